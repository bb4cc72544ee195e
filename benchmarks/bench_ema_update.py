"""ema_update against its peers, one level."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import peers_ema as peers
from harness import Case, Contender, WrongResult
from longcat_kernels.reference import ema_update as spec

SHAPES = (  # N D K, and whether few entries get most rows
    (128, 32, 64, False),
    (1024, 64, 1024, False),
    (4096, 256, 4096, False),
    (4096, 256, 4096, True),
    (1024, 1024, 16384, False),
    (16384, 1024, 4096, True),
)
CLOSE = 1e-5  # relative to the largest element: sums of thousands of rows in float32


def inputs(case: spec.Case, skewed: bool, device: str) -> dict[str, Any]:
    """Arguments of a call; skewed codes have the density of the cube of a uniform number."""
    arguments = spec.inputs(case, device)
    if skewed:
        uniform_N = torch.rand(case.rows, generator=torch.Generator().manual_seed(1))
        arguments["codes"] = (uniform_N**3 * case.entries).long().to(device)
    return arguments


def contenders(case: spec.Case, skewed: bool, dense: bool, device: str) -> list[Contender]:
    """Ours, the peers (those that build N x K only with `dense`), and a copy of as many bytes."""
    arguments = inputs(case, skewed, device)

    def judge(embed_KD: Tensor) -> None:
        """Raises WrongResult unless this is the codebook after one update."""
        truth_KD, sums_KD, sizes_K = (arguments[key].double() for key in ("embed", "embed_ema", "cluster_size_ema"))
        rows_ND, codes_N = arguments["vectors"].double(), arguments["codes"]
        rule = case.decay, peers.EPS, 0.0, 0.0, 1.0, case.seed
        spec.ema_update(truth_KD, sums_KD, sizes_K, None, rows_ND, codes_N, *rule)
        error = ((embed_KD - truth_KD).abs().max() / truth_KD.abs().max()).item()
        if not error <= CLOSE:
            raise WrongResult(f"codewords are off by {error:.1e} of the largest")

    found = [
        Contender("ours", lambda: peers.ours(arguments), judge),
        Contender("ours, prepared", lambda: peers.ours(arguments, prepared=True), judge),
        Contender("ours, with restart", lambda: peers.ours(arguments, restart_threshold=1.0)),
        Contender("copy of as many bytes", lambda: peers.copy(spec.cost(case).bytes, device), is_bound=True),
    ]
    for name, sums in peers.PEERS.items():
        builds_matrix = sums in (peers.one_hot_sums, peers.einsum_sums)
        if dense or not builds_matrix:
            precisions = ("highest", "medium") if builds_matrix else ("highest",)
            found.append(Contender(name, partial(peers.peer, arguments, sums), judge, precisions=precisions))
    return found


def _case(case: spec.Case, skewed: bool, dense: bool) -> Case:
    half = "" if case.dtype == torch.float32 else f" {str(case.dtype).removeprefix('torch.')}"
    name = f"{case.rows}x{case.dim} K{case.entries}{half}{' skewed' if skewed else ''}"
    return Case(name, spec.cost(case), partial(contenders, case, skewed, dense), memory=dense)


CASES = (
    *(_case(spec.Case(n, d, k, restart_threshold=0.0), skewed, True) for n, d, k, skewed in SHAPES),
    *(_case(case, False, False) for case in spec.MODEL[1:]),
)
