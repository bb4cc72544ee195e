"""`depth_decode` inside Moshi (the PyPI package `moshi`): all codes of a frame by one call.

    from longcat_kernels.integrations import moshi
    gen = LMGen(lm_model)
    moshi.patch(gen)

Dimension key
    B rows    L codebooks of the depformer    D width of the depformer    F hidden units
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longcat_kernels.integrations._followed import FollowedWeights
from longcat_kernels.ops.depth_decode import depth_decode
from longcat_kernels.reference.depth_sampling import DepthSampling
from longcat_kernels.reference.depth_weights import DepthConfig, DepthLayer, DepthWeights, rope_table


def patch(gen: Any, *, seed: int = 0) -> None:
    """Makes an `LMGen` draw the codes of its frames by `depth_decode`, with its own temperature, top_k and guidance.

    Before `gen.streaming(...)`. Greedy codes are those it draws itself; samples are of the same distribution, from
    `seed`, row and frame instead of torch's generator. Weights may change later, but not under a CUDA graph.

    Raises:
        ValueError: its depformer has a part that `depth_decode` has not: other norms than RMSNorm, sinusoidal
            positions, LoRA or quantized layers, layer scale, feed-forwards of different widths.
    """
    gen.depformer_step = _DepformerStep(gen, seed)


def unpatch(gen: Any) -> None:
    """Undoes `patch`."""
    vars(gen).pop("depformer_step", None)


def depth_weights(model: Any) -> DepthWeights:
    """The depformer of an `LMModel`: views where each codebook has the same weights, stacked copies where its own.

    `hidden` is the main transformer's output, `start` its `depformer_text_emb` of the text token.

    Raises:
        ValueError: see `patch`.
    """
    depformer, attention = model.depformer, model.depformer.layers[0].self_attn
    levels, schedule = model.dep_q, model.depformer_weights_per_step_schedule
    sets = tuple(schedule or range(levels))
    norms = [layer_norm for layer in depformer.layers for layer_norm in (layer.norm1, layer.norm2)]
    has_final = not isinstance(model.depformer_norms[0], nn.Identity)
    eps = _eps([*norms, *(model.depformer_norms if has_final else ())])
    layers = [_layer(layer, _rope_of(depformer)) for layer in depformer.layers]
    config = DepthConfig(
        classes=(model.card,) * levels,
        hidden=model.depformer_in[0].in_features,
        dim=attention.embed_dim,
        layers=len(layers),
        heads=attention.num_heads,
        kv_heads=attention.num_heads // attention.kv_repeat,
        head_dim=attention.embed_dim // attention.num_heads,
        ffn=layers[0].up.shape[1],
        conditioning="last+hidden",
        gated=layers[0].gate is not None,
        eps=eps,
        attention_sets=sets if len(attention.in_projs) > 1 else (),
        ffn_sets=sets if len(layers[0].up) > 1 else (),
        projection_sets=sets if len(model.depformer_in) > 1 else (),
        norm_sets=tuple(range(levels)) if has_final else (),
    )
    return DepthWeights(
        config=config,
        tables=[*(_table(embedding) for embedding in model.depformer_emb), None],
        layers=layers,
        head_weights=[_weight(linear) for linear in model.linears],
        head_biases=[linear.bias for linear in model.linears],
        projection=_stacked(model.depformer_in),
        final_norm=torch.stack([norm.alpha.flatten() for norm in model.depformer_norms]) if has_final else None,
        rope=_rope(depformer, config, model.depformer_in[0].weight.device),
    )


class _DepformerStep:
    """What a patched `LMGen` has instead of its method: an object and no closure, so that a copy has its own."""

    def __init__(self, gen: Any, seed: int) -> None:
        model = gen.lm_model
        parts = (model.depformer, model.depformer_in, model.depformer_emb, model.depformer_norms, model.linears)
        self.gen, self.seed = gen, seed
        self.weights = FollowedWeights(model, parts, depth_weights)
        self.frames: dict[int, Tensor] = {}  # int64 [rows], by number of rows

    @torch.no_grad()
    def __call__(self, text_token: Tensor, transformer_out: Tensor) -> Tensor:
        """text_token [B], transformer_out [B or 2 B, 1, D of the model] -> [B, L]."""
        gen, rows = self.gen, transformer_out.shape[0]
        is_guided = gen.cfg_coef != 1.0
        if rows not in self.frames:
            self.frames[rows] = torch.zeros(rows, dtype=torch.int64, device=text_token.device)
        sampling = DepthSampling(
            temperature=gen.temp if gen.use_sampling else 0.0, top_k=gen.top_k, guidance=float(gen.cfg_coef)
        )
        codes_BL = depth_decode(
            transformer_out[:, 0],
            self.weights.prepared(),
            sampling,
            seed=self.seed,
            step=self.frames[rows],
            pairs="split" if is_guided else None,
            start=gen.lm_model.depformer_text_emb(text_token.repeat(2) if is_guided else text_token),
        ).codes
        self.frames[rows].add_(1)  # in place: the replay of a CUDA graph counts as well
        return codes_BL[: text_token.shape[0]]


def _layer(layer: Any, rope: str) -> DepthLayer:
    if not isinstance(layer.layer_scale_1, nn.Identity):
        raise ValueError("moshi: depformer_layer_scale must be None for depth_decode, got layers with a scale")
    attention = layer.self_attn
    head_dim = attention.embed_dim // attention.num_heads
    keys = head_dim * (attention.num_heads // attention.kv_repeat)
    q, k, v = _stacked(attention.in_projs).split([attention.embed_dim, keys, keys], dim=1)
    if rope == "rope":  # turns neighbouring channels; depth_decode turns halves
        q, k = (_halves(weight, head_dim) for weight in (q, k))
    gates = layer.gating
    if gates is None:
        gate, up, down = None, _weight(layer.linear1)[None], _weight(layer.linear2)[None]
        if layer.activation is not functional.gelu:
            raise ValueError(f"moshi: activation must be gelu for depth_decode, got {layer.activation}")
    else:
        gates = list(gates) if isinstance(gates, nn.ModuleList) else [gates]
        if any(part.activation is not functional.silu for part in gates):
            raise ValueError(f"moshi: depformer_gating must be silu for depth_decode, got {gates[0].activation}")
        gate, up = _stacked([part.linear_in for part in gates]).chunk(2, dim=1)
        down = _stacked([part.linear_out for part in gates])
    return DepthLayer(
        norm1=layer.norm1.alpha.flatten(),
        q_weight=q,
        k_weight=k,
        v_weight=v,
        out_weight=_stacked(attention.out_projs),
        norm2=layer.norm2.alpha.flatten(),
        up=up,
        down=down,
        gate=gate,
    )


def _eps(norms: Sequence[Any]) -> float:
    found = {getattr(norm, "eps", None) if hasattr(norm, "alpha") else type(norm).__name__ for norm in norms}
    if len(found) != 1 or not isinstance(eps := found.pop(), float):
        raise ValueError("moshi: norms of the depformer must be RMSNorm of one eps for depth_decode, got others")
    return eps


def _weight(linear: Any) -> Tensor:
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"moshi: layers of the depformer must be nn.Linear for depth_decode, got {type(linear).__name__}"
        )
    return linear.weight


def _stacked(linears: Sequence[Any]) -> Tensor:
    weights = [_weight(linear) for linear in linears]
    if len(weights) == 1:
        return weights[0][None]
    if any(weight.shape != weights[0].shape for weight in weights):
        raise ValueError("moshi: depformer_dim_feedforward must be one number for depth_decode, got different ones")
    return torch.stack(weights)


def _table(embedding: Any) -> Tensor:
    """What each id is embedded as."""
    if embedding.norm is None and embedding.low_rank is None and not embedding.demux_second_stream:
        return embedding.weight
    return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))


def _rope_of(depformer: Any) -> str:
    kind: str = depformer.positional_embedding
    if kind not in ("none", "rope", "rope_concat"):
        raise ValueError(f"moshi: depformer_pos_emb must be none, rope or rope_concat for depth_decode, got {kind}")
    return kind


def _rope(depformer: Any, config: DepthConfig, device: torch.device) -> Tensor | None:
    if _rope_of(depformer) == "none":
        return None
    return rope_table(depformer.rope.max_period, config.levels, config.head_dim, device)


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head, the even ones in front of the odd ones."""
    return weight.unflatten(1, (-1, head_dim // 2, 2)).transpose(2, 3).flatten(1, 3)
