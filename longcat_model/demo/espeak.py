"""Spoken digits synthesized offline: espeak-ng, called in process through ctypes.

The `espeakng_loader` wheel carries the shared library and its voice data, so nothing is downloaded or installed. Files
are written in the layout of the Free Spoken Digit Dataset, `{digit}_{speaker}_{take}.wav`, at 16 kHz mono. A take fixes
speaking rate and pitch; takes 0-4 use odd rates and pitches, later takes even ones, so that no held-out take shares
its settings with a training take.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
from scipy.signal import resample_poly

SAMPLE_RATE = 16_000  # Hz, of the files written
HELD_OUT_TAKES = 5  # takes 0-4 are never trained on
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Accents and voice variants that speak clearly; whispering, croaking and robot variants are left out, and those with
# breath (f2, f3, f5), whose noise the library seeds with the time of day.
TRAIN_VOICES = (
    "en-us+f1", "en-us+f4", "en-us+m1", "en-us+m3", "en-us+m7", "en-us-nyc+f4", "en-us-nyc+m4",
    "en+f1", "en+f4", "en+m2", "en+m5", "en-gb-x-rp+f1", "en-gb-x-rp+m3", "en-gb-scotland+f1",
    "en-gb-scotland+m1", "en-029+f4", "en-029+m8", "en-gb-x-gbclan+m6", "en-gb-x-gbcwmd+f4", "en-gb-x-gbcwmd+m2",
)  # fmt: skip
HELD_OUT_VOICES = ("en-us+m5", "en+m7", "en-gb-x-rp+f4", "en-gb-scotland+m3", "en-us-nyc+f1")

_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback before the call returns, none to a sound card
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_CHARS_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, kw_only=True)
class SpeechSet:
    """Which clips to synthesize; the default is 20 x 10 x 12 training-voice clips and 5 x 10 x 5 of unseen voices."""

    voices: tuple[str, ...] = TRAIN_VOICES
    held_out_voices: tuple[str, ...] = HELD_OUT_VOICES
    takes: int = 12  # of each digit by each training voice, the five held out included


def speaker_name(voice: str) -> str:
    """Name of a voice inside a file name, where `_` separates fields: `en-us+f3` becomes `en-us-f3`."""
    return voice.replace("+", "-").replace("_", "-")


def take_settings(voice: str, digit: int, take: int) -> tuple[int, int]:
    """Words a minute and pitch (0-99) of a take: odd for the held-out takes 0-4, even for the others."""
    draw = np.random.default_rng(zlib.crc32(f"{voice}/{digit}/{take}".encode()))
    held_out = take < HELD_OUT_TAKES
    rate, pitch = int(draw.integers(64, 100)) * 2, int(draw.integers(15, 36)) * 2
    return rate + held_out, pitch + held_out


class Synthesizer:
    """One voice of espeak-ng. The library keeps one global voice a process, so use one at a time.

    Raises:
        RuntimeError: the library cannot start, or knows no such voice.
    """

    def __init__(self, voice: str) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate = self._library.espeak_Initialize(
            _SYNCHRONOUS, 0, os.fsencode(espeakng_loader.get_data_path()), 0
        )
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak: the library must start, got status {self.sample_rate}")
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak: voice must be one of the library's own, got {voice!r}")
        self._pieces: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept alive: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: object) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, *, rate: int, pitch: int) -> np.ndarray:
        """Waveform [samples] float32 in [-1, 1) at `self.sample_rate`; rate in words a minute, pitch 0-99."""
        self._pieces.clear()
        self._library.espeak_SetParameter(_RATE, rate, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _CHARS_UTF8, None, None)
        if not self._pieces:
            raise RuntimeError(f"espeak: text must be speakable, got {text!r}")
        return np.concatenate(self._pieces).astype(np.float32) / 32_768


def synthesize(
    directory: Path,
    speech_set: SpeechSet | None = None,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes every clip of `speech_set` that `directory` lacks; an interrupted run continues where it stopped.

    The bytes written are the same in every run: the library's noise and phase carry over from clip to clip, so a voice
    speaks all its clips in order, in a process of its own, and a voice that lacks a file speaks them all again.

    Args:
        workers: processes at a time, at least 1.
        progress: called with (clips done, clips in all) at the start and after each voice.
    """
    speech_set = speech_set or SpeechSet()
    directory.mkdir(parents=True, exist_ok=True)
    jobs = [(directory, voice, speech_set.takes) for voice in speech_set.voices]
    jobs += [(directory, voice, HELD_OUT_TAKES) for voice in speech_set.held_out_voices]
    todo = [job for job in jobs if not all(path.exists() for _, _, path in _clips(*job))]
    total = len(WORDS) * sum(takes for _, _, takes in jobs)
    done = total - len(WORDS) * sum(takes for _, _, takes in todo)
    report = progress or (lambda done, total: None)
    report(done, total)
    if not todo:
        return
    with _processes().Pool(workers, _leave_interrupts_to_the_caller, maxtasksperchild=1) as pool:
        for count in pool.imap_unordered(_speak_voice, todo):
            done += count
            report(done, total)


def _processes() -> BaseContext:
    """How to start processes: never a fork of the caller, whose threads (torch's) the fork would lose in mid-air."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # its imports take a voice longer than to speak
    return context


def _leave_interrupts_to_the_caller() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _clips(directory: Path, voice: str, takes: int) -> list[tuple[int, int, Path]]:
    """(digit, take, path) of every clip of a voice, in the order in which they are spoken."""
    speaker = speaker_name(voice)
    return [(d, t, directory / f"{d}_{speaker}_{t}.wav") for d in range(len(WORDS)) for t in range(takes)]


def _speak_voice(job: tuple[Path, str, int]) -> int:
    clips = _clips(*job)
    synthesizer = Synthesizer(job[1])
    divisor = math.gcd(SAMPLE_RATE, synthesizer.sample_rate)
    for digit, take, path in clips:
        rate, pitch = take_settings(job[1], digit, take)
        waveform = synthesizer.say(WORDS[digit], rate=rate, pitch=pitch)
        waveform = resample_poly(waveform, SAMPLE_RATE // divisor, synthesizer.sample_rate // divisor)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        soundfile.write(part, waveform, SAMPLE_RATE, subtype="PCM_16", format="WAV")
        part.replace(path)
    return len(clips)
