"""Depth decoding by kernels of whole batches: five a layer and eight more a level, the same ones whatever is drawn.

Nothing waits for the device, what is launched depends on shapes alone, and memory is workspace and outputs: after a
first call, which compiles, a call can be captured in a CUDA graph. Keys and values of all levels stay in workspace,
and activations in float32; products take operands of the weights' dtype. A row has the same bits in any batch:
kernels are not compiled anew for numbers of rows, and see `_depth_products` for the tiles that are chosen by them.

Dimension key
    T rows    L levels    V classes of a level    H width of hidden    D width of the transformer    E of the tables
    A heads    K key-value heads    C channels of a head    F hidden units    N codes of history
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from longcat_kernels.reference.depth_weights import DepthConfig, DepthLayer, DepthWeights
from longcat_kernels.triton import on
from longcat_kernels.triton._depth_attention import attention
from longcat_kernels.triton._depth_codes import code_kernel, embed_kernel
from longcat_kernels.triton._depth_products import enter, linear, qkv, up
from longcat_kernels.triton._depth_rows import PLANES
from longcat_kernels.triton._depth_sampling import (
    mass_kernel,
    pick_kernel,
    scores_kernel,
    seen_kernel,
    threshold_kernel,
)
from longcat_kernels.triton._gemm import TYPES
from longcat_kernels.triton._numeric import DTYPES, INTERPRETED, folds
from longcat_kernels.workspace import New, fresh

ROWS = 64 if INTERPRETED else 1  # of a program of the sampler; the interpreter has a price a program, not a row
WIDTH = 1024  # classes of a block
SEARCH = 2048  # classes of a step of the search for thresholds


def why_not(hidden: Tensor, *inputs: Any) -> str | None:
    """None, or why these tensors cannot be taken."""
    return None if hidden.dtype in TYPES else f"takes float32, bfloat16 and float16, got {hidden.dtype}"


def run(
    hidden_TH: Tensor,
    weights: list[Tensor],
    packed: list[Tensor],
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    start: Tensor | None,
    prefix: Tensor | None,
    active: Tensor | None,
    leaders: Tensor | None,
    history: Tensor | None,
    offsets: Tensor | None,
    config: list[int],
    eps: float,
    wants_logits: bool,
    logprobs: Tensor,
    drawn_logprobs: Tensor,
    embedding: Tensor,
    logits: Tensor,
    codes: Tensor,
    *,
    new: New = fresh,
) -> None:
    """Fills the outputs."""
    sizes = DepthConfig.of(config, eps)
    if not len(hidden_TH):
        return
    with on(hidden_TH.device):
        w = DepthWeights.of([tensor.contiguous() if tensor.ndim == 1 else tensor for tensor in weights], sizes)
        w = w._replace(rope=None if w.rope is None else w.rope.contiguous())
        batch = _Batch.of(len(hidden_TH), w, params, seeds, steps, prefix, active, leaders, new)
        if batch.idle is not None:
            hidden_TH = _without(hidden_TH, batch.idle, "hidden", new)
            start = None if start is None else _without(start, batch.idle, "start", new)
        stream = _Stream.of(hidden_TH, start, w, new)
        seen = batch.seen(history, offsets, sizes, new) if history is not None and offsets is not None else None
        first = 0  # of the level's logits among all
        outputs = (codes, logprobs, drawn_logprobs)
        for level, classes in enumerate(sizes.classes):
            stream.advance(level)
            if level >= sizes.given:
                level_logits = logits[:, first : first + classes] if wants_logits else batch.logits[:, :classes]
                stream.head(level, level_logits)
                level_seen = None if seen is None else seen[:, first : first + classes]
                batch.draw(level, level_logits, level_seen, outputs)
                first += classes
            else:
                batch.take(level, classes, outputs)
            stream.embed(level, codes, embedding)
        if wants_logits and batch.idle is not None:
            logits.masked_fill_(batch.idle[:, None], 0)


def _without(x: Tensor, idle_T: Tensor, name: str, new: New) -> Tensor:
    """A copy with zeros in rows that are idle."""
    return new(name, tuple(x.shape), x.dtype, x.device).copy_(x).masked_fill_(idle_T[:, None], 0)


@dataclass(frozen=True)
class _Batch:
    """What belongs to rows, and the workspace of the sampler."""

    params: Tensor  # [T, L, 8], last stride 1
    seeds: Tensor  # [T]
    steps: Tensor  # [T]
    prefix: Tensor | None  # [T, P]
    active: Tensor | None  # [T] uint8, of the leaders
    idle: Tensor | None  # [T] bool, its opposite
    leaders: Tensor  # [T]; not read unless paired
    followers: Tensor  # [T]: each row's own, itself where it has none; not read unless paired
    paired: bool
    logits: Tensor  # [T, most V] float32, for those that are not asked for
    scores: Tensor  # [T, most V] float32
    masses: Tensor  # [T, most V] float32
    stats: Tensor  # [7, T, most blocks] float64
    limits: Tensor  # [2, T] int32

    @classmethod
    def of(
        cls,
        rows: int,
        w: DepthWeights,
        params: Tensor,
        seeds: Tensor,
        steps: Tensor,
        prefix: Tensor | None,
        active: Tensor | None,
        leaders: Tensor | None,
        new: New,
    ) -> _Batch:
        memory = functools.partial(_memory, new, params.device)
        own = torch.arange(rows, out=memory("own", rows, dtype=torch.int64))
        first = followers = own
        if leaders is not None:
            first = torch.clamp(leaders, 0, rows - 1, out=memory("first", rows, dtype=torch.int64))
            followers = _followers(first, own, memory)
        idle = None
        if active is not None:
            active = torch.index_select(active, 0, first, out=memory("active", rows, dtype=torch.bool))
            idle = torch.logical_not(active, out=memory("idle", rows, dtype=torch.bool))
        most = max(w.config.classes[w.config.given :], default=1)
        logits, scores, masses = (memory(name, rows, most) for name in ("own_logits", "scores", "masses"))
        return cls(
            params if params.stride(2) == 1 else params.contiguous(),
            seeds.contiguous(),
            steps.contiguous(),
            None if prefix is None else prefix.contiguous(),
            None if active is None else active.view(torch.uint8),
            idle,
            first,
            followers,
            leaders is not None,
            logits,
            scores,
            masses,
            memory("stats", PLANES, rows, triton.cdiv(most, WIDTH), dtype=torch.float64),
            memory("limits", 2, rows, dtype=torch.int32),
        )

    def seen(self, history: Tensor, offsets: Tensor, sizes: DepthConfig, new: New) -> Tensor:
        """[T, sum V] uint8: which ids of each level stand in the rows' histories."""
        rows = len(self.seeds)
        seen = new("seen", (rows, sum(sizes.classes[sizes.given :])), torch.uint8, history.device).zero_()
        first, history, offsets = 0, history.contiguous(), offsets.contiguous()
        for level in range(sizes.given, sizes.levels):
            seen_kernel[(rows,)](
                *(seen[:, first:], history[:, level], offsets, len(history), sizes.classes[level], sizes.levels),
                seen.stride(0),
                CHUNK=128,
                num_warps=1,
            )
            first += sizes.classes[level]
        return seen

    def draw(self, level: int, logits: Tensor, seen: Tensor | None, outputs: tuple[Tensor, ...]) -> None:
        """Codes and logprobs of a level from its logits [T, V]."""
        (rows, classes), params = logits.shape, self.params[:, level]
        wide = max(16, min(WIDTH, triton.next_power_of_2(classes)))
        blocks = triton.cdiv(classes, wide)
        grid, each_block = triton.cdiv(rows, ROWS), (triton.cdiv(rows, ROWS), blocks)
        sizes, params_row = (rows, classes, blocks), params.stride(0)
        flags = {"PAIRED": self.paired, "ROWS": ROWS, "num_warps": 4}
        padded = {"BLOCKS": triton.next_power_of_2(blocks)}
        scores_kernel[each_block](
            *(logits, params, self.leaders, self.followers, logits if seen is None else seen, self.scores, self.stats),
            *(*sizes, logits.stride(0), params_row, 0 if seen is None else seen.stride(0)),
            SEEN=seen is not None,
            WIDTH=wide,
            FOLDS=folds(wide),
            enable_fp_fusion=False,
            **flags,
        )
        mass_kernel[each_block](
            *(self.scores, params, self.leaders, self.stats, self.masses, *sizes, params_row),
            WIDTH=wide,
            **padded,
            **flags,
        )
        threshold_kernel[(grid,)](
            *(self.scores, self.masses, params, self.leaders, self.stats, self.limits, *sizes, params_row),
            WIDTH=max(16, min(SEARCH, triton.next_power_of_2(classes))),
            **padded,
            **flags | {"num_warps": 8},
        )
        pick_kernel[each_block](
            *(self.scores, self.limits, params, self.leaders, self.seeds, self.steps, self.stats),
            *(*sizes, level, params_row),
            WIDTH=wide,
            **padded,
            **flags,
        )
        self._code(level, logits, sizes, outputs, given=False)

    def take(self, level: int, classes: int, outputs: tuple[Tensor, ...]) -> None:
        """Codes of a level without a head."""
        self._code(level, self.logits, (len(self.seeds), classes, 1), outputs, given=True)

    def _code(
        self, level: int, logits: Tensor, sizes: tuple[int, int, int], outputs: tuple[Tensor, ...], *, given: bool
    ) -> None:
        rows, _, blocks = sizes
        forced = self.prefix is not None and level < self.prefix.shape[1]
        prefix = self.prefix[:, level] if self.prefix is not None and forced else self.seeds
        params, active = self.params[:, level], self.seeds if self.active is None else self.active
        code_kernel[(triton.cdiv(rows, ROWS),)](
            *(logits, self.scores, self.limits, self.stats, params, self.leaders, self.followers, active, prefix),
            *(output[:, level] for output in outputs),
            *(*sizes, outputs[0].stride(0), logits.stride(0), params.stride(0), prefix.stride(0)),
            GIVEN=given,
            FORCED=forced,
            PAIRED=self.paired,
            ACTIVE=self.active is not None,
            ROWS=ROWS,
            BLOCKS=triton.next_power_of_2(blocks),
            enable_fp_fusion=False,
            num_warps=1,
        )


