"""The CUDA kernels of depth_decode, run on the CPU one fiber a thread with grid barriers, against the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from longcat_kernels.ops import OPS
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference._depth_cases import CLOSE_DRAWS
from longcat_kernels.reference.depth_sampling import DepthSampling
from longcat_kernels.reference.depth_weights import DepthConfig, DepthWeights
from longcat_kernels.testing import assert_close, record

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="CUDA emulation: no C++ compiler")
(OP,) = (op for op in OPS if op.name == "depth_decode")
# "end" is drawn, and the last level has no table.
ENDS = spec.Case(8, replace(spec.EDGE[0].config, classes=(2, 2)), "moshi", DepthSampling(end="allow"))
SMALL = [*(case for case in spec.EDGE if 0 < case.tokens <= 8), ENDS]  # all that the kernel for few rows takes


def arguments(case: Any, seed: int = 0) -> list[Any]:
    """Of the schema, without the backend."""
    return list(record(OP, OP.spec.inputs(case, "cpu", seed)).arguments[:-1])


def sampler(classes: int, sampling: DepthSampling, levels: int = 1) -> spec.Case:
    """A transformer without layers: what there is of a level is its head and the draw."""
    config = DepthConfig((classes,) * levels, hidden=8, dim=8, layers=0, heads=1, kv_heads=1, head_dim=8, ffn=8)
    return spec.Case(8, config, sampling=sampling)


def assert_same_codes(inputs: list[Any]) -> Tensor:
    got, want = emulated.depth_decode(*inputs), spec.depth_decode(*inputs)
    assert torch.equal(got[4], want[4])
    for actual, truth in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5, equal_nan=True)
    return got[4]


@pytest.mark.parametrize("case", SMALL)
def test_equals_the_truth(case: Any) -> None:
    call = record(OP, OP.spec.inputs(case, "cpu"))
    for actual, truth in zip(emulated.depth_decode(*call.arguments[:-1]), call.truth(OP), strict=True):
        assert_close(actual, truth, case.tolerance, case.inner)


@pytest.mark.parametrize(
    "numbers",
    [
        DepthSampling(),
        DepthSampling(0.7, top_k=50),
        DepthSampling(1.3, top_p=0.9),
        DepthSampling(0.5, top_k=40, top_p=0.8, order="joint"),
        DepthSampling(0.5, top_k=40, top_p=0.8),
        DepthSampling(2.0, min_p=0.2),
        DepthSampling(1e-3),
        DepthSampling(1e-30),
        DepthSampling(0.0),
        DepthSampling(1.0, top_k=1),
        DepthSampling(1.0, top_p=1e-6),
    ],
)
@pytest.mark.parametrize("classes", [2, 1100])
def test_draws_what_the_definition_draws(numbers: DepthSampling, classes: int) -> None:
    codes_TL = assert_same_codes(arguments(sampler(classes, numbers, levels=3)))
    assert classes == 2 or codes_TL.unique().numel() > 8


def test_draws_are_decided_in_float64() -> None:
    for seeds in (CLOSE_DRAWS[:8], CLOSE_DRAWS[1:]):
        inputs = arguments(sampler(4, DepthSampling()))
        inputs[1][-2].zero_()  # the head
        inputs[1][-1].zero_()  # its bias
        inputs[4], inputs[5] = torch.tensor(seeds), torch.zeros(8, dtype=torch.int64)
        assert_same_codes(inputs)


@pytest.mark.parametrize(
    "numbers",
    [DepthSampling(1.0, top_k=200), DepthSampling(1.0, top_p=0.5), DepthSampling(1.0, 333, 0.7), DepthSampling(0.0)],
)
def test_equal_scores_are_kept_by_rising_id(numbers: DepthSampling) -> None:
    """A few values among 900 ids, exact in float32: top_k and top_p end within equals, where the id decides."""
    inputs = arguments(sampler(900, numbers, levels=2))
    inputs[0] = inputs[0].sign()
    w = DepthWeights.of(inputs[1], DepthConfig.of(inputs[12], inputs[13]))
    heads = [head.sign() / 4 for head in w.head_weights if head is not None]
    plain = w._replace(head_weights=heads, head_biases=(), projection=torch.eye(8)[None], input_norm=None)
    inputs[1] = plain._replace(final_norm=None, tables=[table.sign() for table in w.tables]).tensors()
    assert_same_codes(inputs)


def test_rows_that_are_not_finite_are_lost_alone() -> None:
    inputs = arguments(sampler(30, DepthSampling(0.8, 20, 0.9), levels=2))
    inputs[0][2, 3], inputs[0][5, 0] = torch.nan, torch.inf
    assert assert_same_codes(inputs)[[2, 5], 0].tolist() == [0, 0]
    inputs = arguments(next(case for case in SMALL if case.like == "moshi"))
    inputs[0][1, 3] = torch.nan
    assert_same_codes(inputs)


def test_where_only_the_end_is_possible_and_barred_nothing_is_drawn() -> None:
    inputs = arguments(
        spec.Case(4, DepthConfig((5, 3), 8, 8, 0, 1, 1, 8, 8, ends=True), sampling=DepthSampling(0.7, 2))
    )
    for bias in inputs[1][-2:]:
        bias[:-1] = -torch.inf
    assert not assert_same_codes(inputs).any()


@pytest.mark.parametrize("case", [next(case for case in SMALL if case.like == like) for like in ("moshi", "csm")])
def test_a_rows_results_do_not_depend_on_others(case: Any) -> None:
    """To the last bit: alone, with one or four others, at any place, on one block or on four."""
    inputs = arguments(case)
    whole = emulated.depth_decode(*inputs)
    for rows in ([0], [3, 2], [3, 1, 0, 2]):
        part = [v[rows] if i in (0, *range(3, 9)) and v is not None else v for i, v in enumerate(inputs)]
        for blocks in (1, 4):
            for actual, expected in zip(emulated.depth_decode(*part, multiprocessors=blocks), whole, strict=True):
                assert torch.equal(actual.nan_to_num(7), expected[rows].nan_to_num(7))


# Many rows, on tensor cores


def widened(case: spec.Case, rows: int, **changes: Any) -> spec.Case:
    return replace(case, tokens=rows, dtype=torch.bfloat16, **changes)


def sized(dim: int, rows: int, ffn: int = 24) -> spec.Case:
    config = DepthConfig((20, 9), hidden=dim, dim=dim, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=ffn, gated=True)
    return spec.Case(rows, config, sampling=DepthSampling(0.8), forced=2, dtype=torch.bfloat16)


LONGCAT, MOSHI, CSM = (next(c for c in spec.EDGE[2:] if c.like == like) for like in ("longcat", "moshi", "csm"))
MANY = [
    widened(LONGCAT, 10, pairs="interleaved", forced=2, sampling=DepthSampling(guidance=3.0)),
    widened(MOSHI, 16),
    widened(CSM, 9, some=True),
    widened(LONGCAT, 130, config=DepthConfig((1,), 6, 6, 1, 1, 1, 4, 5)),  # five groups of rows, one level, one class
    sized(131, 70),
    sized(40, 9, ffn=900),  # deeper than all warps go in a turn
]


@pytest.mark.parametrize("case", MANY, ids=lambda case: f"{case.like}-{case.tokens}")
def test_many_rows_equal_the_truth(case: spec.Case) -> None:
    call = record(OP, OP.spec.inputs(case, "cpu"))
    got = emulated.depth_decode(*call.arguments[:-1], multiprocessors=5)
    for actual, truth in zip(got, call.truth(OP), strict=True):
        assert_close(actual, truth, case.tolerance, case.inner)


def test_many_rows_do_not_depend_on_each_other() -> None:
    """To the last bit: among 70, with 8 others, at other places, on other numbers of blocks; NaN stays in its row."""
    inputs = arguments(replace(sized(20, 70), forced=0))
    lost = [inputs[0].clone(), *inputs[1:]]
    lost[0][3, 5] = torch.nan
    whole, dirty = emulated.depth_decode(*inputs, multiprocessors=5), emulated.depth_decode(*lost, multiprocessors=4)
    rows, others = [69, 2, 64, 30, 1, 5, 6, 7, 63], [row for row in range(70) if row != 3]
    part = [v[rows] if i in (0, *range(3, 9)) and v is not None else v for i, v in enumerate(inputs)]
    few = emulated.depth_decode(*part, multiprocessors=4)
    for want, some, most in zip(whole, few, dirty, strict=True):
        assert torch.equal(some, want[rows]) and torch.equal(most[others], want[others])
    assert dirty[0][3, 0].isnan()


def test_a_level_that_is_given_reads_no_head() -> None:
    inputs = arguments(replace(CSM, tokens=3))
    w = DepthWeights.of(inputs[1], CSM.config)
    head = torch.full((CSM.config.classes[0], CSM.config.dim), torch.nan)
    more = [inputs[0], w._replace(head_weights=[head, *w.head_weights[1:]]).tensors(), *inputs[2:]]
    for got, want in zip(emulated.depth_decode(*more), emulated.depth_decode(*inputs), strict=True):
        assert torch.equal(got, want)


def test_rows_of_several_slots_and_of_odd_lengths() -> None:
    """Depths beyond a slot's 512 or 1024 elements, in pieces of sixteen bytes and not."""
    for dim, dtype in ((520, torch.float32), (1040, torch.bfloat16), (517, torch.float32), (131, torch.float16)):
        config = DepthConfig((9, 6), hidden=dim, dim=dim, layers=1, heads=1, kv_heads=1, head_dim=32, ffn=5)
        for rows in (1, 2, 3, 8):
            call = record(OP, OP.spec.inputs(spec.Case(rows, config, dtype=dtype), "cpu"))
            case = call.arguments[:-1]
            for actual, truth in zip(emulated.depth_decode(*case), call.truth(OP), strict=True):
                assert_close(actual, truth, spec.Case.tolerance, spec.Case(rows, config, dtype=dtype).inner)


def test_numbers_that_nobody_checked_touch_no_memory() -> None:
    """On a device the host reads none of them."""
    inputs = arguments(SMALL[3])
    inputs[3] = inputs[3].clone()
    inputs[3][..., 5] = 1e6  # excluded
    inputs[7] = torch.full((len(inputs[0]), 2), 2**40)
    inputs[9] = torch.tensor([2**40, -1, *range(2, len(inputs[0]))])
    inputs[10], inputs[11] = torch.full((3, 4), 2**40), torch.tensor([-5, *[2**50] * len(inputs[0])])
    codes_TL = emulated.depth_decode(*inputs)[4]
    assert (codes_TL >= 0).all() and (codes_TL < torch.tensor(SMALL[3].config.classes)).all()


def test_under_sanitizers() -> None:
    """A few calls in a process of its own: no wild access, no undefined behaviour."""
    emulated.assert_clean(
        "test_cuda_depth",
        "t.test_equals_the_truth(t.SMALL[3])",
        "t.test_many_rows_equal_the_truth(t.MANY[3])",
        "t.test_numbers_that_nobody_checked_touch_no_memory()",
    )
