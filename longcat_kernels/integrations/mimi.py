"""`rvq_encode` and `rvq_decode` inside Mimi: the quantizer of Moshi's codec (PyPI `moshi`) and of transformers'.

    from longcat_kernels.integrations import mimi
    mimi.patch(model)  # a MimiModel of either, or its quantizer

Dimension key
    B clips    T frames    L levels    D width of the codewords    C channels of the model
"""

from __future__ import annotations

from dataclasses import dataclass
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
    parts = _parts(model)
    for part in parts:
        _check(part)
    for part in parts:
        books = _Books(part)
        part.encode = (_MoshiEncode if hasattr(part, "vq") else _TransformersEncode)(part, books)
        part.decode = _Decode(part, books)


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


def _check(part: Any) -> None:
    layers = part.vq.layers if hasattr(part, "vq") else ()
    if not all(isinstance(p, nn.Identity) for layer in layers for p in (layer.project_in, layer.project_out)):
        raise ValueError("mimi: levels must have no projections of their own, got some with project_in or project_out")


# What a patched quantizer has instead of methods are objects and no closures: a copy of the model then has its own.


class _Books:
    """Prepared codebooks of tensors that are asked for at every use: training replaces them."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.known: list[tuple[Tensor, PreparedCodebook]] = []

    def words(self) -> list[Tensor]:
        if hasattr(self.part, "vq"):
            return [layer.embedding for layer in self.part.vq.layers]
        return [layer.codebook.embed for layer in self.part.layers]

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


@dataclass(frozen=True, eq=False)
class _MoshiEncode:
    part: Any
    books: _Books

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, L, T] int64."""
        if x.shape[-1] == 0:  # no convolution takes that
            return torch.empty(x.shape[0], self.part.n_q, 0, dtype=torch.int64, device=x.device)
        return self.books.encode(self.part.input_proj(x), self.part.n_q).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _TransformersEncode:
    part: Any
    books: _Books

    def __call__(self, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:
        """[B, C, T] -> [L, B, T] int64."""
        x_BDT = embeddings if self.part.input_proj is None else self.part.input_proj(embeddings)
        return self.books.encode(x_BDT, num_quantizers or self.part.num_quantizers).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class _Decode:
    part: Any
    books: _Books

    def __call__(self, codes: Tensor) -> Tensor:
        """[B, L, T] integers -> [B, C, T]."""
        x_BDT = self.books.decode(codes.transpose(1, 2).long()).transpose(1, 2)
        projected: Tensor = x_BDT if self.part.output_proj is None else self.part.output_proj(x_BDT)
        return projected
