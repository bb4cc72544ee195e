"""Post-validation: the optimizer steps before all ranks have told their part of the gradient's norm.

Clipping, and leaving out a step whose gradient is not finite, need the norm over all ranks: waiting for it is a bubble
at the end of every step. So each rank steps as if nothing had to be clipped, goes on with the forwards of the next
step, and looks at the norm when it is there. Where the step was wrong, what it overwrote is copied back, bit for bit,
and the step is done again as it should have been; so all weights are those of a run that waits (Qi et al., arXiv
2401.10241, section 4; there the step is undone by arithmetic).

What there is to gain depends on the schedule: the bubble that lies between two steps. All of today's generators keep
device 0 from the first action of a step to its last, so that only the wait for the norm itself is saved.

Memory: a copy of a rank's parameters and of its optimizer's state (with AdamW, three times the parameters), and the
gradients until the next step's first backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longcat_model.pipeline.transport import Transport

Norms = Sequence[Sequence[Mapping[str, Tensor]]]  # by pipeline, device and parameter


class Snapshot:
    """What a step overwrites: parameters, the optimizer's state of them, and other tensors."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> None:
        self._optimizer, self._parameters, self._tensors = optimizer, parameters, [*parameters, *others]
        self._copies: dict[Tensor, Tensor] = {}  # kept from step to step: memory is asked for once
        self._known: dict[nn.Parameter, dict[str, Any]] = {}

    @torch.no_grad()
    def take(self) -> None:
        self._known = {p: dict(self._optimizer.state[p]) for p in self._parameters if p in self._optimizer.state}
        for tensor in self._all():
            if tensor in self._copies:
                self._copies[tensor].copy_(tensor)
            else:
                self._copies[tensor] = tensor.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        for tensor in self._all():
            tensor.copy_(self._copies[tensor])
        for parameter in self._parameters:
            if parameter in self._known:
                self._optimizer.state[parameter] = dict(self._known[parameter])
            else:
                self._optimizer.state.pop(parameter, None)

    def _all(self) -> list[Tensor]:
        states = (value for state in self._known.values() for value in state.values() if isinstance(value, Tensor))
        return [*self._tensors, *states]


class PostValidation:
    """The clipped step of one rank, without waiting.

    A step is `begin`, then the optimizer's step and whatever else changes `others`; then gradients are set to None, and
    after forwards of the next step, which can be done again, comes `settle`.

    Args:
        transport: the rank's end.
        optimizer: of this rank's `parameters`, and perhaps of others that have no gradient here.
        parameters: by name.
        others: what else a step changes.
        total: norms by name, of every device of every pipeline -> the norm; the same function on every rank.
    """

    def __init__(
        self,
        transport: Transport,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        others: Sequence[Tensor],
        total: Callable[[Norms], Tensor],
    ) -> None:
        self._transport, self._optimizer, self._parameters = transport, optimizer, parameters
        self._total, self._most = total, 0.0
        self._snapshot = Snapshot(optimizer, list(parameters.values()), others)
        self._announced: Callable[[], list[list[Any]]] | None = None
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._options: list[dict[str, Any]] = []

    @property
    def is_open(self) -> bool:
        """Whether a step waits to be settled."""
        return self._announced is not None

    def begin(self, most: float, news: Any = None) -> None:
        """Tells the other ranks the norms of this one's gradients, and `news`; keeps what the step will overwrite.

        `most` is the norm that gradients are scaled down to.
        """
        self._most = most
        self._grads = {weight: weight.grad for weight in self._parameters.values() if weight.grad is not None}
        norms = gradient_norms(self._parameters)
        self._announced = self._transport.announce((norms, news))
        self._options = _options(self._optimizer)
        self._snapshot.take()

    def settle(self, also: Callable[[], None] = lambda: None) -> tuple[Tensor, bool, list[list[Any]]]:
        """Waits for all ranks' norms; where the step was wrong, takes it back and does it as it should be.

        What the next step's forwards have added to gradients is then dropped.

        Args:
            also: what belongs to a step besides the optimizer's; called where the step is done again.

        Returns:
            the norm; whether the step stands as it was; the news of every device of every pipeline.
        """
        assert self._announced is not None, "settle: a step must have begun"
        everyone = self._announced()
        norm = self._total([[norms for norms, _ in devices] for devices in everyone])
        stands = bool(self._most / (norm + 1e-6) >= 1)  # as clip_grads_with_norm_ scales
        if not stands:
            self._snapshot.restore()
            if torch.isfinite(norm):
                self._redo(norm, also)
            for weight in self._parameters.values():
                weight.grad = None
        self._announced, self._grads = None, {}
        return norm, stands, [[news for _, news in devices] for devices in everyone]

    def _redo(self, norm: Tensor, also: Callable[[], None]) -> None:
        groups = self._optimizer.param_groups
        present = _options(self._optimizer)
        for weight in self._parameters.values():
            weight.grad = self._grads.get(weight)
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._most, norm)
        for group, then in zip(groups, self._options, strict=True):
            group.update(then)
        self._optimizer.step()
        also()
        for group, now in zip(groups, present, strict=True):
            group.update(now)


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each group, such as the learning rate."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def gradient_norms(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The norm of every gradient that is there, on the CPU."""
    return {name: torch.linalg.vector_norm(g).cpu() for name, w in parameters.items() if (g := w.grad) is not None}
