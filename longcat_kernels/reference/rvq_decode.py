"""RVQ decode, defined: sums the codewords that each row's codes name (SoundStream, arXiv 2107.03312, section III-C).

Dimension key
    T rows    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.spec import Cost, Refusal


def rvq_decode(codes_TL: Tensor, codebooks: list[Tensor]) -> tuple[Tensor]:
    """out[t] = sum over l of codebooks[l][codes[t, l]], first level to last; a negative code adds nothing."""
    out_TD = codebooks[0].new_zeros(codes_TL.shape[0], codebooks[0].shape[1])
    for codes_T, codebook_KD in zip(codes_TL.unbind(1), codebooks, strict=True):
        out_TD = out_TD + torch.where(codes_T[:, None] >= 0, codebook_KD[codes_T.clamp(min=0)], 0)
    return (out_TD,)


@dataclass(frozen=True)
class Case:
    """One problem size."""

    shape: tuple[int, ...]  # leading shape of codes
    dim: int
    entries: tuple[int, ...]  # of each level
    shared: bool = False
    strided: bool = False


EDGE = (
    Case((0,), 8, (4, 4)),
    Case((1,), 1, (1,)),
    Case((2, 3, 5), 7, (5, 9), shared=True),
    Case((40,), 16, (3, 2, 2), strided=True),
    Case((33,), 24, (40, 17, 9)),
)
MODEL = (Case((4096,), 3584, (16384,) * 8), Case((6000,), 5120, (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024)))


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of one call; a tenth of the codes are -1."""
    g = torch.Generator().manual_seed(seed)
    books = [torch.randn(k, case.dim, generator=g).to(device).requires_grad_() for k in case.entries]
    entries = case.entries[:1] * len(case.entries) if case.shared else case.entries
    codes = torch.stack([torch.randint(k, case.shape, generator=g) for k in entries], -1)
    codes = torch.where(torch.rand(codes.shape, generator=g) < 0.1, -1, codes).to(device)
    if case.strided:
        codes = codes.mT.contiguous().mT
    return {"codes": codes, "codebooks": books[0] if case.shared else books}


def cost(case: Case) -> Cost:
    """One addition a codeword channel; every named codeword read, every code and output moved once."""
    rows, levels = math.prod(case.shape), len(case.entries)
    moved = rows * (levels * case.dim * 4 + case.dim * 4 + levels * 8)
    return Cost(flops=rows * levels * case.dim, bytes=moved + 1)


REFUSALS = (
    Refusal(
        "codebooks must be a list of [K, D], or one that levels share, got [2, 4, 8]: unbind it",
        lambda a: {"codebooks": torch.ones(2, 4, 8)},
    ),
    Refusal("codes must be int64, got torch.int32", lambda a: {"codes": a["codes"].int()}),
    Refusal("codes must be [..., 2], got [0, 3]", lambda a: {"codes": a["codes"].new_zeros(0, 3)}),
    Refusal("codes must be [..., 2], got []", lambda a: {"codes": a["codes"].sum()}),
    Refusal(
        "codes must be [..., L] with L at least 1, got []",
        lambda a: {"codes": a["codes"].sum(), "codebooks": torch.ones(4, 8)},
    ),
    Refusal("codebooks must be [K, 0] with K at least 1, got []", lambda a: {"codebooks": [torch.ones(())] * 2}),
    Refusal("codes must be below 4 at level 1, got 4", lambda a: {"codes": torch.tensor([[3, 4]])}),
    Refusal(
        "codebooks must be [K, 8] with K at least 1, got [4, 7]",
        lambda a: {"codebooks": [a["codebooks"][0], torch.ones(4, 7)]},
    ),
    Refusal(
        "codebooks must be float32, got torch.float64", lambda a: {"codebooks": [c.double() for c in a["codebooks"]]}
    ),
    Refusal("levels must be between 1 and 2, got 0", lambda a: {"levels": 0}),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
