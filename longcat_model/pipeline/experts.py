"""Experts shared out over ranks with the same stages: rank r of W has [r E / W, (r + 1) E / W) of every layer.

Tokens travel to their experts and back (`ExpertParallel`); everything else of a stage is on all of these ranks.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from longcat_kernels.modules import ExpertParallel, MoE
from longcat_model.model import LongcatNext

_EXPERT = re.compile(r"\.mlp\.(gate_up|down)($|\.(?!step$))")  # an optimizer's step is one number


def is_expert(name: str) -> bool:
    """Whether the parameter, or what an optimizer keeps of it, holds a row for each expert."""
    return _EXPERT.search(name) is not None


class ExpertShards:
    """What one rank has.

    Args:
        mesh: of the ranks that share experts out, for their tokens.
        near: the same on the CPU, for checkpoints.
        experts: E.

    Raises:
        ValueError: the ranks do not divide the experts.
    """

    def __init__(self, mesh: DeviceMesh, near: DeviceMesh, experts: int) -> None:
        self.near, self.parallel = near, ExpertParallel(mesh.get_group(), experts)
        self.rows = slice(self.parallel.own.start, self.parallel.own.stop)

    def divide(self, model: LongcatNext) -> None:
        """Leaves of a whole model's experts those of this rank."""
        for module in model.modules():
            if isinstance(module, MoE):
                module.parallel = self.parallel
                module.gate_up = nn.Parameter(module.gate_up.detach()[self.rows])
                module.down = nn.Parameter(module.down.detach()[self.rows])

    def spread(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows of experts as what they are of all ranks' rows, in the same memory."""
        return {name: self._whole(tensor) if is_expert(name) else tensor for name, tensor in tensors.items()}

    def _whole(self, rows: Tensor) -> Tensor:
        found: Tensor = DTensor.from_local(rows.detach(), self.near, [Shard(0)], run_check=False)
        return found
