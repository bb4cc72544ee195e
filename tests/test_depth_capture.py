"""What the host does of `depth_decode` on a GPU in steady state: reads no tensor, makes none, waits for nothing.

Seen without a GPU by tensors on the meta device, which have no memory: whoever looks into one, or copies it to the
host, fails. tests/cuda/on_fake_driver.py goes on where the compiled module calls the driver;
tests/cuda/test_cuda_device.py captures a graph where there is a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longcat_kernels import Workspace, cuda, native, triton
from longcat_kernels.ops.depth_decode import OP, _decode
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.testing import record

# Mixed pairs with a history, some rows not active; start; a given level.
CASES = [spec.EDGE[5], spec.EDGE[7], spec.EDGE[10]]


class OnlyKnownMemory(TorchDispatchMode):
    """Refuses operations of torch whose results are not in the memory of tensors known before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {memory_of(tensor) for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for result in tree_leaves(found):
            if isinstance(result, Tensor):
                assert memory_of(result) in self.known, f"{function} allocates"
        return found


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def arguments_of(case: spec.Case) -> list[Any]:
    """As the public function hands them on for tensors of a device, all numbers in tensors, as a server has them."""
    arguments = list(record(OP, spec.inputs(case, "meta")).arguments[:-1])
    return [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]


def call_twice(arguments: list[Any], backend: str) -> None:
    """The second time with a workspace that the first has filled, and no other memory."""
    workspace = Workspace()
    outputs = _decode((*arguments, backend), workspace.new)
    known = tensors_of([arguments, outputs]) + list(workspace._tensors.values())
    with OnlyKnownMemory(known):
        again = _decode((*arguments, backend), workspace.new)
    assert all(a is b for a, b in zip(outputs, again, strict=True))


def test_who_looks_into_a_tensor_fails() -> None:
    """The other tests could not fail otherwise."""
    x = torch.ones(1, device="meta")
    for read in (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.cpu, Tensor.nonzero, Tensor.numpy):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read(x)
    with OnlyKnownMemory([x]), pytest.raises(AssertionError, match="allocates"):
        x.add_(1) + 1


@pytest.mark.parametrize("case", CASES)
def test_triton_only_launches(case: spec.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five kernels a layer and eight more a level, and one a level for its history."""
    jit = pytest.importorskip("triton.runtime.jit")
    launched: list[str] = []
    monkeypatch.setattr(triton, "_why_not", lambda *_: None)
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *_, **__: launched.append(self.__name__))
    arguments = arguments_of(case)
    call_twice(arguments, "triton")
    c, half = case.config, len(launched) // 2
    heads = c.levels - c.given
    histories = heads if case.some else 0
    assert launched[:half] == launched[half:]
    assert half == c.levels * (3 + 5 * c.layers) + 5 * heads + histories


@pytest.mark.parametrize("case", CASES)
def test_cuda_makes_one_call_of_the_compiled_module(case: spec.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[Any]] = []

    def decode(kernels: str, stream: int, allocate: Any, *rest: Any) -> None:
        calls.append([allocate(1000), *rest])

    module = SimpleNamespace(depth_decode_cuda=decode, depth_most_rows_cuda=lambda *_: 8)
    monkeypatch.setattr(cuda, "why_not", lambda *_: None)
    monkeypatch.setattr(cuda, "context", lambda *_: ("kernels", 7))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(native, "module", lambda: module)
    call_twice(arguments_of(case), "cuda")
    assert len(calls) == 2
    assert [memory_of(t) for t in tensors_of(calls[0])] == [memory_of(t) for t in tensors_of(calls[1])]
