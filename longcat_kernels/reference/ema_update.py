"""EMA codebook update, defined (LongCat-Next report, equation (4); Laplace smoothing and restart as in RQ-VAE).

    N_k <- g N_k + (1 - g) |S_k|            S_k: rows whose code is k
    m_k <- g m_k + (1 - g) sum of S_k
    e_k <- m_k (1 / (n (N_k + eps) / (n + K eps)))            n = sum of N_k
    where N_k < max(threshold, fraction n / K):  e_k <- a row of this batch,  N_k <- count (0: n / K),  m_k <- N_k e_k

Where a moving count is NaN, so is n: the statistics move, no codeword does, and none restarts.

Sums and quotients are float64, rounded to float32 once. Which row an entry restarts from is defined by `restart_rows`,
so that every implementation and every process of a data-parallel run chooses the same one.

Dimension key
    N rows    D width    K entries    R restarted entries
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.spec import Cost, Refusal


def ema_update(
    embed_KD: Tensor,
    embed_ema_KD: Tensor,
    cluster_size_ema_K: Tensor,
    packed: Tensor | None,
    vectors_ND: Tensor,
    codes_N: Tensor,
    decay: float,
    eps: float,
    restart_threshold: float,
    restart_fraction: float,
    restart_count: float,
    seed: int,
) -> tuple[Tensor]:
    """Writes the first three in place; gives the number of restarted entries, int64 [].

    `packed` is the kernels' own form of the codebook: the definition leaves it alone.
    """
    used_N = codes_N >= 0
    counts_K = torch.bincount(codes_N[used_N], minlength=embed_KD.shape[0]).double()  # else 1 - g turns float32
    sums_KD = torch.zeros_like(embed_KD, dtype=torch.float64)
    sums_KD.index_add_(0, codes_N[used_N], vectors_ND[used_N].double())
    cluster_size_ema_K.copy_((decay * cluster_size_ema_K.double() + (1 - decay) * counts_K).float())
    embed_ema_KD.copy_(decay * embed_ema_KD.double() + (1 - decay) * sums_KD)

    total = cluster_size_ema_K.double().sum()
    sizes_K1 = (total * (cluster_size_ema_K.double() + eps) / (total + embed_KD.shape[0] * eps))[:, None]
    embed_KD.copy_(torch.where(sizes_K1 > 0, embed_ema_KD * (1 / sizes_K1), embed_KD))

    rows = restart_rows(used_N.nonzero()[:, 0], seed)
    mean = total / embed_KD.shape[0]
    threshold = (restart_fraction * mean).clamp(min=restart_threshold)
    restarted_R = (cluster_size_ema_K.double() < threshold).nonzero()[:, 0]
    restarted_R = restarted_R if rows.numel() else restarted_R[:0]
    chosen_R = rows[torch.arange(restarted_R.numel(), device=rows.device) % max(1, rows.numel())]
    count = mean.to(cluster_size_ema_K.dtype) if restart_count == 0 else mean.new_tensor(restart_count)
    cluster_size_ema_K[restarted_R] = count.to(cluster_size_ema_K.dtype)
    embed_KD[restarted_R] = vectors_ND[chosen_R].to(embed_KD.dtype)
    embed_ema_KD[restarted_R] = (vectors_ND[chosen_R].double() * count).to(embed_ema_KD.dtype)
    return (torch.tensor(restarted_R.numel(), device=embed_KD.device),)


def restart_rows(used: Tensor, seed: int) -> Tensor:
    """The row numbers in `used` in the order in which the restarted entries, lowest first, take them; then round again.

    Sorts them by mix(mix(number) ^ mix(mix(low 32 bits of seed) ^ high 32 bits ^ 0x9e3779b9)). `mix` is a bijection of
    32-bit numbers, so no two keys are equal.
    """
    key = _mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF) ^ 0x9E3779B9)
    return used[_mix(_mix(used) ^ key).argsort()]


def _mix(x: Any) -> Any:
    """A 32-bit integer hash (xor-shift and multiply, twice) of an int or of an int64 tensor in [0, 2^32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Case:
    """One problem size. `used` is the share of the entries that the codes name."""

    rows: int
    dim: int
    entries: int
    dtype: torch.dtype = torch.float32
    restart_threshold: float = 1.0
    used: float = 1.0
    ignored: float = 0.0  # share of codes that are -1
    decay: float = 0.99
    seed: int = 0
    restart_fraction: float = 0.0
    restart_count: float = 1.0
    nan_count: bool = False  # one of the moving counts is NaN


EDGE = (
    Case(0, 8, 4),
    Case(1, 1, 1),
    Case(5, 7, 33, seed=-3),
    Case(100, 9, 12, torch.bfloat16, used=0.4, ignored=0.3, seed=2**40 + 5),
    Case(64, 24, 16, torch.float16, restart_threshold=0.0, decay=0.5),
    Case(12, 8, 6, ignored=1.0),
    Case(90, 8, 30, used=0.5, restart_threshold=0.0, restart_fraction=0.8, restart_count=0.0),
    Case(90, 8, 30, used=0.5, restart_fraction=0.1, restart_count=2.5),
    Case(90, 8, 30, used=0.5, nan_count=True),
    Case(300, 16, 40, used=0.5, seed=7),
)
MODEL = (Case(4096, 256, 4096), Case(16384, 3584, 16384, torch.bfloat16), Case(6000, 5120, 8192, torch.bfloat16))


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Arguments of one call: EMA counts between 0 and 3."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.rand(case.entries, generator=g) * 3
    if case.nan_count:
        sizes[-1] = torch.nan
    embed = torch.randn(case.entries, case.dim, generator=g)
    codes = torch.randint(max(1, int(case.entries * case.used)), (case.rows,), generator=g)
    codes = torch.where(torch.rand(case.rows, generator=g) < case.ignored, -1, codes)
    return {
        "embed": embed.to(device),
        "embed_ema": (embed * sizes[:, None]).to(device),
        "cluster_size_ema": sizes.to(device),
        "vectors": torch.randn(case.rows, case.dim, generator=g).to(device, case.dtype),
        "codes": codes.to(device),
        "decay": case.decay,
        "restart_threshold": case.restart_threshold,
        "restart_fraction": case.restart_fraction,
        "restart_count": case.restart_count,
        "seed": case.seed,
    }


def cost(case: Case) -> Cost:
    """One addition a row channel, four operations an entry channel; rows read, embed written, statistics both."""
    moved = case.rows * (case.dim * case.dtype.itemsize + 8) + case.entries * (3 * case.dim * 4 + 8)
    return Cost(flops=case.rows * case.dim + 4 * case.entries * case.dim, bytes=moved)


REFUSALS = (
    Refusal("embed must be float32 [K, D], got torch.float64 [4, 8]", lambda a: {"embed": a["embed"].double()}),
    Refusal("embed_ema must be float32 [4, 8], got torch.float32 [3, 8]", lambda a: {"embed_ema": a["embed_ema"][:3]}),
    Refusal(
        "cluster_size_ema must be float32 [4], got torch.float32 [4, 1]",
        lambda a: {"cluster_size_ema": torch.ones(4, 1)},
    ),
    Refusal("vectors must be [N, 8], got [0, 7]", lambda a: {"vectors": a["vectors"][:, :7]}),
    Refusal(
        "vectors must be float32, bfloat16 or float16, got torch.int64", lambda a: {"vectors": a["vectors"].long()}
    ),
    Refusal("codes must be int64 [0], got torch.int64 [2]", lambda a: {"codes": torch.zeros(2, dtype=torch.int64)}),
    Refusal(
        "codes must be below 4, got 4",
        lambda a: {"codes": torch.tensor([4]), "vectors": torch.ones(1, 8)},
    ),
    Refusal("vectors must be on cpu, got meta", lambda a: {"vectors": a["vectors"].to("meta")}),
    Refusal("seed must be in [-2^63, 2^63), got 9223372036854775808", lambda a: {"seed": 2**63}),
    Refusal("decay must be in [0, 1], got 1.5", lambda a: {"decay": 1.5}),
    Refusal("eps must be at least 0, got -1.0", lambda a: {"eps": -1.0}),
    Refusal("eps must be at least 0, got nan", lambda a: {"eps": float("nan")}),
    Refusal("restart_threshold must be a number, got nan", lambda a: {"restart_threshold": float("nan")}),
    Refusal("restart_fraction must be at least 0, got -0.5", lambda a: {"restart_fraction": -0.5}),
    Refusal("restart_count must be at least 0, got -1.0", lambda a: {"restart_count": -1.0}),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
