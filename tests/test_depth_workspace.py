"""Decoding in steady state: a workspace's memory is made once, and nothing of what it held before shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from depths import runnable
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from longcat_kernels import DepthDecoding, PreparedDepth, Workspace, depth_decode, native
from longcat_kernels.ops.depth_decode import OP
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.testing import record

CASES = [spec.EDGE[5], spec.EDGE[7], spec.EDGE[10]]  # mixed pairs, Moshi's start, a given level; some rows not active


@pytest.fixture(params=list(OP.impls))
def backend(request: pytest.FixtureRequest) -> str:
    return runnable(request.param)


def served(case: spec.Case, seed: int = 0) -> dict[str, Any]:
    """The case's call as a server makes it: all that is made of numbers is there already."""
    arguments = spec.inputs(case, seed=seed)
    call = record(OP, arguments)
    sampling, seeds, steps = (tensor.contiguous() for tensor in call.arguments[3:6])
    prepared = PreparedDepth(arguments["weights"]).refresh()
    return {
        **arguments,
        "weights": prepared,
        "sampling": sampling,
        "seed": seeds,
        "step": steps,
        "pairs": call.arguments[9],
    }


def allocations(run: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation and, below zero, release by torch's allocator on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]


def assert_equal(got: DepthDecoding, want: DepthDecoding) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize("case", CASES)
def test_a_second_call_allocates_no_tensor(case: spec.Case) -> None:
    arguments, workspace = served(case), Workspace()
    assert allocations(lambda: depth_decode(**arguments, backend="cpu"))
    depth_decode(**arguments, workspace=workspace, backend="cpu")
    others = served(case, 1) | {"weights": arguments["weights"], "active": None}
    for call in (arguments, others):
        assert allocations(lambda call=call: depth_decode(**call, workspace=workspace, backend="cpu")) == []


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_earlier_calls_shows(backend: str, case: spec.Case) -> None:
    """Whatever is in the memory, and whichever batches take turns."""
    workspace, sizes = Workspace(), []
    few = replace(case, tokens=3, pairs=None, sampling=spec.EDGE[3].sampling)
    for turn, chosen in enumerate((case, few, case, few)):
        arguments = served(chosen, turn)
        got = depth_decode(**arguments, workspace=workspace, backend=backend)
        assert_equal(got, depth_decode(**arguments, backend=backend))
        sizes.append(workspace.bytes)
        for tensor in workspace._tensors.values():
            tensor.view(torch.uint8).fill_(255)
    assert sizes[1] == sizes[3] > sizes[0]


def test_results_are_the_workspaces(backend: str) -> None:
    workspace, arguments = Workspace(), served(CASES[0])
    first = depth_decode(**arguments, workspace=workspace, backend=backend)
    codes = first.codes.clone()
    second = depth_decode(**arguments | {"seed": arguments["seed"] + 1}, workspace=workspace, backend=backend)
    assert first.codes is second.codes and not torch.equal(second.codes, codes)


def test_a_workspace_made_in_inference_mode_serves_outside_of_it(backend: str) -> None:
    workspace, arguments = Workspace(), served(CASES[0])
    with torch.inference_mode():
        depth_decode(**arguments, workspace=workspace, backend=backend)
    got = depth_decode(**arguments, workspace=workspace, backend=backend)
    assert_equal(got, depth_decode(**arguments, backend=backend))


def test_a_compiled_graph_has_its_own_memory() -> None:
    workspace, arguments = Workspace(), served(CASES[0])
    torch._dynamo.reset()

    def draw(hidden: torch.Tensor) -> torch.Tensor:
        return depth_decode(**arguments | {"hidden": hidden}, workspace=workspace).codes

    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    assert torch.equal(compiled(arguments["hidden"]), depth_decode(**arguments).codes) and workspace.bytes == 0


def test_fake_tensors_never_become_the_workspaces() -> None:
    workspace, arguments = Workspace(), served(CASES[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = arguments | {"hidden": mode.from_tensor(arguments["hidden"])}
        shape = depth_decode(**fake, workspace=workspace).codes.shape
    assert workspace.bytes == 0 and shape == depth_decode(**arguments, workspace=workspace).codes.shape


def test_refuses_what_it_would_overwrite_while_it_reads() -> None:
    arguments = {**served(CASES[0]), "workspace": Workspace()}
    first = depth_decode(**arguments)
    offsets = torch.zeros(len(first.codes) + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="history's codes must not be a result that its workspace holds"):
        depth_decode(**arguments | {"history": (first.codes, offsets)})
    with pytest.raises(ValueError, match="prefix must not be a result that its workspace holds"):
        depth_decode(**arguments | {"prefix": first.codes[:, :1]})
    depth_decode(**arguments | {"history": (first.codes.clone(), offsets), "prefix": first.codes[:, :1].clone()})
