"""Top-k routing: a row of logits a program; the best expert k times over, as an integer that orders score and id.

Dimension key
    T tokens    E experts, identity experts included    k experts of one token    R, W rows and padded width of a tile
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import TYPES
from longcat_kernels.triton._numeric import folds, tile_rows
from longcat_kernels.triton._screen import key_of

LEAST: tl.constexpr = tl.constexpr(-(2**63))
NAN: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # above infinity, as torch sorts NaN


@triton.jit
def scores(logits_ptr, row_R, T, E, row_stride, column_stride, WIDTH: tl.constexpr, SOFTMAX: tl.constexpr):
    """[R, W] float32: softmax or sigmoid of the logits, 0 from E on."""
    column_W = tl.arange(0, WIDTH)
    inside_RW = (row_R < T)[:, None] & (column_W < E)[None, :]
    at_RW = row_R.to(tl.int64)[:, None] * row_stride + column_W.to(tl.int64)[None, :] * column_stride
    logits_RW = tl.load(logits_ptr + at_RW, inside_RW, other=float("-inf")).to(tl.float32)
    if SOFTMAX:
        most_R = tl.max(tl.where(logits_RW == logits_RW, logits_RW, float("inf")), 1)
        powers_RW = tl.exp(logits_RW - tl.where(row_R < T, most_R, 0.0)[:, None])
        powers_RW = tl.where((column_W < E)[None, :], powers_RW, 0.0)
        return powers_RW / tl.where(row_R < T, tl.sum(powers_RW, 1), 1.0)[:, None]
    else:
        return tl.where((column_W < E)[None, :], tl.sigmoid(logits_RW), 0.0)


@triton.jit(do_not_specialize=["scale"])
def route_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E]; not read unless BIASED
    weights_ptr,  # out [T, k] float32
    ids_ptr,  # out [T, k] int64
    T,
    E,
    SLOTS,  # k
    row_stride,
    column_stride,
    scale,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    RENORM: tl.constexpr,
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_W = tl.arange(0, WIDTH)
    score_RW = scores(logits_ptr, row_R, T, E, row_stride, column_stride, WIDTH, SOFTMAX)
    choice_RW = score_RW
    if BIASED:
        choice_RW += tl.load(bias_ptr + column_W, column_W < E, other=0.0).to(tl.float32)[None, :]
    key_RW = tl.where(choice_RW == choice_RW, key_of(choice_RW + 0.0), NAN).to(tl.int64)
    key_RW = (key_RW << 32) + (WIDTH - 1 - column_W).to(tl.int64)[None, :]
    key_RW = tl.where((column_W < E)[None, :], key_RW, LEAST)
    total_R = tl.zeros((ROWS,), tl.float32)
    for slot in range(0, SLOTS):
        best_R = tl.max(key_RW, 1)
        id_R = (WIDTH - 1) - (best_R & (WIDTH - 1))
        chosen_RW = key_RW == best_R[:, None]
        weight_R = tl.sum(tl.where(chosen_RW, score_RW, 0.0), 1)
        total_R += weight_R
        at_R = row_R.to(tl.int64) * SLOTS + slot
        tl.store(ids_ptr + at_R, id_R, row_R < T)
        if not RENORM:
            tl.store(weights_ptr + at_R, weight_R * scale, row_R < T)
        key_RW = tl.where(chosen_RW, LEAST, key_RW)
    if RENORM:
        tl.debug_barrier()
        for slot in range(0, SLOTS):
            at_R = row_R.to(tl.int64) * SLOTS + slot
            id_R = tl.load(ids_ptr + at_R, row_R < T, other=-1)
            weight_R = tl.sum(tl.where(column_W[None, :] == id_R[:, None], score_RW, 0.0), 1)
            tl.store(weights_ptr + at_R, weight_R / total_R * scale, row_R < T)


def why_not(*inputs: Any) -> str | None:
    """None, or why these tensors cannot be taken."""
    dtypes = [tensor.dtype for tensor in inputs if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    wrong = next((dtype for dtype in dtypes if dtype not in TYPES), None)
    return None if wrong is None else f"takes float32, bfloat16 and float16, got {wrong}"


def run(
    logits_TE: Tensor,
    k: int,
    n_real: int,
    bias_E: Tensor | None,
    score: str,
    renorm: bool,
    scale: float,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
) -> None:
    """Fills weights and ids."""
    (tokens, experts), wide = logits_TE.shape, 1 << folds(logits_TE.shape[1])
    rows = tile_rows(wide)
    if tokens:
        with on(logits_TE.device):
            route_kernel[(triton.cdiv(tokens, rows),)](
                *(logits_TE, logits_TE if bias_E is None else bias_E.contiguous(), weights_Tk, ids_Tk),
                *(tokens, experts, k, *logits_TE.stride(), scale),
                ROWS=rows,
                WIDTH=wide,
                SOFTMAX=score == "softmax",
                BIASED=bias_E is not None,
                RENORM=renorm,
                num_warps=4,
            )
