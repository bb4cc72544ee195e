"""Residual vector quantizer whose codebooks follow the data (LongCat-Next report, equations (3) and (4)).

Dimension key
    N rows (the leading shape of x, flattened)    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longcat_kernels.ops.ema_update import ema_update
from longcat_kernels.ops.rvq_decode import rvq_decode
from longcat_kernels.ops.rvq_encode import RVQEncoding, check_mask, rvq_encode

KMEANS_STEPS = 8  # of the first batch; later batches go on by moving averages
# Rules of `ema_update` that make it k-means: without memory and smoothing an entry becomes the mean of its rows.
_MEANS = {"decay": 0.0, "eps": 0.0, "restart_threshold": 1.0}
_FROM_ROWS = {"decay": 0.0, "eps": 0.0, "restart_threshold": math.inf}


class Codebook(nn.Module):
    """The state of one codebook, named as in the released vision tokenizer; only `ema_update` moves it."""

    embed: Tensor  # [K + 1, D] float32; the last row is zero and never chosen, so that code -1 reads it
    embed_ema: Tensor  # [K, D] float32: moving sum of the rows of each entry
    cluster_size_ema: Tensor  # [K] float32: moving count of the rows of each entry

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        entries_KD = nn.init.kaiming_uniform_(torch.empty(size, dim))
        self.register_buffer("embed", torch.cat([entries_KD, torch.zeros(1, dim)]))
        self.register_buffer("embed_ema", entries_KD.clone())
        self.register_buffer("cluster_size_ema", torch.ones(size))

    @property
    def entries(self) -> Tensor:
        """[K, D], a view."""
        return self.embed[:-1]


class ResidualVQ(nn.Module):
    """Quantizes rows level by level; in training mode also fits its codebooks to what it sees.

    The first training batch initialises the codebooks by k-means; each one then updates them by `ema_update`.
    All of it is a function of the inputs and of the state dict: `step` seeds the choice of rows.

    Args:
        sizes: entries of each level.
        dim: width of a row.
        shared: one codebook for all levels (equal sizes); its statistics are those of all levels together, after each
            batch. The state dict holds it once per level, as the released checkpoint does.
        decay, eps, restart_threshold: see `ema_update`.
        residual_dtype: see `rvq_encode`.

    Raises:
        ValueError: no level, a size or width below 1, or unequal sizes with a shared codebook.
    """

    step: Tensor  # int64 []: training batches seen
    initialized: Tensor  # bool []

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        *,
        shared: bool = False,
        decay: float = 0.99,
        eps: float = 1e-5,
        restart_threshold: float = 1.0,
        residual_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"ResidualVQ: sizes must be one or more numbers of at least 1, got {list(sizes)}")
        if dim < 1:
            raise ValueError(f"ResidualVQ: dim must be at least 1, got {dim}")
        if shared and len(set(sizes)) > 1:
            raise ValueError(f"ResidualVQ: sizes must be equal with a shared codebook, got {list(sizes)}")
        self.sizes, self.dim, self.shared = tuple(sizes), dim, shared
        self.decay, self.eps, self.restart_threshold = decay, eps, restart_threshold
        self.residual_dtype = residual_dtype
        books = [Codebook(sizes[0], dim)] * len(sizes) if shared else [Codebook(size, dim) for size in sizes]
        self.codebooks = nn.ModuleList(books)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_load_state_dict_pre_hook(_released_is_initialized)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, mask: Tensor | None = None, kept: Tensor | None = None) -> RVQEncoding:
        """Encodes x; in training mode first initialises the codebooks if need be, and afterwards updates them.

        Args:
            x: [..., dim], float32, bfloat16 or float16; the gradient is that of `rvq_encode`. Rows with NaN or infinity
                are encoded as `rvq_encode` says, and move no codebook.
            mask: bool, the leading shape of x; False rows are neither encoded nor counted.
            kept: integers in 1..L, broadcast to the leading shape of x: quantizer dropout (SoundStream, section III-C).
                `quantized` then sums only so many first levels of a row; all else stays as it is without.
        """
        if not self.training:
            return _drop_levels(self.encode(x, mask=mask), x, self.entries(), kept)
        if mask is not None:
            check_mask(mask, x)  # before anything moves
        seed = int(self.step) << 16
        if not self.initialized:
            self._initialize(x.detach(), mask, seed)
        # Backward reads the codewords that were chosen: they must outlive the update.
        keep = x.requires_grad and torch.is_grad_enabled()
        entries = [entries_KD.clone() if keep else entries_KD for entries_KD in self.entries()]
        encoding = rvq_encode(x, entries, mask=mask, residual_dtype=self.residual_dtype)
        self._update(x.detach(), encoding, seed)
        self.step += 1
        return _drop_levels(encoding, x, entries, kept)

    def encode(self, x: Tensor, levels: int | None = None, mask: Tensor | None = None) -> RVQEncoding:
        """Encodes x [..., dim] by the first `levels` levels; changes nothing."""
        return rvq_encode(x, self.entries(), levels=levels, mask=mask, residual_dtype=self.residual_dtype)

    def decode(self, codes: Tensor, levels: int | None = None) -> Tensor:
        """Sums the codewords of `codes` [..., L] int64 (-1: none), or of the first `levels`: [..., dim] float32."""
        return rvq_decode(codes, self.entries(), levels=levels)

    def entries(self) -> list[Tensor]:
        """One codebook [K, dim] a level, views of the buffers."""
        return [self._book(level).entries for level in range(len(self.sizes))]

    def usage(self) -> list[float]:
        """Share of each level's entries whose moving count reaches `restart_threshold`."""
        return [
            self._book(level).cluster_size_ema.ge(self.restart_threshold).float().mean().item()
            for level in range(len(self.sizes))
        ]

    def perplexity(self) -> list[float]:
        """exp(entropy) of each level's moving counts: how many entries are in even use."""
        sizes = [self._book(level).cluster_size_ema.double() for level in range(len(self.sizes))]
        shares = [size / size.sum() for size in sizes]
        return [torch.special.entr(share).sum().exp().item() for share in shares]

    def extra_repr(self) -> str:
        return f"{list(self.sizes)}, {self.dim}, shared={self.shared}, decay={self.decay}"

    def _book(self, level: int) -> Codebook:
        book = self.codebooks[level]
        assert isinstance(book, Codebook)
        return book

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None, seed: int) -> None:
        """k-means over the finite, unmasked rows; without any, nothing happens."""
        usable = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
        rows_ND = x[usable]
        if not len(rows_ND):
            return
        together = len(self.sizes) if self.shared else 1
        for first in range(0, len(self.sizes), together):
            levels = range(first, first + together)
            book = self._book(first)
            everywhere_N = torch.zeros(len(rows_ND), dtype=torch.int64, device=x.device)
            _move(book, rows_ND, everywhere_N, seed=seed + (first << 8), **_FROM_ROWS)
            for number in range(1, KMEANS_STEPS + 1):
                codes_NL = rvq_encode(rows_ND, book.entries, levels=together, residual_dtype=self.residual_dtype).codes
                # A shared codebook needs entries for the residuals of the deeper levels too: it starts from them again.
                rule = _FROM_ROWS if number == 1 and self.shared else _MEANS
                self._move_levels(levels, rows_ND, codes_NL, seed=seed + (first << 8) + number, **rule)
            rows_ND = rvq_encode(rows_ND, [book.entries], residual_dtype=self.residual_dtype).residual
        self.initialized.fill_(True)

    @torch.no_grad()
    def _update(self, x: Tensor, encoding: RVQEncoding, seed: int) -> None:
        finite = encoding.residual.isfinite().all(-1, keepdim=True)
        codes_NL = torch.where(finite, encoding.codes, -1).reshape(-1, len(self.sizes))
        self._move_levels(
            range(len(self.sizes)),
            x.reshape(-1, self.dim),
            codes_NL,
            decay=self.decay,
            eps=self.eps,
            restart_threshold=self.restart_threshold,
            seed=seed + 255,
        )

    def _move_levels(self, levels: range, rows_ND: Tensor, codes_NL: Tensor, *, seed: int, **rule: float) -> None:
        """Updates the codebooks of `levels` with the residuals each was given; a shared one with all at once."""
        residual_ND, given = rows_ND.to(self.residual_dtype).float(), []
        for level, codes_N in zip(levels, codes_NL.unbind(1), strict=True):
            book, vectors_ND = self._book(level), residual_ND
            residual_ND = (vectors_ND - book.embed[codes_N]).to(self.residual_dtype).float()
            given.append(vectors_ND)
            if not self.shared:
                _move(book, given.pop(), codes_N, seed=seed + (level << 8), **rule)
        if self.shared:
            _move(self._book(0), torch.cat(given), codes_NL.T.reshape(-1), seed=seed, **rule)


def _move(book: Codebook, vectors_ND: Tensor, codes_N: Tensor, **rule: Any) -> None:
    ema_update(book.entries, book.embed_ema, book.cluster_size_ema, vectors_ND, codes_N, **rule)


def _released_is_initialized(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict of codebooks alone, as the released checkpoint has it, needs no initialisation."""
    if f"{prefix}codebooks.0.embed" in state:
        state.setdefault(f"{prefix}initialized", torch.tensor(True))
        state.setdefault(f"{prefix}step", torch.tensor(0))


def _drop_levels(encoding: RVQEncoding, x: Tensor, entries: list[Tensor], kept: Tensor | None) -> RVQEncoding:
    if kept is None:
        return encoding
    if kept.is_floating_point() or kept.dtype == torch.bool:
        raise ValueError(f"ResidualVQ: kept must hold integers, got {kept.dtype}")
    levels = torch.arange(len(entries), device=x.device)
    codes = encoding.codes.masked_fill(levels >= kept[..., None], -1)
    quantized = rvq_decode(codes, entries).to(x.dtype)
    straight_through = torch.where(codes[..., :1] >= 0, x + (quantized - x).detach(), 0)
    return encoding._replace(quantized=straight_through)
