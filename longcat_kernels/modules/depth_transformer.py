"""The depth transformer: predicts the codes of one position level by level (LongCat-Next report, section 2.5.2).

Dimension key
    N positions    L levels    H width of the backbone    D width of the depth transformer    F hidden units of a level
    C codebook entries of a level; its classes and table rows are C + 1, the last of them "end"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from longcat_kernels.ops.depth_decode import depth_decode
from longcat_kernels.reference.depth_decode import DepthDecoding, DepthLayer, DepthWeights


class DepthTransformer(nn.Module):
    """Released state dict names; level l conditions on the summed embeddings of the levels before it.

    The released checkpoint stores `linear1` with the rows of the levels interleaved, `linear2` with their columns in
    blocks, and biases for both that the model never adds: they are kept, without gradient, so that it loads strictly.

    Args:
        hidden: width of the backbone states.
        dim: width of the transformer.
        heads: attention heads; must divide dim.
        layers: transformer layers.
        ffn_scale: hidden units of all levels together, in units of dim; ffn_scale * dim must be a multiple of L.
        sizes: codebook entries of each level; a level has one class more, "end".
        eps: of every norm.

    Raises:
        ValueError: no level or one without an entry, `heads` does not divide `dim`, or L does not divide ffn_scale *
            dim.

    Example:
        >>> model = DepthTransformer(hidden=8, dim=4, heads=2, layers=1, ffn_scale=4, sizes=(5, 3))
        >>> tables = [torch.randn(6, 8), torch.randn(4, 8)]
        >>> [tuple(logits.shape) for logits in model.logits(torch.randn(7, 8), torch.zeros(7, 2).long(), tables)]
        [(7, 6), (7, 4)]
        >>> model.decode(torch.randn(7, 8), tables, temperature=0.0).codes.shape
        torch.Size([7, 2])
    """

    def __init__(
        self, hidden: int, dim: int, heads: int, layers: int, ffn_scale: int, sizes: Sequence[int], *, eps: float = 1e-6
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"DepthTransformer: sizes must be one or more numbers of at least 1, got {list(sizes)}")
        if heads < 1 or dim % heads:
            raise ValueError(f"DepthTransformer: heads must divide dim {dim}, got {heads}")
        levels, ffn_width = len(sizes), ffn_scale * dim
        if ffn_width % levels:
            raise ValueError(
                f"DepthTransformer: ffn_scale * dim must be a multiple of {levels} levels, got {ffn_width}"
            )
        self.sizes, self.heads_count, self.eps = tuple(sizes), heads, eps
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.hidden_proj = nn.Linear(hidden, dim, bias=False)
        self.transformer_layers = nn.ModuleList(
            DepthTransformerLayer(dim, heads, levels, ffn_width, eps) for _ in range(layers)
        )
        self.headnorm = nn.RMSNorm(dim, eps)
        self.heads = nn.ModuleList(nn.Linear(dim, size + 1) for size in sizes)

    def logits(self, hidden: Tensor, codes: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
        """Teacher-forced logits of all levels in one pass.

        Args:
            hidden: [N, H] backbone states.
            codes: [N, L] int64 in [0, C_l]; a negative code adds nothing. Where all codes before a level are C_l
                ("end"), the level sees zeros. The last level's codes are not read.
            tables: L embedding tables [C_l + 1, H]; the last is not read.

        Returns:
            L tensors [N, C_l + 1].

        Raises:
            ValueError: `codes` or `tables` do not have one entry a level.
        """
        if codes.shape != (len(hidden), len(self.sizes)):
            raise ValueError(
                f"DepthTransformer: codes must be [{len(hidden)}, {len(self.sizes)}], got {list(codes.shape)}"
            )
        x_NLH = torch.cat([hidden[:, None], self._conditions(codes, tables).to(hidden.dtype)], dim=1)
        z_NLD = self.hidden_proj(self.hidden_norm(x_NLH))
        for layer in self.transformer_layers:
            z_NLD = layer(z_NLD)
        z_NLD = self.headnorm(z_NLD)
        return [head(z_ND) for head, z_ND in zip(self.heads, z_NLD.unbind(1), strict=True)]

    def _conditions(self, codes: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """[N, L - 1, H] what levels 1.. see: the running sum of the embeddings before them."""
        if len(tables) != len(self.sizes):
            raise ValueError(f"DepthTransformer: tables must be one a level, {len(self.sizes)}, got {len(tables)}")
        if len(self.sizes) == 1:
            return tables[0].new_zeros(len(codes), 0, tables[0].shape[1])
        codes_NL = codes[:, :-1]
        rows = [functional.embedding(c, t) for c, t in zip(codes_NL.clamp_min(0).unbind(1), tables, strict=False)]
        rows_NLH = torch.stack(rows, dim=1).masked_fill((codes_NL < 0)[..., None], 0)
        is_end_NL = codes_NL == codes.new_tensor(self.sizes[:-1])
        only_ends_NL = is_end_NL.cummin(1).values if is_end_NL.numel() else is_end_NL
        return rows_NLH.cumsum(1).masked_fill(only_ends_NL[..., None], 0)

    def weights(self, tables: Sequence[Tensor]) -> DepthWeights:
        """The parameters as `depth_decode` takes them: views, no copies."""
        return DepthWeights(
            tables=list(tables),
            hidden_norm=self.hidden_norm.weight,
            hidden_proj=self.hidden_proj.weight,
            layers=[cast(DepthTransformerLayer, layer).weights() for layer in self.transformer_layers],
            headnorm=self.headnorm.weight,
            head_weights=[head.get_parameter("weight") for head in self.heads],
            head_biases=[head.get_parameter("bias") for head in self.heads],
            heads=self.heads_count,
            eps=self.eps,
        )

    @torch.no_grad()
    def decode(self, hidden: Tensor, tables: Sequence[Tensor], **sampling: Any) -> DepthDecoding:
        """Draws the codes of each position: `depth_decode` with this module's weights; hidden is [N, H]."""
        return depth_decode(hidden, self.weights(tables), **sampling)


