"""What the ops save the demo, measured on its own modules in a few seconds: beside each, its definition in torch.

Dimension key
    N positions    D width    L levels
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from longcat_kernels import DepthSampling
from longcat_kernels.modules import DepthTransformer, ResidualVQ
from longcat_model.demo.settings import Settings
from longcat_model.system import System

FRAMES = 1  # drawn at once, as in a conversation
ROUNDS = 3  # at least


@dataclass(frozen=True)
class Speed:
    """One number by the op and by its definition."""

    what: str
    unit: str
    op: float
    definition: float

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def measure(system: System, settings: Settings, stage_s: dict[str, float]) -> list[dict[str, Any]]:
    """Frames a second of both depth heads, and the quantizers' share of the training that moves their codebooks.

    Args:
        stage_s: seconds of each finished stage. A definition's share is what it would have been, had the stage's
            other work taken as long.
    """
    seconds = 0.02 if settings.smoke else 0.3  # of each measurement
    model = system.model
    found = [
        frames("images", model.visual_head, model.visual_tables(), seconds),
        frames("speech", model.audio_head, model.audio_tables(), seconds),
        share(
            "images",
            system.vision.quantizer.quantize,
            settings.vision.images * 8,  # positions: four for each of two digits
            settings.vision.quantizer_steps / stage_s["vision_quantizer"],
            seconds,
        ),
        share(
            "speech",
            system.audio.quantizer,
            settings.clips * 15,  # positions: a little more than a second each
            settings.audio.joint_steps / stage_s["audio_joint"],
            seconds,
        ),
    ]
    return [speed.as_dict() for speed in found]


def frames(name: str, head: DepthTransformer, tables: list[torch.Tensor], seconds: float) -> Speed:
    """Of `depth_decode`, which the demo draws by, and of the definition, level by level."""
    hidden = torch.randn(FRAMES, head.config.hidden, generator=torch.Generator().manual_seed(0))
    prepared, sampling = head.prepared(tables), DepthSampling(temperature=0.5, top_p=0.9)

    def call() -> None:
        head.decode(hidden, prepared, sampling)

    op, definition = both(call, seconds)
    return Speed(f"depth decoding of {name}", "frames a second", FRAMES / op, FRAMES / definition)


def share(name: str, quantizer: ResidualVQ, rows: int, steps_a_second: float, seconds: float) -> Speed:
    """Of encoding, losses, their gradient and the codebooks' update in a second of training."""
    trained = copy.deepcopy(quantizer).train()
    spread = trained.entries()[0].std()
    x = torch.randn(rows, trained.entries()[0].shape[1], generator=torch.Generator().manual_seed(0)) * spread
    x.requires_grad_()

    def call() -> None:
        trained(x).losses.mean().backward()

    op, definition = both(call, seconds)
    others_s = max(1 / steps_a_second - op, 0.0)
    shares = [100 * mine / (mine + others_s) for mine in (op, definition)]
    return Speed(f"quantizer's share of training the tokenizer of {name}", "%", *shares)


def both(call: Callable[[], None], seconds: float) -> tuple[float, float]:
    """Seconds of a call, by the ops and by their definitions, in alternating rounds of about `seconds` each."""
    times: tuple[list[float], list[float]] = ([], [])
    call()
    end = time.perf_counter() + 2 * seconds
    while len(times[1]) < ROUNDS or time.perf_counter() < end:
        for kept, name in zip(times, ("auto", "reference"), strict=True):
            with backend(name):
                start = time.perf_counter()
                call()
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


@contextmanager
def backend(name: str) -> Iterator[None]:
    """What the ops' `backend="auto"` prefers meanwhile."""
    variable = "LONGCAT_BACKEND"
    before = os.environ.get(variable)
    os.environ[variable] = name
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
