"""depth_decode in Triton's interpreter, where it goes beyond the contract: ties, long rows, bits, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from longcat_kernels import DepthConfig, DepthSampling, Workspace, depth_decode
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference._depth_cases import random_weights
from longcat_kernels.reference.sampling import draw, gumbel, seen
from longcat_kernels.workspace import fresh


def config(classes: tuple[int, ...], **changes: Any) -> DepthConfig:
    small = DepthConfig(classes=classes, hidden=10, dim=8, layers=1, heads=2, kv_heads=2, head_dim=4, ffn=8, ends=True)
    return replace(small, **changes)


def weights_of(sizes: DepthConfig, like: str = "longcat", dtype: torch.dtype = torch.float32) -> Any:
    return random_weights(spec.Case(1, sizes, like, dtype=dtype), "cpu", torch.Generator().manual_seed(4))


def hidden(rows: int, seed: int = 1, width: int = 10) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


NUMBERS = {
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    "top_k": st.sampled_from([0, 1, 2, 5, 40, 2049]),
    "top_p": st.sampled_from([1.0, 0.99, 0.5, 0.01]),
    "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
    "order": st.sampled_from(["sequential", "joint"]),
    "end": st.sampled_from(["mask", "allow"]),
}


@settings(max_examples=8, deadline=None)
@given(
    numbers=st.lists(st.fixed_dictionaries(NUMBERS), min_size=8, max_size=8),
    grid=st.sampled_from([None, 0.0, 1.0, 4.0]),
    seed=st.integers(-(2**62), 2**62),
)
def test_draws_are_those_of_the_definition(numbers: list[dict[str, Any]], grid: float | None, seed: int) -> None:
    """From the same logits, with blocks that are not full, and, on a grid, with ties across blocks."""
    rows, classes, level = 8, 2500, 3
    from longcat_kernels.triton.depth_decode import _Batch

    weights = weights_of(config((2, 2, 2, classes)))
    g = torch.Generator().manual_seed(seed % 2**32)
    logits = torch.randn(rows, classes, generator=g) * 2
    logits = logits if grid is None else (logits * grid).round() / max(grid, 1.0)
    params = torch.cat([DepthSampling(**own).table(1, weights.config) for own in numbers])
    seeds, steps = torch.arange(rows) * 3 + seed, torch.arange(rows) * 2**31
    history, offsets = torch.randint(-1, classes + 1, (60, 4), generator=g), torch.arange(9) * 7
    batch = _Batch.of(rows, weights, params, seeds, steps, None, None, None, fresh)
    past = batch.seen(history, offsets, weights.config, fresh)
    outputs = (torch.zeros(rows, 4, dtype=torch.int64), torch.zeros(rows, 4), torch.zeros(rows, 4))
    batch.draw(level, logits, past[:, 6:], outputs)
    noise = gumbel(seeds, steps, [(level, classes)])[0]
    want = draw(logits, params[:, level], noise, seen(history[:, level], offsets, classes), None)
    assert torch.equal(outputs[0][:, level], want.ids)
    torch.testing.assert_close(outputs[1][:, level], want.logprobs, rtol=2e-6, atol=0)
    torch.testing.assert_close(outputs[2][:, level], want.drawn_logprobs, rtol=2e-6, atol=1e-6)


def one_order(a: Any, b: Any, dtype: Any) -> Any:
    """A product that adds in order: the bits of numpy's depend on where in the tile a row is."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total += a[:, k : k + 1] * b[k : k + 1]
    return total


