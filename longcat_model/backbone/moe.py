"""Shortcut-connected mixture-of-experts layer (LongCat-Flash, arXiv 2509.01322, section 2): the dataflow.

    a0 = r0 + attention0(norm(r0))
    n0 = norm(a0)
    shortcut = experts(n0)                 # depends on n0 alone: may run beside the four steps below
    d0 = a0 + dense0(n0)
    a1 = d0 + attention1(norm(d0))
    out = a1 + dense1(norm(a1)) + shortcut

Dimension key
    B batch    S sequence    D model    T = B * S tokens    E experts, identity ones included    k experts a token
"""

from __future__ import annotations

from torch import Tensor, nn

from longcat_kernels.modules import MoE
from longcat_model import config
from longcat_model.backbone.attention import Context, LatentAttention
from longcat_model.backbone.feedforward import SwiGLU
from longcat_model.backbone.norm import RMSNorm


class ShortcutLayer(nn.Module):
    """Two attention and two dense sub-blocks and one mixture of experts; parameter names are the released ones."""

    def __init__(self, sizes: config.Backbone, index: int) -> None:
        super().__init__()
        hidden, experts = sizes.hidden, sizes.experts
        self.input_layernorm = nn.ModuleList(RMSNorm(hidden, eps=sizes.norm_eps) for _ in range(2))
        self.self_attn = nn.ModuleList(LatentAttention(hidden, sizes.attention, 2 * index + s) for s in range(2))
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(hidden, eps=sizes.norm_eps) for _ in range(2))
        self.mlps = nn.ModuleList(SwiGLU(hidden, sizes.ffn_width) for _ in range(2))
        self.mlp = MoE(hidden, experts.width, experts.real, experts.zero, experts.top_k, experts.scale)

    def forward(self, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [B, S, D]; returns the next hidden state, router logits [T, E] float32 and expert ids [T, k]."""
        hidden = hidden + self.self_attn[0](self.input_layernorm[0](hidden), context)
        normed = self.post_attention_layernorm[0](hidden)
        routed = self.mlp(normed)
        hidden = hidden + self.mlps[0](normed)
        hidden = hidden + self.self_attn[1](self.input_layernorm[1](hidden), context)
        hidden = hidden + self.mlps[1](self.post_attention_layernorm[1](hidden)) + routed.output
        return hidden, routed.router_logits, routed.ids
