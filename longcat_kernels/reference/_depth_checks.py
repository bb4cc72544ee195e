"""What a depth transformer's config and weights must be like, for `depth_decode` and for those that prepare them.

Dimension key as in `depth_weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longcat_kernels.reference.depth_weights import CONDITIONINGS, ORDER, SETS, DepthConfig, DepthWeights

MAX_LEVELS = 32


def check_config(c: DepthConfig) -> None:
    """Raises ValueError unless the numbers describe a depth transformer."""
    levels = c.levels
    _check(1 <= levels <= MAX_LEVELS, f"weights must have 1 to {MAX_LEVELS} levels, got {levels}")
    for level, classes in enumerate(c.classes):
        _check(classes >= 1, f"weights must have at least 1 class at level {level}, got {classes}")
        _check(
            classes > 1 or not c.ends,
            f"weights must have 2 classes or more at level {level}, one of them end, got {classes}",
        )
    _check(0 <= c.given <= levels, f"weights.config.given must be in [0, {levels}], got {c.given}")
    for name in ("hidden", "dim", "heads", "kv_heads", "head_dim", "ffn"):
        _check(getattr(c, name) >= 1, f"weights.config.{name} must be at least 1, got {getattr(c, name)}")
    _check(c.layers >= 0, f"weights.config.layers must be at least 0, got {c.layers}")
    _check(c.heads % c.kv_heads == 0, f"weights.config.kv_heads must divide {c.heads} heads, got {c.kv_heads}")
    names = ", ".join(CONDITIONINGS)
    _check(c.conditioning in CONDITIONINGS, f"weights.config.conditioning must be one of {names}, got {c.conditioning}")
    _check(0 <= c.eps < float("inf"), f"weights.config.eps must be >= 0 and finite, got {c.eps}")
    for name in SETS:
        found = getattr(c, name)
        rule = f"one number a level, {levels}, or none"
        _check(len(found) in (0, levels), f"weights.config.{name} must be {rule}, got {found}")
        in_range = all(0 <= number < levels for number in found)
        _check(in_range, f"weights.config.{name} must be in [0, {levels}), got {found}")


def check_weights(w: DepthWeights) -> None:
    """Raises ValueError unless the lists have a tensor a level, and what must be there is."""
    c = w.config
    check_config(c)
    _check(len(w.layers) == c.layers, f"weights.layers must be {c.layers}, got {len(w.layers)}")
    counts = {"tables": len(w.tables), "head_weights": len(w.head_weights), "head_biases": len(w.head_biases)}
    for name, count in counts.items():
        optional = name == "head_biases"
        rule = f"{c.levels} tensors, one a level{', or none' if optional else ''}"
        _check(count == c.levels or (optional and not count), f"weights.{name} must have {rule}, got {count}")
    for level, table in enumerate(w.tables[:-1]):
        _check(table is not None, f"weights.tables must be given at level {level}, got None")
    for level, head in enumerate(w.head_weights):
        _check(level < c.given or head is not None, f"weights.head_weights must be given at level {level}, got None")
    if w.projection is None:
        _check(c.hidden == c.dim, f"weights.projection must be given where dim {c.dim} is not hidden {c.hidden}")
    _check(any(tensor.numel() for tensor in w._replace(rope=None).tensors()), "weights must have a tensor, got none")
    for layer in w.layers:
        rule = "given" if c.gated else "None"
        found = "None" if layer.gate is None else "a tensor"
        _check(
            (layer.gate is not None) == c.gated,
            f"weights.layers.gate must be {rule}, for gated is {c.gated}, got {found}",
        )


def check_shapes(w: DepthWeights, like: Tensor) -> None:
    """Raises ValueError unless every tensor has the shape that the config gives it, and dtype and device of `like`."""
    c = w.config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    projections, norms = c.count("projection_sets"), c.count("norm_sets")
    _check_tensor("input_norm", w.input_norm, [c.hidden], like)
    _check_tensor("projection", w.projection, [projections, c.dim, c.hidden], like)
    _check_tensor("projection_bias", w.projection_bias, [projections, c.dim], like)
    _check_tensor("final_norm", w.final_norm, [norms, c.dim], like)
    if w.rope is not None:
        _check(c.head_dim % 2 == 0, f"weights.config.head_dim must be even where there is rope, got {c.head_dim}")
        _check_tensor("rope", w.rope, [2, c.levels, c.head_dim // 2], like, torch.float32)
    a, f = c.count("attention_sets"), c.count("ffn_sets")
    vectors = {"norm1": [c.dim], "norm2": [c.dim], "q_norm": [c.head_dim], "k_norm": [c.head_dim]}
    matrices = {"q": (a, queries, c.dim), "k": (a, keys, c.dim), "v": (a, keys, c.dim), "out": (a, c.dim, queries)}
    shapes = vectors | {f"{name}_weight": list(shape) for name, shape in matrices.items()}
    shapes |= {f"{name}_bias": list(shape[:2]) for name, shape in matrices.items()}
    shapes |= {"gate": [f, c.ffn, c.dim], "up": [f, c.ffn, c.dim], "down": [f, c.dim, c.ffn]}
    for layer in w.layers:
        for name in ORDER:
            _check_tensor(f"layers.{name}", getattr(layer, name), shapes[name], like)
    biases = w.head_biases or [None] * c.levels
    for level, (classes, *tensors) in enumerate(zip(c.classes, w.tables, w.head_weights, biases, strict=True)):
        table, head_weight, head_bias = tensors
        _check_table(table, classes, c.width, level, like)
        _check_tensor("head_weights", head_weight, [classes, c.dim], like)
        _check_tensor("head_biases", head_bias, [classes], like)


def _check_table(table: Tensor | None, classes: int, width: int, level: int, like: Tensor) -> None:
    if table is None:
        return
    found = f"{table.dtype} {list(table.shape)}"
    fits = table.ndim == 2 and table.shape[0] >= classes and table.shape[1] == width and table.dtype == like.dtype
    rule = f"{like.dtype} [{classes} or more, {width}] at level {level}"
    _check(fits, f"weights.tables must be {rule}, got {found}")
    _check(table.device == like.device, f"weights.tables must be on {like.device}, got {table.device}")


def _check_tensor(
    name: str, tensor: Tensor | None, shape: list[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    if tensor is None:
        return
    dtype, found = dtype or like.dtype, list(tensor.shape)
    if found != shape or tensor.dtype != dtype:
        raise ValueError(f"depth_decode: weights.{name} must be {dtype} {shape}, got {tensor.dtype} {found}")
    if tensor.device != like.device:
        raise ValueError(f"depth_decode: weights.{name} must be on {like.device}, got {tensor.device}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"depth_decode: {message}")
