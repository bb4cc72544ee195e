"""Placement: against all splits one by one, and what a profile becomes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longcat_model.pipeline import ir, profile
from longcat_model.pipeline import place as place_module
from longcat_model.pipeline.place import place
from longcat_model.pipeline.profile import Module, Profile, Split, stage_costs
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import bubble, simulate

LAYER = Module(forward=1.0, input=1.1, weight=0.9, saved=900, received=50)
EMBEDDING = Module(forward=0.1, input=0.0, weight=0.1, saved=10, received=5)
HEAD = Module(forward=1.0, input=1.0, weight=1.0, saved=200, received=50)


def model(layers: int, losses: float = 1.0) -> Profile:
    ends = Module(losses, losses, losses, 300, 50)
    return Profile(EMBEDDING, (LAYER,) * layers, HEAD, ends, 0.05, loss_lengths=(0.5, 1.5))


def makespan(one: Profile, split: Split, devices: int, microbatches: int) -> float:
    costs = stage_costs(one, split, microbatches)
    return simulate(v_half(devices, microbatches), ir.v_placement(devices), costs).makespan


@pytest.mark.parametrize("losses", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alike", [True, False])
def test_where_splits_are_few_the_best_is_found(losses: float, alike: bool) -> None:
    one = model(6, losses)
    if not alike:
        factors = (0.5, 2.0, 1.0, 3.0, 0.7, 1.1)
        one = replace(one, layers=tuple(Module(f, 1.1 * f, 0.9 * f, 900, 50) for f in factors))
    every = [
        Split((*counts, *[0] * (3 - head)), head)
        for head in (2, 3)
        for counts in itertools.product(range(7), repeat=head + 1)
        if sum(counts) == 6
    ]
    best = min(makespan(one, split, 2, 6) for split in every)
    found = place(one, 2, 6)
    assert found.makespan == pytest.approx(best, rel=1e-12) == pytest.approx(makespan(one, found.split, 2, 6))
    assert found.lower_bound <= best and found.gap >= 0


def test_where_splits_are_many_the_bound_holds_and_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descent, made to run where all splits can be looked at too."""
    for losses in (1.0, 3.0, 6.0):
        exact = place(model(9, losses), 2, 8)
        with monkeypatch.context() as patch:
            patch.setattr(place_module, "SPLITS", 0)
            found = place(model(9, losses), 2, 8)
        assert found.lower_bound <= exact.makespan <= found.makespan <= 1.02 * exact.makespan


def test_heavy_losses_leave_device_0_without_layers() -> None:
    split = place(model(6, losses=8.0), 3, 6).split
    assert split.layers[0] == split.layers[-1] == 0 and sum(split.layers) == 6


@pytest.mark.parametrize(("p", "losses"), [(4, 2.0), (4, 5.0), (8, 3.0)])
def test_devices_idle_little_more_than_the_schedule_makes_them(p: int, losses: float) -> None:
    """At a granularity of an eighth of a stage: 8 layers a stage."""
    m = 4 * p
    found = place(model(16 * p, losses), p, m)
    placement = ir.v_placement(p)
    work = sum(map(found.costs.stage_work, range(2 * p)))
    idle = 1 - work / (p * found.makespan)
    assert idle <= bubble(found.makespan, placement, found.costs) + 0.03


def test_stage_costs_are_sums_of_modules() -> None:
    one = replace(model(3), lengths=(1.0, 2.0))
    costs = stage_costs(one, Split((1, 2, 0, 0), 2), 3)
    assert costs.forward[0] == pytest.approx((1.1, 2.2, 1.1)) and costs.forward[1] == pytest.approx((2, 4, 2))
    assert costs.forward[2] == (1, 2, 1) and costs.forward[3] == (0.5, 1.5, 0.5)
    assert costs.saved == ((910, 1820, 910), (1800, 3600, 1800), (200, 400, 200), (150, 450, 150))
    assert costs.received == ((5, 10, 5), (50, 100, 50), (50, 100, 50), (25, 75, 25))


