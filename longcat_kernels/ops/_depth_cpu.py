"""`depth_decode` by the compiled module: how its arguments are given to it.

Dimension key as in `depth_decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import native
from longcat_kernels.reference.depth_weights import ORDER
from longcat_kernels.workspace import New, fresh, scratch_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(hidden: Tensor, *_: Any) -> str | None:
    """Why the compiled module cannot take these tensors, or None."""
    if hidden.device.type != "cpu":
        return f"takes tensors on the CPU, got {hidden.device}"
    if hidden.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {hidden.dtype}"
    return native.why_not()


def decode(
    hidden: Tensor,
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    start: Tensor | None,
    prefix: Tensor | None,
    active: Tensor | None,
    leaders: Tensor | None,
    history: Tensor | None,
    offsets: Tensor | None,
    config: Sequence[int],
    eps: float,
    wants_logits: bool,
    *outputs: Tensor,
    new: New = fresh,
    isa: str = "auto",
) -> None:
    first, levels = 5 + len(ORDER) * config[3], config[0]
    rows = (params, seeds, steps, start, prefix, active, leaders, history, offsets)
    native.module().depth_decode(
        _adjacent(hidden),
        [] if packed else [_adjacent(tensor) for tensor in weights],
        [_adjacent(table) for table in weights[first : first + levels]],
        packed[0] if packed else None,
        _adjacent(params),
        *(None if tensor is None else tensor.contiguous() for tensor in rows[1:]),
        config,
        eps,
        *outputs,
        scratch_of(new, hidden.device),
        threads=torch.get_num_threads(),
        isa=isa,
    )


def _adjacent(tensor: Tensor) -> Tensor:
    """With adjacent elements along the last axis: a copy where it has not."""
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 else tensor.contiguous()
