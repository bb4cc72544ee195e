"""Passes: what each adds, that it costs no time, and that torch's own passes and simulator accept the results."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from longcat_model.pipeline import ir
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import Kind, Placement, Schedule
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.passes.free import free_activations
from longcat_model.pipeline.passes.merge import merge_backward
from longcat_model.pipeline.passes.recompute import recompute
from longcat_model.pipeline.passes.reduce import reduce_gradients
from longcat_model.pipeline.passes.transfers import add_transfers
from longcat_model.pipeline.schedules.linear import interleaved_1f1b, one_f_one_b, zb_h1
from longcat_model.pipeline.schedules.v import v_half, v_min, v_zb
from longcat_model.pipeline.simulate import peak_bytes, simulate

SCHEDULES = [
    pytest.param(make(p, m), placement(p), m, id=f"{make.__name__}-{p}-{m}")
    for make, placement in (
        (one_f_one_b, ir.loop_placement),
        (interleaved_1f1b, lambda p: ir.loop_placement(p, 2)),
        (zb_h1, ir.loop_placement),
        (v_half, ir.v_placement),
        (v_min, ir.v_placement),
        (v_zb, ir.v_placement),
    )
    for p, m in ((1, 2), (2, 5), (4, 3), (4, 8))
]


@pytest.mark.parametrize(("schedule", "placement", "m"), SCHEDULES)
def test_lowering_costs_neither_time_nor_memory(schedule: Schedule, placement: Placement, m: int) -> None:
    """Under costs that differ everywhere: receives are posted early enough, and FREE stands where W was."""
    scales = [1.0 + 0.37 * (stage * 5 % 7) for stage in range(len(placement))]
    costs = uniform(len(placement), m, 1.0, 1.3, 0.7, 0.4, stage_scales=scales, saved=100)
    lowered = lower(schedule, placement, m, costs)
    before, after = (simulate(one, placement, costs).makespan for one in (schedule, lowered))
    assert after == pytest.approx(before, rel=1e-12)
    assert peak_bytes(lowered, costs) == peak_bytes(schedule, costs)


@pytest.mark.parametrize(("schedule", "placement", "m"), SCHEDULES)
def test_torch_runs_ours_and_its_transfers_are_ours(schedule: Schedule, placement: Placement, m: int) -> None:
    """torch's pass adds the same SEND and RECV actions, and its simulator runs our lowered schedule to the end."""

    def read(text: str) -> dict[int, list]:
        return {i: [torch_schedules._Action.from_str(a) for a in row.split(",")] for i, row in enumerate(text.split())}

    stages = len(placement)
    theirs = torch_schedules._add_send_recv(read(ir.to_csv(schedule)), lambda stage: placement[stage], stages)
    transfers = add_transfers(schedule, placement, uniform(stages, m))
    assert [sorted(map(str, row)) for row in theirs.values()] == [sorted(map(str, row)) for row in transfers]
    lowered = ir.without(ir.for_torch(lower(schedule, placement, m)), ir.OF_STAGE)
    ran = torch_schedules._simulate_comms_compute(read(ir.to_csv(lowered)), lambda stage: placement[stage], stages)
    assert [[str(a) for a in ran[device] if a is not None] for device in sorted(ran)] == [
        [str(a) for a in row] for row in lowered
    ]


def test_a_backward_is_joined_where_nobody_waits_for_its_input_gradient() -> None:
    schedule = ir.parse("0F0 3F0 3I0 3W0 0I0 0W0\n1F0 2F0 2I0 2W0 1I0 1W0\n")
    # 2I0 gives to stage 1 on the same device, 0I0 to nobody; 3I0 and 1I0 are waited for.
    assert ir.show(merge_backward(schedule, ir.v_placement(2))) == "0F0 3F0 3I0 3W0 0B0\n1F0 2F0 2B0 1I0 1W0\n"


def test_transfers_stand_where_no_posting_order_deadlocks() -> None:
    schedule = ir.parse("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n")
    assert ir.show(add_transfers(schedule, (0, 1), uniform(2, 2))) == (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1\n1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1\n"
    ).replace("1RECV_F0 1F0 1RECV_F1", "1RECV_F0 1RECV_F1 1F0")


def test_free_reduce_and_recompute_stand_in_their_places() -> None:
    schedule = ir.parse("0F0 0F1 0I0 0B1 0W0\n")
    assert ir.show(free_activations(schedule)) == "0F0 0F1 0I0 0B1 0FREE1 0W0 0FREE0\n"
    assert ir.show(reduce_gradients(schedule)) == "0F0 0F1 0I0 0B1 0W0 0REDUCE_GRAD\n"
    assert ir.show(recompute(schedule, {0})) == "0F0 0F1 0R0 0I0 0R1 0B1 0W0\n"
    assert recompute(schedule, {1}) == schedule


def test_recomputation_trades_time_for_memory() -> None:
    placement, costs = ir.v_placement(4), uniform(8, 8)
    plain = lower(v_half(4, 8), placement, 8, costs)
    again = lower(v_half(4, 8), placement, 8, costs, recomputed=range(8))
    assert sum(action.kind is Kind.R for row in again for action in row) == 64
    assert simulate(again, placement, costs).makespan > simulate(plain, placement, costs).makespan
    # At most one microbatch in full between R and W of each of two stages; of the others their inputs, a tenth.
    assert max(peak_bytes(again, costs)) < 0.8 * max(peak_bytes(plain, costs))


def test_what_cannot_run_is_not_lowered() -> None:
    with pytest.raises(ValueError, match="0W0 must run once, got 0 times"):
        lower(ir.parse("0F0 0I0\n"), (0,), 1)
