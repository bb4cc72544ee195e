"""Residual vector quantizer whose codebooks follow the data (LongCat-Next report, equations (3) and (4)).

Dimension key
    N rows (the leading shape of x, flattened)    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longcat_kernels.modules._codebook import Codebook, finite_rows, for_encoding, initialize, update, usable_rows
from longcat_kernels.modules._gather import Ranks
from longcat_kernels.ops.rvq_decode import rvq_decode
from longcat_kernels.ops.rvq_encode import DTYPES, RVQEncoding, row_mask, rvq_encode, rvq_encode_before_update

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SEEDS = 8  # bits: seeds are step, level and k-means step, the last of them the update


class VisionCodebook(Codebook):
    """Buffers named as in the released vision tokenizer."""

    embed: Tensor  # [K + 1, D] float32; the last row is zero and never chosen, so that code -1 reads it
    embed_ema: Tensor  # [K, D] float32: moving sum of the rows of each entry
    cluster_size_ema: Tensor  # [K] float32: moving count of the rows of each entry

    def __init__(self, size: int, dim: int, gram: bool = False) -> None:
        super().__init__(gram)
        entries_KD = nn.init.kaiming_uniform_(torch.empty(size, dim))
        self.register_buffer("embed", torch.cat([entries_KD, torch.zeros(1, dim)]))
        self.register_buffer("embed_ema", entries_KD.clone())
        self.register_buffer("cluster_size_ema", torch.ones(size))

    @property
    def entries(self) -> Tensor:
        return self.embed[:-1]

    @property
    def sums(self) -> Tensor:
        return self.embed_ema

    @property
    def counts(self) -> Tensor:
        return self.cluster_size_ema


class ResidualVQ(nn.Module):
    """Quantizes rows level by level; in training mode also fits its codebooks to what it sees.

    The first training batch initialises the codebooks by k-means; each one then updates them by `ema_update`.
    All of it is a function of the inputs and of the state dict: `step` seeds the choice of rows.

    Data parallel: where torch.distributed is initialised, the batch is that of all ranks together, in their order. All
    ranks move their codebooks alike, to the bit, and to the bit as one process with that batch would; a step takes two
    collectives, also on ranks without a row (`Ranks` says what they cost). Under DistributedDataParallel give it
    `broadcast_buffers=False`: there is nothing to broadcast.

    State dicts are named as in the released vision tokenizer, and `step` and `initialized`, which may be missing. Those
    of the released audio tokenizer (`{l}.codebook.embed` and so on) and of RQ-VAE (`codebooks.{l}.weight`) load too.

    Args:
        sizes: entries of each level.
        dim: width of a row.
        shared: one codebook for all levels (equal sizes); its statistics are those of all levels together, after each
            batch. The state dict holds it once per level, as the released checkpoint does.
        gram: with a shared codebook on the CPU, also keep the products of all pairs of its words, K x K: see
            `PreparedCodebook`.
        decay, eps, restart_threshold, restart_fraction, restart_count: see `ema_update`.
        kmeans_init: False: start from random entries, without waiting for a batch.
        kmeans_steps: of the first batch, at most 254; later batches go on by moving averages.
        residual_dtype: see `rvq_encode`.
        sync: True: over the default process group; a group: over that one; False: each process by itself.

    Raises:
        ValueError: no level or more than 256, a size or width below 1, unequal sizes with a shared codebook, `gram`
            without one, or `kmeans_steps` out of range.

    Example:
        >>> vq = ResidualVQ([16, 16], dim=4)
        >>> encoding = vq(torch.randn(2, 50, 4))  # training mode: k-means, then one EMA update
        >>> encoding.codes.shape, encoding.quantized.shape, encoding.losses.shape
        (torch.Size([2, 50, 2]), torch.Size([2, 50, 4]), torch.Size([2]))
        >>> vq.decode(vq.eval().encode(torch.randn(3, 4)).codes).shape
        torch.Size([3, 4])
    """

    step: Tensor  # int64 []: training batches seen
    initialized: Tensor  # bool []

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        *,
        shared: bool = False,
        gram: bool = False,
        decay: float = 0.99,
        eps: float = 1e-5,
        restart_threshold: float = 1.0,
        restart_fraction: float = 0.0,
        restart_count: float = 1.0,
        kmeans_init: bool = True,
        kmeans_steps: int = 8,
        residual_dtype: torch.dtype = torch.float32,
        sync: bool | ProcessGroup = True,
    ) -> None:
        super().__init__()
        if not 1 <= len(sizes) <= 1 << _SEEDS or min(sizes) < 1:
            raise ValueError(f"ResidualVQ: sizes must be 1 to 256 numbers of at least 1, got {list(sizes)}")
        if dim < 1:
            raise ValueError(f"ResidualVQ: dim must be at least 1, got {dim}")
        if shared and len(set(sizes)) > 1:
            raise ValueError(f"ResidualVQ: sizes must be equal with a shared codebook, got {list(sizes)}")
        if gram and not shared:
            raise ValueError("ResidualVQ: gram must be False unless the codebook is shared, got True")
        if not 0 <= kmeans_steps <= 254:
            raise ValueError(f"ResidualVQ: kmeans_steps must be between 0 and 254, got {kmeans_steps}")
        self.sizes, self.dim, self.shared = tuple(sizes), dim, shared
        self.decay, self.eps, self.kmeans_steps = decay, eps, kmeans_steps
        self.restart_threshold, self.restart_fraction = restart_threshold, restart_fraction
        self.restart_count, self.residual_dtype = restart_count, residual_dtype
        self.ranks = Ranks(sync)
        books = [VisionCodebook(sizes[0], dim, gram)] * len(sizes) if shared else None
        self.codebooks = nn.ModuleList(books or [VisionCodebook(size, dim) for size in sizes])
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.tensor(not kmeans_init))
        self.register_load_state_dict_pre_hook(_rename)  # type: ignore[no-untyped-call]

    def forward(
        self, x: Tensor, mask: Tensor | None = None, kept: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> RVQEncoding:
        """Encodes x; in training mode first initialises the codebooks if need be, and afterwards updates them.

        Args:
            x: [..., dim], float32, bfloat16 or float16; the gradient is that of `rvq_encode`. Rows with NaN or infinity
                are encoded as `rvq_encode` says, and move no codebook.
            mask: bool, the leading shape of x; False rows are neither encoded nor counted.
            kept: integers in 1..L, broadcast to the leading shape of x: quantizer dropout (SoundStream, section III-C).
                `quantized` then sums only so many first levels of a row; all else stays as it is without.
            lengths: integers [B] in place of a mask, x being [B, S, dim].

        Raises:
            ValueError: x, mask, kept or lengths does not fit, or the ranks disagree (`Ranks.gather`).
        """
        self._check(x, kept)
        mask = row_mask(x, mask, lengths)
        if not self.training:
            return _drop_levels(self.encode(x, mask=mask), x, self.entries(), kept)
        books = self._books()
        step = int(self.step)
        rows_ND = None if self.initialized else self._initialize(x.detach(), mask, step)
        encoding = rvq_encode_before_update(x, for_encoding(books), mask=mask, residual_dtype=self.residual_dtype)
        dropped = _drop_levels(encoding, x, self.entries(), kept)
        if rows_ND is None:
            batch = self.ranks.gather(*usable_rows(x.detach(), encoding), step)
        else:
            again = rvq_encode(rows_ND, for_encoding(books), residual_dtype=self.residual_dtype)
            batch = usable_rows(rows_ND, again)
        self._update(*batch, step)
        self.step += 1
        return dropped

    def encode(
        self, x: Tensor, levels: int | None = None, mask: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> RVQEncoding:
        """Encodes x [..., dim] by the first `levels` levels; changes nothing."""
        books = for_encoding(self._books())
        return rvq_encode(x, books, levels=levels, mask=mask, lengths=lengths, residual_dtype=self.residual_dtype)

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Sums the codewords of `codes` [..., L] int64 (-1: none), or of the first `levels`: [..., dim] float32."""
        return rvq_decode(codes, self.entries(), levels=levels)

    def entries(self) -> list[Tensor]:
        """One codebook [K, dim] a level, views of the buffers."""
        return [book.entries for book in self._books()]

    def usage(self) -> list[float]:
        """Share of each level's entries whose moving count is high enough that they do not restart."""
        shares = []
        for book in self._books():
            least = max(self.restart_threshold, self.restart_fraction * book.counts.double().mean().item())
            shares.append(book.counts.double().ge(least).double().mean().item())
        return shares

    def perplexity(self) -> list[float]:
        """exp(entropy) of each level's moving counts: how many entries are in even use."""
        shares = [book.counts.double() / book.counts.double().sum() for book in self._books()]
        return [torch.special.entr(share).sum().exp().item() for share in shares]

    def extra_repr(self) -> str:
        return f"{list(self.sizes)}, {self.dim}, shared={self.shared}, decay={self.decay}"

    def _check(self, x: Tensor, kept: Tensor | None) -> None:
        if x.dtype not in DTYPES or x.ndim < 1 or x.shape[-1] != self.dim:
            rule = f"float32, bfloat16 or float16 [..., {self.dim}]"
            raise ValueError(f"ResidualVQ: x must be {rule}, got {x.dtype} {list(x.shape)}")
        if kept is not None and (kept.is_floating_point() or kept.dtype == torch.bool):
            raise ValueError(f"ResidualVQ: kept must hold integers, got {kept.dtype}")

    def _books(self) -> list[Codebook]:
        return [book for book in self.codebooks if isinstance(book, Codebook)]

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None, step: int) -> Tensor:
        """k-means over the finite, unmasked rows of all ranks; gives them. Without any, nothing happens."""
        rows_ND = finite_rows(x, mask, self.residual_dtype)
        rows_ND, _ = self.ranks.gather(rows_ND, rows_ND.new_zeros(len(rows_ND), 0, dtype=torch.int64), step)
        if len(rows_ND):
            seed, dtype = step << 2 * _SEEDS, self.residual_dtype
            initialize(self._books(), rows_ND, steps=self.kmeans_steps, residual_dtype=dtype, seed=seed)
            self.initialized.fill_(True)
        return rows_ND

    @torch.no_grad()
    def _update(self, rows_ND: Tensor, codes_NL: Tensor, step: int) -> None:
        update(
            self._books(),
            rows_ND,
            codes_NL,
            residual_dtype=self.residual_dtype,
            seed=(step << 2 * _SEEDS) + 255,
            decay=self.decay,
            eps=self.eps,
            restart_threshold=self.restart_threshold,
            restart_fraction=self.restart_fraction,
            restart_count=self.restart_count,
        )


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Gives the names of other checkpoints to the ones that this module has; codebooks alone are initialised ones."""
    levels = len(module.sizes) if isinstance(module, ResidualVQ) else 0
    for level in range(levels):
        audio, ours = f"{prefix}{level}.codebook.", f"{prefix}codebooks.{level}."
        embed = state.get(f"{audio}embed")
        if embed is not None and embed.ndim == 2:
            state[f"{audio}embed"] = nn.functional.pad(embed, (0, 0, 0, 1))
        renames = {
            f"{audio}embed": "embed",
            f"{audio}embed_avg": "embed_ema",
            f"{audio}cluster_size": "cluster_size_ema",
            f"{ours}weight": "embed",  # RQ-VAE
        }
        for theirs, name in renames.items():
            if theirs in state:
                state[f"{ours}{name}"] = state.pop(theirs)
    if f"{prefix}codebooks.0.embed" in state:
        state.setdefault(f"{prefix}initialized", torch.tensor(True))
        state.setdefault(f"{prefix}step", torch.tensor(0))


def _drop_levels(encoding: RVQEncoding, x: Tensor, entries: list[Tensor], kept: Tensor | None) -> RVQEncoding:
    if kept is None:
        return encoding
    levels = torch.arange(len(entries), device=x.device)
    codes = encoding.codes.masked_fill(levels >= kept[..., None], -1)
    quantized = rvq_decode(codes, entries).to(x.dtype)
    straight_through = torch.where(codes[..., :1] >= 0, x + (quantized - x).detach(), 0)
    return encoding._replace(quantized=straight_through)
