"""The demo's documents: numbers tokenized once, then drawn for every training step.

The tokenizers are frozen while the language model trains, so images and speech are turned into codes beforehand: ids
are tiny, and a step reads only ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longcat_model.demo import digits, speech
from longcat_model.demo.tasks import Tasks
from longcat_model.sequence import Batch, Document, pack
from longcat_model.system import System

CHUNK = 250  # numbers composed and encoded at once


@dataclass(frozen=True)
class Pool:
    """Numbers with the codes of one picture or utterance of each."""

    numbers: list[str]
    codes: list[Tensor]

    def as_dict(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "codes": self.codes}


def picture_pool(system: System, scans: digits.Scans, *, count: int, seed: int) -> Pool:
    """`count` augmented pictures of numbers, tokenized."""
    numbers: list[str] = []
    codes: list[Tensor] = []
    for step, size in _chunks("tokenize images", count):
        drawn = digits.training_numbers(scans, count=size, seed=seed, step=step)
        numbers += drawn.texts
        codes += system.vision.encode(drawn.images)
    return Pool(numbers, codes)


def utterance_pool(system: System, clips: Sequence[speech.Clip], *, count: int, seed: int) -> Pool:
    """`count` augmented utterances of numbers, tokenized."""
    composer = speech.Composer(clips)
    numbers: list[str] = []
    codes: list[Tensor] = []
    for step, size in _chunks("tokenize speech", count):
        drawn = composer.numbers(seed=seed, step=step, count=size)
        numbers += ["".join(map(str, spoken.digits)) for spoken in drawn]
        codes += system.audio.encode([spoken.waveform for spoken in drawn])
    return Pool(numbers, codes)


@contextmanager
def counter(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of (done, total)."""
    with tqdm(desc=name, unit=unit) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _chunks(name: str, count: int) -> Iterator[tuple[int, int]]:
    with tqdm(total=count, desc=name, unit="number") as bar:
        for step, start in enumerate(range(0, count, CHUNK)):
            size = min(CHUNK, count - start)
            yield step, size
            bar.update(size)


def training_batches(
    tasks: Tasks, pictures: Pool, utterances: Pool, *, documents: int, row_length: int, seed: int
) -> Callable[[int], Batch]:
    """Batches of `documents` documents, a quarter of each task, as a pure function of the step."""
    return partial(_batch, tasks, pictures, utterances, documents, row_length, seed)


def _batch(
    tasks: Tasks, pictures: Pool, utterances: Pool, documents: int, row_length: int, seed: int, step: int
) -> Batch:
    generator = torch.Generator().manual_seed((seed << 32) + step)
    return pack([_draw(tasks, pictures, utterances, i % 4, generator) for i in range(documents)], row_length)


def _draw(tasks: Tasks, pictures: Pool, utterances: Pool, task: int, generator: torch.Generator) -> Document:
    pool = pictures if task < 2 else utterances
    index = int(torch.randint(len(pool.numbers), (), generator=generator))
    number, codes = pool.numbers[index], pool.codes[index]
    if task == 0:
        return tasks.see(codes, number)
    if task == 1:
        return tasks.paint(codes, number, generator)
    if task == 2:
        return tasks.hear(codes, number)
    return tasks.say(codes, number, generator)
