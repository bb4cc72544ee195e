"""RVQ encode, defined: each row, level by level, to its nearest codeword (LongCat-Next report, equation (3)).

    r_0 = x    codes_l = argmin_k |r_l - c_lk|^2    r_(l+1) = r_l - c_l[codes_l]    losses_l = mean r_(l+1)^2

The residual recursion is float32, element by element. A distance is judged as the float64 score |c|^2 - 2 r.c, in
which both sums run over the products, exact in float64, in the order of `_tree_sum`: so the winner is defined to the
last bit and every implementation must return it. Equal scores go to the lower index.

Dimension key
    T rows    D width    L levels    K entries of one codebook    P pairs of a row and a codeword that may be nearest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.spec import Cost, Refusal

_SCORES = 1 << 20  # float64 scores held at a time: 8 MB


def rvq_encode(
    x_TD: Tensor,
    codebooks: list[Tensor],
    packed: list[Tensor],
    gram: Tensor | None,
    mask_T: Tensor | None,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantized [T, D], residual [T, D], losses [L] and codes [T, L]; see the public function for their meaning.

    `packed` and `gram` only make kernels faster: the definition does not look at them.
    """
    kept_T1 = torch.ones_like(x_TD[:, :1], dtype=torch.bool) if mask_T is None else mask_T[:, None]
    # Zero, with the gradient of x: carries the straight-through and the commitment gradients.
    wanted = x_TD.requires_grad and torch.is_grad_enabled()
    through_TD = torch.where(kept_T1, x_TD - x_TD.detach(), 0) if wanted else torch.zeros_like(x_TD[:, :1])
    count = (kept_T1.sum() * x_TD.shape[1]).clamp(min=1)
    residual_TD = torch.where(kept_T1, x_TD.detach(), 0).to(residual_dtype).float()
    quantized_TD = torch.zeros_like(x_TD, dtype=codebooks[0].dtype)
    codes, losses = [], []
    for codebook_KD in codebooks:
        codes_T = nearest(residual_TD, codebook_KD)
        chosen_TD = torch.where(kept_T1, codebook_KD.detach()[codes_T], 0)
        residual_TD = (residual_TD - chosen_TD.float()).to(residual_dtype).float()
        quantized_TD = quantized_TD + chosen_TD
        codes.append(torch.where(kept_T1[:, 0], codes_T, -1))
        losses.append((residual_TD.double() + through_TD).square().sum() / count)
    return quantized_TD.to(x_TD.dtype) + through_TD, residual_TD, torch.stack(losses), torch.stack(codes, 1)


