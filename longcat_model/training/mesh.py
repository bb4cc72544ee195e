"""How ranks stand to each other: pipelines along one side, their data-parallel replicas along the other.

Rank p * data + d is device p of replica d, so that replicas, which send the most, are next to each other; of those,
each `experts` neighbours share experts out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longcat_model.pipeline.experts import ExpertShards
from longcat_model.training.replicas import Groups, Replicas


class Mesh(NamedTuple):
    """How many ranks there are along each side."""

    pipeline: int  # devices of a pipeline
    data: int = 1  # pipelines, each with a part of a batch
    experts: int = 1  # of those, how many share experts out; divides `data`

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data

    def pipelines(self) -> list[list[int]]:
        """The ranks of each pipeline, device by device."""
        return [[device * self.data + replica for device in range(self.pipeline)] for replica in range(self.data)]

    def check(self, experts: int) -> None:
        """Raises ValueError unless those who share experts out divide the replicas and the `experts` of a layer."""
        if self.data % self.experts or experts % self.experts:
            raise ValueError(
                f"train: expert-parallel must divide the {self.data} data-parallel replicas and the {experts} experts, "
                f"got {self.experts}"
            )

    def connect(self, device: torch.device, experts: int) -> tuple[Groups, ExpertShards | None]:
        """This rank's groups, and its part of a layer's experts if they are shared out; all ranks call it together."""
        if self.data == 1:
            return Groups(), None
        data = _mesh(device.type, pipeline=self.pipeline, data=self.data)
        if self.experts == 1:
            return Groups(Replicas(data.get_group("data"))), None
        mesh, near = (
            _mesh(kind, pipeline=self.pipeline, same=self.data // self.experts, experts=self.experts)
            for kind in (device.type, "cpu")
        )
        groups = Groups(
            *(Replicas(m.get_group(side)) for m, side in ((data, "data"), (mesh, "experts"), (mesh, "same")))
        )
        return groups, ExpertShards(mesh["experts"], near["experts"], experts)


def _mesh(kind: str, **sides: int) -> DeviceMesh:
    return init_device_mesh(kind, tuple(sides.values()), mesh_dim_names=tuple(sides))
