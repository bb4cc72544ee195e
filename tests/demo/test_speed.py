"""What the demo says its ops save: the settings that it measures under, and shares by hand."""

from __future__ import annotations

import os

import pytest
import torch

from longcat_kernels.modules import ResidualVQ
from longcat_model.demo import speed


def test_both_are_measured_and_the_setting_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += 0.5 if os.environ.get("LONGCAT_BACKEND") == "reference" else 0.25

    for before in ("cpu", None):
        monkeypatch.setenv("LONGCAT_BACKEND", "cpu")
        if before is None:
            monkeypatch.delenv("LONGCAT_BACKEND")
        assert speed.both(call, 1.0) == (0.25, 0.5)
        assert os.environ.get("LONGCAT_BACKEND") == before


def test_a_share_is_of_the_stage_with_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 100 ms of which the op takes 20: with a definition of 320 ms it takes 400, 80 % its own."""
    monkeypatch.setattr(speed, "both", lambda call, seconds: (0.02, 0.32))
    quantizer = ResidualVQ([4, 4], 3)
    found = speed.share("x", quantizer, rows=5, steps_a_second=10.0, seconds=0.1)
    assert (found.op, found.definition) == (pytest.approx(20), pytest.approx(80))


def test_measuring_moves_no_codebook() -> None:
    quantizer = ResidualVQ([4, 4], 3).eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    speed.share("x", quantizer, rows=5, steps_a_second=10.0, seconds=0.01)
    assert not quantizer.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
