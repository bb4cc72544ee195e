"""The four tasks on held-out data: scores, and samples to look at and listen to.

Results are plain data that a checkpoint can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longcat_model.demo import digits
from longcat_model.demo.data import Data
from longcat_model.demo.settings import Evaluation
from longcat_model.demo.speech import Clip, Composer, Spoken, Variation
from longcat_model.demo.speech_judge import SpeechJudge
from longcat_model.demo.tasks import Tasks
from longcat_model.generation import GREEDY, Sampling, generate_image, generate_speech, generate_text
from longcat_model.sequence import Document
from longcat_model.system import System

LONGEST_ANSWER = 8  # ids of a transcription
LONGEST_SPEECH = 40  # frames: 3.2 s
PART = 50  # numbers painted or said at once
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


@dataclass(frozen=True)
class Exam:
    """The four tasks, each examined on what was held out; a method returns results by name."""

    system: System
    data: Data
    sizes: Evaluation
    seed: int

    @property
    def tasks(self) -> Tasks:
        return Tasks.of(self.system.model.ids, self.system.text)

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.sizes.temperature, top_p=self.sizes.top_p, seed=self.seed)

    @property
    def asked(self) -> list[str]:
        """Single digits to paint and to say."""
        return [str(i % 10) for i in range(self.sizes.digits)]

    def see(self) -> dict[str, Result]:
        """Every held-out scan by itself, then numbers composed of them."""
        scans = self.data.held_out_scans
        numbers = digits.plain_numbers(scans, count=self.sizes.numbers, seed=self.seed)
        return {"see_digits": self._read(digits.single_digits(scans)), "see_numbers": self._read(numbers)}

    def _read(self, numbers: digits.Numbers) -> Result:
        prompts = [self.tasks.see_prompt(codes) for codes in self.system.vision.encode(numbers.images)]
        return Result(numbers.texts, self._answers(prompts), images=numbers.images[:SHOWN])

    def hear(self) -> dict[str, Result]:
        """Unseen takes of every digit, numbers composed of them, and voices never heard in training."""
        composer = Composer(self.data.speech.takes, Variation.none())
        results = {
            "hear_digits": self._transcribe(single_clips(self.data.speech.takes, self.sizes.digits, self.seed)),
            "hear_numbers": self._transcribe(composer.numbers(seed=self.seed, step=0, count=self.sizes.numbers)),
        }
        if self.data.speech.speakers:
            unheard = single_clips(self.data.speech.speakers, self.sizes.digits, self.seed)
            results["hear_new_voices"] = self._transcribe(unheard)
        return results

    def _transcribe(self, spoken: Sequence[Spoken]) -> Result:
        waveforms = [number.waveform for number in spoken]
        prompts = [self.tasks.hear_prompt(codes) for codes in self.system.audio.encode(waveforms)]
        expected = ["".join(map(str, number.digits)) for number in spoken]
        return Result(expected, self._answers(prompts), speech=waveforms[:SHOWN])

    def _answers(self, prompts: Sequence[Document]) -> list[str]:
        answers = generate_text(self.system.model, prompts, max_tokens=LONGEST_ANSWER, sampling=GREEDY)
        return [self.system.text.decode(ids) for ids in answers]

    def paint(self) -> dict[str, Result]:
        """Pictures read by a classifier that knows only real training scans."""
        judge = digits.Judge(self.data.scans)
        own = judge.score(self.data.held_out_scans)

        def judged(numbers: list[str]) -> Result:
            images = self._in_parts("paint", numbers, partial(paint, self.system, guidance=self.sizes.guidance))
            return Result(numbers, judge.read(images), own, images=images[:SHOWN])

        return {"paint_digits": judged(self.asked), "paint_numbers": judged(whole_numbers(self.sizes.digits))}

    def talk(self) -> dict[str, Result]:
        """Single digits recognised by a classifier that knows only training recordings, in both modes."""
        judge = SpeechJudge.fit(self.data.speech.train)
        takes = self.data.speech.takes
        own = judge.accuracy([clip.waveform for clip in takes], [clip.digit for clip in takes])

        def judged(mode: str) -> Result:
            waveforms = self._in_parts(f"talk {mode}", self.asked, partial(say, self.system, mode=mode))
            heard = [str(digit) for digit in judge.recognise(waveforms)]
            return Result(self.asked, heard, own, speech=waveforms[:SHOWN])

        return {"talk_serial": judged("serial"), "talk_parallel": judged("parallel")}

    def _in_parts(self, name: str, numbers: Sequence[str], make: Callable[..., list[Tensor]]) -> list[Tensor]:
        """What `make` gives for `numbers`, a part at a time under a progress bar; number i draws with seed + i."""
        made: list[Tensor] = []
        with tqdm(total=len(numbers), desc=f"evaluate {name}", unit="number") as bar:
            for start in range(0, len(numbers), PART):
                part = numbers[start : start + PART]
                made += make(part, sampling=replace(self.sampling, seed=self.seed + start))
                bar.update(len(part))
        return made


def paint(system: System, numbers: Sequence[str], *, sampling: Sampling, guidance: float) -> list[Tensor]:
    """Pictures of numbers, each [3, H, W] in [0, 1]."""
    tasks = Tasks.of(system.model.ids, system.text)
    height, width = (side // system.vision.sizes.cell for side in (digits.SIDE, digits.SIDE))
    codes: dict[int, Tensor] = {}
    for length in sorted(set(map(len, numbers))):
        rows = [i for i, number in enumerate(numbers) if len(number) == length]
        painted = generate_image(
            system.model,
            [tasks.paint_prompt(numbers[i]) for i in rows],
            layout=tasks.layout,
            height=height,
            width=width * length,
            sampling=sampling,
            guidance=guidance,
        )
        codes |= dict(zip(rows, painted, strict=True))
    return system.vision.decode([codes[i] for i in range(len(numbers))], seed=sampling.seed)


def say(system: System, numbers: Sequence[str], *, mode: str, sampling: Sampling) -> list[Tensor]:
    """Speech for numbers, each [samples]; `mode` is serial or parallel."""
    tasks = Tasks.of(system.model.ids, system.text)
    prompts = [tasks.say_prompt(number) for number in numbers]
    spoken = generate_speech(system.model, prompts, mode=mode, sampling=sampling, max_frames=LONGEST_SPEECH)
    return system.audio.decode([speech.codes for speech in spoken], seed=sampling.seed)


def whole_numbers(count: int) -> list[str]:
    """`count` different numbers of two and three digits in turn, spread over their ranges."""
    return [str(10 + 90 * i // count if i % 2 else 100 + 900 * i // count) for i in range(count)]


def single_clips(clips: Sequence[Clip], count: int, seed: int) -> list[Spoken]:
    """About `count` clips, as many of each digit, as numbers of one digit."""
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [[clips[i] for i in order if clips[i].digit == digit][: -(-count // 10)] for digit in range(10)]
    return [
        Spoken(digits=(clip.digit,), speaker=clip.speaker, waveform=clip.waveform) for group in chosen for clip in group
    ]
