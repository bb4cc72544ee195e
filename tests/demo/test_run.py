"""The demo's whole path at the smallest size: report.json has what it promises, and a rerun repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longcat_model import presets
from longcat_model.cli import main
from longcat_model.demo import evaluate
from longcat_model.demo.page import GOALS
from longcat_model.system import System


class CutOff(BaseException):
    pass


def report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return found


def test_interrupted_demo_goes_on_to_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(presets, "demo", presets.tiny)
    arguments = ["demo", "--smoke", "--out", str(tmp_path)]

    def cut(*_: object, **__: object) -> None:
        raise CutOff

    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(evaluate, "say", cut)
        main(arguments)
    assert not (tmp_path / "report.json").exists() and (tmp_path / "evaluate_paint.pt").exists()
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}

    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()} == trained
    printed = capsys.readouterr().out
    assert str(tmp_path / "report.html") in printed
    result = report(tmp_path)
    for name in GOALS:
        assert result[name].keys() == {"value", "n", "judge"} and 0 <= result[name]["value"] <= 1
        assert (result[name]["judge"] is None) == name.startswith(("see", "hear"))
        assert name in printed
    assert result["settings"]["smoke"] is True and result["peak_rss_bytes"] > 10**8
    assert {"vision_sae", "audio_joint", "language_joint", "evaluate_talk"} <= result["seconds"].keys()
    assert "commit" in result
    whats = [row["what"] for row in result["speed"]]
    assert len(whats) == 4 and whats[0] == "depth decoding of images" and "speech" in whats[3]
    assert all(row["op"] > 0 and row["definition"] > 0 for row in result["speed"])
    assert (tmp_path / "report.html").read_text().count("data:audio/wav") > 20
    assert System.load(tmp_path).sizes == presets.tiny()

    assert main(arguments) == 0
    again = report(tmp_path)
    assert {name: again[name] for name in GOALS} == {name: result[name] for name in GOALS}
