"""Pictures, traces, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.pipelining.schedules import _Action

from longcat_model import cli
from longcat_model.pipeline import ir, render
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import simulate


def test_the_grid_shows_who_does_what_when() -> None:
    schedule = ir.parse("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n")
    assert render.grid(schedule, (0, 1), uniform(2, 2)) == (
        "0F0 0F1 .   .   0B0 -   .   0B1 -\n.   1F0 1B0 -   1F1 1B1 -   .   .\n"
    )
    assert render.grid(schedule, (0, 1), uniform(2, 2), columns=2) == "0F0 0F1\n.   1F0\n"


def test_the_trace_has_every_action_at_its_time() -> None:
    placement, costs = ir.v_placement(2), uniform(4, 3, 2.0, 1.0, 1.0, 0.5, saved=8)
    schedule = lower(v_half(2, 3), placement, 3, costs)
    timeline = simulate(schedule, placement, costs)
    events = render.chrome_trace(schedule, placement, costs, microseconds=10)["traceEvents"]
    json.dumps(events)
    for device, row in enumerate(schedule):
        own = [event for event in events if event["pid"] == device]
        actions = [event for event in own if event["ph"] in "Xi"]
        assert [event["name"] for event in actions] == list(map(str, row))
        assert [event["ts"] for event in actions] == pytest.approx([10 * start for start in timeline.starts[device]])
        held = [event["args"]["bytes"] for event in own if event["ph"] == "C"]
        assert max(held) == 32 and held[-1] == 0


def test_the_command_prints_a_table_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = {"forward": 1.0, "input": 1.0, "weight": 1.0, "saved": 100, "received": 10}
    profile = {"layers": [module] * 5, "transfer": 0.1}
    profile |= dict.fromkeys(("embedding", "text_head", "modality_losses"), module)
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    arguments = ["schedule", "--devices", "2", "--microbatches", "4", "--moves", "2000", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--profile", str(tmp_path / "profile.json")]) == 0
    printed = capsys.readouterr().out
    names = ("1F1B", "interleaved 1F1B", "ZB-H1", "V-ZB", "V-Min", "V-Half", "searched")
    assert all(f"\n{name} " in printed for name in names) and "placement: layers of each stage" in printed
    out = tmp_path / "out"
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "timeline.svg").read_text().count("<path") > 48  # an action each, at least
    assert len((out / "grid.txt").read_text().splitlines()) == 2
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    for row in (out / "compute_only.csv").read_text().split():
        assert all(str(_Action.from_str(cell)) == cell for cell in row.split(","))
    assert cli.main([*arguments, "--any-order"]) == 2
    assert "any-order needs a profile with lengths that differ" in capsys.readouterr().err
    (tmp_path / "profile.json").write_text(json.dumps(profile | {"lengths": [1.0, 4.0, 2.0, 0.5]}))
    arguments += ["--profile", str(tmp_path / "profile.json")]
    spans = []
    for order in ((), ("--any-order",)):
        assert cli.main([*arguments, *order]) == 0
        spans.append(float(capsys.readouterr().out.split("\nsearched ")[1].split()[0]))
    assert spans[1] < spans[0]
    assert cli.main(["schedule", "--devices", "0", "--microbatches", "4"]) == 2
    assert cli.main([*arguments, "--memory", "1"]) == 2
    assert "memory of the devices must be at least" in capsys.readouterr().err
    assert not list(out.glob("tmp*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--devices", "0"), "--devices must be at least 1 and below 2^62, got 0"),
        (("--memory", str(10**20)), "--memory must be at least 0 and below 2^62"),
        (("--out", "{file}"), "out must be a directory that can be written to, got"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_search(
    more: tuple[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    more = (more[0], more[1].format(file=tmp_path / "file"))
    arguments = {"--devices": "2", "--microbatches": "2", "--out": str(tmp_path / "out"), **dict([more])}
    assert cli.main(["schedule", *(word for pair in arguments.items() for word in pair)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_grid_of_actions_that_differ_by_a_billion_stays_readable() -> None:
    costs = uniform(4, 2, stage_scales=[1e9, 1, 1, 1])
    text = render.grid(v_half(2, 2), ir.v_placement(2), costs)
    assert len(text) < 2 * 5 * render.MOST_SLOTS
