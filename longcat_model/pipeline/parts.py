"""A model of which a process has only parts: the rest is on the meta device, names and shapes without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor

from longcat_model import config
from longcat_model.model import LongcatNext
from longcat_model.pipeline.experts import ExpertShards, is_expert
from longcat_model.pipeline.split import ModelStage


class Saved(NamedTuple):
    """A language model on disk: small to hand over, read in parts."""

    sizes: config.Model
    file: Path  # safetensors, by the names in the model's state dict

    @classmethod
    def of(cls, model: LongcatNext, file: Path) -> Saved:
        """Writes a model."""
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(file))
        return cls(model.sizes, file)


class Parts:
    """A saved model, of which nothing is in memory at first.

    Args:
        shards: which experts this process has; None: all.

    Attributes:
        model: on the meta device but for what `bring` brought; its parameters are new ones then.

    Raises:
        ValueError: the file is unreadable or does not fit the sizes.
    """

    def __init__(self, saved: Saved, device: torch.device, shards: ExpertShards | None = None) -> None:
        self.file, self.device, self.shards = saved.file, device, shards
        with torch.device("meta"):
            self.model = LongcatNext(saved.sizes)
        wanted = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        try:
            with safe_open(saved.file, framework="pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ValueError(f"pipeline: {saved.file} must be a readable safetensors file, got: {error}") from error
        if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            raise ValueError(f"pipeline: {saved.file} must fit the config, got others of {', '.join(differing[:5])}")
        if shards is not None:
            shards.divide(self.model)

    def bring(self, stage: ModelStage) -> None:
        """Reads the weights of a stage of `model` into memory, and no others."""
        with safe_open(self.file, framework="pt") as file:
            for prefix, module in stage.modules():
                if any(tensor.is_meta for tensor in module.state_dict().values()):
                    module.to_empty(device=self.device)
                    for name, tensor in module.state_dict().items():
                        tensor.copy_(self._read(file, f"{prefix}.{name}"))

    def _read(self, file: Any, name: str) -> Tensor:
        if self.shards is not None and is_expert(name):
            rows: Tensor = file.get_slice(name)[self.shards.rows]
            return rows
        whole: Tensor = file.get_tensor(name)
        return whole

    @contextmanager
    def lend(self, stage: ModelStage) -> Iterator[None]:
        """The weights of a stage are in memory inside, and no longer."""
        self.bring(stage)
        try:
            yield
        finally:
            for _, module in stage.modules():
                module.to_empty(device="meta")
