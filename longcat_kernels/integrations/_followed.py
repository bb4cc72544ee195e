"""Weights of someone else's module, packed for `depth_decode` and always those that the module has now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from longcat_kernels.prepared import PreparedDepth
from longcat_kernels.reference.depth_weights import DepthWeights


class FollowedWeights:
    """The weights of a model as `depth_decode` takes them; made anew when the model's parameters are others.

    Training, `load_state_dict`, other dtypes and devices are noticed. Copies and pickles follow their own model.

    Args:
        model: what has the weights.
        parts: the modules in it whose parameters these are.
        weights_of: gives the weights of a model, or raises ValueError where `depth_decode` has not what it needs.
    """

    _prepared: PreparedDepth | None
    _owners: list[tuple[Mapping[str, Tensor | None], str]]
    _known: list[Any]

    def __init__(self, model: Any, parts: Iterable[nn.Module], weights_of: Callable[[Any], DepthWeights]) -> None:
        self.model, self.parts, self.weights_of = model, tuple(parts), weights_of
        self._forget()
        self.prepared()

    def prepared(self) -> PreparedDepth:
        """The weights as they are."""
        # Modules are walked once: looking at a few hundred tensors costs microseconds, finding them a millisecond.
        owners = self._owners or [
            (m._parameters, name) for p in self.parts for m in p.modules() for name in m._parameters
        ]
        known = [_identity(owner[name]) for owner, name in owners]
        if self._prepared is None or known != self._known:
            self._prepared = PreparedDepth(self.weights_of(self.model))
            self._owners, self._known = owners, known
        return self._prepared

    def _forget(self) -> None:
        self._prepared, self._owners, self._known = None, [], []

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "parts": self.parts, "weights_of": self.weights_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


def _identity(parameter: Tensor | None) -> Any:
    """What tells two states of a parameter apart: the object, where its memory is, how often it was written."""
    if parameter is None:
        return None
    writes = 0 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), parameter.dtype, writes
