"""Teacher forcing: the logits of all levels of a depth transformer in one pass, differentiable.

Dimension key
    N positions    L levels    V classes of a level    H width of the backbone    D width of the depth transformer
    A heads    K key-value heads    C channels of a head    E width of the tables    S weight sets
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from longcat_kernels.reference.depth_decode import norm, rotated
from longcat_kernels.reference.depth_weights import DepthConfig, DepthLayer, DepthWeights


def depth_logits(weights: DepthWeights, hidden: Tensor, codes: Tensor, start: Tensor | None = None) -> list[Tensor]:
    """Logits [N, V] of every level that has a head, from hidden [N, H], codes int64 [N, L] and start [N, D].

    A negative code adds nothing; the last level's codes are not read.
    """
    config = weights.config
    x_NLD = _inputs(weights, hidden, codes, start)
    for layer in weights.layers:
        x_NLD = _layer(x_NLD, layer, weights)
    if weights.final_norm is not None:
        x_NLD = _final_norm(x_NLD, weights.final_norm, config)
    biases = weights.head_biases or [None] * config.levels
    heads = list(zip(x_NLD.unbind(1), weights.head_weights, biases, strict=True))
    return [functional.linear(x_ND, w, b) for x_ND, w, b in heads[config.given :] if w is not None]


def _final_norm(x_NLD: Tensor, weight_SD: Tensor, config: DepthConfig) -> Tensor:
    if len(weight_SD) == 1:
        return norm(x_NLD, weight_SD[0], config.eps)
    return functional.rms_norm(x_NLD, (config.dim,), None, config.eps) * weight_SD[list(config.sets("norm_sets"))]


def _inputs(weights: DepthWeights, hidden: Tensor, codes: Tensor, start: Tensor | None) -> Tensor:
    """[N, L, D]: what enters the layers."""
    config = weights.config
    before_NLE = _embeddings(weights, codes)
    if config.conditioning == "last+hidden":
        first_ND = hidden.new_zeros(len(hidden), config.dim) if start is None else start
        x_NLH = hidden[:, None].expand(-1, config.levels, -1)
    else:
        if config.conditioning == "sum":
            before_NLE = _summed(before_NLE, codes, config.classes if config.ends else None)
        x_NLH = torch.cat([hidden[:, None], before_NLE.to(hidden.dtype)], dim=1)
    if weights.input_norm is not None:
        x_NLH = norm(x_NLH, weights.input_norm, config.eps)
    if weights.projection is not None:
        x_NLH = _linear(x_NLH, weights.projection, weights.projection_bias, config.sets("projection_sets"))
    if config.conditioning == "last+hidden":
        return x_NLH + torch.cat([first_ND[:, None], before_NLE], dim=1)
    return x_NLH


def _embeddings(weights: DepthWeights, codes: Tensor) -> Tensor:
    """[N, L - 1, E]: embeddings of all codes but the last."""
    rows = [
        functional.embedding(codes_N.clamp_min(0), table).masked_fill((codes_N < 0)[:, None], 0)
        for codes_N, table in zip(codes[:, :-1].unbind(1), weights.tables, strict=False)
        if table is not None
    ]
    if not rows:
        return weights.like.new_zeros(len(codes), 0, weights.config.width)
    return torch.stack(rows, dim=1)


def _summed(rows_NLE: Tensor, codes: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Running sums; with `classes`, zeros while all codes are the last class of their level."""
    if not rows_NLE.shape[1]:
        return rows_NLE
    sums_NLE = rows_NLE.cumsum(1)
    if classes is None:
        return sums_NLE
    is_end_NL = codes[:, :-1] == codes.new_tensor(classes[:-1]) - 1
    only_ends_NL = is_end_NL.cummin(1).values if is_end_NL.numel() else is_end_NL
    return sums_NLE.masked_fill(only_ends_NL[..., None], 0)


def _layer(x_NLD: Tensor, layer: DepthLayer, w: DepthWeights) -> Tensor:
    config = w.config
    sets = config.sets("attention_sets")
    n_NLD = norm(x_NLD, layer.norm1, config.eps)
    q, k, v = (
        _linear(n_NLD, weight, bias, sets).unflatten(-1, (-1, config.head_dim))
        for weight, bias in (
            (layer.q_weight, layer.q_bias),
            (layer.k_weight, layer.k_bias),
            (layer.v_weight, layer.v_bias),
        )
    )
    q = q if layer.q_norm is None else norm(q, layer.q_norm, config.eps)
    k = k if layer.k_norm is None else norm(k, layer.k_norm, config.eps)
    if w.rope is not None:
        q, k = (rotated(x, *w.rope[:, :, None]) for x in (q, k))
    if config.heads != config.kv_heads:
        k, v = (x.repeat_interleave(config.heads // config.kv_heads, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed_NALC = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x_NLD = x_NLD + _linear(mixed_NALC.transpose(1, 2).flatten(2), layer.out_weight, layer.out_bias, sets)
    return x_NLD + _feed_forward(norm(x_NLD, layer.norm2, config.eps), layer, config.sets("ffn_sets"))


def _feed_forward(n_NLD: Tensor, layer: DepthLayer, sets: Sequence[int]) -> Tensor:
    is_shared = len(layer.up) == 1
    n = n_NLD if is_shared else n_NLD.transpose(0, 1)
    up = _product(n, layer.up, sets)
    act = functional.gelu(up) if layer.gate is None else functional.silu(_product(n, layer.gate, sets)) * up
    out = _product(act, layer.down, sets)
    return out if is_shared else out.transpose(0, 1)


def _linear(x_NLI: Tensor, weight_SOI: Tensor, bias_SO: Tensor | None, sets: Sequence[int]) -> Tensor:
    """[N, L, O]: level l by weight set sets[l]."""
    if len(weight_SOI) == 1:
        return functional.linear(x_NLI, weight_SOI[0], None if bias_SO is None else bias_SO[0])
    product_NLO = _product(x_NLI.transpose(0, 1), weight_SOI, sets).transpose(0, 1)
    return product_NLO if bias_SO is None else product_NLO + bias_SO[list(sets)]


def _product(x: Tensor, weight_SOI: Tensor, sets: Sequence[int]) -> Tensor:
    """x [..., I] by the one weight set, or x [L, N, I] by those of its levels."""
    if len(weight_SOI) == 1:
        return functional.linear(x, weight_SOI[0])
    is_own = tuple(sets) == tuple(range(len(weight_SOI)))
    return torch.bmm(x, (weight_SOI if is_own else weight_SOI[list(sets)]).mT)
