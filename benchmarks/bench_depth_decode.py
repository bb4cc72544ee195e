"""depth_decode against its peers: LongCat's heads at two widths, cold caches, other models at their sizes, the sampler.

"floor: weights read" is what the bandwidth of the machine allows at one row, measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import peers_depth as peers
from harness import Case, Contender, WrongResult
from longcat_kernels import DepthSampling, depth_decode
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference.depth_weights import DepthConfig
from longcat_kernels.spec import Cost

TORCH = ("highest", "medium")  # precisions: torch's default, and its fastest float32 products
TRUSTED_WRONG = 0.5  # a contender with more wrong codes than this does not do the same work
LEVELS, CLASSES = 8, 1025
DRAW_CLASSES = 16_385
DRAWS = {
    "k 1024 p 0.75": DepthSampling(0.5, 1024, 0.75),
    "k 5 p 0.85": DepthSampling(0.5, 5, 0.85),
    "k 16000 p 0.999": DepthSampling(1.0, 16_000, 0.999),
    "all": DepthSampling(1.0),
}


def sizes(dim: int, rows: int, dtype: torch.dtype) -> spec.Case:
    """LongCat's head with four layers and feed-forwards of twice the width."""
    config = DepthConfig(
        classes=(CLASSES,) * LEVELS,
        hidden=dim,
        dim=dim,
        layers=4,
        heads=dim // 128,
        kv_heads=dim // 128,
        head_dim=128,
        ffn=2 * dim,
        ends=True,
        ffn_sets=tuple(range(LEVELS)),
    )
    return spec.Case(rows, config, dtype=dtype)


class Judge:
    """Share of codes that are not those of the reference; bfloat16 rounds near-ties either way."""

    def __init__(self, truth: Callable[[], Tensor]) -> None:
        self.truth = truth
        self.codes_TL: Tensor | None = None

    def share(self, codes_TL: Tensor | None) -> float | None:
        """Raises WrongResult where a contender cannot be doing the work of this case."""
        if codes_TL is None:
            return None
        if self.codes_TL is None:
            self.codes_TL = self.truth()
        share = (codes_TL != self.codes_TL).float().mean().item()
        if share > TRUSTED_WRONG:
            raise WrongResult(f"{share:.1%} of the codes are wrong")
        return share


def head_contenders(case: spec.Case, extended: bool, device: str) -> list[Contender]:
    """LongCat's head; `extended` also by other instruction sets and under torch.compile."""
    arguments = spec.inputs(case, device)
    hidden, weights = arguments["hidden"], arguments["weights"]
    judge = Judge(lambda: depth_decode(hidden, weights, peers.GREEDY, backend="reference").codes)
    ceiling = "fma_avx512" if case.dtype == torch.float32 else None
    precisions = TORCH if case.dtype == torch.float32 else TORCH[:1]

    def contender(name: str, make: Callable[[], Any], **more: Any) -> Contender:
        return Contender(name, make, judge.share, ceiling=ceiling, **more)

    found = [
        contender("ours", lambda: peers.ours(hidden, weights)),
        contender("ours, unprepared", lambda: peers.ours_unprepared(hidden, weights)),
        contender("KV-cached eager", lambda: peers.cached(hidden, weights), precisions=precisions),
    ]
    if case.tokens == 1:
        found.append(contender("floor: weights read", lambda: peers.floor(weights), only_cpu=True))
    if case.dtype == torch.float32:
        found += [
            contender("ours, int8 weights", lambda: peers.ours(hidden, weights, "int8"), only_cpu=True),
            contender("official style", lambda: peers.official_style(hidden, weights), slow=True),
        ]
    if extended:
        found += [
            contender("ours, avx2", lambda: peers.ours_by_isa("avx2", hidden, weights), only_cpu=True),
            contender("ours, portable", lambda: peers.ours_by_isa("portable", hidden, weights), only_cpu=True),
            contender("torch.compile", lambda: peers.compiled(hidden, weights), slow=True),
        ]
    return found


def cold_contenders(case: spec.Case, device: str) -> list[Contender]:
    """The same with nothing of the weights in a cache."""
    names = ("ours", "KV-cached eager", "floor: weights read")
    return [replace(c, precisions=TORCH[:1]) for c in head_contenders(case, False, device) if c.name in names]


def model_contenders(peer: str, make: Callable[[], Any], device: str) -> list[Contender]:
    """Another model's own code, and the op with its weights."""
    call, weights, more, hidden = make()
    judge = Judge(lambda: depth_decode(hidden, weights, peers.GREEDY, backend="reference", **more).codes)
    return [
        Contender("ours", lambda: peers.ours(hidden, weights, **more), judge.share, only_cpu=True),
        Contender(peer, lambda: call, judge.share, precisions=TORCH, only_cpu=True),
        Contender("floor: weights read", lambda: peers.floor(weights), only_cpu=True),
    ]


def draw_contenders(sampling: DepthSampling, rows: int, device: str) -> list[Contender]:
    """Draws of one level, one a row."""
    config = DepthConfig((DRAW_CLASSES,), 1, 1, 0, 1, 1, 1, 1)
    logits = torch.randn(rows, DRAW_CLASSES, generator=torch.Generator().manual_seed(0)) * 2
    params = sampling.table(1, config)[0, 0]
    return [
        Contender("ours", lambda: peers.draw_ours(logits, params), only_cpu=True),
        Contender("official-style sort", lambda: peers.draw_by_sort(logits, params), only_cpu=True),
    ]


def _head(dim: int, rows: int, dtype: torch.dtype, extended: bool = False, cold: bool = False) -> Case:
    case = sizes(dim, rows, dtype)
    short = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    make = partial(cold_contenders, case) if cold else partial(head_contenders, case, extended)
    return Case(f"{'cold ' if cold else ''}D{dim} B{rows} {short}", spec.cost(case), make, cold=cold)


def _model(name: str, peer: str, make: Callable[[], Any], stored: int, read: int) -> Case:
    """`stored` weights, of which `read` are multiplied in a frame."""
    cost = Cost(flops=2 * read, bytes=4 * stored)
    return Case(f"{name} float32", cost, partial(model_contenders, peer, make))


def _draw(name: str, sampling: DepthSampling, rows: int = 1) -> Case:
    cost = Cost(flops=rows * DRAW_CLASSES, bytes=rows * DRAW_CLASSES * 4)
    return Case(f"draw V{DRAW_CLASSES} {name}", cost, partial(draw_contenders, sampling, rows))


FLOAT, HALF = torch.float32, torch.bfloat16
CASES = (
    _head(128, 1, FLOAT),
    _head(512, 1, FLOAT, extended=True),
    _head(512, 1, HALF),
    *(_head(512, 16, dtype) for dtype in (FLOAT, HALF)),
    *(_head(1024, rows, dtype) for rows in (1, 16) for dtype in (FLOAT, HALF)),
    *(_head(512, rows, dtype) for rows in (2, 4, 8, 64) for dtype in (FLOAT, HALF)),
    *(_head(512, 1, dtype, cold=True) for dtype in (FLOAT, HALF)),
    _model("moshi", "moshi LMGen", peers.moshi, 667_000_000, 667_000_000),
    _model("csm", "transformers generate", peers.csm, 178_000_000, 3_690_000_000),
    _model("qwen3-omni", "transformers generate", peers.qwen3_omni, 110_000_000, 1_290_000_000),
    *(_draw(name, sampling) for name, sampling in DRAWS.items()),
)