@pytest.mark.parametrize("like", ["longcat", "qwen"])
def test_a_row_alone_has_the_bits_it_has_among_others(like: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of 16, 32 and 64 rows."""
    monkeypatch.setattr(np, "matmul", one_order)
    sizes = config((9, 7), gated=like == "qwen", kv_heads=1, hidden=8)
    weights, h = weights_of(sizes, like), hidden(70, width=8)
    numbers = DepthSampling(0.8, 4, 0.9, 0.01)
    everyone = depth_decode(h, weights, numbers, seed=torch.arange(70), logits=True, backend="triton")
    for rows in (slice(69, 70), slice(3, 33)):
        some = depth_decode(h[rows], weights, numbers, seed=torch.arange(70)[rows], logits=True, backend="triton")
        for got, want in zip(some, everyone, strict=True):
            assert torch.equal(got, want[rows])


def test_nan_stays_in_its_row_and_its_pair(poisoned: None) -> None:
    weights, h = weights_of(config((9, 7))), hidden(6)
    options: Any = {"seed": 1, "pairs": "interleaved", "logits": True, "backend": "triton"}
    clean = depth_decode(h, weights, **options)
    h[3] = torch.nan
    dirty = depth_decode(h, weights, **options)
    others = torch.tensor([0, 1, 4, 5])
    for got, want in zip(dirty, clean, strict=True):
        assert torch.equal(got[others], want[others])
    assert dirty.logprobs[2:4].isnan().all() and (dirty.codes[2:4] == 0).all()
    assert dirty.logits[3].isnan().all() and not dirty.logits[2].isnan().any()


def test_numbers_out_of_range_write_inside_the_outputs_only() -> None:
    """On an accelerator nobody reads them before the kernels do."""
    from longcat_kernels.triton.depth_decode import run

    weights, rows = weights_of(config((9, 7))), 4
    memory = torch.full((3 * rows, 2), 7)
    codes, floats = memory[rows:-rows], [torch.empty(rows, n) for n in (2, 2, 10, 0)]
    run(
        hidden(rows),
        weights.tensors(),
        [],
        DepthSampling().table(rows, weights.config),
        torch.arange(rows),
        torch.arange(rows),
        None,
        torch.tensor([[-9], [99], [2**40], [1]]),
        None,
        torch.tensor([0, -5, 2**40, 0]),
        torch.full((3, 2), 2**40),
        torch.tensor([-4, 0, 2, 900, 1]),
        weights.config.numbers(),
        1e-6,
        False,
        *floats,
        codes,
    )
    assert (memory[:rows] == 7).all() and (memory[-rows:] == 7).all()
    assert ((codes >= 0) & (codes < torch.tensor([9, 7]))).all()


def test_what_is_launched_depends_on_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No branch of the host looks into a tensor: a CUDA graph of one call serves every other."""
    from longcat_kernels.ops.depth_decode import OP
    from longcat_kernels.testing import record

    case = replace(spec.EDGE[5], tokens=8)
    call = record(OP, spec.inputs(case))

    def refuse(self: torch.Tensor, *arguments: Any) -> Any:
        raise AssertionError("reads a tensor on the host")

    outputs = call.overload(*call.arguments[:-1], "triton")
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
            patch.setattr(torch.Tensor, name, refuse)
        from longcat_kernels.triton.depth_decode import run

        again = [torch.empty_like(output) for output in outputs]
        run(*call.arguments[:-1], *again)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(outputs, again, strict=True))


@pytest.mark.parametrize("case", [spec.EDGE[5], spec.EDGE[7]])
def test_a_second_call_with_a_workspace_allocates_nothing(case: spec.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host, where kernels are only counted: the interpreter's own copies of tensors are not the launcher's."""
    from triton.runtime.interpreter import InterpretedFunction

    from longcat_kernels.ops.depth_decode import OP
    from longcat_kernels.testing import record
    from longcat_kernels.triton.depth_decode import run

    call = record(OP, spec.inputs(case))
    outputs = [torch.empty_like(output) for output in call.overload(*call.arguments[:-1], "reference")]
    arguments = [value.contiguous() if isinstance(value, torch.Tensor) else value for value in call.arguments[:-1]]
    launches, workspace = [], Workspace()
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: launches.append(self))
    run(*arguments, *outputs, new=workspace.new)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run(*arguments, *outputs, new=workspace.new)
    assert len(launches) > 50
    assert [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"] == []
