"""How ranks stand to each other: pipelines along one side, their data-parallel replicas along the other.

Rank p * data + d is device p of replica d, so that replicas, which send the most, are next to each other; of those,
each `experts` neighbours share experts out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longcat_model.pipeline.experts import ExpertShards
from longcat_model.pipeline.transport import TIMEOUT_S
from longcat_model.training.replicas import Groups, Replicas


@dataclass(frozen=True)
class Mesh:
    """How many ranks there are along each side.

    Raises:
        ValueError: a side is below 1, or `experts` does not divide `data`.
    """

    pipeline: int  # devices of a pipeline
    data: int = 1  # pipelines, each with a part of a batch
    experts: int = 1  # of those, how many share experts out

    def __post_init__(self) -> None:
        for name, side in (
            ("pipeline", self.pipeline),
            ("data-parallel", self.data),
            ("expert-parallel", self.experts),
        ):
            if side < 1:
                raise ValueError(f"train: {name} must be at least 1, got {side}")
        if self.data % self.experts:
            raise ValueError(f"train: expert-parallel must divide data-parallel ({self.data}), got {self.experts}")

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data

    def pipelines(self) -> list[list[int]]:
        """The ranks of each pipeline, device by device."""
        return [[device * self.data + replica for device in range(self.pipeline)] for replica in range(self.data)]

    def connect(
        self, device: torch.device, experts: int, timeout_s: float = TIMEOUT_S
    ) -> tuple[Groups, ExpertShards | None]:
        """This rank's groups, and its part of a layer's experts if they are shared out; all ranks call it together.

        In none of the groups does a rank wait longer than `timeout_s` for another.
        """
        if self.data == 1:
            return Groups(), None
        data = _mesh(device.type, pipeline=self.pipeline, data=self.data)
        if self.experts == 1:
            return Groups(Replicas(data.get_group("data"), timeout_s)), None
        mesh, near = (
            _mesh(kind, pipeline=self.pipeline, same=self.data // self.experts, experts=self.experts)
            for kind in (device.type, "cpu")
        )
        sides = ((data, "data"), (mesh, "experts"), (mesh, "same"))
        groups = Groups(*(Replicas(m.get_group(side), timeout_s) for m, side in sides))
        return groups, ExpertShards(mesh["experts"], near["experts"], experts)


def _mesh(kind: str, **sides: int) -> DeviceMesh:
    return init_device_mesh(kind, tuple(sides.values()), mesh_dim_names=tuple(sides))
