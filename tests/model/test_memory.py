"""The memory that is stated before answers are made bounds what they take, and not by far."""

from __future__ import annotations

import functools
import multiprocessing
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longcat_model import presets
from longcat_model.generation import Settings, converse, memory
from longcat_model.messages import IMAGE, SPEECH
from longcat_model.released import checkpoint
from longcat_model.released import memory as released_memory
from longcat_model.released.sizes import shrunk
from longcat_model.released.tokenizers import image_decoders, load_audio, load_vision
from longcat_model.released.vocoder import Vocoder
from longcat_model.system import System
from longcat_model.tokenizers.text import ByteTokenizer


@pytest.fixture(scope="module")
def apart() -> Iterator[Executor]:
    """A process of its own: the profiler leaves it with freed memory that other tests would find, and not count."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@functools.cache
def system_of(preset: str) -> System:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if preset == "released":
        return released_system()
    system = System.create(getattr(presets, preset)())
    for part in system.parts().values():
        part.eval()
    return system


def released_system() -> System:
    """Shrunk, with random weights."""
    sizes = shrunk()
    with TemporaryDirectory() as directory:
        checkpoint.synthesize(sizes, Path(directory, "next"), seed=3)
        loaded = checkpoint.load(Path(directory, "next"), progress=False)
    decoders, vocoder = image_decoders(sizes).requires_grad_(False), Vocoder(sizes.vocoder).requires_grad_(False)
    return System(
        sizes=sizes.model,
        model=loaded.model,
        vision=load_vision(sizes, loaded.tokenizers, decoders=decoders),
        audio=load_audio(sizes, loaded.tokenizers, vocoder=vocoder),
        text=ByteTokenizer(),
        released=sizes,
    )


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


def of_parts(preset: str) -> dict[str, tuple[int, int]]:
    """Bytes stated and measured of each encoder and decoder."""
    system = system_of(preset)
    vision, audio, sizes = system.vision, system.audio, system.sizes
    image, sound = (
        torch.rand(3, 12 * vision.sizes.cell, 20 * vision.sizes.cell),
        torch.randn(90 * audio.samples_per_position),
    )
    cells = torch.zeros(12, 20, len(sizes.vocabulary.visual_sizes), dtype=torch.int64)
    frames = torch.zeros(90, len(sizes.vocabulary.audio_sizes), dtype=torch.int64)
    return {
        "vision.encode": (memory.encoding(image, sizes), peak(lambda: vision.encode([image]))),
        "audio.encode": (memory.encoding(sound, sizes), peak(lambda: audio.encode([0.1 * sound]))),
        "vision.decode": (sum(memory.image(sizes.vision, 12, 20)), peak(lambda: vision.decode([cells]))),
        "audio.decode": (sum(memory.speech(sizes.audio, 90)), peak(lambda: audio.decode([frames]))),
    }


def of_released_decoders(height: int, width: int, frames: int) -> dict[str, tuple[int, int]]:
    """Likewise, of an image of so many cells and of speech."""
    system = system_of("released")
    assert system.released is not None
    cells = torch.zeros(height, width, len(system.sizes.vocabulary.visual_sizes), dtype=torch.int64)
    codes = torch.zeros(frames, len(system.sizes.vocabulary.audio_sizes), dtype=torch.int64)
    vision, audio, sizes = system.vision, system.audio, system.released
    return {
        "image": (sum(released_memory.image(sizes, height, width)), peak(lambda: vision.decode([cells]))),
        "speech": (sum(released_memory.speech(sizes, frames)), peak(lambda: audio.decode([codes]))),
    }


def of_a_call(preset: str, content: str, frames: int) -> tuple[int, int]:
    """Bytes stated and measured of three answers to `content`."""
    how = Settings(height=6, width=6, max_tokens=40, max_text=8, max_frames=frames)
    job = converse.prepare([[{"role": "user", "content": content}]] * 3, system_of(preset), how)
    return job.memory.most, peak(job.run)


@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_encoders_and_decoders(preset: str, apart: Executor) -> None:
    for part, (stated, measured) in apart.submit(of_parts, preset).result().items():
        assert measured <= stated <= 4 * measured, part


@pytest.mark.parametrize(("height", "width", "frames"), [(6, 6, 1), (12, 20, 90), (40, 40, 30)])
def test_released_decoders(height: int, width: int, frames: int, apart: Executor) -> None:
    """The last image is one of which the autoencoder's attention takes the most."""
    for part, (stated, measured) in apart.submit(of_released_decoders, height, width, frames).result().items():
        assert measured <= stated <= 3 * measured, part


@pytest.mark.parametrize("content", ["hello" * 200, f"paint{IMAGE}", f"say{SPEECH}"])
@pytest.mark.parametrize(("preset", "frames"), [("tiny", 40), ("demo", 40), ("released", 12)])
def test_whole_calls(preset: str, frames: int, content: str, apart: Executor) -> None:
    """No more frames than random weights speak before they end by themselves."""
    stated, measured = apart.submit(of_a_call, preset, content, frames).result()
    assert measured <= stated <= 4 * measured
