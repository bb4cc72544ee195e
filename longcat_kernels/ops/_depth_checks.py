"""What `depth_decode` asks of its arguments.

Dimension key as in `depth_decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longcat_kernels.library import check
from longcat_kernels.reference.depth_weights import DepthConfig
from longcat_kernels.reference.sampling import (
    COLUMNS,
    EXCLUDED,
    check_history,
    check_offsets,
    check_steps,
    check_values,
    distinct,
)


def check_hidden(hidden: Tensor, c: DepthConfig) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != c.hidden or not hidden.dtype.is_floating_point:
        found = f"{hidden.dtype} {list(hidden.shape)}"
        raise ValueError(f"depth_decode: hidden must be [T, {c.hidden}] floating point, got {found}")


def check_like(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        wanted, found = (f"{tensor.dtype} on {tensor.device}" for tensor in (weight, hidden))
        raise ValueError(f"depth_decode: hidden must be {wanted}, as the weights are, got {found}")


def check_rows(
    hidden: Tensor,
    c: DepthConfig,
    params: Tensor,
    start: Tensor | None,
    prefix: Tensor | None,
    active: Tensor | None,
    leaders: Tensor | None,
    history: tuple[Tensor, Tensor] | None,
) -> None:
    """Raises ValueError unless what belongs to rows has the right shapes."""
    rows, device = hidden.shape[0], hidden.device
    wanted, found = [rows, c.levels, len(COLUMNS)], list(params.shape)
    fits = found == wanted and params.dtype == torch.float32
    check(fits, lambda: f"depth_decode: sampling must be float32 {wanted}, got {params.dtype} {found}")
    if start is not None:
        fits = c.conditioning == "last+hidden"
        _check(fits, f"start must be None, for conditioning is {c.conditioning}, got a tensor")
        _check_row_tensor("start", start, [rows, c.dim], hidden.dtype, hidden)
    if prefix is not None:
        found = list(prefix.shape)
        fits = len(found) == 2 and found[0] == rows and found[1] <= c.levels and prefix.dtype == torch.int64
        rule = f"int64 [{rows}, P] with P in [{c.given}, {c.levels}]"
        check(fits, lambda: f"depth_decode: prefix must be {rule}, got {prefix.dtype} {found}")
    width = 0 if prefix is None else prefix.shape[1]
    plural = "level has" if c.given == 1 else "levels have"
    _check(width >= c.given, f"prefix must be given, for {c.given} {plural} no head, got {width}")
    if active is not None:
        _check_row_tensor("active", active, [rows], torch.bool, hidden)
    if history is not None:
        check_history("depth_decode", history, rows, c.levels, device)
    for name, tensor in (("prefix", prefix), ("active", active), ("pairs", leaders), ("sampling", params)):
        if tensor is not None:
            _check(tensor.device == device, f"{name} must be on {device}, got {tensor.device}")


def _check_row_tensor(name: str, tensor: Tensor, shape: list[int], dtype: torch.dtype, like: Tensor) -> None:
    if list(tensor.shape) != shape or tensor.dtype != dtype:
        kind, found = "bool" if dtype == torch.bool else f"{dtype}", f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"depth_decode: {name} must be {kind} {shape}, got {found}")
    _check(tensor.device == like.device, f"{name} must be on {like.device}, got {tensor.device}")


def check_contents(
    c: DepthConfig,
    params: Tensor,
    steps: Tensor,
    prefix: Tensor | None,
    leaders: Tensor | None,
    history: Tensor | None,
    offsets: Tensor | None,
) -> None:
    """Raises ValueError unless numbers are in range; on an accelerator reading them would wait for the device."""
    if params.device.type != "cpu" or not params.shape[0]:
        if history is not None and offsets is not None:
            check_offsets("depth_decode", history.shape[0], offsets)
        return
    check_values("depth_decode", params)
    check_steps("depth_decode", steps)
    rows = distinct(params)[..., EXCLUDED].tolist()
    for level, classes in enumerate(c.classes):
        excluded = max(row[level % len(row)] for row in rows)
        got = f"{excluded:g} of {classes}"
        _check(excluded < classes, f"excluded must leave a class at level {level}, got {got}")
    if prefix is not None and prefix.numel():
        _check_prefix(prefix, c)
    if leaders is not None:
        _check_leaders(leaders.tolist())
    if history is not None and offsets is not None:
        check_offsets("depth_decode", history.shape[0], offsets)


def _check_prefix(prefix: Tensor, c: DepthConfig) -> None:
    for level, codes in enumerate(zip(*prefix.tolist(), strict=True)):
        low, high = min(codes), max(codes)
        lowest, classes = 0 if level < c.given else -1, c.classes[level]
        wrong = low if low < lowest else high
        in_range = lowest <= wrong < classes
        rule = f"in [{lowest}, {classes}) at level {level}{', -1 draws' if lowest else ''}"
        _check(in_range, f"prefix must be {rule}, got {wrong}")


def _check_leaders(leaders: Sequence[int]) -> None:
    rows = len(leaders)
    for leader in leaders:
        _check(0 <= leader < rows, f"pairs must be rows in [0, {rows}), got {leader}")
    own = all(leaders[leader] == leader for leader in leaders)
    _check(own, f"pairs must follow rows that follow themselves, got {leaders}")
    followed = [leader for row, leader in enumerate(leaders) if leader != row]
    _check(len(set(followed)) == len(followed), f"pairs must give a row one follower at most, got {leaders}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"depth_decode: {message}")