class DepthTransformerLayer(nn.Module):
    """Pre-norm causal attention shared by the levels, then a feed-forward of each level's own."""

    def __init__(self, dim: int, heads: int, levels: int, ffn_width: int, eps: float) -> None:
        super().__init__()
        self.levels = levels
        self.layernorm1 = nn.RMSNorm(dim, eps)
        self.self_attention = DepthAttention(dim, heads)
        self.layernorm2 = nn.RMSNorm(dim, eps)
        self.linear1 = nn.Linear(dim, ffn_width)
        self.linear2 = nn.Linear(ffn_width, dim)
        for unused in (self.linear1.bias, self.linear2.bias):
            unused.requires_grad_(False)

    @property
    def up(self) -> Tensor:
        """[L, F, D]: level l owns rows l, l + L, ... of the stored matrix."""
        return self.linear1.weight.unflatten(0, (-1, self.levels)).transpose(0, 1)

    @property
    def down(self) -> Tensor:
        """[L, D, F]: level l owns the l-th block of columns of the stored matrix."""
        return self.linear2.weight.unflatten(1, (self.levels, -1)).transpose(0, 1)

    def forward(self, z: Tensor) -> Tensor:
        """z [N, L, D] -> [N, L, D]."""
        z_NLD = z + self.self_attention(self.layernorm1(z))
        n_LND = self.layernorm2(z_NLD).transpose(0, 1)
        act_LNF = functional.gelu(torch.bmm(n_LND, self.up.mT))
        return z_NLD + torch.bmm(act_LNF, self.down.mT).transpose(0, 1)

    def weights(self) -> DepthLayer:
        attention = self.self_attention
        return DepthLayer(
            norm1=self.layernorm1.weight,
            q_weight=attention.q_proj.weight,
            q_bias=attention.q_proj.bias,
            k_weight=attention.k_proj.weight,
            v_weight=attention.v_proj.weight,
            v_bias=attention.v_proj.bias,
            out_weight=attention.out_proj.weight,
            out_bias=attention.out_proj.bias,
            norm2=self.layernorm2.weight,
            up=self.up,
            down=self.down,
        )


class DepthAttention(nn.Module):
    """Causal multi-head attention over the levels, without positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, D] -> [N, L, D]."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_NHLC = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed_NHLC.transpose(1, 2).flatten(2))
