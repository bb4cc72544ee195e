"""The profile-guided scheduler: never worse than what it starts from, within its limits, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from longcat_kernels import native
from longcat_model.pipeline import ir
from longcat_model.pipeline.costs import Costs, uniform
from longcat_model.pipeline.schedules import pattern, walk
from longcat_model.pipeline.schedules.free_order import searched_in_any_order, short_at_both_ends
from longcat_model.pipeline.schedules.searched import Effort, one_at_a_time, searched
from longcat_model.pipeline.schedules.v import half_block, min_block, repeat, v_half, v_min, v_zb, zb_block
from longcat_model.pipeline.simulate import bubble, peak_bytes, simulate, unit_bytes
from longcat_model.pipeline.verify import verify

QUICK = Effort(moves=20_000, tries=100, blocks=1, starts=4)
needs_native = pytest.mark.skipif(native.why_not() is not None, reason="the compiled module is missing")


def uneven(devices: int, microbatches: int, seed: int) -> Costs:
    """Durations that differ by stage and microbatch, sizes by microbatch."""
    chance = np.random.default_rng(seed)
    f, i, w = chance.uniform(5, 20, 3).tolist()
    return uniform(
        2 * devices,
        microbatches,
        f,
        i,
        w,
        chance.uniform(0, 6),
        stage_scales=chance.uniform(1, 2, 2 * devices).tolist(),
        microbatch_scales=chance.lognormal(0, 0.3, microbatches).tolist(),
    )


def problem(devices: int, microbatches: int, seed: int, units: float = 3.5) -> walk.Instance:
    costs = uneven(devices, microbatches, seed)
    return walk.instance(ir.v_placement(devices), costs, [int(units * unit_bytes(costs, devices))] * devices)


@pytest.mark.parametrize(("p", "m", "seed"), [(1, 3, 0), (2, 4, 1), (3, 2, 2), (3, 7, 3)])
@needs_native
def test_the_compiled_walk_is_the_walk_as_defined(p: int, m: int, seed: int) -> None:
    """Orders and makespan, to the bit; so do makespans of orders that exceed a limit or wait for ever."""
    searched_one = problem(p, m, seed)
    start = walk.encode(one_at_a_time(searched_one.placement, m))
    python, length = walk.walk_in_python(searched_one, start, 600, 4, seed)
    compiled, other = walk.walk(searched_one, start, 600, 4, seed)
    assert np.array_equal(python, compiled) and length == other
    assert not np.array_equal(python, start)
    for make in (v_half, v_zb):
        orders = walk.encode(make(p, m))
        in_python = walk._makespan(searched_one, walk.decode(orders, searched_one.placement))
        assert walk.makespan(searched_one, orders) == in_python
        assert (walk.excess(searched_one, orders) > 0) == (
            max(peak_bytes(make(p, m), searched_one.costs)) > searched_one.limits[0]
        )


@needs_native
def test_the_compiled_module_refuses_what_is_no_order() -> None:
    one = problem(2, 3, 0)
    module, good = native.module(), walk.encode(v_half(2, 3))
    for change in (good[:-1], np.zeros_like(good), good[::-1].copy()):
        with pytest.raises(ValueError, match="schedule_search: orders must hold every action once"):
            module.schedule_makespan(change, *one.arguments)
    arguments = list(one.arguments)
    arguments[0] = np.array([0, 1, 2, 0], np.int32)
    with pytest.raises(ValueError, match="schedule_search: placement must name devices that have a limit"):
        module.schedule_makespan(good, *arguments)
    with pytest.raises(ValueError, match="schedule_search: reach must be at least 1"):
        module.schedule_walk(good, *one.arguments, 1, 0, 0)
    assert module.schedule_makespan(walk.encode(ir.parse("0F0 3F0 3I0 0I0 0W0 3W0\n2F0 1F0 2I0 1I0 1W0 2W0\n")),
                                    *problem(2, 1, 0).arguments) == -1  # fmt: skip


def test_without_the_compiled_module_the_search_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = uneven(2, 4, 5)
    effort = Effort(moves=300, tries=20, blocks=1, starts=2)
    compiled = searched(costs, effort=effort)
    monkeypatch.setattr(walk, "_native", lambda: None)
    assert searched(costs, effort=effort) == compiled


def test_numbers_and_actions_are_two_forms_of_one_schedule() -> None:
    for p, m in ((1, 1), (3, 5)):
        assert walk.decode(walk.encode(v_half(p, m)), ir.v_placement(p)) == v_half(p, m)
        for block in (half_block(p), min_block(p), zb_block(p)):
            assert np.array_equal(pattern.repeated(block, m), walk.encode(repeat(block, m)))


@pytest.mark.parametrize("seed", range(6))
def test_a_searched_schedule_is_sound_and_never_worse(seed: int) -> None:
    p, m = 2 + seed % 3, 3 + 2 * seed
    costs, placement = uneven(p, m, seed), ir.v_placement(p)
    found = searched(costs, effort=QUICK)
    makespan = verify(found, placement, m, costs).makespan
    limit = max(peak_bytes(v_half(p, m), costs))
    assert max(peak_bytes(found, costs)) <= limit
    for make in (v_half, v_min, v_zb):
        if max(peak_bytes(make(p, m), costs)) <= limit:
            assert makespan <= simulate(make(p, m), placement, costs).makespan
    assert searched(costs, effort=QUICK) == found


def test_limits_are_kept_device_by_device_down_to_one_microbatch() -> None:
    p, m = 3, 6
    costs, placement = uneven(p, m, 1), ir.v_placement(p)
    least = peak_bytes(one_at_a_time(placement, m), costs)
    for limits in (least, [2 * least[0], least[1], least[2]]):
        found = searched(costs, limits, QUICK)
        assert all(a <= b for a, b in zip(peak_bytes(found, costs), limits, strict=True))
    with pytest.raises(ValueError, match="schedule: memory of the devices must be at least"):
        searched(costs, [least[0], least[1] - 1, least[2]], QUICK)
    with pytest.raises(ValueError, match="must have an even number of stages, got 3"):
        searched(uniform(3, 2))


CASES = [  # F, I, W, transfer; devices, microbatches; scales of both ends; bubble in % that must be reached
    pytest.param((1, 1, 1, 0), 4, 4, (1.0, 1.0), 17.3, id="equal"),
    pytest.param((10, 12, 8, 1), 4, 4, (1.0, 1.0), 27.0, id="U1"),
    pytest.param((10, 12, 8, 1), 4, 8, (1.3, 1.6), 2.1, id="heavy ends"),
    pytest.param((10, 20, 10, 1), 4, 16, (1.0, 1.0), 9.5, id="U2"),
    pytest.param((10, 16, 5, 1), 4, 8, (1.0, 1.0), 20.5, id="U3"),
    pytest.param((10, 12, 8, 5), 4, 8, (1.0, 1.0), 25.1, id="C5"),
]


@pytest.mark.parametrize(("durations", "p", "m", "ends", "must"), CASES)
@needs_native
def test_the_bubble_is_as_small_as_promised(durations: tuple, p: int, m: int, ends: tuple, must: float) -> None:
    """At V-Half's memory, on 4 devices; benchmarks/schedules.py has the larger cases. sail's V-Half: 7 to 37 %."""
    costs = uniform(2 * p, m, *durations, stage_scales=[ends[0], *[1.0] * (2 * p - 2), ends[1]])
    found = searched(costs, effort=Effort(moves=2_500_000))
    makespan = simulate(found, ir.v_placement(p), costs).makespan
    assert 100 * bubble(makespan, ir.v_placement(p), costs) <= must
    assert max(peak_bytes(found, costs)) <= 3.0 * unit_bytes(costs, p)


@pytest.mark.parametrize("p", [2, 4, 6])
def test_equal_costs_leave_v_half_as_it_is(p: int) -> None:
    """Its makespan is proved to be optimal where 4 devices have 8 microbatches."""
    costs = uniform(2 * p, 2 * p)
    makespan = simulate(searched(costs, effort=QUICK), ir.v_placement(p), costs).makespan
    assert makespan == 12 * p + (1 if p == 2 else 3 * p - 7)


def test_the_order_of_microbatches_is_worth_most() -> None:
    costs = uneven(3, 9, 4)
    limits = [int(5 * unit_bytes(costs, 3))] * 3
    found = searched_in_any_order(costs, limits, QUICK)
    makespan = verify(found, ir.v_placement(3), 9, costs).makespan
    assert makespan < simulate(searched(costs, limits, QUICK), ir.v_placement(3), costs).makespan
    assert all(a <= b for a, b in zip(peak_bytes(found, costs), limits, strict=True))
    assert searched_in_any_order(costs, limits, QUICK) == found
    assert short_at_both_ends(uniform(2, 5, microbatch_scales=[3, 1, 5, 2, 4])) == [1, 0, 2, 4, 3]
