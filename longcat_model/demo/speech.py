"""Spoken digits: clips in the layout of the Free Spoken Digit Dataset, and numbers composed of them.

A data set is a folder of `{digit}_{speaker}_{take}.wav`: real recordings, or clips that `longcat_model.demo.espeak`
synthesized. Takes 0-4 of every speaker are held out, and all takes of the speakers named `held_out_speakers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor

from longcat_model.demo.espeak import HELD_OUT_TAKES, SAMPLE_RATE

Lesson = tuple[list[Tensor], list[tuple[int, ...]]]

_NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)\.wav")
_LOUDNESS = 0.1  # root mean square of a normalised clip; full scale is 1
_SILENCE_DB = -38.0  # of a 10 ms frame against the clip's loudest, below which its ends are trimmed
_MARGIN_S = 0.02  # kept around the trimmed speech: soft consonants start below the threshold


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One recording of one digit."""

    digit: int
    speaker: str
    take: int
    waveform: Tensor  # [samples] float32 at SAMPLE_RATE, trimmed, of equal loudness


@dataclass(frozen=True, kw_only=True)
class Speech:
    """A data set, split: nothing of `takes` and `speakers` may be trained on."""

    train: tuple[Clip, ...]
    takes: tuple[Clip, ...]  # takes 0-4 of the training speakers
    speakers: tuple[Clip, ...]  # every take of speakers never heard in training


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A number of one or more digits in one speaker's voice."""

    digits: tuple[int, ...]
    speaker: str
    waveform: Tensor  # [samples] float32 at SAMPLE_RATE


@dataclass(frozen=True, kw_only=True)
class Variation:
    """Ranges from which composition and augmentation draw; all zero (`Variation.none()`) leaves clips as they are."""

    edge_s: float = 0.08  # longest silence before the first and after the last digit
    gap_s: tuple[float, float] = (0.02, 0.12)  # shortest and longest silence between two digits
    gain_db: float = 4.0  # either way
    speed: float = 0.07  # relative, either way; resampling moves pitch along
    noise: float = 0.003  # highest root mean square of white noise, added to every third number

    @staticmethod
    def none() -> Variation:
        return Variation(edge_s=0.0, gap_s=(0.06, 0.06), gain_db=0.0, speed=0.0, noise=0.0)


def load(directory: Path, *, held_out_speakers: Sequence[str] = ()) -> Speech:
    """Reads a folder of clips.

    Raises:
        ValueError: the folder has no clips, a name does not follow the layout, a file cannot be read, or a split
            lacks a digit.
    """
    if not directory.is_dir():
        raise ValueError(f"speech: directory must exist and hold {{digit}}_{{speaker}}_{{take}}.wav, got {directory}")
    paths = sorted(directory.glob("*.wav"))
    if not paths:
        raise ValueError(
            f"speech: directory must hold {{digit}}_{{speaker}}_{{take}}.wav files, got none in {directory}"
        )
    clips = [read_clip(path) for path in paths]
    known = [clip for clip in clips if clip.speaker not in held_out_speakers]
    speech = Speech(
        train=tuple(clip for clip in known if clip.take >= HELD_OUT_TAKES),
        takes=tuple(clip for clip in known if clip.take < HELD_OUT_TAKES),
        speakers=tuple(clip for clip in clips if clip.speaker in held_out_speakers),
    )
    _check_digits("training takes (5 and up)", speech.train)
    _check_digits(f"held-out takes (0-{HELD_OUT_TAKES - 1})", speech.takes)
    if held_out_speakers:
        _check_digits(f"held-out speakers {', '.join(held_out_speakers)}", speech.speakers)
    return speech


def _check_digits(split: str, clips: Iterable[Clip]) -> None:
    missing = sorted(set(range(10)) - {clip.digit for clip in clips})
    if missing:
        raise ValueError(f"speech: {split} must cover all ten digits, got none of {missing}")


