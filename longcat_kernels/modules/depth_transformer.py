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

from longcat_kernels.modules._depth_logits import depth_logits
from longcat_kernels.ops.depth_decode import depth_decode
from longcat_kernels.prepared import PreparedDepth
from longcat_kernels.reference.depth_decode import DepthDecoding
from longcat_kernels.reference.depth_sampling import DepthSampling
from longcat_kernels.reference.depth_weights import DepthConfig, DepthLayer, DepthWeights


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
        >>> model.decode(torch.randn(7, 8), tables, DepthSampling(temperature=0.0)).codes.shape
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
        self.config = DepthConfig(
            classes=tuple(size + 1 for size in sizes),
            hidden=hidden,
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head_dim=dim // heads,
            ffn=ffn_width // levels,
            ends=True,
            eps=eps,
            ffn_sets=tuple(range(levels)),
        )
        self._prepared: tuple[list[Any], PreparedDepth] | None = None
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.hidden_proj = nn.Linear(hidden, dim, bias=False)
        self.transformer_layers = nn.ModuleList(
            DepthTransformerLayer(dim, levels, ffn_width, eps) for _ in range(layers)
        )
        self.headnorm = nn.RMSNorm(dim, eps)
        self.heads = nn.ModuleList(nn.Linear(dim, size + 1) for size in sizes)

    def logits(self, hidden: Tensor, codes: Tensor, tables: Sequence[Tensor], *, exact: bool = False) -> list[Tensor]:
        """Teacher-forced logits of all levels in one pass.

        Args:
            hidden: [N, H] backbone states.
            codes: [N, L] int64 in [0, C_l]; a negative code adds nothing. Where all codes before a level are C_l
                ("end"), the level sees zeros. The last level's codes are not read.
            tables: L embedding tables [C_l + 1, H]; the last is not read.
            exact: by `depth_decode` with all codes given, level after level: float32, to the last bit those that
                decoding draws from with the same backend and as many rows; without gradient, and codes must not be
                negative.

        Returns:
            L tensors [N, C_l + 1].

        Raises:
            ValueError: `codes` or `tables` do not have one entry a level.
        """
        levels = self.config.levels
        if codes.shape != (len(hidden), levels):
            raise ValueError(f"DepthTransformer: codes must be [{len(hidden)}, {levels}], got {list(codes.shape)}")
        if len(tables) != levels:
            raise ValueError(f"DepthTransformer: tables must be one a level, {levels}, got {len(tables)}")
        if exact:
            decoding = self.decode(hidden, tables, DepthSampling(end="allow"), prefix=codes, logits=True)
            return list(decoding.logits.split(self.config.classes, dim=1))
        return depth_logits(self.weights(tables), hidden, codes)

    def weights(self, tables: Sequence[Tensor]) -> DepthWeights:
        """The parameters as `depth_decode` takes them: views, no copies."""
        return DepthWeights(
            config=self.config,
            tables=list(tables),
            layers=[cast(DepthTransformerLayer, layer).weights() for layer in self.transformer_layers],
            head_weights=[head.get_parameter("weight") for head in self.heads],
            head_biases=[head.get_parameter("bias") for head in self.heads],
            input_norm=self.hidden_norm.weight,
            projection=self.hidden_proj.weight[None],
            final_norm=self.headnorm.weight[None],
        )

    @torch.no_grad()
    def prepared(self, tables: Sequence[Tensor], precision: str | None = None) -> PreparedDepth:
        """The parameters packed for decoding: takes the place of `tables` in `decode`. Made once, and again where a
        parameter or a table is another tensor than it was; see `PreparedDepth` for `precision`."""
        weights = self.weights(tables)
        key: list[Any] = [
            precision,
            *((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in weights.tensors()),
        ]
        if precision is not None:  # of a rounded copy, which does not see writes
            key += [tensor._version for tensor in weights.tensors()]
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = key, PreparedDepth(weights, precision)
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own prepared form."""
        return {**self.__dict__, "_prepared": None}

    @torch.no_grad()
    def decode(
        self,
        hidden: Tensor,
        tables: Sequence[Tensor] | PreparedDepth,
        sampling: DepthSampling | Tensor | None = None,
        **options: Any,
    ) -> DepthDecoding:
        """Draws the codes of each position: `depth_decode` with this module's weights; hidden is [N, H]."""
        weights = tables if isinstance(tables, PreparedDepth) else self.weights(tables)
        return depth_decode(hidden, weights, sampling, **options)


class DepthTransformerLayer(nn.Module):
    """The parameters of pre-norm causal attention shared by the levels, and of each level's own feed-forward."""

    def __init__(self, dim: int, levels: int, ffn_width: int, eps: float) -> None:
        super().__init__()
        self.levels = levels
        self.layernorm1 = nn.RMSNorm(dim, eps)
        self.self_attention = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(dim, dim, bias=name != "k") for name in ("q", "k", "v", "out")}
        )
        self.layernorm2 = nn.RMSNorm(dim, eps)
        self.linear1 = nn.Linear(dim, ffn_width)
        self.linear2 = nn.Linear(ffn_width, dim)
        for unused in (self.linear1.bias, self.linear2.bias):
            unused.requires_grad_(False)

    def weights(self) -> DepthLayer:
        """Level l owns rows l, l + L, ... of `linear1` and the l-th block of columns of `linear2`."""
        q, k, v, out = (self.self_attention[f"{name}_proj"] for name in ("q", "k", "v", "out"))
        return DepthLayer(
            norm1=self.layernorm1.weight,
            q_weight=q.get_parameter("weight")[None],
            q_bias=q.get_parameter("bias")[None],
            k_weight=k.get_parameter("weight")[None],
            v_weight=v.get_parameter("weight")[None],
            v_bias=v.get_parameter("bias")[None],
            out_weight=out.get_parameter("weight")[None],
            out_bias=out.get_parameter("bias")[None],
            norm2=self.layernorm2.weight,
            up=self.linear1.weight.unflatten(0, (-1, self.levels)).transpose(0, 1),
            down=self.linear2.weight.unflatten(1, (self.levels, -1)).transpose(0, 1),
        )
