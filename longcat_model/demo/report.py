"""The report: one self-contained HTML page, every number beside it in `report.json`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from longcat_model.files import png, wav
from longcat_model.training.loop import Row

PIXEL = 5  # screen pixels of a picture's pixel


@dataclass(frozen=True)
class Sample:
    """One example to look at or listen to; media are embedded in the page."""

    prompt: str
    answer: str
    right: bool | None  # None: not judged
    image: Tensor | None = None  # [3, H, W] in [0, 1]
    speech: Tensor | None = None  # [samples]


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, then rows of samples and figures."""

    title: str
    text: str
    rows: Sequence[Sequence[Sample]] = ()
    figures: Sequence[Figure] = ()


def render(
    results: dict[str, Any], goals: dict[str, tuple[str, float | None]], sections: Sequence[Section], rate: int
) -> str:
    """The page as text.

    Args:
        results: the content of `report.json`.
        goals: score name -> what it measures, what it must reach at default settings (None: no goal).
        sections: in order.
        rate: sample rate of the speech, in Hz.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["png"] = lambda image: _uri("image/png", png(image, PIXEL))
    environment.filters["figure"] = lambda figure: _uri("image/png", _figure(figure))
    environment.filters["wav"] = lambda speech: _uri("audio/wav", wav(speech, rate))
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text())
    return template.render(results=results, goals=goals, sections=sections)


def _figure(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def loss_curves(stages: dict[str, list[Row]], metrics: Sequence[str] = ()) -> Figure:
    """One panel a stage: its loss, smoothed, and its `metrics` where it has them."""
    columns = 3
    lines = -(-len(stages) // columns)
    figure = Figure(figsize=(12, 2.6 * lines), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    for axis in axes[len(stages) :]:
        axis.set_axis_off()
    for axis, (name, rows) in zip(axes, stages.items(), strict=False):
        steps = [row["step"] for row in rows]
        for key in ("loss", *(m for m in metrics if rows and m in rows[0])):
            axis.plot(steps, _smooth([row[key] for row in rows]), label=key, linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
    return figure


def bars(values: dict[str, Sequence[float]], *, title: str, x: str, y: str) -> Figure:
    """Groups of bars: one colour a name, one group an index."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        axis.bar(np.arange(len(heights)) + (i - (len(values) - 1) / 2) * width, heights, width, label=name)
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.set_xticks(range(max(len(heights) for heights in values.values())))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def overview(rows: dict[str, Sequence[Sample]]) -> Figure:
    """One picture of the whole: a row of samples a task, images as they are, speech as its waveform."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.5 * columns, 1.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, samples) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        line[0].set_title(name, loc="left", fontsize=11, fontweight="bold", pad=20)
        for axis, sample in zip(line, samples, strict=False):
            axis.text(0.5, 1.04, f"{sample.prompt} {sample.answer}", ha="center", fontsize=8, transform=axis.transAxes)
            if sample.image is not None:
                axis.imshow(sample.image.permute(1, 2, 0).clamp(0, 1).numpy())
            elif sample.speech is not None:
                axis.plot(sample.speech.numpy(), linewidth=0.4)
    return figure


def spectrograms(mels: dict[str, Tensor]) -> Figure:
    """Log-mel spectrograms [bands, frames] side by side."""
    figure = Figure(figsize=(3 * len(mels), 2.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(mels), sharey=True))
    for axis, (name, mel) in zip(axes, mels.items(), strict=True):
        axis.imshow(mel.numpy(), origin="lower", aspect="auto", cmap="magma")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("frame of 10 ms", fontsize=8)
    axes[0].set_ylabel("mel band", fontsize=8)
    return figure


def _smooth(values: list[float], window: int = 15) -> np.ndarray:
    if len(values) < 2 * window:
        return np.asarray(values)
    padded = np.pad(np.asarray(values), (window - 1, 0), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")