def test_a_stage_without_modules_passes_on_what_the_next_one_needs() -> None:
    one = replace(model(2), loss_lengths=(1.0, 0.2), text_head=replace(HEAD, received=70))
    costs = stage_costs(one, Split((0, 0, 1, 1, 0, 0, 0, 0), 5), 2)
    assert costs.received == ((5, 5), *[(50, 50)] * 3, *[(70, 70)] * 2, *[(50, 10)] * 2)
    assert costs.saved[1] == (50, 50) and costs.saved[4] == (70, 70) and costs.saved[6] == (50, 10), "as it came"


def test_transfers_cost_by_link_and_size() -> None:
    """Of what crosses each border; links beyond those that were measured are those again."""
    near, far = ((100, 1.0), (200, 2.0)), ((50, 8.0),)
    one = replace(model(4), links=(near, far), lengths=(1.0, 4.0))
    costs = stage_costs(one, Split((0, 1, 1, 1, 1, 0), 4), 2)
    assert costs.transfer[0] == (1.0, 2.0), "50 and 200 bytes: no less than the least takes"
    assert costs.transfer[4] == (1.0, 1.0), "25 and 75 bytes: of the losses' rows alone"
    assert costs.transfer[1] == costs.transfer[3] == (8.0, 8.0) and costs.transfer[5] == (0, 0)
    again = stage_costs(one, Split((0, 1, 1, 1, 1, 0, 0, 0), 7), 2)
    assert again.transfer[2] == (1.0, 2.0), "from device 2 to 3 as from 0 to 1"
    assert profile.time_of(near, 400) == 4.0 and profile.time_of(near, 150) == 1.5 and profile.time_of(near, 0) == 1.0


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    linked = replace(model(2), transfer=0.0, links=(((64, 0.5), (128, 0.75)),))
    profile.save(linked, tmp_path / "linked.json")
    assert profile.load(tmp_path / "linked.json") == linked
    profile.save(model(2), tmp_path / "profile.json")
    assert profile.load(tmp_path / "profile.json") == model(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("layers"), "the file must be an object with .*'layers'"),
        (lambda p: p.update(lenghts=[1.0]), "may have .*, got .*'lenghts'"),
        (lambda p: p.update(layers={}), r"layers must be a list, got \{\}"),
        (lambda p: p["layers"].append({"forwards": 1}), r"layers\[2\] must be an object with"),
        (
            lambda p: p["embedding"].update(forward="x"),
            "embedding.forward must be a number from 0 to 2\\^48, got 'x'",
        ),
        (lambda p: p["text_head"].update(saved=-1), "text_head.saved must be a number from 0 to 2\\^48, got -1"),
        (lambda p: p["layers"][1].update(saved=10**400), r"layers\[1\].saved must be a number from 0 to 2\^48"),
        (lambda p: p.update(transfer=float("nan")), "transfer must be a number from 0 to 2\\^48, got nan"),
        (lambda p: p.pop("transfer"), "the file must have one of transfer and links"),
        (lambda p: p.update(links=[]), "the file must have one of transfer and links"),
        (
            lambda p: p.pop("transfer") and p.update(links=[[[2, 1], [2, 1]]]),
            r"links\[0\] must be pairs of bytes and time, at rising sizes",
        ),
        (lambda p: p.update(lengths="abc"), "lengths must be a list, got 'abc'"),
        (lambda p: p.update(lengths=[1.0, True]), r"lengths\[1\] must be a number from 0"),
    ],
)
def test_a_bad_profile_is_refused_by_file_and_field(change: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    profile.save(model(2), file)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"profile: .*bad.json: .*{message}"):
        profile.load(file)


@pytest.mark.parametrize("content", [b"[", b"\xff\xfe", None])
def test_a_file_that_is_no_json_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"profile: .*bad.json must be a readable JSON file"):
        profile.load(file)


def test_impossible_placements_are_refused() -> None:
    for layers, devices, microbatches in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="place: there must be layers"):
            place(model(layers), devices, microbatches)
