"""Depth decoding, defined: a causal transformer over the levels of one position, cases and cost.

Dimension key
    T positions    L levels    H width of the backbone    D width of the depth transformer    F hidden units of a level
    C codebook entries of a level; its classes and table rows are C + 1, the last of them "end"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from longcat_kernels.reference.sampling import choose_ids, gumbel, logprobs_of
from longcat_kernels.spec import Cost, Refusal


class DepthLayer(NamedTuple):
    """One transformer layer; attention is shared by the levels, the feed-forward is each level's own."""

    norm1: Tensor  # [D]
    q_weight: Tensor  # [D, D]
    q_bias: Tensor  # [D]
    k_weight: Tensor  # [D, D]
    v_weight: Tensor  # [D, D]
    v_bias: Tensor  # [D]
    out_weight: Tensor  # [D, D]
    out_bias: Tensor  # [D]
    norm2: Tensor  # [D]
    up: Tensor  # [L, F, D], any strides
    down: Tensor  # [L, D, F], any strides


class DepthWeights(NamedTuple):
    """What a depth transformer is made of; float tensors of one dtype."""

    tables: list[Tensor]  # L embedding tables [C_l + 1, H], may overlap in memory
    hidden_norm: Tensor  # [H]
    hidden_proj: Tensor  # [D, H]
    layers: list[DepthLayer]
    headnorm: Tensor  # [D]
    head_weights: list[Tensor]  # L classifiers [C_l + 1, D]
    head_biases: list[Tensor]  # L of [C_l + 1]
    heads: int  # attention heads
    eps: float = 1e-6  # of every norm

    def tensors(self) -> list[Tensor]:
        """All tensors in one list, as the op's schema takes them; `of` puts them back."""
        per_layer = [tensor for layer in self.layers for tensor in layer]
        single = [self.hidden_norm, self.hidden_proj, self.headnorm]
        return [*single, *per_layer, *self.tables, *self.head_weights, *self.head_biases]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], levels: int, heads: int, eps: float) -> DepthWeights:
        (hidden_norm, hidden_proj, headnorm), rest = tensors[:3], tensors[3:]
        ends = len(rest) - 3 * levels
        layers = [DepthLayer(*rest[i : i + len(DepthLayer._fields)]) for i in range(0, ends, len(DepthLayer._fields))]
        tables, head_weights, head_biases = (list(rest[ends + i * levels :][:levels]) for i in range(3))
        return cls(tables, hidden_norm, hidden_proj, layers, headnorm, head_weights, head_biases, heads, eps)


class DepthDecoding(NamedTuple):
    codes: Tensor  # [T, L] int64
    logprobs: Tensor  # [T, L] float32: of the codes under the untruncated softmax at temperature 1
    embedding: Tensor  # [T, H] sum of the codes' embeddings, zero where every code is "end"


