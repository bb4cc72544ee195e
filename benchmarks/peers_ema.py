"""Contenders of the EMA codebook update: each has a state of its own, and gives the call that moves it.

A call gives the codewords after it, [K, D]. None restarts entries but the one that says so.

Dimension key
    N rows    D width    K entries
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Call
from longcat_kernels import ema_update
from longcat_kernels.prepared import PreparedCodebook

DECAY, EPS = 0.99, 1e-5

Sums = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # moves (sums_KD, sizes_K) by (rows_ND, codes_N)


def ours(arguments: dict[str, Any], *, prepared: bool = False, restart_threshold: float = 0.0) -> Call:
    """The op; with `prepared` it also keeps the packed form that `rvq_encode` reads."""
    own = {**arguments, **_state(arguments), "restart_threshold": restart_threshold}
    if prepared:
        own["prepared"] = PreparedCodebook(own["embed"]).refresh()

    def call() -> Tensor:
        ema_update(**own)
        embed_KD: Tensor = own["embed"]
        return embed_KD

    return call


def peer(arguments: dict[str, Any], sums: Sums) -> Call:
    """Moving sums by `sums`, then the codewords from them."""
    own = _state(arguments)
    rows_ND, codes_N = arguments["vectors"].float(), arguments["codes"]

    @torch.no_grad()
    def call() -> Tensor:
        sums(own["embed_ema"], own["cluster_size_ema"], rows_ND, codes_N)
        normalise(own["embed"], own["embed_ema"], own["cluster_size_ema"])
        return own["embed"]

    return call


def _state(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: arguments[name].clone() for name in ("embed", "embed_ema", "cluster_size_ema")}


def copy(size: int, device: str) -> Call:
    """Reads and writes `size` bytes together: what any update costs that moves as many."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def one_hot_sums(sums_KD: Tensor, sizes_K: Tensor, rows_ND: Tensor, codes_N: Tensor) -> None:
    """RQ-VAE's way: a dense one-hot matrix, filled by scatter, and a matrix product with it."""
    one_hot_KN = rows_ND.new_zeros(sums_KD.shape[0], rows_ND.shape[0])
    one_hot_KN.scatter_(0, codes_N[None], 1)
    _move(sums_KD, sizes_K, one_hot_KN @ rows_ND, one_hot_KN.sum(1))


def einsum_sums(sums_KD: Tensor, sizes_K: Tensor, rows_ND: Tensor, codes_N: Tensor) -> None:
    """vector-quantize-pytorch's way: an integer one-hot matrix, its float copy, and an einsum."""
    one_hot_NK = F.one_hot(codes_N, sums_KD.shape[0]).to(rows_ND.dtype)
    _move(sums_KD, sizes_K, torch.einsum("nd,nk->kd", rows_ND, one_hot_NK), one_hot_NK.sum(0))


def scatter_sums(sums_KD: Tensor, sizes_K: Tensor, rows_ND: Tensor, codes_N: Tensor) -> None:
    """Moshi's way: scatter_add_ of rows by codes repeated over the width."""
    batch_KD = torch.zeros_like(sums_KD).scatter_add_(0, codes_N[:, None].expand(-1, rows_ND.shape[1]), rows_ND)
    _move(
        sums_KD, sizes_K, batch_KD, torch.zeros_like(sizes_K).scatter_add_(0, codes_N, torch.ones_like(rows_ND[:, 0]))
    )


def index_sums(sums_KD: Tensor, sizes_K: Tensor, rows_ND: Tensor, codes_N: Tensor) -> None:
    """index_add_ of whole rows, decay before it: the least that torch can move."""
    sizes_K.mul_(DECAY).add_(torch.bincount(codes_N, minlength=sizes_K.shape[0]), alpha=1 - DECAY)
    sums_KD.mul_(DECAY).index_add_(0, codes_N, rows_ND, alpha=1 - DECAY)


def sorted_sums(sums_KD: Tensor, sizes_K: Tensor, rows_ND: Tensor, codes_N: Tensor) -> None:
    """Rows sorted by code, then segment_reduce."""
    counts_K = torch.bincount(codes_N, minlength=sizes_K.shape[0])
    batch_KD = torch.segment_reduce(rows_ND[codes_N.argsort()], "sum", lengths=counts_K, unsafe=True)
    _move(sums_KD, sizes_K, batch_KD, counts_K)


PEERS: dict[str, Sums] = {
    "RQ-VAE-style one-hot": one_hot_sums,
    "vector-quantize-pytorch-style einsum": einsum_sums,
    "Moshi-style scatter_add_": scatter_sums,
    "index_add_": index_sums,
    "sort, segment_reduce": sorted_sums,
}


def _move(sums_KD: Tensor, sizes_K: Tensor, batch_KD: Tensor, counts_K: Tensor) -> None:
    sizes_K.mul_(DECAY).add_(counts_K, alpha=1 - DECAY)
    sums_KD.mul_(DECAY).add_(batch_KD, alpha=1 - DECAY)


def restart(sums_KD: Tensor, sizes_K: Tensor, rows_ND: Tensor) -> None:
    """Entries whose moving count is below one take a random row; rows are tiled, with noise, where they are too few."""
    entries, rows = sums_KD.shape[0], rows_ND.shape[0]
    if rows < entries:
        rows_ND = rows_ND.repeat(-(-entries // rows), 1)
        rows_ND = rows_ND + torch.rand_like(rows_ND) * 0.01 / rows_ND.shape[1] ** 0.5
    chosen_KD = rows_ND[torch.randperm(rows_ND.shape[0], device=rows_ND.device)[:entries]]
    kept_K1 = (sizes_K >= 1).float()[:, None]
    sums_KD.mul_(kept_K1).add_(chosen_KD * (1 - kept_K1))
    sizes_K.mul_(kept_K1[:, 0]).add_(1 - kept_K1[:, 0])


def normalise(embed_KD: Tensor, sums_KD: Tensor, sizes_K: Tensor) -> None:
    """Codewords from sums and counts, the latter smoothed."""
    total = sizes_K.sum()
    smoothed_K = total * (sizes_K + EPS) / (total + sizes_K.shape[0] * EPS)
    embed_KD.copy_(sums_KD / smoothed_K[:, None])
