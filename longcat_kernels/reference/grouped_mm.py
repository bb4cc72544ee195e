"""Grouped matrix product, defined: the formula in plain PyTorch, the cases it is tested and timed on, and its cost.

Dimension key
    E groups (experts)    R rows of all groups, sorted by group    M, N, K sides of one product
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_kernels.spec import Cost, Refusal


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None) -> tuple[Tensor]:
    """One matrix product a group; `offs[e]` is where group e ends along the ragged dimension.

    [R, K] x [E, K, N] -> [R, N], [E, M, K] x [K, R] -> [M, R], [M, R] x [R, N] -> [E, M, N] and, without `offs`,
    [E, M, K] x [E, K, N] -> [E, M, N].
    """
    if offs is None:
        return (a @ b,)
    ends = ends_of(offs, a.shape[1] if a.ndim == 2 == b.ndim else a.shape[0] if a.ndim == 2 else b.shape[1])
    spans, last = list(zip([0, *ends], ends, strict=False)), ends[-1] if ends else 0
    if a.ndim == 2 == b.ndim:
        none_MN = a.new_empty(0, a.shape[0], b.shape[1])
        return (torch.cat([none_MN, *((a[:, start:end] @ b[start:end])[None] for start, end in spans)]),)
    if a.ndim == 2:
        tail_RN = a.new_zeros(a.shape[0] - last, b.shape[2])
        groups = [a[start:end] @ b_KN for (start, end), b_KN in zip(spans, b.unbind(), strict=True)]
        return (torch.cat([*groups, tail_RN]),)
    tail_MR = b.new_zeros(a.shape[1], b.shape[1] - last)
    groups = [a_MK @ b[:, start:end] for (start, end), a_MK in zip(spans, a.unbind(), strict=True)]
    return (torch.cat([*groups, tail_MR], dim=1),)


def ends_of(offs: Tensor, extent: int) -> list[int]:
    """The offsets as numbers; ValueError where they decrease or leave [0, extent]."""
    ends: list[int] = offs.tolist()
    if any(end < start for start, end in zip([0, *ends], [*ends, extent], strict=True)):
        raise ValueError(f"grouped_mm: offs must not decrease and lie in [0, {extent}], got {ends}")
    return ends


@dataclass(frozen=True)
class Case:
    """One problem size: `form` names the ranks of a and b, `ends` the ragged dimension, with `tail` rows over."""

    form: str
    ends: tuple[int, ...]
    sides: tuple[int, int]
    tail: int = 0
    offs_dtype: torch.dtype = torch.int32
    dtype: torch.dtype = torch.float32


EDGE = (
    Case("2x3", (0,), (3, 5)),
    Case("2x3", (3, 3, 10), (7, 5), tail=2),
    Case("3x2", (0, 4, 9), (7, 5), tail=3, offs_dtype=torch.int64),
    Case("2x2", (2, 2, 11), (5, 3), tail=1, offs_dtype=torch.int64),
    Case("3x3", (4, 8, 12), (7, 5)),
    Case("2x3", (5, 17, 17, 33), (16, 24), tail=4, dtype=torch.bfloat16),
)
MODEL = (Case("2x3", tuple(range(128, 256 * 128 + 1, 128)), (3072, 2048), dtype=torch.bfloat16),)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    groups, extent, (p, q) = len(case.ends), case.ends[-1] + case.tail, case.sides
    shapes = {
        "2x3": ((extent, p), (groups, p, q)),
        "3x2": ((groups, p, q), (q, extent)),
        "2x2": ((p, extent), (extent, q)),
        "3x3": ((groups, case.ends[0], p), (groups, p, q)),
    }
    a, b = (torch.randn(shape, generator=g).to(device, case.dtype) for shape in shapes[case.form])
    offs = None if case.form == "3x3" else torch.tensor(case.ends, dtype=case.offs_dtype, device=device)
    return {"a": a.requires_grad_(), "b": b.requires_grad_(), "offs": offs}


def cost(case: Case) -> Cost:
    """Every input and output element moved once; a multiply and an add for every product."""
    rows, (p, q), groups = case.ends[-1], case.sides, len(case.ends)
    return Cost(flops=2 * rows * p * q, bytes=case.dtype.itemsize * (rows * (p + q) + groups * p * q))


REFUSALS = (
    Refusal("a and b must be 2-D or 3-D, got [3] and [1, 3, 5]", lambda a: {"a": torch.ones(3)}),
    Refusal("b must be torch.float32 as a is, got torch.float64", lambda a: {"b": a["b"].double()}),
    Refusal("a must be floating point, got torch.int64", lambda a: {"a": a["a"].long(), "b": a["b"].long()}),
    Refusal("b must be [1, 4, N] to follow a, got [1, 3, 5]", lambda a: {"a": torch.ones(0, 4)}),
    Refusal("offs must be given unless a and b are 3-D, got None", lambda a: {"offs": None}),
    Refusal("offs must be None where a and b are 3-D", lambda a: {"a": torch.ones(1, 2, 3)}),
    Refusal("offs must be int32 or int64 [1], got torch.int32 [2]", lambda a: {"offs": a["offs"].repeat(2)}),
    Refusal("offs must be int32 or int64 [1], got torch.float32 [1]", lambda a: {"offs": a["offs"].float()}),
    Refusal("offs must not decrease and lie in [0, 0], got [1]", lambda a: {"offs": a["offs"] + 1}),
    Refusal("offs must not decrease and lie in [0, 0], got [-1]", lambda a: {"offs": a["offs"] - 1}),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
