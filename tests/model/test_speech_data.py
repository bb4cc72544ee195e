"""Speech data: espeak-ng clips, the folder layout and its errors, composed numbers, the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_model.demo.espeak import (
    HELD_OUT_TAKES,
    HELD_OUT_VOICES,
    SAMPLE_RATE,
    TRAIN_VOICES,
    SpeechSet,
    Synthesizer,
    speaker_name,
    synthesize,
    take_settings,
)
from longcat_model.demo.speech import Clip, Composer, Variation, lessons, load, read_clip
from longcat_model.demo.speech_judge import SpeechJudge

SMALL = SpeechSet(voices=("en-us+f1", "en-us+m3"), held_out_voices=("en-us+f2",), takes=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speech")
    synthesize(directory, SMALL, workers=1)
    return directory


def tone(digit: int, speaker: str, take: int = 5) -> Clip:
    waveform = torch.sin(torch.arange(1600 + 10 * digit) * 0.1)
    return Clip(digit=digit, speaker=speaker, take=take, waveform=waveform)


CLIPS = [tone(digit, speaker) for digit in range(10) for speaker in ("a", "b")]


def test_synthesis_fills_the_layout_and_goes_on_where_it_stopped(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 2 * 10 * 9 + 10 * 5
    assert {"0_en-us-f1_0.wav", "9_en-us-m3_8.wav", "7_en-us-f2_4.wav"} <= names
    kept, lost = folder / "0_en-us-f1_0.wav", folder / "1_en-us-f1_0.wav"
    before = lost.read_bytes(), kept.read_bytes()
    lost.unlink()
    calls: list[tuple[int, int]] = []
    synthesize(folder, SMALL, workers=1, progress=lambda *counts: calls.append(counts))
    assert calls == [(140, 230), (230, 230)]
    assert (lost.read_bytes(), kept.read_bytes()) == before


def test_bytes_are_the_same_in_every_run(folder: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, SpeechSet(voices=SMALL.voices[::-1], held_out_voices=(), takes=9), workers=2)
    written = sorted(tmp_path.iterdir())
    assert len(written) == 180
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in written)


def test_held_out_takes_share_no_setting_with_training_takes() -> None:
    for voice in TRAIN_VOICES:
        for digit in range(10):
            odd = [all(value % 2 for value in take_settings(voice, digit, take)) for take in range(HELD_OUT_TAKES)]
            even = [all(value % 2 == 0 for value in take_settings(voice, digit, take)) for take in range(5, 12)]
            assert all(odd) and all(even)
    assert not set(TRAIN_VOICES) & set(HELD_OUT_VOICES)


def test_unknown_voice_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"voice must be one of the library's own, got 'no-such\+voice'"):
        Synthesizer("no-such+voice")


def test_splits_are_disjoint_and_clips_are_normalised(folder: Path) -> None:
    speech = load(folder, held_out_speakers=[speaker_name(v) for v in SMALL.held_out_voices])
    assert [len(split) for split in (speech.train, speech.takes, speech.speakers)] == [80, 100, 50]
    assert {clip.take for clip in speech.train} == {5, 6, 7, 8} and {clip.take for clip in speech.takes} == set(
        range(5)
    )
    assert {clip.speaker for clip in speech.speakers} == {"en-us-f2"}
    for clip in speech.train:
        assert clip.waveform.dtype == torch.float32 and float(clip.waveform.abs().max()) <= 0.95
        assert 0.1 * SAMPLE_RATE < len(clip.waveform) < SAMPLE_RATE


def test_judge_knows_held_out_takes_and_is_deaf_to_level_and_edges(folder: Path) -> None:
    speech = load(folder, held_out_speakers=["en-us-f2"])
    judge = SpeechJudge.fit(speech.train)
    digits = [clip.digit for clip in speech.takes]
    assert judge.accuracy([clip.waveform for clip in speech.takes], digits) >= 0.95
    quiet = [torch.nn.functional.pad(0.1 * clip.waveform, (3000, 5000)) for clip in speech.takes]
    assert judge.accuracy(quiet, digits) >= 0.95
    assert judge.recognise([]) == []


def test_refuses_folders_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directory must exist"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="got none in"):
        load(tmp_path)
    sound = 0.1 * np.sin(np.arange(4000))
    for digit in range(10):
        soundfile.write(tmp_path / f"{digit}_a_7.wav", sound, 8000)
    with pytest.raises(ValueError, match=r"held-out takes \(0-4\) must cover all ten digits, got none of \[0, 1"):
        load(tmp_path)
    for digit in range(9):
        soundfile.write(tmp_path / f"{digit}_a_0.wav", sound, 8000)
    with pytest.raises(ValueError, match=r"got none of \[9\]"):
        load(tmp_path)
    soundfile.write(tmp_path / "9_a_0.wav", sound, 8000)
    assert len(load(tmp_path).takes) == 10
    with pytest.raises(ValueError, match="held-out speakers b must cover"):
        load(tmp_path, held_out_speakers=["b"])


def test_refuses_files_that_are_no_clips(tmp_path: Path) -> None:
    for name in ("nine_a_0.wav", "10_a_0.wav", "1_a.wav", "1_a_b_0.wav"):
        with pytest.raises(ValueError, match=f"file name must be .*, got {name}"):
            read_clip(tmp_path / name)
    (tmp_path / "1_a_0.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="must be a readable wav"):
        read_clip(tmp_path / "1_a_0.wav")
    soundfile.write(tmp_path / "1_a_1.wav", np.zeros(100), 8000)
    with pytest.raises(ValueError, match="must hold sound, got silence"):
        read_clip(tmp_path / "1_a_1.wav")


def test_stereo_and_other_rates_become_mono_16_khz(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    soundfile.write(tmp_path / "4_a_0.wav", np.stack([np.sin(2500 * time)] * 2, 1) * 0.5, 8000)
    clip = read_clip(tmp_path / "4_a_0.wav")
    assert (clip.digit, clip.speaker, clip.take, clip.waveform.ndim) == (4, "a", 0, 1)
    assert abs(len(clip.waveform) - SAMPLE_RATE) < 0.02 * SAMPLE_RATE


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3))
def test_numbers_are_a_function_of_seed_and_step(seed: int, step: int, count: int, longest: int) -> None:
    first, again = (Composer(CLIPS).numbers(seed=seed, step=step, count=count, max_digits=longest) for _ in range(2))
    assert len(first) == count
    for one, two in zip(first, again, strict=True):
        assert one.digits == two.digits and one.speaker == two.speaker and torch.equal(one.waveform, two.waveform)
        assert 1 <= len(one.digits) <= longest and one.waveform.dtype == torch.float32


def test_without_variation_a_number_is_its_clips_and_their_gaps() -> None:
    composer = Composer(CLIPS, Variation.none())
    spoken = composer.say((3, 1), np.random.default_rng(0), speaker="b")
    expected = [CLIPS[7].waveform, torch.zeros(960), CLIPS[3].waveform]
    assert torch.equal(spoken.waveform, torch.cat(expected))


def test_composer_needs_a_speaker_of_all_digits() -> None:
    with pytest.raises(ValueError, match="must hold a speaker of all ten digits"):
        Composer([tone(d, "a") for d in range(9)])


def test_lessons_pair_waveforms_with_digits_by_step() -> None:
    lesson = lessons(Composer(CLIPS), seed=3, count=4)
    waveforms, digits = lesson(7)
    assert len(waveforms) == len(digits) == 4
    assert digits == lesson(7)[1] and digits != lesson(8)[1]
