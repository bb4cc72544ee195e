"""Products of `depth_decode`: rows times the matrices of one level, with the norm before and what follows fused.

A weight matrix stands on the left, so that its rows, the outputs, are rows of the tile and there are few of them:
tiles of 16 or 32. That leaves one tensor-core instruction on every architecture, m16n8k16 (m16n8k8 for float32),
whatever the number of rows, and K is added up in steps that do not depend on it either: a row has the same bits in
any batch. RMSNorm multiplies by its weight before the product and by 1 / rms after it, so that rows are read once.

Dimension key
    T rows    N outputs    K inputs    C outputs of a tile    R rows of a tile
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat_kernels.triton._gemm import cast, multiply_add
from longcat_kernels.triton._numeric import DTYPES, folds, padded, tile_rows, tree_sum, warps


@dataclass(frozen=True)
class Cut:
    """What one program takes, and how it is compiled; the depth depends on the dtype alone."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self, inputs: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "FOLDS": folds(self.depth),
            "EVEN": inputs % self.depth == 0,
            "TYPE": DTYPES[dtype],
            "num_warps": self.warps,
            "num_stages": self.stages,
            **({"maxnreg": 255} if self.rows > 16 else {}),  # the assembler aims at fewer otherwise, and spills
        }


def cut(rows: int, dtype: torch.dtype) -> Cut:
    """Narrow tiles for few rows, so that there are programs for every processor; weights are read once a row tile."""
    height, columns, number, stages = next(shape for shape in _SHAPES if rows <= shape[0] or shape is _SHAPES[-1])
    return Cut(height, columns, 256 // dtype.itemsize, number, stages)


_SHAPES = ((16, 16, 4, 5), (32, 32, 4, 3), (64, 32, 8, 3))


@triton.jit
def _tile(T, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and outputs of this program: programs that share weights are neighbours."""
    across = tl.cdiv(T, ROWS)
    row_R = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    return row_R, tl.program_id(0) // across * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _load_x(x_ptr, norm_ptr, row_R, k_K, T, K, x_row, NORM: tl.constexpr, EVEN: tl.constexpr):
    """x [R, K] float32, and times the norm's weight."""
    inside_RK = (row_R < T)[:, None] if EVEN else (row_R < T)[:, None] & (k_K < K)[None, :]
    x_RK = tl.load(x_ptr + row_R.to(tl.int64)[:, None] * x_row + k_K[None, :], inside_RK, other=0.0).to(tl.float32)
    weighted_RK = x_RK
    if NORM:
        norm_K = tl.load(norm_ptr + k_K) if EVEN else tl.load(norm_ptr + k_K, k_K < K, other=0.0)
        weighted_RK = x_RK * norm_K.to(tl.float32)[None, :]
    return x_RK, weighted_RK


@triton.jit
def _load_w(w_ptr, n_C, k_K, N, K, w_row, w_column, EVEN: tl.constexpr):
    """Weights [C, K]; outputs beyond the last are copies of it."""
    at_CK = tl.minimum(n_C, N - 1).to(tl.int64)[:, None] * w_row + k_K.to(tl.int64)[None, :] * w_column
    return tl.load(w_ptr + at_CK) if EVEN else tl.load(w_ptr + at_CK, (k_K < K)[None, :], other=0.0)


@triton.jit
def _inverse_rms(square_RK, K, eps, ROWS: tl.constexpr, DEPTH: tl.constexpr, FOLDS: tl.constexpr):
    return 1.0 / tl.sqrt_rn(tree_sum(square_RK, ROWS, DEPTH, FOLDS) / K + eps)


@triton.jit
def _linear(
    x_ptr,  # [T, K], last stride 1
    norm_ptr,  # [K]; not read unless NORM
    w_ptr,  # [N, K]
    bias_ptr,  # [N]; not read unless BIAS
    residual_ptr,  # [T, N], added; not read unless RESIDUAL
    out_ptr,  # out [T, N] float32; may be residual
    T,
    N,
    K,
    eps,
    x_row,
    w_row,
    w_column,
    residual_row,
    out_row,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FOLDS: tl.constexpr,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
):
    """This program's tile of out = norm(x) @ w^T + bias + residual."""
    row_R, n_C = _tile(T, ROWS, COLUMNS)
    sum_CR = tl.zeros((COLUMNS, ROWS), tl.float32)
    square_RK = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in range(0, K, DEPTH):
        k_K = k + tl.arange(0, DEPTH)
        x_RK, weighted_RK = _load_x(x_ptr, norm_ptr, row_R, k_K, T, K, x_row, NORM, EVEN)
        if NORM:
            square_RK += x_RK * x_RK
        w_CK = _load_w(w_ptr, n_C, k_K, N, K, w_row, w_column, EVEN)
        sum_CR = multiply_add(w_CK, tl.trans(cast(weighted_RK, TYPE)), sum_CR)
    if NORM:
        sum_CR *= _inverse_rms(square_RK, K, eps, ROWS, DEPTH, FOLDS)[None, :]
    inside_CR = (n_C < N)[:, None] & (row_R < T)[None, :]
    if BIAS:
        sum_CR += tl.load(bias_ptr + n_C, n_C < N, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        residual_ptrs = residual_ptr + row_R.to(tl.int64)[None, :] * residual_row + n_C[:, None]
        sum_CR += tl.load(residual_ptrs, inside_CR, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_R.to(tl.int64)[None, :] * out_row + n_C[:, None], sum_CR, inside_CR)


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    T,
    N,
    K,
    eps,
    x_row,
    w_row,
    w_column,
    residual_row,
    out_row,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FOLDS: tl.constexpr,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
):
    """See `_linear`."""
    _linear(
        *(x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, T, N, K, eps, x_row, w_row, w_column),
        *(residual_row, out_row, NORM, BIAS, RESIDUAL, ROWS, COLUMNS, DEPTH, FOLDS, EVEN, TYPE),
    )


@triton.jit(do_not_specialize=["T"])
def qkv_kernel(
    z_ptr,  # [T, D] float32
    norm_ptr,  # [D]
    q_ptr,  # [A C, D]
    k_ptr,  # [K C, D]
    v_ptr,  # [K C, D]
    q_bias_ptr,  # [A C]; biases are not read unless Q_BIAS, K_BIAS, V_BIAS
    k_bias_ptr,  # [K C]
    v_bias_ptr,  # [K C]
    out_ptr,  # out [T, (A + 2 K) C] float32
    T,
    queries,
    keys,
    D,
    eps,
    q_row,
    q_column,
    k_row,
    k_column,
    v_row,
    v_column,
    out_row,
    Q_BIAS: tl.constexpr,
    K_BIAS: tl.constexpr,
    V_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FOLDS: tl.constexpr,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Queries, keys and values of normed rows, by the second number of the program."""
    part = tl.program_id(1)
    if part == 0:
        _linear(
            *(z_ptr, norm_ptr, q_ptr, q_bias_ptr, z_ptr, out_ptr, T, queries, D, eps, D, q_row, q_column),
            *(D, out_row, True, Q_BIAS, False, ROWS, COLUMNS, DEPTH, FOLDS, EVEN, TYPE),
        )
    elif tl.program_id(0) // tl.cdiv(T, ROWS) * COLUMNS < keys:
        if part == 1:
            _linear(
                *(z_ptr, norm_ptr, k_ptr, k_bias_ptr, z_ptr, out_ptr + queries, T, keys, D, eps, D, k_row, k_column),
                *(D, out_row, True, K_BIAS, False, ROWS, COLUMNS, DEPTH, FOLDS, EVEN, TYPE),
            )
        else:
            v_out_ptr = out_ptr + queries + keys
            _linear(
                *(z_ptr, norm_ptr, v_ptr, v_bias_ptr, z_ptr, v_out_ptr, T, keys, D, eps, D, v_row, v_column),
                *(D, out_row, True, V_BIAS, False, ROWS, COLUMNS, DEPTH, FOLDS, EVEN, TYPE),
            )


@triton.jit(do_not_specialize=["T"])
def up_kernel(
    z_ptr,  # [T, K] float32
    norm_ptr,  # [K]
    gate_ptr,  # [N, K]; not read unless GATED
    up_ptr,  # [N, K]
    act_ptr,  # out [T, N]: silu(gate z) * up z, or gelu(up z)
    T,
    N,
    K,
    eps,
    gate_row,
    gate_column,
    up_row,
    up_column,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FOLDS: tl.constexpr,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
):
    row_R, n_C = _tile(T, ROWS, COLUMNS)
    gate_CR = tl.zeros((COLUMNS, ROWS), tl.float32)
    up_CR = tl.zeros((COLUMNS, ROWS), tl.float32)
    square_RK = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in range(0, K, DEPTH):
        k_K = k + tl.arange(0, DEPTH)
        z_RK, weighted_RK = _load_x(z_ptr, norm_ptr, row_R, k_K, T, K, K, True, EVEN)
        square_RK += z_RK * z_RK
        z_KR = tl.trans(cast(weighted_RK, TYPE))
        if GATED:
            gate_CR = multiply_add(_load_w(gate_ptr, n_C, k_K, N, K, gate_row, gate_column, EVEN), z_KR, gate_CR)
        up_CR = multiply_add(_load_w(up_ptr, n_C, k_K, N, K, up_row, up_column, EVEN), z_KR, up_CR)
    inverse_R = _inverse_rms(square_RK, K, eps, ROWS, DEPTH, FOLDS)
    up_CR *= inverse_R[None, :]
    if GATED:
        gate_CR *= inverse_R[None, :]
        act_CR = gate_CR / (1.0 + tl.exp(-gate_CR)) * up_CR
    else:
        act_CR = 0.5 * up_CR * (1.0 + tl.erf(up_CR * 0.7071067811865476))
    inside_CR = (n_C < N)[:, None] & (row_R < T)[None, :]
    tl.store(act_ptr + row_R.to(tl.int64)[None, :] * N + n_C[:, None], cast(act_CR, TYPE), inside_CR)


@triton.jit(do_not_specialize=["T"])
def enter_kernel(
    x_ptr,  # [T, D], last stride 1
    norm_ptr,  # [D]; not read unless NORM
    residual_ptr,  # [T, D], last stride 1; not read unless RESIDUAL
    z_ptr,  # out [T, D] float32
    T,
    D,
    eps,
    x_row,
    residual_row,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLDS: tl.constexpr,
):
    """z = norm(x) + residual, of a transformer without a projection."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d_W = tl.arange(0, WIDTH)
    inside_RW = (row_R < T)[:, None] & (d_W < D)[None, :]
    z_RW = tl.load(x_ptr + row_R.to(tl.int64)[:, None] * x_row + d_W[None, :], inside_RW, other=0.0).to(tl.float32)
    if NORM:
        inverse_R = _inverse_rms(z_RW * z_RW, D, eps, ROWS, WIDTH, FOLDS)
        z_RW = z_RW * inverse_R[:, None] * tl.load(norm_ptr + d_W, d_W < D, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        residual_ptrs = residual_ptr + row_R.to(tl.int64)[:, None] * residual_row + d_W[None, :]
        z_RW += tl.load(residual_ptrs, inside_RW, other=0.0).to(tl.float32)
    tl.store(z_ptr + row_R.to(tl.int64)[:, None] * D + d_W[None, :], z_RW, inside_RW)


def linear(
    x_TK: Tensor,
    w_NK: Tensor,
    out_TN: Tensor,
    *,
    norm_K: Tensor | None = None,
    eps: float = 0.0,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
) -> None:
    """out = norm(x) @ w^T + bias + residual; out is float32 and may be residual, x is float32 or of w's dtype."""
    (rows, inputs), outputs = x_TK.shape, len(w_NK)
    shape = cut(rows, w_NK.dtype)
    nothing = x_TK  # not read
    residual = nothing if residual_TN is None else residual_TN
    linear_kernel[(triton.cdiv(rows, shape.rows) * triton.cdiv(outputs, shape.columns),)](
        *(x_TK, nothing if norm_K is None else norm_K, w_NK, nothing if bias_N is None else bias_N, residual, out_TN),
        *(rows, outputs, inputs, eps, x_TK.stride(0), *w_NK.stride(), residual.stride(0), out_TN.stride(0)),
        NORM=norm_K is not None,
        BIAS=bias_N is not None,
        RESIDUAL=residual_TN is not None,
        **shape.options(inputs, w_NK.dtype),
    )


def qkv(
    z_TD: Tensor,
    norm_D: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, ...],
    out_TN: Tensor,
    eps: float,
) -> None:
    """out [T, (A + 2 K) C]: norm(z) times the weights of queries, keys and values, side by side."""
    (rows, inputs), (queries, keys) = z_TD.shape, (len(w) for w in weights[:2])
    shape = cut(rows, weights[0].dtype)
    qkv_kernel[(triton.cdiv(rows, shape.rows) * triton.cdiv(queries, shape.columns), 3)](
        *(z_TD, norm_D, *weights, *(z_TD if bias is None else bias for bias in biases), out_TN),
        *(rows, queries, keys, inputs, eps, *(stride for w in weights for stride in w.stride()), out_TN.stride(0)),
        **{f"{name}_BIAS": bias is not None for name, bias in zip("QKV", biases, strict=True)},
        **shape.options(inputs, weights[0].dtype),
    )


def up(z_TK: Tensor, norm_K: Tensor, gate_NK: Tensor | None, up_NK: Tensor, act_TN: Tensor, eps: float) -> None:
    """act, of the weights' dtype, from z: GELU, or SwiGLU with a gate."""
    (rows, inputs), outputs = z_TK.shape, len(up_NK)
    shape, gate = cut(rows, up_NK.dtype), up_NK if gate_NK is None else gate_NK
    up_kernel[(triton.cdiv(rows, shape.rows) * triton.cdiv(outputs, shape.columns),)](
        *(z_TK, norm_K, gate, up_NK, act_TN, rows, outputs, inputs, eps, *gate.stride(), *up_NK.stride()),
        GATED=gate_NK is not None,
        **shape.options(inputs, up_NK.dtype),
    )


def enter(x_TD: Tensor, z_TD: Tensor, norm_D: Tensor | None, residual_TD: Tensor | None, eps: float) -> None:
    """z = norm(x) + residual."""
    rows, width = z_TD.shape
    wide, residual = padded(width), x_TD if residual_TD is None else residual_TD
    enter_kernel[(triton.cdiv(rows, tile_rows(wide)),)](
        *(x_TD, x_TD if norm_D is None else norm_D, residual, z_TD, rows, width, eps, x_TD.stride(0)),
        residual.stride(0),
        NORM=norm_D is not None,
        RESIDUAL=residual_TD is not None,
        ROWS=tile_rows(wide),
        WIDTH=wide,
        FOLDS=folds(wide),
        num_warps=warps(wide),
    )
