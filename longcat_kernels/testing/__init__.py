"""What a contract test needs of an op: its call as the schema sees it, float64 truth, gradients, a measure of error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longcat_kernels.spec import Op


@dataclass(frozen=True)
class Call:
    """A call of `longcat::<op>`: the overload, and its arguments in the order of the schema, the backend last."""

    overload: Any
    arguments: tuple[Any, ...]

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """Results, then the arguments written in place, of a call on copies."""
        arguments = (*_map(_copy, self.arguments[:-1]), backend)
        results = self.overload(*arguments)
        return (*_tuple(results), *self._written(arguments))

    def truth(self, op: Op) -> tuple[Tensor, ...]:
        """The same in float64 by the definition."""
        arguments = _map(_upcast, self.arguments[:-1])
        return (*getattr(op.spec, op.name)(*arguments), *self._written(arguments))

    def gradients(self, op: Op, backend: str | None) -> list[Tensor]:
        """Gradients of all arguments that require one, for fixed gradients of the results; None: by the definition.

        Sparse ones come as if they were not.
        """
        arguments = _map(_copy if backend else _upcast, self.arguments[:-1])
        results = _tuple(self.overload(*arguments, backend) if backend else getattr(op.spec, op.name)(*arguments))
        results = tuple(result for result in results if result.requires_grad)
        leaves = [leaf for leaf in _leaves(arguments) if leaf.requires_grad]
        if not leaves:
            return []
        grads = torch.autograd.grad(results, leaves, [_ramp(result) for result in results])
        return [grad.to_dense() for grad in grads]

    def _written(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        pairs = zip(arguments, self.overload._schema.arguments, strict=False)
        return [a for a, s in pairs if a is not None and s.alias_info is not None and s.alias_info.is_write]


def record(op: Op, arguments: dict[str, Any]) -> Call:
    """The call of the op's schema that the public function makes for `arguments`."""
    with _Recorder(f"longcat::{op.name}") as recorder:
        op.run(**arguments, backend="reference")
    return replace(recorder.calls[0])


def assert_close(actual: Tensor, truth: Tensor, tolerance: float = 1.0, inner: float = 0.0) -> None:
    """Within one rounding of the result's dtype, plus 16 float32 roundings of its largest value for the sums inside.

    Integers must be equal, and so must NaN and infinity. `tolerance` multiplies what is allowed; `inner` is allowed on
    top, as a share of the largest value.
    """
    assert actual.shape == truth.shape, f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, truth.to(actual.dtype))
        return
    scale = truth.detach().double().nan_to_num(0, 0, 0).abs().amax().item() if truth.numel() else 0.0
    rtol, atol = tolerance * 1.01 * torch.finfo(actual.dtype).eps, (tolerance * 16 * 2.0**-24 + inner) * scale
    torch.testing.assert_close(actual.double(), truth.double(), rtol=rtol, atol=atol, equal_nan=True)


class _Recorder(TorchFunctionMode):
    """Keeps the calls of one op."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func._schema.name == self.name:
            self.calls.append(Call(func, args))
        return func(*args, **(kwargs or {}))


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_map(function, v) for v in value) if isinstance(value, (list, tuple)) else value


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)


def _copy(tensor: Tensor) -> Tensor:
    """A leaf of its own memory with the same strides."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _upcast(tensor: Tensor) -> Tensor:
    return _copy(tensor.double() if tensor.is_floating_point() else tensor).requires_grad_(tensor.requires_grad)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _ramp(result: Tensor) -> Tensor:
    """A gradient with no two elements alike, exact in every dtype."""
    values = torch.arange(result.numel(), device=result.device).mul(37).remainder(63).sub(31)
    return values.div(32).to(result.dtype).reshape(result.shape)
