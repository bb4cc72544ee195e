"""Depth decoding, defined: a causal transformer over the levels of one position.

Dimension key
    T positions    L levels    V classes of a level    H width of the backbone    D width of the depth transformer
    A heads    K key-value heads    C channels of a head    E width of the tables    N codes of history
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from longcat_kernels.reference._depth_cases import EDGE, MODEL, REFUSALS, Case, cost, inputs
from longcat_kernels.reference.depth_weights import DepthConfig, DepthLayer, DepthWeights
from longcat_kernels.reference.sampling import GUIDANCE, draw, draws, gumbel, seen, wide

__all__ = ["EDGE", "MODEL", "REFUSALS", "Case", "DepthDecoding", "cost", "depth_decode", "inputs"]


class DepthDecoding(NamedTuple):
    codes: Tensor  # [T, L] int64; -1 in rows that are not active
    logprobs: Tensor  # [T, L] float32: of the codes under the untruncated softmax at temperature 1, guidance applied
    drawn_logprobs: Tensor  # [T, L] float32: under the distribution they were drawn from; -inf where it excludes them
    embedding: Tensor  # [T, E] sum of the codes' embeddings, zero where every code is "end"
    logits: Tensor  # [T, sum of V over the levels with heads] float32, before guidance; [T, 0] where not asked for


def depth_decode(
    hidden: Tensor,
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    start: Tensor | None,
    prefix: Tensor | None,
    active: Tensor | None,
    leaders: Tensor | None,
    history: Tensor | None,
    offsets: Tensor | None,
    config: Sequence[int],
    eps: float,
    wants_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draws the codes of each position level by level, with a key-value cache: one row per level through the layers.

    Args:
        weights, config, eps: `DepthWeights.tensors`, `DepthConfig.numbers` and its eps.
        packed: what a kernel made of the weights; not read here.
        params: float32 [T, L, 8], see `sampling.COLUMNS`; may be expanded.
        seeds, steps: int64 [T].
        leaders: int64 [T]: the row whose code each row takes, its own where it draws. A row u that follows another, t,
            lends its logits: c = s * (c_t - c_u) + c_u, in float32, each operation rounded; one follower a leader at
            most. It takes everything else from t as well, and has only its logits to itself.
        others: as in `longcat_kernels.depth_decode`.

    Returns:
        logprobs, drawn_logprobs, embedding, logits, codes.
    """
    sizes = DepthConfig.of(config, eps)
    w = DepthWeights.of(weights, sizes)
    rows, dtype = len(hidden), wide(hidden.dtype)
    leaders_T, followers_T = _pairs(leaders, rows, hidden.device)
    if active is not None:
        active = active[leaders_T]
        hidden = hidden.masked_fill(~active[:, None], 0)
        start = None if start is None else start.masked_fill(~active[:, None], 0)
    levels = list(enumerate(sizes.classes))
    noise = gumbel(seeds, steps, levels) if draws(params) else [None] * len(levels)
    cache = [hidden.new_empty(2, rows, sizes.levels, sizes.kv_heads, sizes.head_dim) for _ in w.layers]
    inputs = Inputs.first(hidden, start, w)
    codes, logprobs, drawn_logprobs, logits = [], [], [], []
    for level, classes in levels:
        z_TD = level_states(inputs.projected(level), w, level, cache)
        forced_T = prefix[leaders_T, level] if prefix is not None and level < prefix.shape[1] else None
        if level < sizes.given:
            assert forced_T is not None
            ids_T, before_T, after_T = forced_T, *hidden.new_zeros(2, rows, dtype=dtype)
        else:
            logits.append(level_logits(z_TD, w, level).to(dtype))
            guided_TV = guided(logits[-1], followers_T, params[:, level, GUIDANCE])
            seen_TV = None if history is None or offsets is None else seen(history[:, level], offsets, classes)
            drawn = draw(guided_TV, params[:, level], noise[level], seen_TV, forced_T)
            ids_T, before_T, after_T = (result[leaders_T] for result in drawn)
        codes.append(ids_T)
        logprobs.append(before_T)
        drawn_logprobs.append(after_T)
        inputs = inputs.after(level, ids_T)
    results = [torch.stack(logprobs, 1), torch.stack(drawn_logprobs, 1), inputs.embedding()]
    results.append(torch.cat([hidden.new_empty(rows, 0, dtype=dtype), *(logits if wants_logits else [])], 1))
    codes_TL = torch.stack(codes, 1)
    if active is not None:
        results = [result.masked_fill(~active[:, None], 0) for result in results]
        codes_TL = codes_TL.masked_fill(~active[:, None], -1)
    return (*results, codes_TL)  # type: ignore[return-value]


