"""What the demo learns from, and what it holds out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longcat_model.demo import digits, espeak, language, speech
from longcat_model.demo.settings import Settings


@dataclass(frozen=True)
class Data:
    """Scans and recordings, split; nothing held out is trained on by any part, judges included."""

    scans: digits.Scans
    held_out_scans: digits.Scans
    speech: speech.Speech


def load_data(directory: Path, settings: Settings, speech_dir: Path | None) -> Data:
    """Scans from scikit-learn; speech from `speech_dir`, or synthesized under `directory`.

    Raises:
        ValueError: `speech_dir` is no data set of spoken digits.
    """
    scans, held_out = digits.load_scans()
    if speech_dir is not None:
        return Data(scans, held_out, speech.load(speech_dir))
    voices = espeak.SpeechSet(voices=espeak.TRAIN_VOICES[: settings.speech_voices], takes=settings.speech_takes)
    with language.counter("synthesize speech", "clip") as update:
        espeak.synthesize(directory / "speech", voices, progress=update)
    unseen = [espeak.speaker_name(voice) for voice in voices.held_out_voices]
    return Data(scans, held_out, speech.load(directory / "speech", held_out_speakers=unseen))
