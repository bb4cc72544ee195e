"""What tests and benchmarks know of an op: one `Op` value each, listed in `longcat_kernels.ops.OPS`.

The module `reference/<op>.py` is the op's specification. It holds
    <op>(...)                  the definition in plain torch, differentiable, at whatever precision its inputs have;
                               its parameters are those of the schema, which ends with `str backend`, without that
                               one, and it returns the results as a tuple
    Case                       a frozen dataclass: one problem size
    EDGE, MODEL                tuples of `Case`: every corner, the last a plain one; the sizes of the real model
    inputs(case, device, seed) the arguments of the public function by name; where one requires grad, the gradient is
                               checked too
    cost(case)                 `Cost` of one call
    REFUSALS                   tuple of `Refusal`: changes to the call of EDGE[0] that must be refused, and how
A `Case` may have `tolerance`: how many times the usual error it is allowed, and `inner`: which share of the largest
result may be lost because operands inside are rounded to a narrow dtype; each with the reason beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_kernels.backends import Impl


@dataclass(frozen=True)
class Cost:
    """What one call cannot do without."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Refusal:
    """A call that must be refused before any work is done.

    Example: `Refusal("x must be floating point", lambda a: {"x": a["x"].long()})` replaces one argument of a good call.
    """

    message: str  # what the error says, after "<op>: "
    change: Callable[[dict[str, Any]], dict[str, Any]]  # good arguments -> the arguments to replace
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class Op:
    """One op: its stem, its public function, its implementations and its specification."""

    name: str  # the stem: public function, schema `longcat::<name>`, file names, first word of errors
    run: Callable[..., Any]  # the public function
    impls: dict[str, Impl]  # backend name -> implementation, in order of preference
    spec: ModuleType  # reference/<name>.py