def read_clip(path: Path) -> Clip:
    """One file as a `Clip`: mono, at `SAMPLE_RATE`, trimmed, normalised.

    Raises:
        ValueError: the name does not follow the layout, or the file is no readable, audible wav.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"speech: file name must be {{digit}}_{{speaker}}_{{take}}.wav, got {path.name}")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"speech: file must be a readable wav, got {path}: {error}") from error
    waveform = samples.mean(axis=1)
    if waveform.size == 0 or not np.abs(waveform).max() > 0:
        raise ValueError(f"speech: file must hold sound, got silence in {path}")
    if rate != SAMPLE_RATE:
        divisor = int(np.gcd(rate, SAMPLE_RATE))
        waveform = resample_poly(waveform, SAMPLE_RATE // divisor, rate // divisor)
    digit, speaker, take = int(match["digit"]), match["speaker"], int(match["take"])
    return Clip(digit=digit, speaker=speaker, take=take, waveform=torch.from_numpy(normalise(trim(waveform))))


def trim(waveform: np.ndarray) -> np.ndarray:
    """Cuts silence off both ends of [samples], up to a margin."""
    frame = SAMPLE_RATE // 100
    padded = np.pad(waveform, (0, -len(waveform) % frame)).reshape(-1, frame)
    power = np.square(padded).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (_SILENCE_DB / 10))
    if loud.size == 0:
        return waveform
    margin = int(_MARGIN_S * SAMPLE_RATE)
    return waveform[max(0, loud[0] * frame - margin) : (loud[-1] + 1) * frame + margin]


def normalise(waveform: np.ndarray) -> np.ndarray:
    """Scales [samples] to the common loudness, but never beyond 0.95 of full scale; silence stays silence."""
    power = float(np.sqrt(np.square(waveform).mean()))
    peak = float(np.abs(waveform).max())
    scale = min(_LOUDNESS / max(power, 1e-8), 0.95 / max(peak, 1e-8))
    return (waveform * scale).astype(np.float32)


class Composer:
    """Numbers spoken by concatenating one speaker's clips.

    Everything drawn comes from the generator or the (seed, step) given, so equal arguments give equal numbers.
    """

    def __init__(self, clips: Sequence[Clip], variation: Variation | None = None) -> None:
        self.variation = variation or Variation()
        self._clips: dict[str, dict[int, list[Clip]]] = {}
        for clip in clips:
            self._clips.setdefault(clip.speaker, {}).setdefault(clip.digit, []).append(clip)
        self.speakers = tuple(sorted(name for name, digits in self._clips.items() if len(digits) == 10))
        if not self.speakers:
            raise ValueError(f"Composer: clips must hold a speaker of all ten digits, got {len(self._clips)} without")

    def numbers(self, *, seed: int, step: int, count: int, max_digits: int = 3) -> list[Spoken]:
        """`count` numbers of 1 to `max_digits` digits: a pure function of (seed, step)."""
        draw = np.random.default_rng((seed, step))
        lengths = draw.integers(1, max_digits + 1, count)
        return [self.say(tuple(int(d) for d in draw.integers(0, 10, n)), draw) for n in lengths]

    def say(self, digits: Sequence[int], draw: np.random.Generator, speaker: str | None = None) -> Spoken:
        """The digits in the voice of `speaker` (any, if None)."""
        speaker = speaker or self.speakers[int(draw.integers(len(self.speakers)))]
        variation = self.variation
        speed = 1 + variation.speed * float(draw.uniform(-1, 1))
        pieces = [_silence(draw.uniform(0, variation.edge_s))]
        for index, digit in enumerate(digits):
            takes = self._clips[speaker][digit]
            if index:
                pieces.append(_silence(draw.uniform(*variation.gap_s)))
            pieces.append(_resample(takes[int(draw.integers(len(takes)))].waveform, speed))
        pieces.append(_silence(draw.uniform(0, variation.edge_s)))
        waveform = torch.cat(pieces) * 10 ** (variation.gain_db * float(draw.uniform(-1, 1)) / 20)
        level = float(draw.uniform(0, variation.noise)) * (draw.random() < 1 / 3)
        if level > 0:
            waveform = waveform + level * torch.from_numpy(draw.standard_normal(len(waveform), dtype=np.float32))
        return Spoken(digits=tuple(digits), speaker=speaker, waveform=waveform)


def lessons(composer: Composer, *, seed: int = 0, count: int = 16) -> Callable[[int], Lesson]:
    """What the audio tokenizer trains on: step -> `count` waveforms and the digits said in each."""

    def lesson(step: int) -> Lesson:
        numbers = composer.numbers(seed=seed, step=step, count=count)
        return [number.waveform for number in numbers], [number.digits for number in numbers]

    return lesson


def _silence(seconds: float) -> Tensor:
    return torch.zeros(int(seconds * SAMPLE_RATE))


def _resample(waveform: Tensor, speed: float) -> Tensor:
    if speed == 1:
        return waveform
    size = int(len(waveform) / speed)
    return torch.nn.functional.interpolate(waveform[None, None], size=size, mode="linear", align_corners=False)[0, 0]
