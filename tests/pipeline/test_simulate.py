"""Times, memory and bounds of small schedules that can be worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_model.pipeline import ir
from longcat_model.pipeline.bounds import lower_bound
from longcat_model.pipeline.costs import Costs, permuted, uniform
from longcat_model.pipeline.schedules.searched import one_at_a_time
from longcat_model.pipeline.schedules.v import v_half, v_min, v_zb
from longcat_model.pipeline.simulate import Deadlock, bottleneck, bubble, live_bytes, peak_bytes, simulate, unit_bytes


def test_a_small_schedule_by_hand() -> None:
    """Two devices, transfers of 1: device 1 waits for each, device 0 for the gradient."""
    schedule, placement = ir.parse("0F0 0F1 0I0 0W0 0B1\n1F0 1B0 1F1 1B1\n"), (0, 1)
    costs = uniform(2, 2, forward=2, input=3, weight=1, transfer=1, saved=10)
    timeline = simulate(schedule, placement, costs)
    assert timeline.starts == ((0, 2, 10, 13, 16), (3, 5, 9, 11))
    assert timeline.ends == ((2, 4, 13, 14, 20), (5, 9, 11, 15))
    assert timeline.makespan == 20 and bottleneck(placement, costs) == 12
    assert bubble(20, placement, costs) == pytest.approx(8 / 20)
    assert live_bytes(schedule, costs) == ((10, 20, 20, 10, 0), (10, 0, 10, 0))
    assert peak_bytes(schedule, costs) == (20, 10) and unit_bytes(costs, 2) == 10


def test_a_transfer_begins_when_both_ends_are_there() -> None:
    costs = uniform(2, 1, forward=2, transfer=1)
    early = ir.parse("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0\n")
    late = ir.parse("0F0 0SEND_F0 0B0 0RECV_B0\n1RECV_F0 1F0 1B0 1SEND_B0\n")
    assert simulate(early, (0, 1), costs).makespan == 2 + 1 + 2 + 2 + 1 + 2
    with pytest.raises(Deadlock, match="device 0 waits for 0RECV_B0 on device 0"):
        simulate(late, (0, 1), costs)


def test_recomputed_forwards_keep_their_input_only() -> None:
    schedule = ir.parse("0F0 0F1 0R0 0B0 0R1 0I1 0W1 0FREE1\n")
    costs = Costs(*(((1.0, 1.0),) * 1 for _ in range(4)), saved=((100, 200),), received=((10, 20),))
    assert live_bytes(schedule, costs) == ((10, 30, 120, 20, 200, 200, 200, 0),)
    assert simulate(schedule, (0,), costs).makespan == 8


def test_a_deadlock_names_who_waits_for_whom() -> None:
    crossed = ir.parse("0F0 3F0 3B0 0B0\n1F0 2B0 2F0 1B0\n")
    with pytest.raises(Deadlock, match="device 0 waits for 2F0 on device 1; device 1 waits for 2F0 on device 1"):
        simulate(crossed, ir.v_placement(2), uniform(4, 1))
    with pytest.raises(Deadlock, match="device 1 waits for 0F0 which no device does"):
        simulate(((), ir.parse("1F0")[0]), (0, 1), uniform(2, 1))


DURATIONS = st.floats(0.1, 10.0)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.lists(DURATIONS, min_size=12, max_size=12), st.floats(0, 5))
def test_no_schedule_is_shorter_than_the_bound(p: int, m: int, scales: list[float], transfer: float) -> None:
    costs = uniform(
        2 * p, m, 1.0, 2.0, 0.7, transfer, stage_scales=scales[: 2 * p], microbatch_scales=scales[-m:], saved=7
    )
    placement = ir.v_placement(p)
    for schedule in (v_half(p, m), v_min(p, m), v_zb(p, m), one_at_a_time(placement, m)):
        makespan = simulate(schedule, placement, costs).makespan
        assert lower_bound(placement, costs, peak_bytes(schedule, costs)) <= makespan * (1 + 1e-9)


def test_the_bound_is_met_where_the_best_schedule_is_known() -> None:
    """p = m = 4 at V-Half's memory: 29 slots are proved to be the least, and the bound alone proves it here."""
    costs = uniform(8, 4, saved=1)
    assert lower_bound(ir.v_placement(4), costs, [6] * 4) == simulate(v_half(4, 4), ir.v_placement(4), costs).makespan


def test_costs_are_checked() -> None:
    good = uniform(2, 3)
    with pytest.raises(ValueError, match="costs: weight must have one row a stage"):
        Costs(good.forward, good.input, good.weight[:1], good.transfer, good.saved, good.received)
    with pytest.raises(ValueError, match="costs: forward must be finite and not negative"):
        uniform(2, 3, forward=float("nan"))
    assert permuted(uniform(1, 3, microbatch_scales=[1, 2, 3]), [2, 0, 1]).forward == ((3, 1, 2),)
