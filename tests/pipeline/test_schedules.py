"""Closed-form schedules: what the papers promise of them, for any number of devices and microbatches."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from longcat_model.pipeline import ir
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import Placement, Schedule
from longcat_model.pipeline.schedules.fill import fill
from longcat_model.pipeline.schedules.linear import interleaved_1f1b, one_f_one_b, zb_h1
from longcat_model.pipeline.schedules.v import half_block, min_block, repeat, v_half, v_min, v_zb, zb_block
from longcat_model.pipeline.simulate import peak_bytes, simulate
from longcat_model.pipeline.verify import verify

Make = Callable[[int, int], Schedule]
V: list[Make] = [v_half, v_min, v_zb]
MAKERS: list[tuple[Make, int]] = [(one_f_one_b, 1), (interleaved_1f1b, 2), (zb_h1, 1), *((make, 2) for make in V)]


def placement_of(make: Make, devices: int, chunks: int) -> Placement:
    return ir.v_placement(devices) if make in V else ir.loop_placement(devices, chunks)


def measured(make: Make, chunks: int, devices: int, microbatches: int) -> tuple[float, float]:
    """Slots of half a stage that are not work on a device, and peak in stage units, each F, I and W being equal."""
    schedule, placement = make(devices, microbatches), placement_of(make, devices, chunks)
    costs = uniform(len(placement), microbatches, *(3 * [2.0 / chunks]), saved=2 // chunks)
    makespan = verify(schedule, placement, microbatches, costs).makespan
    return makespan - 6 * microbatches, max(peak_bytes(schedule, costs)) / 2


@pytest.mark.parametrize(("make", "chunks"), MAKERS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5, 8])
def test_every_schedule_runs_whatever_the_numbers(make: Make, chunks: int, devices: int) -> None:
    placement = placement_of(make, devices, chunks)
    for microbatches in {1, 2, 3, devices - 1, devices, devices + 1, 2 * devices + 1} - {0}:
        verify(make(devices, microbatches), placement, microbatches)


@pytest.mark.parametrize("p", range(2, 11))
def test_makespans_and_peaks_are_those_of_the_papers(p: int) -> None:
    """With no fewer than 2p microbatches. Slots are what half a device's F takes, as for two stages a device."""
    m = 2 * p
    half = 1 if p == 2 else 3 * p - 7 if p % 2 == 0 else 3 * p - 4
    assert measured(v_half, 2, p, m) == (half, (p + 2) // 2)
    slots, peak = measured(v_min, 2, p, m)
    assert slots <= (4 * p - 7 if p % 3 == 0 else 4 * p - 5) and peak == (p + 4) // 3
    assert measured(v_zb, 2, p, m) == (p - 1, p)
    assert measured(one_f_one_b, 1, p, m) == (6 * (p - 1), p)
    assert measured(zb_h1, 1, p, m) == (2 * (p - 1), p)
    assert measured(interleaved_1f1b, 2, p, m) == (3 * (p - 1), 1.5 * p - 0.5)


def test_four_microbatches_on_four_devices_take_as_few_slots_as_can_be() -> None:
    """29, proved by constraint programming; V-Half's usual formula for more microbatches gives it here too."""
    assert measured(v_half, 2, 4, 4) == (5, 3)


@pytest.mark.parametrize("block", [half_block, min_block, zb_block])
@pytest.mark.parametrize("devices", range(1, 17))
def test_blocks_repeat_without_two_actions_in_a_slot(block: Callable, devices: int) -> None:
    for slots in block(devices):
        assert len({slot % 6 for slot in slots.values()}) == 6


def test_v_half_looks_as_expected() -> None:
    assert ir.show(v_half(2, 3)) == (
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 0I0 3I1 0W0 3W1 0I1 0W1 3F2 3I2 3W2 0I2 0W2\n"
        "1F0 2F0 1F1 2F1 2I0 1I0 2W0 1F2 2I1 1I1 1W0 2F2 2W1 1W1 2I2 1I2 2W2 1W2\n"
    )


def test_filling_keeps_within_the_limit_or_says_so() -> None:
    placement, plain = ir.v_placement(3), repeat(half_block(3), 6)
    costs = uniform(6, 6, saved=1)
    for limit in (4, 5, 6):
        filled = fill(plain, placement, limit, hoist=True, weights_last=False)
        assert max(peak_bytes(filled, costs)) <= limit
        assert simulate(filled, placement, costs).makespan <= simulate(plain, placement, costs).makespan
    with pytest.raises(ValueError, match="no device can go on within 1 activations"):
        fill(plain, placement, 1, hoist=True, weights_last=False)


@pytest.mark.parametrize("make", [make for make, _ in MAKERS])
def test_impossible_numbers_are_refused(make: Make) -> None:
    for devices, microbatches in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="schedule: devices and microbatches must be at least 1"):
            make(devices, microbatches)
