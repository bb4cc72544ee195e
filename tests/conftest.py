"""Shared by all tests: outputs nobody wrote are NaN, and what a machine could not run is listed at the end."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def pytest_runtest_setup(item: Any) -> None:
    """Tests of the Triton implementations run in a process with the interpreter: it must be on before kernels load."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    on_cpu = parameters.get("backend") == "triton" and parameters.get("device") != "cuda"
    if (on_cpu or item.path.parent.name == "interpreter") and not INTERPRETED:
        pytest.skip("triton: run in a process of its own, with TRITON_INTERPRET=1")


def pytest_runtest_teardown(item: Any) -> None:
    """After an illegal access every call of a process fails: its other tests would only repeat the error."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the GPU was lost in {item.nodeid}: {str(error).splitlines()[0]}", returncode=3)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter makes triton.language over in every call of a device function: half of its time, in vain."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    original, made_over = interpreter._patch_lang, set()

    def once_a_launch(fn: Any) -> Any:
        if id(fn.__globals__) in made_over:
            return None
        made_over.add(id(fn.__globals__))
        scope = original(fn)
        return SimpleNamespace(restore=lambda: (made_over.clear(), scope.restore()))

    interpreter._patch_lang = once_a_launch
    yield
    interpreter._patch_lang = original


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes uninitialised memory show: floats are NaN, integers far out of range, booleans True."""

    def poison(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            if isinstance(tensor, FakeTensor) or tensor.is_meta:
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)

        return filled

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def threads() -> Any:
    """Sets torch's thread count for one test: `threads(2)`."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Lists the implementations that did not run here, each once with its reason."""
    reasons = sorted({report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])})
    if reasons:
        terminalreporter.section("not run on this machine")
        for reason in reasons:
            terminalreporter.line(reason)
