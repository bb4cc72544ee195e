"""The rows of all ranks of a data-parallel run, so that every rank moves its codebooks by the same global batch.

Dimension key
    N rows    D width    L levels    R ranks    B bytes of a row and its codes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from longcat_kernels.ops.rvq_encode import DTYPES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """Whose rows count: those of this process (False), of the default group where there is one (True), or of a group.

    Two collectives a call, whatever the data: one of the numbers of rows, one of the rows and codes themselves. The
    latter moves N (D itemsize(x) + 4 L) bytes, N being the rows of all ranks, where summing the statistics of L
    codebooks of K entries would move 2 * 4 L K (D + 1): it is the cheaper where N < 2 L K with float32 rows, or
    N < 4 L K with bfloat16, and the only one that leaves the bits of a single process. Each rank then does the whole
    update, which is small beside the encoding of its own share.
    """

    def __init__(self, sync: bool | ProcessGroup) -> None:
        self.sync = sync

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a process group cannot be copied

    def gather(self, rows_ND: Tensor, codes_NL: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Rows [N, D] and codes [N, L] of all ranks in their order; a rank may have none.

        Args:
            rows_ND: float32, bfloat16 or float16.
            codes_NL: int64 below 2^31.
            step: a number on which all ranks must agree.

        Raises:
            ValueError: on every rank, where dtypes, widths or steps differ.
        """
        if self.sync is False or not dist.is_available() or not dist.is_initialized():
            return rows_ND, codes_NL
        group = None if self.sync is True else self.sync
        if dist.get_world_size(group) == 1:
            return rows_ND, codes_NL
        head = [len(rows_ND), DTYPES.index(rows_ND.dtype), rows_ND.shape[1], codes_NL.shape[1], step]
        heads = _all_gather(torch.tensor(head, device=rows_ND.device), group).tolist()
        if any(other[1:] != heads[0][1:] for other in heads):
            raise ValueError(
                "ResidualVQ: all ranks must have rows of one dtype and width and be in the same state, got [rows, "
                f"dtype (float32 0, bfloat16 1, float16 2), width, levels, step] {heads}"
            )
        counts = [other[0] for other in heads]
        mine_NB = torch.cat([rows_ND.contiguous().view(torch.uint8), codes_NL.int().view(torch.uint8)], 1)
        padded_NB = mine_NB.new_zeros(max(1, *counts), mine_NB.shape[1])
        padded_NB[: len(mine_NB)] = mine_NB
        all_RNB = _all_gather(padded_NB, group)
        row_bytes = rows_ND.shape[1] * rows_ND.itemsize
        all_NB = torch.cat([rank_NB[:count] for rank_NB, count in zip(all_RNB, counts, strict=True)])
        rows, codes = all_NB[:, :row_bytes].contiguous(), all_NB[:, row_bytes:].contiguous()
        return rows.view(rows_ND.dtype), codes.view(torch.int32).long()


def _all_gather(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """[R, ...]: the tensors of all ranks."""
    gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(gathered.unbind(0)), tensor, group=group)
    return gathered
