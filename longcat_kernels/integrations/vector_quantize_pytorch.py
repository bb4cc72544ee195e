"""`ResidualVQ` with the interface and the state dict of vector-quantize-pytorch 1.32, on the ops of this package.

Dimension key
    N rows (the leading shape of x, flattened)    D width of the codebooks    L levels    K entries of one codebook
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from longcat_kernels.modules._codebook import (
    Codebook,
    finite_rows,
    for_encoding,
    initialize,
    residuals,
    update,
    usable_rows,
)
from longcat_kernels.modules._gather import Ranks
from longcat_kernels.ops.rvq_decode import rvq_decode
from longcat_kernels.ops.rvq_encode import RVQEncoding, row_mask, rvq_encode, rvq_encode_before_update

_SUPPORTED = (
    "dim, num_quantizers, codebook_size, codebook_dim, shared_codebook, quantize_dropout, "
    "quantize_dropout_cutoff_index, quantize_dropout_multiple_of, accept_image_fmap, accept_3d_fmap, channel_last, "
    "return_zeros_for_masked_padding, decay, eps, kmeans_init, kmeans_iters, threshold_ema_dead_code, "
    "commitment_weight, sync_codebook, ema_update"
)
# Options of the original that must keep their defaults: name -> the default, then other values that mean the same here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "diveq": (False,),
    "heads": (1,),
    "implicit_neural_codebook": (False,),
    "mlp_kwargs": ({},),
    "beam_size": (None,),
    "eval_beam_size": (None,),
    "beam_score_quantizer_weights": (None,),
    "quant_grad_frac": (0.0,),
    "separate_codebook_per_head": (False,),
    "freeze_codebook": (False,),
    "sync_kmeans": (True,),
    "use_cosine_sim": (False,),
    "layernorm_after_project_in": (False,),
    "commitment_use_cross_entropy_loss": (False,),
    "orthogonal_reg_weight": (0.0,),
    "orthogonal_reg_active_codes_only": (False,),
    "orthogonal_reg_max_codes": (None,),
    "codebook_diversity_loss_weight": (0.0,),
    "codebook_diversity_temperature": (100.0,),
    "stochastic_sample_codes": (False,),
    "sample_codebook_temp": (1.0, None),
    "straight_through": (False,),
    "rotation_trick": (None, False),
    "directional_reparam": (False,),
    "directional_reparam_variance": (5e-3,),
    "sync_affine_param": (False,),
    "vq_bridge": (None,),
    "manual_ema_update": (False,),
    "learnable_codebook": (None, False),
    "in_place_codebook_optimizer": (None,),
    "manual_in_place_optimizer_update": (False,),
    "affine_param": (False,),
    "affine_param_batch_decay": (0.99,),
    "affine_param_codebook_decay": (0.9,),
    "sync_update_v": (0.0,),
    "route_gradients_to_input": (True,),
}


class EuclideanCodebook(Codebook):
    """The buffers of the original, with their leading axis of one head."""

    initted: Tensor  # bool []
    cluster_size: Tensor  # [1, K] float32
    embed_avg: Tensor  # [1, K, D] float32
    embed: Tensor  # [1, K, D] float32

    def __init__(self, size: int, dim: int, initted: bool) -> None:
        super().__init__()
        embed = nn.init.kaiming_uniform_(torch.empty(1, size, dim))
        self.register_buffer("initted", torch.tensor(initted))
        self.register_buffer("cluster_size", torch.ones(1, size))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)

    @property
    def entries(self) -> Tensor:
        return self.embed[0]

    @property
    def sums(self) -> Tensor:
        return self.embed_avg[0]

    @property
    def counts(self) -> Tensor:
        return self.cluster_size[0]


class Layer(nn.Module):
    """One level, so that the codebook has the name that it has in the original's state dict."""

    def __init__(self, codebook: EuclideanCodebook) -> None:
        super().__init__()
        self._codebook = codebook


