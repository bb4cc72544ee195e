"""What a depth transformer is: its sizes as plain numbers, and its weights as `depth_decode` takes them.

One description covers LongCat-Next's heads, Moshi's depformer, CSM's depth decoder and Qwen3-Omni's code predictor.

Dimension key
    L levels    V classes of a level    H width of the backbone    D width of the depth transformer    A heads
    K key-value heads    C channels of a head    F hidden units    E width of the tables    S weight sets
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CONDITIONINGS = ("sum", "last", "last+hidden")
SETS = ("attention_sets", "ffn_sets", "projection_sets", "norm_sets")
_HEADER = 12  # numbers before those of each level


@dataclass(frozen=True)
class DepthConfig:
    """Sizes and rules of a depth transformer.

    What level l is given, in front of its layers:
        "sum"          u_0 = hidden, u_l = sum of the embeddings of the codes before l;  z = projection(norm(u_l))
        "last"         u_0 = hidden, u_l = embedding of code l - 1;                      z = projection(norm(u_l))
        "last+hidden"  z = projection(norm(hidden)) + embedding of code l - 1; at level 0 `start`, or nothing
    """

    classes: tuple[int, ...]  # ids of each level, "end" included where there is one
    hidden: int  # H
    dim: int  # D
    layers: int
    heads: int  # A
    kv_heads: int  # K: divides the heads
    head_dim: int  # C
    ffn: int  # F
    conditioning: str = "sum"
    given: int = 0  # levels at the front that have no head: their codes come as `prefix`
    ends: bool = False  # the last class is "end"; while all codes are "end" their sum is zeros
    gated: bool = False  # SwiGLU instead of GELU
    eps: float = 1e-6  # of every RMSNorm
    attention_sets: tuple[int, ...] = ()  # the weight set of each level; (): one for all
    ffn_sets: tuple[int, ...] = ()
    projection_sets: tuple[int, ...] = ()
    norm_sets: tuple[int, ...] = ()  # of the norm before the heads

    @property
    def levels(self) -> int:
        return len(self.classes)

    @property
    def width(self) -> int:
        """E: width of the tables."""
        return self.dim if self.conditioning == "last+hidden" else self.hidden

    def sets(self, name: str) -> tuple[int, ...]:
        """The weight set of each level, `name` as the field is called."""
        return getattr(self, name) or (0,) * self.levels

    def count(self, name: str) -> int:
        """S: how many weight sets there are."""
        return 1 + max(self.sets(name))

    def numbers(self) -> list[int]:
        """All but `eps` as the op's schema takes them; `of` puts them back.

        L, hidden, dim, layers, heads, kv_heads, head_dim, ffn, given, conditioning (its place in `CONDITIONINGS`),
        ends, gated; then L each: classes, attention_sets, ffn_sets, projection_sets, norm_sets.
        """
        rules = [self.given, CONDITIONINGS.index(self.conditioning), int(self.ends), int(self.gated)]
        sizes = [self.hidden, self.dim, self.layers, self.heads, self.kv_heads, self.head_dim, self.ffn]
        per_level = [number for name in SETS for number in self.sets(name)]
        return [self.levels, *sizes, *rules, *self.classes, *per_level]

    @classmethod
    def of(cls, numbers: Sequence[int], eps: float) -> DepthConfig:
        levels, hidden, dim, layers, heads, kv_heads, head_dim, ffn, given, conditioning, ends, gated = numbers[
            :_HEADER
        ]
        classes, *sets = (tuple(numbers[_HEADER + i * levels :][:levels]) for i in range(1 + len(SETS)))
        return cls(
            classes=classes,
            hidden=hidden,
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=ffn,
            conditioning=CONDITIONINGS[conditioning],
            given=given,
            ends=bool(ends),
            gated=bool(gated),
            eps=eps,
            **dict(zip(SETS, sets, strict=True)),
        )


class DepthLayer(NamedTuple):
    """One transformer layer; matrices are stacked by weight set, with any strides."""

    norm1: Tensor  # [D]
    q_weight: Tensor  # [S, A C, D]
    k_weight: Tensor  # [S, K C, D]
    v_weight: Tensor  # [S, K C, D]
    out_weight: Tensor  # [S, D, A C]
    norm2: Tensor  # [D]
    up: Tensor  # [S, F, D]
    down: Tensor  # [S, D, F]
    gate: Tensor | None = None  # [S, F, D]: of SwiGLU
    q_bias: Tensor | None = None  # [S, A C]
    k_bias: Tensor | None = None  # [S, K C]
    v_bias: Tensor | None = None  # [S, K C]
    out_bias: Tensor | None = None  # [S, D]
    q_norm: Tensor | None = None  # [C], of each head
    k_norm: Tensor | None = None  # [C]


class DepthWeights(NamedTuple):
    """What a depth transformer is made of: float tensors of one dtype; `rope` is float32."""

    config: DepthConfig
    tables: Sequence[Tensor | None]  # L embedding tables [at least V, E], may overlap; the last may be absent
    layers: Sequence[DepthLayer]
    head_weights: Sequence[Tensor | None]  # L classifiers [V, D]; None at the levels that are given
    head_biases: Sequence[Tensor | None] = ()  # L of [V], or None; () for none at all
    input_norm: Tensor | None = None  # [H]
    projection: Tensor | None = None  # [S, D, H]; None: the identity
    projection_bias: Tensor | None = None  # [S, D]
    final_norm: Tensor | None = None  # [S, D], before the heads
    rope: Tensor | None = None  # [2, L, C / 2]: cosines and sines, see `rope_table`

    def tensors(self) -> list[Tensor]:
        """All tensors in one list, as the op's schema takes them; `of` puts them back.

        input_norm, projection, projection_bias, final_norm, rope; each layer's in `ORDER`; L tables, L head weights,
        L head biases. Those that are absent are empty tensors: null pointers to a kernel.
        """
        nothing = self.layers[0].norm1.new_empty(0) if self.layers else torch.empty(0)
        single = [self.input_norm, self.projection, self.projection_bias, self.final_norm, self.rope]
        per_layer = [getattr(layer, name) for layer in self.layers for name in ORDER]
        biases = self.head_biases or [None] * len(self.tables)
        every = [*single, *per_layer, *self.tables, *self.head_weights, *biases]
        return [nothing if tensor is None else tensor for tensor in every]

    @property
    def like(self) -> Tensor:
        """One of the tensors whose dtype and device all have, but for `rope`."""
        return next(tensor for tensor in self._replace(rope=None).tensors() if tensor.numel())

    def map_matrices(self, function: Callable[[Tensor], Tensor]) -> DepthWeights:
        """With `function` of every matrix that a row is multiplied by; tables, norms and biases stay."""
        layers = [
            layer._replace(**{name: function(m) for name in MATRICES if (m := getattr(layer, name)) is not None})
            for layer in self.layers
        ]
        return self._replace(
            layers=layers,
            head_weights=[None if head is None else function(head) for head in self.head_weights],
            projection=None if self.projection is None else function(self.projection),
        )

    @classmethod
    def of(cls, tensors: Sequence[Tensor], config: DepthConfig) -> DepthWeights:
        every = [tensor if tensor.numel() else None for tensor in tensors]
        first = 5 + len(ORDER) * config.layers
        layers = [
            DepthLayer(**dict(zip(ORDER, every[i:], strict=False)))  # type: ignore[arg-type]
            for i in range(5, first, len(ORDER))
        ]
        tables, heads, biases = (every[first + i * config.levels :][: config.levels] for i in range(3))
        return cls(config, tables, layers, heads, biases, *every[:5])


# The tensors of a layer in the order of the schema.
ORDER = (
    *("norm1", "q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "out_weight", "out_bias"),
    *("q_norm", "k_norm", "norm2", "gate", "up", "down"),
)
MATRICES = ("q_weight", "k_weight", "v_weight", "out_weight", "gate", "up", "down")


def rope_table(theta: float, levels: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines of rotary positions 0 .. levels - 1, float32 [2, levels, head_dim / 2] (Su et al. 2021).

    Channel c of the first half of a head turns with channel c of the second half by the angle
    level * theta ** (-2 c / head_dim).
    """
    frequency_c = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle_Lc = torch.arange(levels, device=device, dtype=torch.float32)[:, None] * frequency_c
    return torch.stack([angle_Lc.cos(), angle_Lc.sin()])
