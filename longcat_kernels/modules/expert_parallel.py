"""Experts shared out over ranks: tokens go to the ranks of their experts, sums come back (GShard, arXiv 2006.16668).

A token goes once to each rank that has experts of it, with its ids and weights, and comes back as that rank's part of
its sum. Identity experts are done where the token is.

Dimension key
    W ranks    T tokens of this rank    k slots of a token    R rows: pairs of a token and a rank that it goes to
    N rows that came from all ranks    D model
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from longcat_kernels.ops.fused_moe import check_experts, fused_moe
from longcat_kernels.reference.fused_moe import identity_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ExpertParallel:
    """The ranks of a group, rank r of W having experts [r E / W, (r + 1) E / W).

    A call takes five collectives and its backward three, whatever the data: the numbers of rows, then tokens, ids and
    weights, then sums; and the gradients of sums, tokens and weights. All ranks must call it, and run its backward,
    equally often, with the same dtypes and the same tensors requiring gradients; a rank may have no tokens.

    Raises:
        ValueError: the ranks do not divide `experts`.
    """

    def __init__(self, group: ProcessGroup, experts: int) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if experts % ranks:
            raise ValueError(f"ExpertParallel: experts must be a multiple of the {ranks} ranks, got {experts}")
        self.group, self.ranks, self.experts = group, ranks, experts
        self.own = range(rank * experts // ranks, (rank + 1) * experts // ranks)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        return self  # a process group cannot be copied

    def fused_moe(
        self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *, backend: str = "auto"
    ) -> Tensor:
        """`fused_moe` of this rank's tokens and all ranks' experts; gate_up and down hold this rank's own.

        The gradients of gate_up and down are those of the sum of all ranks' losses. Equal to `fused_moe` of all tokens
        and experts in one process but for the order in which a token's terms are added, by rank and then by slot, and,
        with bfloat16, one rounding of each rank's part.

        Raises:
            ValueError: a shape, dtype or device is wrong; before anything is sent.
        """
        check_experts(x, gate_up, down, ids, weights)
        if len(gate_up) != len(self.own):
            raise ValueError(
                f"ExpertParallel: gate_up must have the {len(self.own)} experts of this rank, got {len(gate_up)}"
            )
        plan = _Plan.of(ids, self.experts, self.ranks)
        sent = plan.counts.tolist()
        received = self._swap(plan.counts).tolist()
        splits = (sent, received, self.group)
        x_ND = _Swap.apply(_Spread.apply(x, plan.tokens, plan.rows), *splits)  # type: ignore[no-untyped-call]
        weights_Nk = _Swap.apply(_Spread.apply(weights, plan.tokens, plan.rows), *splits)  # type: ignore[no-untyped-call]
        ids_Nk = _Swap.apply(plan.ids, *splits)  # type: ignore[no-untyped-call]
        part_ND = fused_moe(x_ND, gate_up, down, ids_Nk, weights_Nk, backend=backend)
        part_RD = _Swap.apply(part_ND, received, sent, self.group)  # type: ignore[no-untyped-call]
        wide = torch.promote_types(x.dtype, torch.float32)
        sum_TD: Tensor = _Gather.apply(part_RD, plan.tokens, plan.rows)  # type: ignore[no-untyped-call]
        return (sum_TD + identity_part(x.to(wide), ids, weights.to(wide), self.experts)).to(x.dtype)

    def _swap(self, counts_W: Tensor) -> Tensor:
        received_W = torch.empty_like(counts_W)
        dist.all_to_all_single(received_W, counts_W, group=self.group)
        return received_W


class _Plan(NamedTuple):
    """Which tokens go to which rank."""

    counts: Tensor  # [W] rows for each rank
    tokens: Tensor  # [R] token of each row, by rank and then by token
    rows: Tensor  # [T, W] row of each token for each rank; R: none
    ids: Tensor  # [R, k] ids on the rank that a row goes to; -1: another rank's expert

    @classmethod
    def of(cls, ids_Tk: Tensor, experts: int, ranks: int) -> _Plan:
        per_rank = experts // ranks
        owner_Tk = torch.where((ids_Tk >= 0) & (ids_Tk < experts), ids_Tk // per_rank, -1)
        goes_WT = (owner_Tk == torch.arange(ranks, device=ids_Tk.device)[:, None, None]).any(2)
        ranks_R, tokens_R = goes_WT.nonzero(as_tuple=True)
        rows_WT = torch.where(goes_WT, goes_WT.flatten().cumsum(0).view_as(goes_WT) - 1, len(tokens_R))
        ids_Rk = torch.where(owner_Tk[tokens_R] == ranks_R[:, None], ids_Tk[tokens_R] % per_rank, -1)
        return cls(goes_WT.sum(1), tokens_R, rows_WT.T, ids_Rk)


def _sum_rows(rows_RD: Tensor, rows_TW: Tensor) -> Tensor:
    """[T, D]: the sum of each token's rows in the order of ranks, at least float32."""
    padded = functional.pad(rows_RD.to(torch.promote_types(rows_RD.dtype, torch.float32)), (0, 0, 0, 1))
    return functional.embedding_bag(rows_TW, padded, mode="sum")


class _Spread(torch.autograd.Function):
    """Tokens to rows. Its gradient is `_Gather`: sums in a fixed order, where that of indexing may not have one."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_R: Tensor, rows_TW: Tensor) -> Tensor:
        ctx.dtype = x_TD.dtype
        ctx.save_for_backward(rows_TW)
        return x_TD[tokens_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum_rows(grads[0], ctx.saved_tensors[0]).to(ctx.dtype), None, None


class _Gather(torch.autograd.Function):
    """Rows to sums of tokens, at least float32."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, tokens_R: Tensor, rows_TW: Tensor) -> Tensor:
        ctx.dtype = rows_RD.dtype
        ctx.save_for_backward(tokens_R)
        return _sum_rows(rows_RD, rows_TW)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.saved_tensors[0]].to(ctx.dtype), None, None


class _Swap(torch.autograd.Function):
    """Sends rows to all ranks, `sent[r]` to rank r, and gives those received; gradients go back the same ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad: Tensor = _Swap.apply(grads[0], ctx.received, ctx.sent, ctx.group)  # type: ignore[no-untyped-call]
        return grad, None, None, None