def depth_decode(
    hidden: Tensor,
    tensors: Sequence[Tensor],
    seeds: Tensor,
    prefix: Tensor | None,
    levels: int,
    heads: int,
    eps: float,
    temperature: float,
    top_k: int,
    top_p: float,
    step: int,
    guidance: float | None,
    end: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the codes of each position level by level, with a key-value cache: one row per level through the layers.

    Level l sees u_l = hidden at l = 0, else the sum of the embeddings of the codes before it, or zeros while all of
    those are "end": z = proj(norm(u)), layers, logits_l = head_l(norm(z)). Returns logprobs, embedding, codes.
    """
    weights = DepthWeights.of(tensors, levels, heads, eps)
    sizes = [len(table) for table in weights.tables]
    pairs = 1 if guidance is None else 2
    noise = gumbel(seeds[::pairs], step, list(enumerate(sizes))) if temperature > 0 else [None] * len(sizes)
    cache = [hidden.new_empty(2, len(hidden), len(sizes), len(weights.headnorm)) for _ in weights.layers]
    input_TH, total_TH = hidden, torch.zeros_like(hidden)
    ended_T1 = torch.ones(len(hidden), 1, dtype=torch.bool, device=hidden.device)
    codes, logprobs = [], []
    for level, size in enumerate(sizes):
        logits_TC = guided(level_logits(input_TH, weights, level, cache), guidance)
        if prefix is not None and level < prefix.shape[1]:
            ids_T = prefix[::pairs, level]
        else:
            ids_T = choose_ids(without_end(logits_TC, end, level), noise[level], temperature, top_k, top_p)
        logprobs.append(logprobs_of(logits_TC, ids_T).repeat_interleave(pairs))
        codes.append(ids_T.repeat_interleave(pairs))
        total_TH = total_TH + weights.tables[level][codes[-1]]
        ended_T1 = ended_T1 & (codes[-1] == size - 1)[:, None]
        input_TH = total_TH.masked_fill(ended_T1, 0)
    return torch.stack(logprobs, 1), input_TH, torch.stack(codes, 1)


def level_logits(input_TH: Tensor, weights: DepthWeights, level: int, cache: Sequence[Tensor]) -> Tensor:
    """[T, C + 1] logits of one level; reads the cached keys and values of the levels before and appends its own."""
    z_TD = functional.linear(_norm(input_TH, weights.hidden_norm, weights.eps), weights.hidden_proj)
    for layer, keys_values in zip(weights.layers, cache, strict=True):
        n_TD = _norm(z_TD, layer.norm1, weights.eps)
        keys_values[0, :, level] = functional.linear(n_TD, layer.k_weight)
        keys_values[1, :, level] = functional.linear(n_TD, layer.v_weight, layer.v_bias)
        q_THC = functional.linear(n_TD, layer.q_weight, layer.q_bias).unflatten(-1, (weights.heads, -1))
        k, v = keys_values[:, :, : level + 1].unflatten(-1, (weights.heads, -1)).transpose(2, 3)
        mixed_TD = functional.scaled_dot_product_attention(q_THC[:, :, None], k, v).flatten(1)
        z_TD = z_TD + functional.linear(mixed_TD, layer.out_weight, layer.out_bias)
        up_TF = functional.linear(_norm(z_TD, layer.norm2, weights.eps), layer.up[level])
        z_TD = z_TD + functional.linear(functional.gelu(up_TF), layer.down[level])
    normed_TD = _norm(z_TD, weights.headnorm, weights.eps)
    return functional.linear(normed_TD, weights.head_weights[level], weights.head_biases[level])


def guided(logits_TC: Tensor, guidance: float | None) -> Tensor:
    """Classifier-free guidance over rows [conditional, unconditional, conditional, ...]: one row a pair."""
    if guidance is None:
        return logits_TC
    conditional, unconditional = logits_TC[::2], logits_TC[1::2]
    return guidance * (conditional - unconditional) + unconditional


def without_end(logits_TC: Tensor, end: str, level: int) -> Tensor:
    """The last class out of reach, unless `end` allows it at this level."""
    if end == "allow" or (end == "level0" and level == 0):
        return logits_TC
    return torch.cat([logits_TC[:, :-1], logits_TC.new_full((len(logits_TC), 1), -torch.inf)], dim=1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


@dataclass(frozen=True)
class Case:
    """One problem size and its sampling."""

    tokens: int
    sizes: tuple[int, ...]
    hidden: int
    dim: int
    heads: int
    layers: int
    width: int  # hidden units of a level
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float | None = None
    end: str = "mask"
    forced: int = 0  # levels given as prefix
    dtype: torch.dtype = torch.float32


EDGE = (
    Case(0, (4, 3), 8, 4, 2, 1, 6),
    Case(1, (1,), 4, 2, 1, 1, 2, temperature=0),
    Case(9, (16, 8, 8, 5), 12, 8, 2, 2, 12, temperature=0, end="allow"),
    Case(9, (16, 8, 8, 5), 12, 8, 2, 2, 12, temperature=0.7, top_k=4, top_p=0.9, end="level0"),
    Case(8, (16, 8, 8, 5), 12, 8, 2, 2, 12, guidance=3.0, forced=2),
)
MODEL = (
    Case(1, (16_384,) * 8, 3072, 2048, 16, 4, 4096, temperature=0.5, top_k=1024, top_p=0.75, dtype=torch.bfloat16),
    Case(16, (8192, 4096, 2048, *(1024,) * 5), 3072, 3072, 24, 4, 6144, 0.5, 5, 0.85, dtype=torch.bfloat16),
)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    prefix = [torch.randint(size, (case.tokens,), generator=g) for size in case.sizes[: case.forced]]
    return {
        "hidden": torch.randn(case.tokens, case.hidden, generator=g).to(device, case.dtype),
        "weights": random_weights(case, device, g),
        "temperature": case.temperature,
        "top_k": case.top_k,
        "top_p": case.top_p,
        "seed": seed,
        "step": 5,
        "guidance": case.guidance,
        "end": case.end,
        "prefix": torch.stack(prefix, 1).to(device) if prefix else None,
    }


def random_weights(case: Case, device: str, g: torch.Generator) -> DepthWeights:
    """Weights that keep activations at unit size, and biases, so that every term of the formula matters."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(device, case.dtype)

    levels, dim, width = len(case.sizes), case.dim, case.width
    square = dim**-0.5

    def layer() -> DepthLayer:
        return DepthLayer(
            norm1=1 + normal(dim, scale=0.1),
            q_weight=normal(dim, dim, scale=square),
            q_bias=normal(dim, scale=0.1),
            k_weight=normal(dim, dim, scale=square),
            v_weight=normal(dim, dim, scale=square),
            v_bias=normal(dim, scale=0.1),
            out_weight=normal(dim, dim, scale=square),
            out_bias=normal(dim, scale=0.1),
            norm2=1 + normal(dim, scale=0.1),
            up=normal(width, levels, dim, scale=square).transpose(0, 1),
            down=normal(dim, levels, width, scale=width**-0.5).transpose(0, 1),
        )

    return DepthWeights(
        tables=[normal(size + 1, case.hidden) for size in case.sizes],
        hidden_norm=1 + normal(case.hidden, scale=0.1),
        hidden_proj=normal(dim, case.hidden, scale=case.hidden**-0.5),
        layers=[layer() for _ in range(case.layers)],
        headnorm=1 + normal(dim, scale=0.1),
        head_weights=[normal(size + 1, dim, scale=2 * square) for size in case.sizes],
        head_biases=[normal(size + 1, scale=0.1) for size in case.sizes],
        heads=case.heads,
    )


def cost(case: Case) -> Cost:
    """Each weight read once and multiplied once a position; cached keys and values stay in fast memory."""
    dim, levels = case.dim, len(case.sizes)
    per_level = case.hidden * dim + case.layers * (4 * dim * dim + 2 * dim * case.width)
    products = levels * per_level + sum(case.sizes) * dim
    stored = case.hidden * dim + case.layers * (4 * dim * dim + 2 * levels * dim * case.width) + sum(case.sizes) * dim
    return Cost(
        flops=2 * case.tokens * products, bytes=case.dtype.itemsize * (stored + case.tokens * levels * case.hidden)
    )


REFUSALS = (
    Refusal("hidden must be [T, 8] floating point, got torch.float32 [8]", lambda a: {"hidden": torch.ones(8)}),
    Refusal("hidden must be [T, 8] floating point, got torch.float32 [2, 7]", lambda a: {"hidden": torch.ones(2, 7)}),
    Refusal("weights must have 1 to 32 levels, got 0", lambda a: {"weights": a["weights"]._replace(tables=[])}),
    Refusal(
        "weights.hidden_proj must be [D, H], got [3]",
        lambda a: {"weights": a["weights"]._replace(hidden_proj=torch.ones(3))},
    ),
    Refusal(
        "weights.tables must be [C + 1, 8] with C at least 1, got [1, 8]",
        lambda a: {"weights": a["weights"]._replace(tables=[torch.ones(1, 8)] * 2)},
    ),
    Refusal("weights must have heads that divide 4, got 3", lambda a: {"weights": a["weights"]._replace(heads=3)}),
    Refusal(
        "weights.head_biases must have 2 tensors, one a level, got 1",
        lambda a: {"weights": a["weights"]._replace(head_biases=a["weights"].head_biases[:1])},
    ),
    Refusal(
        "weights.headnorm must be torch.float32 [4], got torch.float32 [5]",
        lambda a: {"weights": a["weights"]._replace(headnorm=torch.ones(5))},
    ),
    Refusal("temperature must be >= 0 and finite, got -1", lambda a: {"temperature": -1.0}),
    Refusal("top_k must be >= 0 (0 keeps all), got -2", lambda a: {"top_k": -2}),
    Refusal("top_p must be in (0, 1], got 0", lambda a: {"top_p": 0.0}),
    Refusal("seed must be an int or int64 [0], got torch.float32 [0]", lambda a: {"seed": torch.ones(0)}),
    Refusal("seed must be an int in [-2^63, 2^63 - 1] or a tensor, got 9223372036854775808", lambda a: {"seed": 2**63}),
    Refusal("seed must be an int in [-2^63, 2^63 - 1] or a tensor, got 1.5", lambda a: {"seed": 1.5}),
    Refusal("seed must be on cpu, got meta", lambda a: {"seed": torch.ones(0, dtype=torch.int64, device="meta")}),
    Refusal(
        "prefix must be on cpu, got meta", lambda a: {"prefix": torch.ones(0, 1, dtype=torch.int64, device="meta")}
    ),
    Refusal("step must be in [0, 2^63), got -1", lambda a: {"step": -1}),
    Refusal("end must be mask, level0 or allow, got 'stop'", lambda a: {"end": "stop"}),
    Refusal("guidance must have rows in pairs, got 3 rows", lambda a: {"guidance": 2.0, "hidden": torch.ones(3, 8)}),
    Refusal(
        "prefix must be int64 [0, P] with P <= 2, got torch.int64 [0, 3]", lambda a: {"prefix": torch.ones(0, 3).long()}
    ),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
