"""The text form of schedules, against torch's own parser."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action

from longcat_model.pipeline import ir
from longcat_model.pipeline.ir import Action, Kind

KINDS = st.sampled_from(sorted(set(Kind) - ir.OF_STAGE))
ACTIONS = st.builds(Action, st.integers(0, 99), KINDS, st.integers(0, 999)) | st.builds(
    Action, st.integers(0, 99), st.sampled_from(sorted(ir.OF_STAGE)), st.just(ir.ALL)
)
SCHEDULES = st.lists(st.lists(ACTIONS, max_size=6).map(tuple), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(SCHEDULES)
def test_text_and_csv_are_read_back(schedule: ir.Schedule) -> None:
    assert ir.parse(ir.show(schedule)) == schedule
    assert ir.from_csv(ir.to_csv(schedule)) == schedule


@settings(deadline=None)
@given(SCHEDULES)
def test_torch_reads_what_is_meant_for_it(schedule: ir.Schedule) -> None:
    for row in ir.for_torch(schedule):
        for action in row:
            theirs = _Action.from_str(str(action))
            assert (theirs.stage_index, theirs.computation_type.value) == (action.stage, action.kind.value)
            assert theirs.microbatch_index == (None if action.microbatch == ir.ALL else action.microbatch)
            assert str(theirs) == str(action)


def test_torchs_overlapped_pairs_and_idle_slots_are_read() -> None:
    pair = str(_Action.from_str("(7F1;0B3)OVERLAP_F_B"))
    assert ir.show(ir.from_csv(f"0F0,,{pair},0W1\n")) == "0F0 7F1 0B3 0W1\n"


@pytest.mark.parametrize("text", ["", "F0", "3F", "3X0", "3F0x", "-1F0", "3REDUCE_GRAD0", "(7F1;0B3)OVERLAP_F_B"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="schedule: an action must read"):
        ir.parse_action(text)


def test_placements_and_transfers() -> None:
    v = ir.v_placement(2)
    assert v == (0, 1, 1, 0) and ir.loop_placement(2, 2) == (0, 1, 0, 1)

    def carried(text: str) -> str:
        return str(ir.transfer(ir.parse_action(text), v))

    # The turn of the V and the ends stay on the device.
    assert [carried(f"{stage}F0") for stage in range(4)] == ["0SEND_F0", "None", "2SEND_F0", "None"]
    assert [carried(f"{stage}B0") for stage in range(4)] == ["None", "1SEND_B0", "None", "3SEND_B0"]
    assert carried("1W0") == "None"
    for text in ("0SEND_F5", "3SEND_B5", "2RECV_F1", "2RECV_B1"):
        action = ir.parse_action(text)
        assert ir.counterpart(ir.counterpart(action)) == action
