"""Layers of transformers' models that are built like Llama's, as `depth_decode` takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels.reference.depth_weights import DepthLayer


def depth_layer(layer: Any) -> DepthLayer:
    """Views of a decoder layer's weights; norms of heads where it has them."""
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    biases = {
        f"{name}_bias": None if linear.bias is None else linear.bias[None]
        for name, linear in (("q", q), ("k", k), ("v", v), ("out", out))
    }
    return DepthLayer(
        norm1=layer.input_layernorm.weight,
        q_weight=q.weight[None],
        k_weight=k.weight[None],
        v_weight=v.weight[None],
        out_weight=out.weight[None],
        norm2=layer.post_attention_layernorm.weight,
        up=mlp.up_proj.weight[None],
        down=mlp.down_proj.weight[None],
        gate=mlp.gate_proj.weight[None],
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        **biases,
    )


def rope_of(name: str, rotary: Any, levels: int) -> Tensor:
    """[2, levels, C / 2] float32: the rotary positions of a model's own frequencies."""
    if "dynamic" in rotary.rope_type or rotary.rope_type == "longrope":
        raise ValueError(f"{name}: rope_type must have fixed frequencies for depth_decode, got {rotary.rope_type}")
    positions_L = torch.arange(levels, dtype=torch.float32, device=rotary.inv_freq.device)
    angle_Lc = positions_L[:, None] * rotary.inv_freq.float()
    return torch.stack([angle_Lc.cos(), angle_Lc.sin()]) * rotary.attention_scaling


def silu_only(name: str, config: Any) -> None:
    """Raises ValueError for feed-forwards that `depth_decode` has not."""
    if config.hidden_act != "silu":
        raise ValueError(f"{name}: hidden_act must be silu for depth_decode, got {config.hidden_act}")
    if getattr(config, "mlp_bias", False):
        raise ValueError(f"{name}: mlp_bias must be False for depth_decode, got True")
