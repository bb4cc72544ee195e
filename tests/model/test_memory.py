"""The memory that is stated before answers are made bounds what they take, and not by far."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longcat_model import presets
from longcat_model.generation import Settings, converse, memory
from longcat_model.messages import IMAGE, SPEECH
from longcat_model.system import System


@pytest.fixture(scope="module", params=["tiny", "demo"])
def system(request: pytest.FixtureRequest) -> System:
    torch.manual_seed(0)
    system = System.create(getattr(presets, request.param)())
    for part in system.parts().values():
        part.eval()
    return system


def peak(call: Callable[[], object]) -> int:
    """Bytes beyond those before: torch's allocations, and numpy's at their highest, which may be at another time."""
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
        numpy = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return max(most, numpy)


def assert_bounds(stated: int, measured: int) -> None:
    print(f"stated {stated:,}, measured {measured:,}: {stated / measured:.2f}")
    assert measured <= stated <= 4 * measured


def test_encoders_and_decoders(system: System) -> None:
    sizes, cell = system.sizes, system.vision.sizes.cell
    for media in (torch.rand(3, 12 * cell, 20 * cell), 0.1 * torch.randn(90 * system.audio.samples_per_position)):
        encode = (system.vision if media.ndim == 3 else system.audio).encode
        assert_bounds(memory.encoding(media, sizes), peak(lambda: encode([media])))  # noqa: B023
    cells = torch.zeros(12, 20, len(sizes.vocabulary.visual_sizes), dtype=torch.int64)
    assert_bounds(sum(memory.image(sizes.vision, 12, 20)), peak(lambda: system.vision.decode([cells])))
    frames = torch.zeros(90, len(sizes.vocabulary.audio_sizes), dtype=torch.int64)
    assert_bounds(sum(memory.speech(sizes.audio, 90)), peak(lambda: system.audio.decode([frames])))


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("content", ["hello" * 200, f"paint{IMAGE}", f"say{SPEECH}"])
def test_whole_calls(system: System, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Settings(height=6, width=6, max_tokens=40, max_text=8, max_frames=40)
    job = converse.prepare([user(content)] * 3, system, how)
    assert_bounds(job.memory.most, peak(job.run))