class ResidualVQ(nn.Module):
    """A drop-in for `vector_quantize_pytorch.ResidualVQ`: its arguments, results and state dict.

    What differs:
    - Codes are exact nearest codewords, computed in float32 whatever the dtype of x, and do not depend on the batch.
    - The gradient of `quantized` to x is exactly 1, in either mode. The original gives none outside training, and in
      training each level that of the rotation trick or, with `rotation_trick=False`, 1, so that L levels add up to L.
    - Which rows an entry (re)starts from is a function of the rows and of how often this module was called, not of
      torch's random numbers; so is the number of levels that quantizer dropout keeps. k-means of a shared codebook
      sees the residuals of all levels.
    - `all_codes` of a training step are the codewords that were chosen, not those after the update.
    - Several processes take two collectives a training step, and end with the bits of a single one: see
      `longcat_kernels.modules.ResidualVQ`.
    - `lens` may stand in place of `mask`, and both work with images.

    Args:
        dim: width of x.
        num_quantizers: levels L; may be missing where `codebook_size` is a tuple.
        codebook_size: entries K of each level, or of all.
        codebook_dim: width D of the codebooks; where it is not dim, linear layers `project_in` and `project_out` stand
            around them.
        shared_codebook: one codebook for all levels.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training use only a random
            number of first levels, more than the cutoff, a multiple; the codes of the others are -1.
        accept_image_fmap, accept_3d_fmap, channel_last: x is [B, dim, ...] if one of the first two is True or the last
            is False; codes are [B, ..., L].
        return_zeros_for_masked_padding: False: masked rows come back as they went in.
        decay, eps: see `ema_update`.
        kmeans_init, kmeans_iters: start from k-means of the first batch, seen in either mode.
        threshold_ema_dead_code: entries whose moving count falls below it restart, with it as their new count; 0: none.
        commitment_weight: multiplies the losses.
        sync_codebook: False: each process by itself.
        ema_update: False: codebooks stay as they are.

    Raises:
        ValueError: an option of the original that this drop-in does not have is not at its default, or sizes do not fit
            together.
        TypeError: the original has no such option.

    Example:
        >>> vq = ResidualVQ(dim=8, num_quantizers=4, codebook_size=32)
        >>> quantized, indices, losses = vq(torch.randn(2, 10, 8))
        >>> quantized.shape, indices.shape, losses.shape
        (torch.Size([2, 10, 8]), torch.Size([2, 10, 4]), torch.Size([4]))
        >>> vq.get_output_from_indices(indices).shape
        torch.Size([2, 10, 8])
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        channel_last: bool = True,
        return_zeros_for_masked_padding: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 0,
        commitment_weight: float = 1.0,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _check_others(others)
        sizes = _sizes(num_quantizers, codebook_size, shared_codebook)
        _check_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of, len(sizes))
        if ema_update is False and threshold_ema_dead_code > 0:
            raise ValueError(
                f"ResidualVQ: ema_update must be True with threshold_ema_dead_code {threshold_ema_dead_code}, got False"
            )
        width = dim if codebook_dim is None else codebook_dim
        self.num_quantizers, self.codebook_sizes, self.codebook_dim = len(sizes), sizes, width
        self.shared_codebook, self.has_projections = shared_codebook, width != dim
        self.project_in = nn.Linear(dim, width) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(width, dim) if self.has_projections else nn.Identity()
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.channel_first = accept_image_fmap or accept_3d_fmap or not channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.decay, self.eps, self.kmeans_iters = decay, eps, kmeans_iters
        self.threshold_ema_dead_code, self.commitment_weight = threshold_ema_dead_code, commitment_weight
        self.ema_update = ema_update is not False
        self.ranks = Ranks(sync_codebook is not False)
        self.step = 0  # training steps of this object: the state dict has no place for it
        books = [EuclideanCodebook(size, width, not kmeans_init) for size in (sizes[:1] if shared_codebook else sizes)]
        self.layers = nn.ModuleList(Layer(book) for book in (books * len(sizes) if shared_codebook else books))

    @property
    def codebook_size(self) -> int:
        """Entries of the first level."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[L, K, D], or a tuple of [K, D] where the levels differ in size."""
        entries = tuple(book.entries for book in self._books())
        return torch.stack(entries) if len(set(self.codebook_sizes)) == 1 else entries

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codewords [L, B, ..., D] of codes [B, ..., at most L]; those of negative and missing codes are zero."""
        books, indices = self._books(), self._checked(indices)
        words = [
            rvq_decode(indices[..., level : level + 1], [book.entries])
            for level, book in enumerate(books[: indices.shape[-1]])
        ]
        missing = [torch.zeros_like(words[0])] * (len(books) - len(words))
        return torch.stack([*words, *missing])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output [B, ..., dim] of codes [B, ..., at most L]; negative codes add nothing."""
        indices = self._checked(indices)
        quantized = rvq_decode(indices, [book.entries for book in self._books()[: indices.shape[-1]]])
        return self.project_out(quantized)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: None = None,
        freeze_codebook: bool = False,
        beam_size: None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        *,
        lens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x; in training mode also moves the codebooks.

        Args:
            x: [B, ..., dim], or [B, dim, ...] if so constructed; float32, bfloat16 or float16.
            mask: bool, the shape of x without its channels; codes of False rows are -1.
            return_all_codes: also give what `get_codes_from_indices` makes of the codes.
            freeze_codebook: leave the codebooks as they are.
            rand_quantize_dropout_fixed_seed: picks the number of levels that quantizer dropout keeps.
            lens: integers [B] in place of a mask.
            indices, sample_codebook_temp, beam_size: must be None.

        Returns:
            quantized as x, codes [B, ..., L] int64, losses [L], zero outside training; if so asked, all codes
            [L, B, ..., D].
        """
        _check_none(indices=indices, sample_codebook_temp=sample_codebook_temp, beam_size=beam_size)
        rows = x.movedim(1, -1) if self.channel_first else x
        mask = row_mask(rows, mask, lens)
        projected = self.project_in(rows)
        levels = self._kept_levels(rand_quantize_dropout_fixed_seed)
        books = self._books()[:levels]
        first_ND = self._initialize(projected.detach(), mask)
        encoding = rvq_encode_before_update(projected, for_encoding(books), mask=mask)
        codes = nn.functional.pad(encoding.codes, (0, self.num_quantizers - levels), value=-1)
        results = [self._output(encoding, rows, mask), codes, self._losses(encoding)]
        if return_all_codes:
            results.append(self.get_codes_from_indices(codes))
        if self.training:
            if self.ema_update and not freeze_codebook:
                self._update(projected.detach(), encoding, first_ND, levels)
            self.step += 1
        return tuple(results)

    def _books(self) -> list[EuclideanCodebook]:
        return [layer._codebook for layer in self.layers if isinstance(layer, Layer)]

    def _checked(self, indices: Tensor) -> Tensor:
        levels, shape = self.num_quantizers, list(indices.shape)
        if indices.is_floating_point() or not shape or not 1 <= shape[-1] <= levels:
            rule = f"integers [..., at least 1 and at most {levels}]"
            raise ValueError(f"ResidualVQ: indices must be {rule}, got {indices.dtype} {shape}")
        return indices.long()

    def _kept_levels(self, seed: int | None) -> int:
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        chosen = random.Random(self.step if seed is None else seed)
        levels = chosen.randrange(self.quantize_dropout_cutoff_index, self.num_quantizers) + 1
        multiple = self.quantize_dropout_multiple_of
        return min(-(-levels // multiple) * multiple, self.num_quantizers)

    def _output(self, encoding: RVQEncoding, rows: Tensor, mask: Tensor | None) -> Tensor:
        quantized = self.project_out(encoding.quantized)
        if mask is not None:
            padding = torch.zeros_like(rows) if self.return_zeros_for_masked_padding else rows
            quantized = torch.where(mask[..., None], quantized, padding)
        return quantized.movedim(-1, 1) if self.channel_first else quantized

    def _losses(self, encoding: RVQEncoding) -> Tensor:
        weight = max(0.0, self.commitment_weight) if self.training else 0.0
        losses = encoding.losses * weight if weight else torch.zeros_like(encoding.losses)
        return nn.functional.pad(losses, (0, self.num_quantizers - len(losses)))

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """k-means of the rows of all ranks, where it is still to be done; gives them."""
        books = self._books()
        if all(book.initted for book in books):
            return None
        rows_ND = finite_rows(x, mask, torch.float32)
        rows_ND, _ = self.ranks.gather(rows_ND, rows_ND.new_zeros(len(rows_ND), 0, dtype=torch.int64), self.step)
        if len(rows_ND):
            seed = self.step << 16
            initialize(books, rows_ND, steps=self.kmeans_iters, residual_dtype=torch.float32, seed=seed)
            for book in books:
                book.initted.fill_(True)
        return rows_ND

    @torch.no_grad()
    def _update(self, x: Tensor, encoding: RVQEncoding, first_ND: Tensor | None, levels: int) -> None:
        books = self._books()[:levels]
        if first_ND is None:
            rows_ND, codes_NL = self.ranks.gather(*usable_rows(x, encoding), self.step)
        else:
            rows_ND, codes_NL = usable_rows(first_ND, rvq_encode(first_ND, for_encoding(books)))
        seed = (self.step << 16) + 255
        restarts = {
            "restart_threshold": self.threshold_ema_dead_code,
            "restart_count": self.threshold_ema_dead_code,
            "eps": self.eps,
        }
        if not self.shared_codebook:
            update(books, rows_ND, codes_NL, residual_dtype=torch.float32, seed=seed, decay=self.decay, **restarts)
            return
        # The original lets the levels decay a shared codebook one after another; then entries restart from any of them.
        given = list(residuals(books, rows_ND, codes_NL, torch.float32))
        for vectors_ND, codes_N in zip(given, codes_NL.unbind(1), strict=True):
            books[0].move(vectors_ND, codes_N, decay=self.decay, eps=self.eps, restart_threshold=0.0)
        if self.threshold_ema_dead_code > 0:
            books[0].move(torch.cat(given), codes_NL.T.reshape(-1), decay=1.0, seed=seed, **restarts)


def _sizes(levels: int | None, size: int | tuple[int, ...], shared: bool) -> tuple[int, ...]:
    if levels is None and not isinstance(size, tuple):
        raise ValueError("ResidualVQ: num_quantizers must be given unless codebook_size is a tuple, got None")
    sizes = size if isinstance(size, tuple) else (size,) * (levels or 0)
    if not sizes or min(sizes) < 1 or (levels is not None and levels != len(sizes)):
        raise ValueError(f"ResidualVQ: codebook_size must be {levels or 'some'} sizes of at least 1, got {size}")
    if shared and len(set(sizes)) > 1:
        raise ValueError(f"ResidualVQ: codebook_size must be one size with a shared codebook, got {size}")
    return sizes


def _check_dropout(wanted: bool, cutoff: int, multiple: int, levels: int) -> None:
    if cutoff < 0 or (wanted and cutoff >= levels):
        raise ValueError(f"ResidualVQ: quantize_dropout_cutoff_index must be between 0 and {levels - 1}, got {cutoff}")
    if multiple < 1:
        raise ValueError(f"ResidualVQ: quantize_dropout_multiple_of must be at least 1, got {multiple}")


def _check_others(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in _FIXED:
            raise TypeError(f"ResidualVQ: got an unexpected keyword argument {name!r}")
        if not any(value is same or value == same for same in _FIXED[name]):
            raise ValueError(
                f"ResidualVQ: {name} must be {_FIXED[name][0]}, got {value}: supported options are {_SUPPORTED}"
            )


def _check_none(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            got = "a tensor" if isinstance(value, Tensor) else value
            raise ValueError(f"ResidualVQ: {name} must be None, got {got}: this drop-in does not have it")