def nearest(rows_TD: Tensor, codebook_KD: Tensor) -> Tensor:
    """The code of each float32 row, [T] int64: lowest score, then lowest index.

    A row with NaN or infinity gets code 0; a codeword with NaN or infinity is never chosen (code 0 where all have it).
    """
    norms_K = _tree_sum(codebook_KD.double().square())
    usable_K = norms_K.isfinite()
    words_KD = torch.where(usable_K[:, None], codebook_KD.double(), 0)
    norms_K = torch.where(usable_K, norms_K, torch.inf)
    chunk = max(1, _SCORES // words_KD.shape[0])
    parts = [_nearest_of_chunk(rows_tD.double(), words_KD, norms_K) for rows_tD in rows_TD.split(chunk)]
    return torch.cat(parts) if parts else rows_TD.new_zeros(0, dtype=torch.int64)


def _nearest_of_chunk(rows_TD: Tensor, words_KD: Tensor, norms_K: Tensor) -> Tensor:
    """Screens by a matrix product, then rescores in the defined order the pairs that its rounding could misjudge."""
    entries = words_KD.shape[0]
    squares_T = rows_TD.square().sum(1)
    rows_TD = torch.where(squares_T.isfinite()[:, None], rows_TD, 0)
    scores_TK = torch.addmm(norms_K, rows_TD, words_KD.T, alpha=-2)
    longest = torch.where(norms_K.isfinite(), norms_K, 0).amax()
    # A score in any order of summation errs by less than (D + 2) 2^-53 (|r| + |c|)^2; four scores are compared here.
    window_T = (8 * rows_TD.shape[1] + 32) * 2.0**-53 * (squares_T.nan_to_num().sqrt() + longest.sqrt()).square()
    near_TK = scores_TK <= (scores_TK.amin(1) + window_T)[:, None]
    row_P, entry_P = near_TK.nonzero().unbind(1)
    piece = _SCORES // rows_TD.shape[1] + 1
    pairs = zip(row_P.split(piece), entry_P.split(piece), strict=True)
    score_P = torch.cat([norms_K[k] - 2 * _tree_sum(rows_TD[t] * words_KD[k]) for t, k in pairs])
    best_T = torch.full_like(squares_T, torch.inf).scatter_reduce_(0, row_P, score_P, "amin")
    winner_P = torch.where(score_P == best_T[row_P], entry_P, entries)
    codes_T = torch.full_like(squares_T, entries, dtype=torch.int64).scatter_reduce_(0, row_P, winner_P, "amin")
    return torch.where(squares_T.isfinite(), codes_T, 0)


def _tree_sum(terms: Tensor) -> Tensor:
    """Sum over the last axis, zero-padded to a power of two: adds the second half to the first until one is left."""
    width = 1 << (terms.shape[-1] - 1).bit_length()
    terms = torch.nn.functional.pad(terms, (0, width - terms.shape[-1]))
    while width > 1:
        width //= 2
        terms = terms[..., :width] + terms[..., width:]
    return terms[..., 0]


@dataclass(frozen=True)
class Case:
    """One problem size. `data` picks what is hard: see `inputs`."""

    shape: tuple[int, ...]  # leading shape of x
    dim: int
    entries: tuple[int, ...]  # of each level
    dtype: torch.dtype = torch.float32
    shared: bool = False
    masked: bool = False
    strided: bool = False
    residual_dtype: torch.dtype = torch.float32
    data: str = "normal"


EDGE = (
    Case((0,), 8, (4, 4)),
    Case((1,), 1, (1,)),
    Case((33,), 7, (5, 33, 3)),
    Case((2, 3, 11), 24, (40, 17), torch.bfloat16, masked=True),
    Case((130,), 64, (96, 96), torch.float16, strided=True, shared=True),
    Case((37,), 130, (64, 64), torch.bfloat16, residual_dtype=torch.bfloat16),
    Case((50,), 16, (70, 70), masked=True, data="duplicates"),
    Case((64,), 48, (128, 64), data="near ties"),
    Case((64,), 32, (64, 64), data="common mean"),
    Case((64,), 20, (64, 64), data="six decades"),
)
MODEL = (
    Case((1024,), 64, (1024,) * 8),
    Case((4096,), 256, (4096,) * 2),
    Case((256,), 3584, (16384,) * 2, torch.bfloat16),
    Case((375,), 5120, (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024), torch.bfloat16, residual_dtype=torch.bfloat16),
)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of one call.

    `data`: "duplicates" repeats codewords and zeroes one row; "near ties" puts rows between two codewords, to a
    relative gap of 2^-12 to 2^-28; "common mean" adds 30 standard deviations to everything; "six decades" spreads the
    codewords' norms.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*case.shape, case.dim, generator=g)
    codebooks = [torch.randn(k, case.dim, generator=g) * 2.0**-level for level, k in enumerate(case.entries)]
    if case.data == "duplicates":
        codebooks = [c[torch.arange(c.shape[0]) % 7] for c in codebooks]
        x[:1] = 0
    if case.data == "near ties":
        gap = 2.0 ** -torch.linspace(12, 28, x.shape[0])[:, None]
        pick = torch.randint(case.entries[0], (2, x.shape[0]), generator=g)
        x = (codebooks[0][pick[0]] * (1 + gap) + codebooks[0][pick[1]] * (1 - gap)) / 2
    if case.data == "common mean":
        x, codebooks[0] = x + 30, codebooks[0] + 30
    if case.data == "six decades":
        codebooks = [c * 10 ** torch.linspace(-3, 3, c.shape[0])[:, None] for c in codebooks]
    x = x.to(device, case.dtype)
    if case.strided:
        x = x.T.contiguous().T
    codebooks = [c.to(device) for c in codebooks]
    mask = torch.rand(*case.shape, generator=g).lt(0.7).to(device) if case.masked else None
    shared = {"codebooks": codebooks[0], "levels": len(codebooks)} if case.shared else {"codebooks": codebooks}
    return {"x": x.requires_grad_(), **shared, "mask": mask, "residual_dtype": case.residual_dtype}


def cost(case: Case) -> Cost:
    """Two flops a row, codeword and channel; every input, codebook and output moved once."""
    rows = 1
    for n in case.shape:
        rows *= n
    moved = (
        rows * case.dim * (2 * case.dtype.itemsize + 4)
        + sum(case.entries) * case.dim * 4
        + rows * len(case.entries) * 8
    )
    return Cost(flops=2 * rows * case.dim * sum(case.entries), bytes=moved)


REFUSALS = (
    Refusal(
        "codebooks must be a list of [K, D], or one that levels share, got [2, 4, 8]: unbind it",
        lambda a: {"codebooks": torch.ones(2, 4, 8)},
    ),
    Refusal("x must be float32, bfloat16 or float16, got torch.int64", lambda a: {"x": a["x"].long()}),
    Refusal("x must be [..., D], D at least 1, got []", lambda a: {"x": a["x"].sum()}),
    Refusal("codebooks must have at least one level, got 0", lambda a: {"codebooks": []}),
    Refusal("codebooks must be [K, 8] with K at least 1, got [0, 8]", lambda a: {"codebooks": [a["codebooks"][0][:0]]}),
    Refusal("codebooks must be [K, 8] with K at least 1, got [4, 7]", lambda a: {"codebooks": [torch.ones(4, 7)]}),
    Refusal("codebooks must be float32, got torch.float64", lambda a: {"codebooks": [a["codebooks"][0].double()]}),
    Refusal("levels must be between 1 and 2, got 3", lambda a: {"levels": 3}),
    Refusal("levels must be at least 1 with one shared codebook, got None", lambda a: {"codebooks": a["codebooks"][0]}),
    Refusal("mask must be torch.bool [0], got torch.bool [3]", lambda a: {"mask": torch.ones(3, dtype=torch.bool)}),
    Refusal("mask must be on cpu, got meta", lambda a: {"mask": torch.ones(0, dtype=torch.bool, device="meta")}),
    Refusal(
        "residual_dtype must be float32, bfloat16 or float16, got torch.float64",
        lambda a: {"residual_dtype": torch.float64},
    ),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
