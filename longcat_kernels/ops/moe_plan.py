"""Routing plan: which rows each expert computes, where they come from and where they go.

Dimension key
    T tokens    k slots of a token    E real experts    R slots, T * k: as many rows at most    N tiles, at most
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longcat_kernels import native, triton
from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.library import check, register
from longcat_kernels.reference import moe_plan as spec
from longcat_kernels.spec import Op


class RoutingPlan(NamedTuple):
    """What `moe_plan` gives, int32: rows sorted by expert, those of an expert in the order of their slots.

    Sizes follow from those of the ids alone, so that nobody waits for a count; what is past the last row or tile is -1.
    """

    counts: Tensor  # [E] rows of each expert
    offsets: Tensor  # [E + 1] where each expert's rows begin; the last: the number of rows
    tokens: Tensor  # [R] token of each row: what to gather
    slots: Tensor  # [R] flat slot of each row, token * k + slot
    rows: Tensor  # [T, k] row of each slot; -1: none, its id is not a real expert's
    tiles: Tensor  # [N, 2] expert and first row of each tile; N = E + ceil(R / tile)

    @staticmethod
    def from_counts(counts: Tensor, total: int, *, tile: int = 64, backend: str = "auto") -> RoutingPlan:
        """The plan of rows that an all-to-all has brought: source after source, each source's by expert.

        Args:
            counts: integers [S, E]: rows of each expert from each of S sources.
            total: rows there is room for; those past the sum of counts belong to nobody.
            tile: as in `moe_plan`.
            backend: as in `moe_plan`.

        Returns:
            plan: of `total` tokens with a slot each: `tokens` says where in the buffer each expert's rows are.

        Raises:
            ValueError: a shape, dtype or size is wrong, or there are more rows than room. Counts on a GPU are not
                waited for, nor those of a trace: rows without room are then left out.

        Example:
            >>> plan = RoutingPlan.from_counts(torch.tensor([[1, 2], [1, 0]]), 5)
            >>> plan.tokens.tolist()
            [0, 3, 1, 2, -1]
        """
        check(
            counts.ndim == 2 and min(counts.shape) >= 1 and not counts.is_floating_point(),
            lambda: f"moe_plan: counts must be integers [S, E], got {counts.dtype} {list(counts.shape)}",
        )
        check(total >= 0, lambda: f"moe_plan: total must be at least 0, got {total}")
        sources, experts = counts.shape
        ends = counts.flatten().cumsum(0)
        if counts.is_cpu and not torch.compiler.is_compiling():
            least, rows = int(counts.min()), int(ends[-1])
            check(least >= 0, lambda: f"moe_plan: counts must be at least 0, got {least}")
            check(rows <= total, lambda: f"moe_plan: total must be at least the sum of counts, {rows}, got {total}")
        block = torch.searchsorted(ends, torch.arange(total, device=counts.device), right=True)
        ids = torch.where(block < sources * experts, block % experts, -1)
        return moe_plan(ids[:, None], experts, tile=tile, backend=backend)


def moe_plan(ids: Tensor, n_real: int, *, tile: int = 64, backend: str = "auto") -> RoutingPlan:
    """Sorts slots by expert, stably: a counting sort, the same on every device, without a wait for the host.

    Args:
        ids: int64 [T, k] as `moe_route` gives them; those outside [0, n_real) - identity experts, and -1 for what is
            not here - get no row.
        n_real: real experts E, at least 1.
        tile: rows of a tile, at least 1: each expert's rows are cut into tiles of so many.
        backend: "auto" or the name of an implementation.

    Raises:
        ValueError: a shape, dtype or size is wrong, or no implementation takes the tensors.

    Example:
        >>> plan = moe_plan(torch.tensor([[1, 0], [7, 1]]), 2, tile=2)
        >>> plan.counts.tolist(), plan.tokens.tolist(), plan.rows.tolist(), plan.tiles.tolist()
        ([1, 2], [0, 0, 1, -1], [[1, 0], [-1, 2]], [[0, 0], [1, 1], [-1, -1], [-1, -1]])
    """
    return RoutingPlan(*_op(ids, n_real, tile, backend))


def _allocate(ids_Tk: Tensor, n_real: int, tile: int, backend: str) -> tuple[Tensor, ...]:
    shape, dtype = ids_Tk.shape, ids_Tk.dtype
    if len(shape) != 2 or shape[1] < 1 or dtype != torch.int64:
        raise ValueError(f"moe_plan: ids must be int64 [T, k] with k >= 1, got {dtype} {list(shape)}")
    if n_real < 1:
        raise ValueError(f"moe_plan: n_real must be at least 1, got {n_real}")
    if tile < 1:
        raise ValueError(f"moe_plan: tile must be at least 1, got {tile}")
    slots = shape[0] * shape[1]
    sides = ((n_real,), (n_real + 1,), (slots,), (slots,), shape, (spec.most_tiles(slots, n_real, tile), 2))
    return tuple(ids_Tk.new_empty(*side, dtype=torch.int32) for side in sides)


def _run(ids_Tk: Tensor, n_real: int, tile: int, backend: str) -> tuple[Tensor, ...]:
    outputs = _allocate(ids_Tk, n_real, tile, backend)
    choose("moe_plan", IMPLS, backend, ids_Tk, n_real, tile).run(ids_Tk, n_real, tile, *outputs)
    return outputs


_op = register(
    "moe_plan(Tensor ids, SymInt n_real, SymInt tile, str backend) "
    "-> (Tensor counts, Tensor offsets, Tensor tokens, Tensor slots, Tensor rows, Tensor tiles)",
    _run,
    _allocate,
)


def _why_not_cpu(ids_Tk: Tensor, *_: Any) -> str | None:
    if not ids_Tk.is_cpu:
        return f"takes tensors on the CPU, got {ids_Tk.device}"
    return native.why_not()


def _cpu(ids_Tk: Tensor, n_real: int, tile: int, *outputs: Tensor) -> None:
    native.module().moe_plan(ids_Tk.contiguous(), tile, *outputs)


IMPLS: dict[str, Impl] = {
    "triton": triton.implementation("moe_plan"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": reference(spec.moe_plan),
}
OP = Op("moe_plan", moe_plan, IMPLS, spec)