class Inputs(NamedTuple):
    """What the codes so far make of the next level's input."""

    hidden: Tensor  # [T, H]
    start: Tensor | None  # [T, D]
    weights: DepthWeights
    total: Tensor  # [T, E] sum of embeddings, wide
    last: Tensor | None  # [T, E] embedding of the last code
    ended: Tensor  # [T] bool: all codes so far are "end"

    @classmethod
    def first(cls, hidden: Tensor, start: Tensor | None, weights: DepthWeights) -> Inputs:
        rows, config = len(hidden), weights.config
        total_TE = hidden.new_zeros(rows, config.width, dtype=wide(hidden.dtype))
        return cls(hidden, start, weights, total_TE, start, hidden.new_full((rows,), config.ends, dtype=torch.bool))

    def after(self, level: int, ids_T: Tensor) -> Inputs:
        table = self.weights.tables[level]
        if table is None:
            return self
        last_TE = table[ids_T]
        ended_T = self.ended & (ids_T == self.weights.config.classes[level] - 1)
        return self._replace(total=self.total + last_TE.to(self.total.dtype), last=last_TE, ended=ended_T)

    def embedding(self) -> Tensor:
        """[T, E] of hidden's dtype."""
        return self.total.masked_fill(self.ended[:, None], 0).to(self.hidden.dtype)

    def projected(self, level: int) -> Tensor:
        """[T, D]: what enters the layers at `level`."""
        w, config = self.weights, self.weights.config
        if config.conditioning == "last+hidden" or level == 0:
            x_TH = self.hidden
        elif config.conditioning == "sum":
            x_TH = self.embedding()
        else:
            assert self.last is not None
            x_TH = self.last
        if w.input_norm is not None:
            x_TH = norm(x_TH, w.input_norm, config.eps)
        z_TD = x_TH
        if w.projection is not None:
            z_TD = linear(x_TH, w.projection, w.projection_bias, config.sets("projection_sets")[level])
        return z_TD + self.last if config.conditioning == "last+hidden" and self.last is not None else z_TD


def level_states(z_TD: Tensor, w: DepthWeights, level: int, cache: Sequence[Tensor]) -> Tensor:
    """[T, D]: through all layers; reads the cached keys and values of the levels before and appends its own."""
    config = w.config
    attention_set, ffn_set = config.sets("attention_sets")[level], config.sets("ffn_sets")[level]
    for layer, keys_values in zip(w.layers, cache, strict=True):
        n_TD = norm(z_TD, layer.norm1, config.eps)
        q_TAC, keys_values[0, :, level], keys_values[1, :, level] = _qkv(n_TD, layer, w, attention_set, level)
        k, v = keys_values[:, :, : level + 1].transpose(2, 3).repeat_interleave(config.heads // config.kv_heads, 2)
        mixed_TD = attended(q_TAC, k, v).flatten(1)
        z_TD = z_TD + linear(mixed_TD, layer.out_weight, layer.out_bias, attention_set)
        n_TD = norm(z_TD, layer.norm2, config.eps)
        up_TF = linear(n_TD, layer.up, None, ffn_set)
        if layer.gate is None:
            act_TF = functional.gelu(up_TF)
        else:
            act_TF = functional.silu(linear(n_TD, layer.gate, None, ffn_set)) * up_TF
        z_TD = z_TD + linear(act_TF, layer.down, None, ffn_set)
    return z_TD


def _qkv(n_TD: Tensor, layer: DepthLayer, w: DepthWeights, number: int, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T, A or K, C] each."""
    q, k, v = (
        linear(n_TD, weight, bias, number).unflatten(-1, (-1, w.config.head_dim))
        for weight, bias in (
            (layer.q_weight, layer.q_bias),
            (layer.k_weight, layer.k_bias),
            (layer.v_weight, layer.v_bias),
        )
    )
    q = q if layer.q_norm is None else norm(q, layer.q_norm, w.config.eps)
    k = k if layer.k_norm is None else norm(k, layer.k_norm, w.config.eps)
    if w.rope is not None:
        q, k = (rotated(x, *w.rope[:, level]) for x in (q, k))
    return q, k, v


def attended(q_TAC: Tensor, k_TALC: Tensor, v_TALC: Tensor) -> Tensor:
    """[T, A, C]: queries against the L levels so far; of one level alone the softmax is 1, whatever its score.

    torch's fused attention would give 0, and not NaN, where every score of a row is NaN.
    """
    if k_TALC.shape[2] == 1:
        return v_TALC[:, :, 0]
    dtype = wide(q_TAC.dtype)
    q, k, v = q_TAC[:, :, None].to(dtype), k_TALC.to(dtype), v_TALC.to(dtype)
    probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (probabilities @ v)[:, :, 0].to(q_TAC.dtype)


def level_logits(z_TD: Tensor, w: DepthWeights, level: int) -> Tensor:
    """[T, V] of a level that has a head."""
    if w.final_norm is not None:
        z_TD = norm(z_TD, w.final_norm[w.config.sets("norm_sets")[level]], w.config.eps)
    head = w.head_weights[level]
    assert head is not None
    return functional.linear(z_TD, head, w.head_biases[level] if w.head_biases else None)


def guided(logits_TV: Tensor, followers_T: Tensor | None, scale_T: Tensor) -> Tensor:
    """Classifier-free guidance: logits = s * (own - follower's) + follower's, in rows that have a follower."""
    if followers_T is None:
        return logits_TV
    other_TV = logits_TV[followers_T]
    mixed_TV = scale_T[:, None].to(logits_TV.dtype) * (logits_TV - other_TV) + other_TV
    is_alone_T = followers_T == torch.arange(len(followers_T), device=followers_T.device)
    return torch.where(is_alone_T[:, None], logits_TV, mixed_TV)


def _pairs(leaders_T: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The row whose code each row takes, and each row's follower, itself where it has none."""
    own_T = torch.arange(rows, device=device)
    if leaders_T is None:
        return own_T, None
    follows_T = leaders_T != own_T
    return leaders_T, own_T.index_put((leaders_T[follows_T],), own_T[follows_T])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
    """By weight set `number`."""
    return functional.linear(x, weight[number], None if bias is None else bias[number])


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the halves of each head against each other; cos and sin [..., C / 2] are float32."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
