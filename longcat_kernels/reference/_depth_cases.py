"""Problem sizes of `depth_decode`, its inputs, cost, and the calls it must refuse.

Dimension key as in `depth_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.reference.depth_sampling import DepthSampling
from longcat_kernels.reference.depth_weights import DepthConfig, DepthLayer, DepthWeights, rope_table
from longcat_kernels.spec import Cost, Refusal

GREEDY = DepthSampling(temperature=0.0)
# Seeds, of 230 million, with which the two largest noises of ids 0 to 3, at step 0 and level 0, are 1e-8 to 1.5e-7
# apart, the higher id's being the larger: in float32 they are equal, and the lower id would be drawn.
CLOSE_DRAWS = (26979777, 41319222, 81477903, 100971096, 143927283, 164991487, 177920097, 192188289, 215305997)


@dataclass(frozen=True)
class Case:
    """One problem size and its sampling; `like` names the model whose optional tensors the weights have."""

    tokens: int
    config: DepthConfig
    like: str = "longcat"  # or "moshi", "csm", "qwen"
    sampling: DepthSampling = GREEDY
    pairs: str | None = None  # also "mixed"
    forced: int = 0  # levels given as prefix
    some: bool = False  # some rows are not active, some have a history, prefix and step of their own
    dtype: torch.dtype = torch.float32

    # Logprobs carry the rounding of logits, which are larger than they are, over the temperature.
    tolerance = 4.0

    @property
    def inner(self) -> float:
        """Every product of every layer takes operands that are rounded to the dtype."""
        return 0.0 if self.dtype == torch.float32 else 2 * torch.finfo(self.dtype).eps


def _longcat(classes: tuple[int, ...], hidden: int, dim: int, heads: int, layers: int, ffn: int) -> DepthConfig:
    return DepthConfig(
        classes=classes,
        hidden=hidden,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ffn=ffn,
        ends=True,
        ffn_sets=tuple(range(len(classes))),
    )


_SMALL = _longcat((17, 9, 9, 6), 12, 8, 2, 2, 12)
_MOSHI = DepthConfig(
    classes=(9, 7, 7),
    hidden=10,
    dim=8,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=4,
    ffn=6,
    conditioning="last+hidden",
    gated=True,
    eps=1e-8,
    attention_sets=(0, 1, 1),
    ffn_sets=(0, 1, 2),
    projection_sets=(0, 1, 2),
    norm_sets=(0, 1, 1),
)
_CSM = DepthConfig(
    classes=(11, 11, 5, 11),
    hidden=10,
    dim=12,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=4,
    ffn=10,
    conditioning="last",
    given=1,
    gated=True,
    eps=1e-5,
)
_MIXED_NUMBERS = DepthSampling(
    temperature=torch.tensor([[0.8], [0.0], [1.3], [0.6], [1.0], [0.9], [0.7], [1.1]]),
    top_k=torch.tensor([5, 0, 3, 2]),
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.4,
    guidance=torch.tensor([[2.0], [1.0], [0.5], [3.0], [1.0], [2.0], [1.5], [2.5]]),
    order="joint",
    end=torch.tensor([True, False, False, True]),
)

EDGE = (
    Case(0, _longcat((5, 4), 8, 4, 2, 1, 6), sampling=DepthSampling()),
    Case(1, _longcat((2,), 4, 2, 1, 1, 2)),
    Case(9, _SMALL, sampling=DepthSampling(0.0, end="allow")),
    Case(9, _SMALL, sampling=DepthSampling(0.7, 4, 0.9, end="level0")),
    Case(8, _SMALL, sampling=DepthSampling(guidance=3.0), pairs="interleaved", forced=2),
    Case(8, _SMALL, sampling=_MIXED_NUMBERS, pairs="mixed", some=True),
    Case(6, _SMALL, sampling=DepthSampling(0.5, end="allow"), pairs="split", forced=4, dtype=torch.bfloat16),
    Case(5, _MOSHI, "moshi", DepthSampling(0.9, top_k=3)),
    Case(4, _MOSHI, "moshi", forced=3, dtype=torch.float16),
    Case(5, _CSM, "csm", DepthSampling(0.9, top_p=0.8), forced=1),
    Case(5, replace(_CSM, hidden=12, eps=1e-6), "qwen", forced=1, some=True),
    Case(3, _longcat((3,) * 32, 8, 4, 2, 1, 4), sampling=DepthSampling(min_p=0.1)),
    Case(16, _longcat((64, 64), 32, 32, 2, 2, 48), sampling=DepthSampling(0.8, 8)),
)
_AUDIO = (8193, 4097, 2049, *(1025,) * 5)
MODEL = tuple(
    Case(rows, config, sampling=sampling, dtype=torch.bfloat16)
    for rows, config, sampling in (
        (1, _longcat((16_385,) * 8, 3072, 2048, 16, 4, 4096), DepthSampling(0.5, 1024, 0.75)),
        (16, _longcat(_AUDIO, 3072, 3072, 24, 4, 6144), DepthSampling(0.5, 5, 0.85)),
    )
)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    config, rows = case.config, case.tokens
    prefix = [torch.randint(classes, (rows,), generator=g) for classes in config.classes[: case.forced]]
    arguments: dict[str, Any] = {
        "hidden": torch.randn(rows, config.hidden, generator=g).to(device, case.dtype),
        "weights": random_weights(case, device, g),
        "sampling": _on(case.sampling, device),
        "seed": seed,
        "step": 5,
        "pairs": case.pairs,
        "prefix": torch.stack(prefix, 1).to(device) if prefix else None,
        "logits": True,
    }
    if case.pairs == "mixed":
        arguments["pairs"] = torch.tensor([0, 0, 2, 4, 4, *range(5, rows)]).to(device)
    if config.conditioning == "last+hidden":
        arguments["start"] = torch.randn(rows, config.dim, generator=g).to(device, case.dtype)
    if case.some:
        arguments |= _some_rows(config, rows, device, g)
    return arguments


def _on(sampling: DepthSampling, device: str) -> DepthSampling:
    moved: dict[str, Any] = {n: value.to(device) for n, value in vars(sampling).items() if isinstance(value, Tensor)}
    return replace(sampling, **moved)


def _some_rows(config: DepthConfig, rows: int, device: str, g: torch.Generator) -> dict[str, Any]:
    """Every third row is not active; each has its own step, and a history as long as its number."""
    offsets = torch.tensor([0, *range(rows)]).cumsum(0)
    codes = [torch.randint(-1, classes + 1, (int(offsets[-1]),), generator=g) for classes in config.classes]
    prefix = [torch.randint(0 if level < config.given else -1, 3, (rows,), generator=g) for level in range(2)]
    return {
        "active": (torch.arange(rows) % 3 != 2).to(device),
        "history": (torch.stack(codes, 1).to(device), offsets.to(device)),
        "prefix": torch.stack(prefix, 1).to(device),
        "step": (torch.arange(rows) * 2**33).to(device),
    }


def random_weights(case: Case, device: str, g: torch.Generator) -> DepthWeights:
    """Weights that keep activations at unit size, and biases, so that every term of the formula matters."""
    c, like = case.config, case.like

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(device, case.dtype)

    def matrices(name: str, rows: int, columns: int) -> Tensor:
        return normal(rows, c.count(name), columns, scale=columns**-0.5).transpose(0, 1)

    def layer() -> DepthLayer:
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        biased = {"longcat": "qvo", "csm": "qk"}.get(like, "")
        widths = {"q": queries, "k": keys, "v": keys, "o": c.dim}
        biases = {x: normal(c.count("attention_sets"), n, scale=0.1) for x, n in widths.items() if x in biased}
        return DepthLayer(
            norm1=1 + normal(c.dim, scale=0.1),
            q_weight=matrices("attention_sets", queries, c.dim),
            k_weight=matrices("attention_sets", keys, c.dim),
            v_weight=matrices("attention_sets", keys, c.dim),
            out_weight=matrices("attention_sets", c.dim, queries),
            norm2=1 + normal(c.dim, scale=0.1),
            up=matrices("ffn_sets", c.ffn, c.dim),
            down=normal(c.dim, c.count("ffn_sets"), c.ffn, scale=c.ffn**-0.5).transpose(0, 1),
            gate=matrices("ffn_sets", c.ffn, c.dim) if c.gated else None,
            q_bias=biases.get("q"),
            k_bias=biases.get("k"),
            v_bias=biases.get("v"),
            out_bias=biases.get("o"),
            q_norm=1 + normal(c.head_dim, scale=0.1) if like == "qwen" else None,
            k_norm=1 + normal(c.head_dim, scale=0.1) if like == "qwen" else None,
        )

    last, levels = c.levels - 1, range(c.levels)
    return DepthWeights(
        config=c,
        tables=[None if like == "moshi" and i == last else normal(c.classes[i] + i, c.width) for i in levels],
        layers=[layer() for _ in range(c.layers)],
        head_weights=[None if i < c.given else normal(c.classes[i], c.dim, scale=2 * c.dim**-0.5) for i in levels],
        head_biases=[normal(n, scale=0.1) for n in c.classes] if like == "longcat" else (),
        input_norm=1 + normal(c.hidden, scale=0.1) if like == "longcat" else None,
        projection=None if like == "qwen" else matrices("projection_sets", c.dim, c.hidden),
        projection_bias=normal(c.count("projection_sets"), c.dim, scale=0.1) if like == "csm" else None,
        final_norm=None if like == "moshi" and not c.norm_sets else 1 + normal(c.count("norm_sets"), c.dim, scale=0.1),
        rope=rope_table(500.0, c.levels, c.head_dim, device) if like in ("csm", "qwen") else None,
    )


def cost(case: Case) -> Cost:
    """Each weight read once and multiplied once a position; cached keys and values stay in fast memory."""
    c = case.config
    attention = 2 * (c.heads + c.kv_heads) * c.head_dim * c.dim
    ffn = (3 if c.gated else 2) * c.dim * c.ffn
    heads = sum(c.classes[c.given :]) * c.dim
    products = c.levels * (c.hidden * c.dim + c.layers * (attention + ffn)) + heads
    stored = c.count("projection_sets") * c.hidden * c.dim + heads
    stored += c.layers * (c.count("attention_sets") * attention + c.count("ffn_sets") * ffn)
    rows = case.tokens * c.levels * c.width
    return Cost(flops=2 * case.tokens * products, bytes=case.dtype.itemsize * (stored + rows))


def _weights(**changes: Any) -> Any:
    return lambda a: {"weights": a["weights"]._replace(**changes)}


def _config(**changes: Any) -> Any:
    return lambda a: {"weights": a["weights"]._replace(config=replace(a["weights"].config, **changes))}


def _sampling(**changes: Any) -> Any:
    return lambda a: {"sampling": DepthSampling(**changes)}


def _given(**changes: Any) -> Any:
    return lambda a: changes


_NO_CODES = torch.ones(0, 2, dtype=torch.int64)
REFUSALS = (
    Refusal("hidden must be [T, 8] floating point, got torch.float32 [8]", _given(hidden=torch.ones(8))),
    Refusal("hidden must be [T, 8] floating point, got torch.float32 [2, 7]", _given(hidden=torch.ones(2, 7))),
    Refusal("weights must have 1 to 32 levels, got 0", _config(classes=())),
    Refusal("weights must have at least 1 class at level 1, got 0", _config(classes=(5, 0))),
    Refusal("weights must have 2 classes or more at level 1, one of them end, got 1", _config(classes=(5, 1))),
    Refusal("weights.config.given must be in [0, 2], got 3", _config(given=3)),
    Refusal("weights.config.kv_heads must divide 2 heads, got 3", _config(kv_heads=3)),
    Refusal(
        "weights.config.ffn_sets must be one number a level, 2, or none, got (0, 1, 2)", _config(ffn_sets=(0, 1, 2))
    ),
    Refusal("weights.config.norm_sets must be in [0, 2), got (0, -1)", _config(norm_sets=(0, -1))),
    Refusal("weights.tables must have 2 tensors, one a level, got 0", _weights(tables=[])),
    Refusal(
        "weights.tables must be torch.float32 [5 or more, 8] at level 0, got torch.float32 [4, 8]",
        _weights(tables=[torch.ones(4, 8)] * 2),
    ),
    Refusal(
        "weights.projection must be torch.float32 [1, 4, 8], got torch.float32 [4, 8]",
        _weights(projection=torch.ones(4, 8)),
    ),
    Refusal("weights.projection must be given where dim 4 is not hidden 8", _weights(projection=None)),
    Refusal(
        "weights.head_biases must have 2 tensors, one a level, or none, got 1", _weights(head_biases=[torch.ones(5)])
    ),
    Refusal("weights.head_weights must be given at level 1", lambda a: _no_head(a["weights"])),
    Refusal(
        "weights.final_norm must be torch.float32 [1, 4], got torch.float64 [1, 4]",
        _weights(final_norm=torch.ones(1, 4).double()),
    ),
    Refusal("weights.layers.gate must be given, for gated is True, got None", _config(gated=True)),
    Refusal("temperature must be >= 0 and finite, got -1", _sampling(temperature=-1.0)),
    Refusal("temperature must be >= 0 and finite, got nan", _sampling(temperature=float("nan"))),
    Refusal("top_k must be >= 0 (0 keeps all), got -2", _sampling(top_k=-2)),
    Refusal("top_k must be a whole number, got 2.5", _sampling(top_k=2.5)),
    Refusal("top_p must be in (0, 1], got 0", _sampling(top_p=0.0)),
    Refusal("min_p must be in [0, 1), got 1", _sampling(min_p=1.0)),
    Refusal("repetition_penalty must be > 0 and finite, got 0", _sampling(repetition_penalty=0.0)),
    Refusal("guidance must be finite, got inf", _sampling(guidance=float("inf"))),
    Refusal("order must be sequential, joint or a bool tensor, got 'random'", _sampling(order="random")),
    Refusal("order must be sequential, joint or a bool tensor, got torch.int64", _sampling(order=torch.ones(2).long())),
    Refusal("end must be mask, level0, allow or a bool tensor, got 'stop'", _sampling(end="stop")),
    Refusal("end must be mask, level0, allow or a bool tensor, got torch.int64", _sampling(end=torch.ones(2).long())),
    Refusal("end must be a number or broadcast to [0, 2] on cpu, got [3] on cpu", _sampling(end=torch.ones(3).bool())),
    Refusal("top_p must be a number or broadcast to [0, 2] on cpu, got [3] on cpu", _sampling(top_p=torch.ones(3))),
    Refusal("sampling must be float32 [0, 2, 8], got torch.float32 [0, 3, 8]", _given(sampling=torch.ones(0, 3, 8))),
    Refusal(
        "temperature must be >= 0 and finite, got -1",
        lambda a: {"hidden": torch.ones(1, 8), "sampling": -torch.ones(1, 2, 8)},
    ),
    Refusal(
        "excluded must be a whole number, got 0.5",
        lambda a: {"hidden": torch.ones(1, 8), "sampling": _excluding(0.5)},
    ),
    Refusal(
        "excluded must leave a class at level 0, got 5 of 5",
        lambda a: {"hidden": torch.ones(1, 8), "sampling": _excluding(5)},
    ),
    Refusal("seed must be an int or int64 [0], got torch.float32 [0]", _given(seed=torch.ones(0))),
    Refusal("seed must be an int in [-2^63, 2^63 - 1] or a tensor, got 9223372036854775808", _given(seed=2**63)),
    Refusal("seed must be an int in [-2^63, 2^63 - 1] or a tensor, got 1.5", _given(seed=1.5)),
    Refusal("seed must be on cpu, got meta", _given(seed=torch.ones(0, dtype=torch.int64, device="meta"))),
    Refusal("step must be an int in [0, 2^63) or a tensor, got -1", _given(step=-1)),
    Refusal("step must be in [0, 2^63), got -3", _given(hidden=torch.ones(2, 8), step=torch.tensor([1, -3]))),
    Refusal("step must be an int or int64 [0], got torch.int64 [1]", _given(step=torch.ones(1).long())),
    Refusal("start must be None, for conditioning is sum, got a tensor", _given(start=torch.ones(0, 4))),
    Refusal("prefix must be on cpu, got meta", _given(prefix=_NO_CODES.to("meta"))),
    Refusal(
        "prefix must be int64 [0, P] with P in [0, 2], got torch.int64 [0, 3]", _given(prefix=torch.ones(0, 3).long())
    ),
    Refusal("prefix must be given, for 1 level has no head", lambda a: _config(given=1)(a)),
    Refusal("active must be bool [0], got torch.float32 [0]", _given(active=torch.ones(0))),
    Refusal("pairs must be None, interleaved, split or int64 [0], got 'odd'", _given(pairs="odd")),
    Refusal("pairs must have an even number of rows, got 3", _given(pairs="split", hidden=torch.ones(3, 8))),
    Refusal(
        "pairs must be None, interleaved, split or int64 [0], got torch.int64 [2]", _given(pairs=torch.zeros(2).long())
    ),
    Refusal("pairs must be rows in [0, 2), got 2", _given(pairs=torch.tensor([0, 2]), hidden=torch.ones(2, 8))),
    Refusal(
        "pairs must follow rows that follow themselves, got [1, 0]",
        _given(pairs=torch.tensor([1, 0]), hidden=torch.ones(2, 8)),
    ),
    Refusal(
        "pairs must give a row one follower at most, got [0, 0, 0]",
        _given(pairs=torch.tensor([0, 0, 0]), hidden=torch.ones(3, 8)),
    ),
    Refusal("history must be a tensor of codes and one of offsets, got Tensor", _given(history=_NO_CODES)),
    Refusal(
        "history must be a tensor of codes and one of offsets, got ['Tensor', 'NoneType']",
        _given(history=(_NO_CODES, None)),
    ),
    Refusal(
        "history ids must be int64 [N, 2], got torch.int64 [0, 3]",
        _given(history=(torch.ones(0, 3).long(), torch.zeros(1).long())),
    ),
    Refusal(
        "history offsets must be int64 [1], got torch.int64 [2]", _given(history=(_NO_CODES, torch.zeros(2).long()))
    ),
    Refusal(
        "history offsets must rise from 0 or more to at most 0, got [1]",
        _given(history=(_NO_CODES, torch.ones(1).long())),
    ),
    Refusal("backend must be one of auto, ", _given(backend="gpu")),
)


def _no_head(weights: DepthWeights) -> dict[str, Any]:
    return {"weights": weights._replace(head_weights=[weights.head_weights[0], None])}


def _excluding(count: float) -> Tensor:
    params = torch.tensor([1.0, 0, 1, 0, 1, count, 1, 0])
    return params.expand(1, 2, 8)
