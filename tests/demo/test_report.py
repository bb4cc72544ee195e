"""The report: self-contained, escaped, with every score; media survive the trip into data URIs."""

from __future__ import annotations

import re

import torch

from longcat_model.demo.page import GOALS
from longcat_model.demo.report import Sample, Section, bars, loss_curves, render, spectrograms


def test_page_is_self_contained_and_shows_every_score() -> None:
    results = {name: {"value": 0.5 + i / 100, "n": 7 + i, "judge": None} for i, name in enumerate(GOALS)}
    results |= {"seconds": {"stage": 1.5}, "peak_rss_bytes": 10**9, "settings": {"smoke": False}, "commit": None}
    results["speed"] = [{"what": "frames drawn", "unit": "frames a second", "op": 1234.4, "definition": 61.7}]
    rows = [{"step": float(i), "loss": 1.0 / (i + 1)} for i in range(40)]
    figures = [
        loss_curves({"a": rows, "b": rows[:3]}),
        bars({"x": [0.5, 1.0]}, title="t", x="level", y="share"),
        spectrograms({"m": torch.rand(8, 20)}),
    ]
    samples = [Sample("<b>4</b>", "4", True, image=torch.rand(3, 4, 8)), Sample("5", "6", False, speech=torch.zeros(9))]
    page = render(results, GOALS, [Section("Title", "Text", [samples], figures)], 16_000)
    for i, name in enumerate(GOALS):
        assert re.search(rf"<td>{name}</td>", page) and f"{50 + i:.1f} %" in page
    assert re.search(r"frames drawn</td>.*>1234<.*\n.*>61.7<.*frames a second", page)
    assert "&lt;b&gt;4" in page and "<b>4</b>" not in page
    assert page.count("data:image/png") == 4 and page.count("data:audio/wav") == 1
    assert not re.search(r"""(src|href)=["']?(http|//|[\w./]+\.(js|css|png|wav))""", page)
    assert "speech is\ndigits synthesized by espeak-ng" in page
    results["settings"]["speech_dir"] = "recordings"  # type: ignore[index]
    assert "speech is\nreal recordings" in render(results, GOALS, [], 16_000)
