"""`rvq_encode` and `rvq_decode` inside Mimi: the quantizer of Moshi's codec (PyPI `moshi`) and of transformers'.

    from longcat_kernels.integrations import mimi
    mimi.patch(model)  # a MimiModel of either, or its quantizer

Dimension key
    B clips    T frames    L levels    D width of the codewords    C channels of the model
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longcat_kernels.ops.rvq_decode import rvq_decode
from longcat_kernels.ops.rvq_encode import rvq_encode
from longcat_kernels.prepared import PreparedCodebook

_SPLITS = {
    "SplitResidualVectorQuantizer": ("rvq_first", "rvq_rest"),
    "MimiSplitResidualVectorQuantizer": ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer"),
}


def patch(model: Any) -> None:
    """Makes a Mimi quantizer, semantic and acoustic part alike, encode and decode by `rvq_encode` and `rvq_decode`.

    Projections stay the model's own, and so does moshi's `forward`, by which it trains: its codebooks may go on moving,
    their packed forms follow. Codes are exactly nearest; the original's come from `torch.cdist`, whose rounding decides
    near ties otherwise. Codewords are added up in float32 and rounded once to their dtype.

    Args:
        model: a `MimiModel` of moshi or transformers, or its quantizer, split or not.

    Raises:
        ValueError: it is none of these, or its levels have projections of their own.
    """
    parts = [(part, hasattr(part, "vq")) for part in _parts(model)]
    words = [_moshi_words(part) if is_moshi else _transformers_words(part) for part, is_moshi in parts]
    for (part, is_moshi), books in zip(parts, map(_Books, words), strict=True):
        part.encode = _moshi_encode(part, books) if is_moshi else _transformers_encode(part, books)
        part.decode = _decode(part, books)


def unpatch(model: Any) -> None:
    """Undoes `patch`."""
    for part in _parts(model):
        vars(part).pop("encode", None), vars(part).pop("decode", None)


def _parts(model: Any) -> list[Any]:
    """The residual quantizers that a model has: one, or two where the first levels are apart."""
    quantizer = getattr(model, "quantizer", model)
    kind = type(quantizer).__name__
    if kind in _SPLITS:
        return [getattr(quantizer, name) for name in _SPLITS[kind]]
    if kind in ("ResidualVectorQuantizer", "MimiResidualVectorQuantizer"):
        return [quantizer]
    raise ValueError(f"mimi: model must be a MimiModel or its quantizer, got {kind}")


def _moshi_words(part: Any) -> Callable[[], list[Tensor]]:
    layers = part.vq.layers
    if not all(isinstance(p, nn.Identity) for layer in layers for p in (layer.project_in, layer.project_out)):
        raise ValueError("mimi: levels must have no projections of their own, got some with project_in or project_out")
    return lambda: [layer.embedding for layer in layers]


def _transformers_words(part: Any) -> Callable[[], list[Tensor]]:
    return lambda: [layer.codebook.embed for layer in part.layers]


class _Books:
    """Prepared codebooks of tensors that are asked for at every use: training replaces them."""

    def __init__(self, words: Callable[[], list[Tensor]]) -> None:
        self.words = words
        self.known: list[tuple[Tensor, PreparedCodebook]] = []

    def __call__(self, levels: int) -> list[PreparedCodebook]:
        words = self.words()[:levels]
        for level, words_KD in enumerate(words):
            if level >= len(self.known):
                self.known.append((words_KD, _prepared(words_KD)))
            elif self.known[level][0] is not words_KD:
                self.known[level] = (words_KD, _prepared(words_KD))
        return [book for _, book in self.known[:levels]]

    @torch.no_grad()
    def encode(self, x_BDT: Tensor, levels: int) -> Tensor:
        """Codes [B, T, L]."""
        books = self(levels)
        dtype = torch.promote_types(x_BDT.dtype, self.known[0][0].dtype)
        codes_BTL: Tensor = rvq_encode(x_BDT.transpose(1, 2), books, residual_dtype=dtype).codes
        return codes_BTL

    def decode(self, codes_BTL: Tensor) -> Tensor:
        """[B, T, D] of the codewords' dtype."""
        books = self(codes_BTL.shape[-1])
        return rvq_decode(codes_BTL, books).to(self.known[0][0].dtype)


def _prepared(words_KD: Tensor) -> PreparedCodebook:
    return PreparedCodebook(words_KD.detach().float())


def _moshi_encode(part: Any, books: _Books) -> Callable[[Tensor], Tensor]:
    def encode(x: Tensor) -> Tensor:
        """[B, C, T] -> [B, L, T] int64."""
        if x.shape[-1] == 0:  # no convolution takes that
            return torch.empty(x.shape[0], part.n_q, 0, dtype=torch.int64, device=x.device)
        return books.encode(part.input_proj(x), part.n_q).transpose(1, 2)

    return encode


def _transformers_encode(part: Any, books: _Books) -> Callable[..., Tensor]:
    def encode(embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:
        """[B, C, T] -> [L, B, T] int64."""
        x_BDT = embeddings if part.input_proj is None else part.input_proj(embeddings)
        return books.encode(x_BDT, num_quantizers or part.num_quantizers).permute(2, 0, 1)

    return encode


def _decode(part: Any, books: _Books) -> Callable[[Tensor], Tensor]:
    def decode(codes: Tensor) -> Tensor:
        """[B, L, T] int64 -> [B, C, T]."""
        x_BDT = books.decode(codes.transpose(1, 2)).transpose(1, 2)
        return x_BDT if part.output_proj is None else part.output_proj(x_BDT)

    return decode
