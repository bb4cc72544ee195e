"""What every op promises, whatever it computes: a test a promise, for each implementation; to join, be in OPS.

With a GPU `cuda` and `triton` run there, and the definition on both sides: `-k "[rvq_encode-cuda-gpu-"` picks one.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from longcat_kernels.ops import OPS
from longcat_kernels.spec import Op, Refusal
from longcat_kernels.testing import assert_close, record


def places(backend: str) -> tuple[str, ...]:
    """Devices on which an implementation is tried here; where it cannot run, the test is skipped with its reason."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() or backend == "cpu" or (backend == "triton" and interpreted):
        return ("cpu",)
    return ("cpu", "cuda") if backend == "reference" else ("cuda",)


def every(cases: Any) -> Any:
    """Parametrises over op, implementation, its devices and the cases of the op that `cases(spec)` picks."""
    return pytest.mark.parametrize(
        ("op", "backend", "device", "case"),
        [
            pytest.param(op, backend, device, case, id=f"{op.name}-{backend}-{'gpu-' * (device == 'cuda')}{number}")
            for op in OPS
            for backend in op.impls
            for device in places(backend)
            for number, case in enumerate(cases(op.spec))
        ],
    )


def arguments_or_skip(op: Op, backend: str, device: str, case: Any) -> tuple[dict[str, Any], Any]:
    """The case's call, as keywords and as the schema sees it; skips by name where the implementation cannot take it."""
    arguments = op.spec.inputs(case, device)
    call = record(op, arguments)
    reason = op.impls[backend].why_not(*call.arguments[:-1])
    if reason is not None:
        pytest.skip(f"{op.name}, {backend}: {reason}")
    return arguments, call


def skip_atomics(backend: str, device: str) -> None:
    """Skips what compares bits where they differ from call to call."""
    if (backend, device) == ("reference", "cuda"):
        pytest.skip("reference: torch adds up by atomics on a GPU, in any order")


@every(lambda spec: spec.EDGE)
def test_equals_the_truth(op: Op, backend: str, device: str, case: Any, poisoned: None) -> None:
    _, call = arguments_or_skip(op, backend, device, case)
    for actual, truth in zip(call.run(backend), call.truth(op), strict=True):
        assert_close(actual, truth, getattr(case, "tolerance", 1.0), getattr(case, "inner", 0.0))


@every(lambda spec: spec.EDGE)
def test_gradients_equal_the_truth(op: Op, backend: str, device: str, case: Any, poisoned: None) -> None:
    _, call = arguments_or_skip(op, backend, device, case)
    for actual, truth in zip(call.gradients(op, backend), call.gradients(op, None), strict=True):
        assert_close(actual, truth, getattr(case, "tolerance", 1.0), getattr(case, "inner", 0.0))


@every(lambda spec: spec.EDGE)
def test_same_inputs_give_the_same_bits_with_one_thread_and_two(
    op: Op, backend: str, device: str, case: Any, threads: Any
) -> None:
    """A kernel's bits do not depend on the threads; the reference has torch's matrix products, whose bits may."""
    skip_atomics(backend, device)
    _, call = arguments_or_skip(op, backend, device, case)
    for before, after in ((1, 1), (2, 2)) if backend == "reference" else ((1, 1), (1, 2)):
        threads(before)
        first = [*call.run(backend), *call.gradients(op, backend)]
        threads(after)
        again = [*call.run(backend), *call.gradients(op, backend)]
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, again, strict=True))


@every(lambda spec: spec.EDGE[-1:])
def test_is_registered_rightly(op: Op, backend: str, device: str, case: Any) -> None:
    _, call = arguments_or_skip(op, backend, device, case)
    torch.library.opcheck(call.overload, (*call.arguments[:-1], backend))


@every(lambda spec: spec.EDGE[-1:])
def test_compiles_to_one_graph(op: Op, backend: str, device: str, case: Any) -> None:
    skip_atomics(backend, device)
    arguments, _ = arguments_or_skip(op, backend, device, case)
    compiler = "inductor" if op.name == "rvq_encode" else "aot_eager"
    compiled = torch.compile(op.run, fullgraph=True, backend=compiler)
    got = compiled(**copies(arguments), backend=backend)
    want = op.run(**copies(arguments), backend=backend)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("op", "refusal"), [pytest.param(op, r, id=f"{op.name}: {r.message}") for op in OPS for r in op.spec.REFUSALS]
)
def test_refuses(op: Op, refusal: Refusal) -> None:
    good = op.spec.inputs(op.spec.EDGE[0], "cpu")
    with pytest.raises(refusal.error) as caught:
        op.run(**{**good, **refusal.change(good)})
    assert str(caught.value).startswith(f"{op.name}: {refusal.message}")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_knows_its_cost(op: Op) -> None:
    for case in (*op.spec.EDGE, *op.spec.MODEL):
        cost = op.spec.cost(case)
        assert cost.flops >= 0 and cost.bytes > 0


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def flat(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)
