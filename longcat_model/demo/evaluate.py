"""The four tasks on held-out data: scores, and samples to look at and listen to.

Every function returns plain data that a checkpoint can hold; see `Result`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longcat_model.demo import digits
from longcat_model.demo.speech import Clip, Spoken
from longcat_model.demo.speech_judge import SpeechJudge
from longcat_model.demo.tasks import Tasks
from longcat_model.generation import GREEDY, Sampling, generate_image, generate_speech, generate_text
from longcat_model.system import System

LONGEST_ANSWER = 8  # ids of a transcription
LONGEST_SPEECH = 40  # frames: 3.2 s
SHOWN = 12  # samples kept of every task


@dataclass(frozen=True)
class Result:
    """Outcome of one task: what was asked, what came, whether it was right, and the first media."""

    expected: list[str]
    got: list[str]
    judge: float | None = None
    images: list[Tensor] = field(default_factory=list)
    speech: list[Tensor] = field(default_factory=list)

    @property
    def right(self) -> list[bool]:
        return [a == b for a, b in zip(self.expected, self.got, strict=True)]

    @property
    def value(self) -> float:
        return sum(self.right) / len(self.expected)

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def see(system: System, tasks: Tasks, numbers: digits.Numbers) -> Result:
    """Images -> text, greedily; right if every digit is."""
    prompts = [tasks.see_prompt(codes) for codes in system.vision.encode(numbers.images)]
    answers = generate_text(system.model, prompts, max_tokens=LONGEST_ANSWER, sampling=GREEDY)
    return Result(numbers.texts, _texts(tasks, answers), images=numbers.images[:SHOWN])


def hear(system: System, tasks: Tasks, spoken: Sequence[Spoken]) -> Result:
    """Speech -> text, greedily; right if every digit is."""
    waveforms = [number.waveform for number in spoken]
    prompts = [tasks.hear_prompt(codes) for codes in system.audio.encode(waveforms)]
    answers = generate_text(system.model, prompts, max_tokens=LONGEST_ANSWER, sampling=GREEDY)
    expected = ["".join(map(str, number.digits)) for number in spoken]
    return Result(expected, _texts(tasks, answers), speech=waveforms[:SHOWN])


def paint(system: System, tasks: Tasks, numbers: Sequence[str], sampling: Sampling, guidance: float) -> list[Tensor]:
    """Pictures of numbers of equal length, each [3, H, W] in [0, 1]."""
    height, width = (side // system.vision.sizes.cell for side in (digits.SIDE, digits.SIDE * len(numbers[0])))
    prompts = [tasks.paint_prompt(number) for number in numbers]
    codes = generate_image(
        system.model,
        prompts,
        layout=tasks.layout,
        height=height,
        width=width,
        sampling=sampling,
        guidance=guidance,
    )
    return system.vision.decode(list(codes), seed=sampling.seed)


def say(system: System, tasks: Tasks, numbers: Sequence[str], mode: str, sampling: Sampling) -> list[Tensor]:
    """Speech for numbers, each [samples]; `mode` is serial or parallel."""
    prompts = [tasks.say_prompt(number) for number in numbers]
    spoken = generate_speech(system.model, prompts, mode=mode, sampling=sampling, max_frames=LONGEST_SPEECH)
    return system.audio.decode([speech.codes for speech in spoken], seed=sampling.seed)


def judge_painting(images: Sequence[Tensor], expected: Sequence[str], judge: digits.Judge, own: float) -> Result:
    """Pictures read by a classifier that knows only real scans; `own` is its score on held-out scans."""
    return Result(list(expected), judge.read(images), own, images=list(images[:SHOWN]))


def judge_speech(waveforms: Sequence[Tensor], expected: Sequence[str], judge: SpeechJudge, own: float) -> Result:
    """Single digits recognised by a classifier that knows only recordings; `own` is its score on held-out ones."""
    got = [str(digit) for digit in judge.recognise(waveforms)]
    return Result(list(expected), got, own, speech=list(waveforms[:SHOWN]))


def single_clips(clips: Sequence[Clip], count: int, seed: int) -> list[Spoken]:
    """`count` held-out clips, spread over digits and speakers, as numbers of one digit."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = sorted(order, key=lambda i: clips[i].digit)
    each = -(-count // 10)
    by_digit = [[i for i in chosen if clips[i].digit == digit][:each] for digit in range(10)]
    return [
        Spoken(digits=(clips[i].digit,), speaker=clips[i].speaker, waveform=clips[i].waveform)
        for group in by_digit
        for i in group
    ]


def _texts(tasks: Tasks, answers: Sequence[Sequence[int]]) -> list[str]:
    return [tasks.text.decode(ids) for ids in answers]
