"""A run's directory: finished steps are kept, other settings are refused, nothing foreign is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_model.cli import main
from longcat_model.demo.workspace import Workspace
from longcat_model.files import locked


def test_finished_steps_are_not_done_again(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"codes": [torch.arange(3)], "names": ["a"]}

    first = Workspace(tmp_path / "run", {"steps": 1}).once("tokens", make)
    again = Workspace(tmp_path / "run", {"steps": 1}).once("tokens", make)
    assert len(calls) == 1
    assert again["names"] == first["names"] and torch.equal(again["codes"][0], first["codes"][0])


def test_a_failed_step_is_done_again_and_its_time_counts(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    workspace = Workspace(tmp_path / "run", {})
    with pytest.raises(KeyboardInterrupt):
        workspace.once("tokens", fail)
    before = workspace.seconds()["tokens"]
    assert workspace.once("tokens", lambda: {"n": 1}) == {"n": 1}
    assert workspace.seconds()["tokens"] > before > 0
    assert 10**7 < workspace.peak_rss_bytes() < 10**11


def test_refuses_a_run_with_other_settings(tmp_path: Path) -> None:
    Workspace(tmp_path / "run", {"steps": 1, "seed": 0})
    with pytest.raises(ValueError, match=r"other settings \(steps\).*--fresh"):
        Workspace(tmp_path / "run", {"steps": 2, "seed": 0})


def test_fresh_starts_over(tmp_path: Path) -> None:
    Workspace(tmp_path / "run", {"steps": 1}).once("tokens", lambda: {"n": 1})
    workspace = Workspace(tmp_path / "run", {"steps": 2}, fresh=True)
    assert workspace.once("tokens", lambda: {"n": 2}) == {"n": 2}


def test_two_demos_in_one_directory_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does the second one, begun afresh, delete what the first one made."""
    Workspace(tmp_path, {"steps": 1}).once("tokens", lambda: {"n": 1})
    with locked(tmp_path / "lock"):
        for option in ("--smoke", "--fresh"):
            assert main(["demo", "--out", str(tmp_path), option]) == 2
            assert f"{tmp_path} is in use by another process" in capsys.readouterr().err
        assert (tmp_path / "tokens.pt").exists()
        Workspace(tmp_path, {"steps": 2}, fresh=True)
        assert {path.name for path in tmp_path.iterdir()} == {"lock", "settings.json", "commits.json"}


def test_fresh_deletes_no_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        Workspace(tmp_path, {}, fresh=True)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="holds other files"):
        Workspace(tmp_path, {}, fresh=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_fresh_starts_over_what_was_cut_off_at_once(tmp_path: Path) -> None:
    (tmp_path / "run" / "speech").mkdir(parents=True)
    (tmp_path / "run" / "settings.json").write_text('{"steps": 1}')
    assert Workspace(tmp_path / "run", {"steps": 2}, fresh=True).settings == {"steps": 2}
