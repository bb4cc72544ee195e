"""Routing plan, defined: the formula in plain PyTorch, the cases it is tested and timed on, and its cost.

Dimension key
    T tokens    k slots of a token    E real experts    R slots, T * k    N tiles, at most
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.spec import Cost, Refusal


def moe_plan(ids: Tensor, n_real: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(counts, offsets, tokens, slots, rows, tiles), int32, of the slots with ids in [0, n_real), stably by id."""
    flat_R = ids.reshape(-1)
    place_R = torch.arange(flat_R.numel(), device=ids.device)
    key_R = torch.where((flat_R >= 0) & (flat_R < n_real), flat_R, n_real)
    counts_E = key_R.new_zeros(n_real + 1).scatter_add_(0, key_R, torch.ones_like(key_R))[:-1]
    offsets = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    order_R = key_R.argsort(stable=True)
    slots_R = torch.where(place_R < offsets[-1], order_R, -1)
    tokens_R = torch.where(slots_R < 0, -1, slots_R // ids.shape[1])
    rows_R = torch.where(key_R < n_real, torch.empty_like(order_R).scatter_(0, order_R, place_R), -1)
    tiles_N2 = _tiles(counts_E, offsets, tile, most_tiles(flat_R.numel(), n_real, tile))
    results = (counts_E, offsets, tokens_R, slots_R, rows_R.view(ids.shape), tiles_N2)
    counts, starts, tokens, slots, rows, tiles = (result.to(torch.int32) for result in results)
    return counts, starts, tokens, slots, rows, tiles


def most_tiles(slots: int, n_real: int, tile: int) -> int:
    """How many tiles any ids can need."""
    return n_real + (slots + tile - 1) // tile


def _tiles(counts_E: Tensor, offsets: Tensor, tile: int, most: int) -> Tensor:
    """Tile i belongs to the first expert whose tiles and those before it are more than i."""
    ends_E = ((counts_E + tile - 1) // tile).cumsum(0)
    place_N = torch.arange(most, device=counts_E.device)
    expert_N = torch.searchsorted(ends_E, place_N, right=True)
    known_N = expert_N.clamp(max=len(counts_E) - 1)
    before_N = torch.cat([ends_E.new_zeros(1), ends_E])[known_N]
    pairs_N2 = torch.stack([known_N, offsets[known_N] + (place_N - before_N) * tile], 1)
    return torch.where(expert_N[:, None] < len(counts_E), pairs_N2, -1)


@dataclass(frozen=True)
class Case:
    """One problem size; `ids` says which experts are hit: any of all, identity only, one real only, some ignored."""

    tokens: int
    k: int
    real: int
    zero: int = 0
    tile: int = 4
    ids: str = "any"


EDGE = (
    Case(0, 2, 3),
    Case(1, 1, 1, tile=1),
    Case(17, 3, 5, zero=2),
    Case(17, 3, 5, zero=3, ids="identity"),
    Case(9, 2, 4, ids="one", tile=5),
    Case(600, 2, 2, zero=2, ids="identity"),  # kernels count in more blocks of slots than there are experts
    Case(33, 3, 7, zero=2, ids="ignored", tile=16),
)
MODEL = (Case(4096, 12, 256, zero=128, tile=64),)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    ids_Tk = torch.rand(case.tokens, case.real + case.zero, generator=g).argsort(1)[:, : case.k]
    if case.ids == "identity":
        ids_Tk = ids_Tk % max(1, case.zero) + case.real
    elif case.ids == "one":
        ids_Tk = torch.full_like(ids_Tk, case.real - 1)
    elif case.ids == "ignored":
        ids_Tk = torch.where(ids_Tk % 3 == 0, -1, ids_Tk)
    return {"ids": ids_Tk.to(device), "n_real": case.real, "tile": case.tile}


def cost(case: Case) -> Cost:
    """Ids read twice, three numbers written for each."""
    slots, tiles = case.tokens * case.k, most_tiles(case.tokens * case.k, case.real, case.tile)
    return Cost(flops=0, bytes=slots * (16 + 12) + (2 * case.real + 1) * 4 + tiles * 8)


REFUSALS = (
    Refusal("ids must be int64 [T, k] with k >= 1, got torch.int32 [0, 2]", lambda a: {"ids": a["ids"].int()}),
    Refusal("ids must be int64 [T, k] with k >= 1, got torch.int64 [0]", lambda a: {"ids": a["ids"][:, 0]}),
    Refusal("n_real must be at least 1, got 0", lambda a: {"n_real": 0}),
    Refusal("tile must be at least 1, got 0", lambda a: {"tile": 0}),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