def _followers(first: Tensor, own: Tensor, memory: Callable[..., Tensor]) -> Tensor:
    """The row that follows each row, itself where there is none; those that lead write past the end."""
    rows = len(own)
    leads = torch.eq(first, own, out=memory("leads", rows, dtype=torch.bool))
    place = memory("place", rows, dtype=torch.int64).copy_(first).masked_fill_(leads, rows)
    found = torch.arange(rows + 1, out=memory("followers", rows + 1, dtype=torch.int64))
    return found.scatter_(0, place, own)[:rows]


def _memory(new: New, device: torch.device, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return new(name, shape, dtype, device)


@dataclass
class _Stream:
    """The transformer's weights and its workspace."""

    w: DepthWeights
    hidden: Tensor  # [T, H]
    start: Tensor | None  # [T, D]
    z: Tensor  # [T, D] float32
    qkv: Tensor  # [T, (A + 2 K) C] float32
    mixed: Tensor  # [T, A C] of the weights' dtype
    act: Tensor  # [T, F] of the weights' dtype
    caches: Tensor  # [layers, 2, T, K, L, C] float32
    total: Tensor  # [T, E] float32: the sum of embeddings
    next: Tensor  # [T, E] float32: input of the next level, or what is added to it
    ended: Tensor  # [L + 1, T] uint8: whether all codes before a level are "end"

    @classmethod
    def of(cls, hidden: Tensor, start: Tensor | None, w: DepthWeights, new: New) -> _Stream:
        c, rows, memory = w.config, len(hidden), functools.partial(_memory, new, hidden.device)
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        return cls(
            w,
            hidden if hidden.stride(1) == 1 else hidden.contiguous(),
            start if start is None or start.stride(1) == 1 else start.contiguous(),
            memory("z", rows, c.dim),
            memory("qkv", rows, queries + 2 * keys),
            memory("mixed", rows, queries, dtype=hidden.dtype),
            memory("act", rows, c.ffn, dtype=hidden.dtype),
            memory("caches", c.layers, 2, rows, c.kv_heads, c.levels, c.head_dim),
            memory("total", rows, c.width),
            memory("next", rows, c.width),
            memory("ended", c.levels + 1, rows, dtype=torch.uint8),
        )

    def advance(self, level: int) -> None:
        """z of a level, through all layers."""
        self._enter(level)
        c = self.w.config
        attention_set, ffn_set = c.sets("attention_sets")[level], c.sets("ffn_sets")[level]
        for layer, cache in zip(self.w.layers, self.caches, strict=True):
            self._attend(layer, cache, attention_set, level)
            gate = None if layer.gate is None else layer.gate[ffn_set]
            up(self.z, layer.norm2, gate, layer.up[ffn_set], self.act, c.eps)
            linear(self.act, layer.down[ffn_set], self.z, residual_TN=self.z)

    def _enter(self, level: int) -> None:
        w, c = self.w, self.w.config
        adds = c.conditioning == "last+hidden"
        x = self.hidden if adds or level == 0 else self.next
        residual = None if not adds else self.start if level == 0 else self.next
        if w.projection is None:
            enter(x, self.z, w.input_norm, residual, c.eps)
            return
        number = c.sets("projection_sets")[level]
        weight, bias = w.projection[number], _row(w.projection_bias, number)
        linear(x, weight, self.z, norm_K=w.input_norm, eps=c.eps, bias_N=bias, residual_TN=residual)

    def _attend(self, layer: DepthLayer, cache: Tensor, number: int, level: int) -> None:
        """z += attention, with the weights of set `number`."""
        c = self.w.config
        weights = (layer.q_weight[number], layer.k_weight[number], layer.v_weight[number])
        biases = (_row(bias, number) for bias in (layer.q_bias, layer.k_bias, layer.v_bias))
        qkv(self.z, layer.norm1, weights, tuple(biases), self.qkv, c.eps)
        attention(self.qkv, cache, layer.q_norm, layer.k_norm, self.w.rope, self.mixed, level, c.eps)
        out = layer.out_weight[number]
        linear(self.mixed, out, self.z, bias_N=_row(layer.out_bias, number), residual_TN=self.z)

    def head(self, level: int, logits: Tensor) -> None:
        """Logits [T, V] of a level from z."""
        w, c = self.w, self.w.config
        norm = _row(w.final_norm, c.sets("norm_sets")[level])
        bias = w.head_biases[level] if w.head_biases else None
        weight = w.head_weights[level]
        assert weight is not None
        linear(self.z, weight, logits, norm_K=norm, eps=c.eps, bias_N=bias)

    def embed(self, level: int, codes: Tensor, embedding: Tensor) -> None:
        """Adds the embedding of a level's codes, and makes the next level's input; at the last the op's result."""
        c, table = self.w.config, self.w.tables[level]
        (rows, width), last = embedding.shape, level == c.levels - 1
        wide = min(1024, triton.next_power_of_2(width))
        read = self.total if table is None else table
        embed_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, wide))](
            *(codes[:, level], read, self.total, self.next, self.ended[level], embedding),
            *(rows, c.classes[level], width, codes.stride(0), *read.stride()),
            FIRST=level == 0,
            LAST=last,
            TABLE=table is not None,
            ENDS=c.ends,
            SUM=c.conditioning == "sum",
            TYPE=DTYPES[embedding.dtype],
            ROWS=ROWS,
            WIDTH=wide,
            num_warps=4,
        )


def _row(matrix: Tensor | None, number: int) -> Tensor | None:
    """Row `number`, its elements next to each other."""
    return None if matrix is None else matrix[number].contiguous()
