"""Bidirectional transformer block over packed patches, of the pixel decoder and the refiner.

Pre-norm attention with 2-D rotary positions and SwiGLU, both with the sub-norms of the released pixel decoder; with
`modulated`, the scales and tanh gates of the released refiner (Lumina-2 style).

Dimension key
    T patches    D width    F hidden units of the MLP
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from longcat_model.tokenizers.vision.packing import Segments, attend

EPS = 1e-6


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, *, modulated: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.RMSNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.inner_attn_ln = nn.RMSNorm(width, eps=EPS)
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.RMSNorm(width, eps=EPS)
        self.gate_up = nn.Linear(width, 2 * mlp_width)
        self.ffn_ln = nn.RMSNorm(mlp_width, eps=EPS)
        self.down = nn.Linear(mlp_width, width)
        self.modulation = nn.Linear(width, 4 * width) if modulated else None

    def forward(
        self, x: Tensor, segments: Segments, rope: tuple[Tensor, Tensor], condition: Tensor | None = None
    ) -> Tensor:
        """Maps [T, D] to [T, D]; `condition` [T, D] is what a modulated block reads its scales and gates from."""
        if self.modulation is None:
            x = x + self._attention(self.norm1(x), segments, rope)
            return x + self._mlp(self.norm2(x))
        scale1, gate1, scale2, gate2 = self.modulation(condition).chunk(4, dim=-1)
        x = x + gate1.tanh() * self._attention(self.norm1(x) * (1 + scale1), segments, rope)
        return x + gate2.tanh() * self._mlp(self.norm2(x) * (1 + scale2))

    def _attention(self, x_TD: Tensor, segments: Segments, rope: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv(x_TD).unflatten(1, (3, self.heads, -1))
        return self.out_proj(self.inner_attn_ln(attend(qkv, segments, *rope).flatten(1)))

    def _mlp(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(self.ffn_ln(silu(gate_TF) * up_TF))
