"""What the runtime asks of a pipeline stage: a function of the tensor before it and of one microbatch.

One tensor crosses from stage to stage. Its shape follows from the microbatch, which every device has (ids are tiny), so
that nothing is negotiated on the wire and microbatches may all differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Border(NamedTuple):
    """The tensor that a stage gives to the next one, for one microbatch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Output(NamedTuple):
    """What a stage's forward gives."""

    hidden: Tensor | None  # for the next stage; None from the last
    loss: Tensor | None = None  # scalar: this stage's share of the microbatch's loss; None: it has none
    report: Any = None  # whatever the caller of the step wants of this microbatch; without gradient


class Stage(Protocol):
    """A part of a model. Stage 0 gets None; another one the output of the stage before, which asks for a gradient."""

    def __call__(self, hidden: Tensor | None, microbatch: Any) -> Output: ...

    def takes(self, microbatch: Any) -> Border:
        """What the stage before gives; not asked of stage 0."""
        ...

    def gives(self, microbatch: Any) -> Border:
        """What `hidden` of the output will be; not asked of the last stage."""
        ...
