"""N-gram embedding: hashes and rows table by table, then one product with the projections side by side.

A table in host memory is read there: its hashes go to the host and its rows come back.

Dimension key
    P positions    S sequence    N tables    W width of a table    I widths of all tables    D model
    V rows of the word table    R rows of a tile
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from longcat_kernels.triton import on
from longcat_kernels.triton._gemm import (
    TYPES,
    accumulate,
    cast,
    describe,
    in_vectors,
    shared_bytes,
    tile_of,
    weights_of,
)
from longcat_kernels.triton._numeric import DTYPES, padded, tile_rows


@triton.jit
def _context(id_, first_ignored, end_ignored):
    """An id as it hashes: ignored ids and none as 0."""
    return tl.where((id_ < 0) | ((id_ >= first_ignored) & (id_ < end_ignored)), 0, id_)


@triton.jit(do_not_specialize=["modulus", "base", "back", "S"])
def lookup_kernel(
    ids_ptr,  # [P] int64
    documents_ptr,  # [P] int64; not read unless DOCUMENTS
    history_ptr,  # [B, back] int64; not read unless HISTORY
    table_ptr,  # [modulus, W]; not read unless LOOK_UP
    hashes_ptr,  # out: one column of [P, N] int64
    rows_ptr,  # out: some columns of [P, I]
    P,
    S,
    N,
    WIDTHS,  # I
    W,
    modulus,
    base,
    back,  # ids of a sequence before its first
    first_ignored,
    end_ignored,
    eos,
    table_row,
    table_column,
    ORDER: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    HISTORY: tl.constexpr,
    LOOK_UP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    place_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = place_R < P
    at_R = place_R % S
    size = modulus.to(tl.int64)
    id_R = _context(tl.load(ids_ptr + place_R, inside_R, other=0), first_ignored, end_ignored)
    joined_R = id_R != 0
    hash_R = id_R % size
    power = size * 0 + 1
    for distance in tl.static_range(1, ORDER):
        here_R = at_R >= distance
        earlier_R = tl.load(ids_ptr + place_R - distance, inside_R & here_R, other=0)
        if HISTORY:
            past_ptrs = history_ptr + place_R // S * back + back + at_R - distance
            earlier_R += tl.load(past_ptrs, inside_R & (at_R < distance), other=0)
        earlier_R = _context(earlier_R, first_ignored, end_ignored)
        joined_R &= (earlier_R != 0) & (earlier_R != eos)
        if DOCUMENTS:
            document_R = tl.load(documents_ptr + place_R, inside_R, other=0)
            other_R = tl.load(documents_ptr + place_R - tl.minimum(distance, at_R), inside_R, other=0)
            joined_R &= document_R == other_R
        power = power * (base % size) % size
        hash_R = (hash_R + tl.where(joined_R, earlier_R, 0) * power) % size
    tl.store(hashes_ptr + place_R.to(tl.int64) * N, hash_R, inside_R)
    if LOOK_UP:
        row_R = hash_R * table_row
        for first in range(0, W, WIDTH):
            column = first + tl.arange(0, WIDTH)
            inside = inside_R[:, None] & (column < W)[None, :]
            table_ptrs = table_ptr + row_R[:, None] + column.to(tl.int64)[None, :] * table_column
            values = tl.load(table_ptrs, inside & (hash_R != 0)[:, None], other=0.0)
            tl.store(rows_ptr + place_R.to(tl.int64)[:, None] * WIDTHS + column[None, :], values, inside)


@triton.jit
def project_kernel(
    rows,  # [P, I] or its descriptor
    b,  # projections [1, I, D] or their descriptor
    word_ptr,  # [V, D]
    ids_ptr,  # [P] int64
    out_ptr,  # [P, D]
    P,
    V,
    D,
    WIDTHS,  # I
    share,  # float: 1 / (1 + N)
    first_ignored,
    end_ignored,
    word_row,
    word_column,
    b_group,
    b_k,
    b_n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    A_DESCRIBED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN: tl.constexpr,
    OUT: tl.constexpr,
):
    """(word + rows @ projections) times the share; an id beyond the word table gives NaN."""
    columns = tl.cdiv(D, COLUMNS)
    first = tl.program_id(0) // columns * ROWS
    n = tl.program_id(0) % columns * COLUMNS
    place_R = first + tl.arange(0, ROWS)
    n_N = n + tl.arange(0, COLUMNS)
    inside_R = place_R < P
    at_R = tl.where(inside_R, place_R, 0).to(tl.int64) * WIDTHS
    sum_RN = accumulate(
        *(rows, at_R, first, 1, b, tl.program_id(0) * 0, n, D, WIDTHS, b_group, b_k, b_n),
        *(COLUMNS, DEPTH, A_DESCRIBED, DESCRIBED, K_INNER, EVEN),
    )
    id_R = tl.load(ids_ptr + place_R, inside_R, other=-1)
    inside_RN = inside_R[:, None] & (n_N < D)[None, :]
    word_ptrs = word_ptr + id_R[:, None] * word_row + n_N.to(tl.int64)[None, :] * word_column
    sum_RN += tl.load(word_ptrs, inside_RN & ((id_R >= 0) & (id_R < V))[:, None], other=0.0).to(tl.float32)
    factor_R = tl.where((id_R >= first_ignored) & (id_R < end_ignored), 1.0, share)
    sum_RN = tl.where((id_R < 0)[:, None], 0.0, sum_RN * factor_R[:, None])
    sum_RN = tl.where((id_R >= V)[:, None], float("nan"), sum_RN)
    tl.store(out_ptr + place_R.to(tl.int64)[:, None] * D + n_N[None, :], cast(sum_RN, OUT), inside_RN)


def why_not(ids_BS: Tensor, word_VD: Tensor, *_: Any) -> str | None:
    """None, or why these tensors cannot be taken."""
    return None if word_VD.dtype in TYPES else f"takes float32, bfloat16 and float16, got {word_VD.dtype}"


def run(
    ids_BS: Tensor,
    word_VD: Tensor,
    tables: list[Tensor],
    projections: list[Tensor],
    documents_BS: Tensor | None,
    history_BP: Tensor | None,
    numbers: list[int],
    sparse: bool,
    out_BSD: Tensor,
    hashes_BSN: Tensor,
) -> None:
    """Fills out and the hashes; `numbers` are those of `reference.ngram_embedding.Rule`."""
    if not ids_BS.numel():
        return
    _base, _neighbors, _splits, first, end, _eos = numbers
    positions, dim = ids_BS.numel(), word_VD.shape[1]
    with on(word_VD.device):
        rows_PI = look_up(ids_BS, tables, documents_BS, history_BP, numbers, hashes_BSN)
        projection_1ID = torch.cat(projections, 1).T[None]
        vectors = in_vectors(rows_PI, projection_1ID, word_VD)
        tile = tile_of(positions, 1, word_VD.dtype, shared_bytes(word_VD.device), vectors=vectors)
        weights, constants = weights_of(projection_1ID, tile)
        found = describe(rows_PI, [tile.rows, tile.depth], tile)
        project_kernel[(triton.cdiv(positions, tile.rows) * triton.cdiv(dim, tile.columns),)](
            *(rows_PI if found is None else found, weights[0], word_VD, ids_BS.contiguous(), out_BSD),
            *(positions, len(word_VD), dim, rows_PI.shape[1], 1 / (1 + len(tables)), first, end),
            *(*word_VD.stride(), *weights[1:]),
            A_DESCRIBED=found is not None,
            OUT=DTYPES[word_VD.dtype],
            **constants,
            **tile.options(),
        )


def look_up(
    ids_BS: Tensor,
    tables: list[Tensor],
    documents_BS: Tensor | None,
    history_BP: Tensor | None,
    numbers: list[int],
    hashes_BSN: Tensor,
) -> Tensor:
    """Fills the hashes; gives the rows of all tables side by side [P, I], zero where the hash is."""
    base, neighbors, splits, *ignored_and_eos = numbers
    positions, hashes_PN, device = ids_BS.numel(), hashes_BSN.view(-1, len(tables)), ids_BS.device
    flat_P = ids_BS.contiguous()
    documents_P = flat_P if documents_BS is None else documents_BS.contiguous()
    history = flat_P if history_BP is None else history_BP.contiguous()
    width = sum(table.shape[1] for table in tables)
    rows_PI = torch.empty(positions, width, dtype=tables[0].dtype, device=device)
    column = 0
    for i, table_RW in enumerate(tables):
        is_near, width = _is_near(table_RW, ids_BS), table_RW.shape[1]
        wide = min(256, padded(width))
        rows = tile_rows(wide)
        lookup_kernel[(triton.cdiv(positions, rows),)](
            *(flat_P, documents_P, history, table_RW if is_near else rows_PI, hashes_PN[:, i:], rows_PI[:, column:]),
            *(positions, ids_BS.shape[1], len(tables), rows_PI.shape[1], width, len(table_RW), base, neighbors - 1),
            *(*ignored_and_eos, *table_RW.stride()),
            ORDER=i // splits + 2,
            DOCUMENTS=documents_BS is not None,
            HISTORY=history_BP is not None,
            LOOK_UP=is_near,
            ROWS=rows,
            WIDTH=wide,
            num_warps=4,
        )
        if not is_near:
            rows_PI[:, column : column + width] = gather(table_RW, hashes_PN[:, i])
        column += width
    return rows_PI


def _is_near(table_RW: Tensor, ids_BS: Tensor) -> bool:
    return table_RW.device == ids_BS.device


def gather(table_RW: Tensor, hashes_P: Tensor) -> Tensor:
    """[P, W]: rows of a table, which may be somewhere else; zero where the hash is."""
    rows_PW = functional.embedding(hashes_P.to(table_RW.device), table_RW).to(hashes_P.device)
    return rows_PW.masked_fill((hashes_P == 0)[:, None], 0)
