"""Independent recogniser of single spoken digits, which judges what the model says.

It sees only recordings of the data set: cepstra, a support vector machine, and plain augmentation (noise, filtering) of
training clips. Nothing a model made ever enters its training.
"""

from __future__ import annotations

from collections.abc import Sequence

import librosa
import numpy as np
from scipy.signal import lfilter
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from longcat_model.demo.espeak import SAMPLE_RATE
from longcat_model.demo.speech import Clip, normalise, trim

_CEPSTRA = 20
_RANGE_DB = 40.0  # of a clip's power; what is softer counts as silence, as it does to a listener
_FRAMES = 16  # a clip of any length is resampled to this many


class SpeechJudge:
    """Recognises which digit a waveform says.

    Example:
        judge = SpeechJudge.fit(speech.train)
        judge.accuracy([clip.waveform for clip in speech.takes], [clip.digit for clip in speech.takes])
    """

    def __init__(self, classifier: Pipeline) -> None:
        self._classifier = classifier

    @classmethod
    def fit(cls, clips: Sequence[Clip], *, copies: int = 1, seed: int = 0) -> SpeechJudge:
        """Trains on `clips` and `copies` augmented versions of each; held-out clips must not be among them."""
        draw = np.random.default_rng(seed)
        rows, digits = [], []
        for clip in clips:
            waveform = clip.waveform.numpy()
            versions = [waveform, *(_augment(waveform, draw) for _ in range(copies))]
            rows += [features(version) for version in versions]
            digits += [clip.digit] * len(versions)
        classifier = make_pipeline(StandardScaler(), SVC(C=10.0, gamma="scale"))
        return cls(classifier.fit(np.stack(rows), np.array(digits)))

    def recognise(self, waveforms: Sequence[Tensor]) -> list[int]:
        """The digit each waveform [samples] at 16 kHz says."""
        if not waveforms:
            return []
        return [int(d) for d in self._classifier.predict(np.stack([features(w.numpy()) for w in waveforms]))]

    def accuracy(self, waveforms: Sequence[Tensor], digits: Sequence[int]) -> float:
        """Share of the waveforms recognised as their digit."""
        heard = self.recognise(waveforms)
        return sum(a == b for a, b in zip(heard, digits, strict=True)) / len(digits)


def features(waveform: np.ndarray) -> np.ndarray:
    """[16 * 20] cepstra of [samples]; trimmed and normalised first, so level and surrounding silence do not count."""
    speech = normalise(trim(waveform.astype(np.float32)))
    speech = np.pad(speech, (0, max(0, 1024 - len(speech))))
    power = librosa.feature.melspectrogram(y=speech, sr=SAMPLE_RATE, n_fft=512, hop_length=160, n_mels=40)
    cepstra = librosa.feature.mfcc(S=librosa.power_to_db(power, ref=np.max, top_db=_RANGE_DB), n_mfcc=_CEPSTRA)
    places = np.linspace(0, cepstra.shape[1] - 1, _FRAMES)
    left = np.minimum(places.astype(int), cepstra.shape[1] - 2)
    share = places - left
    return (cepstra[:, left] * (1 - share) + cepstra[:, left + 1] * share).reshape(-1)


def _augment(waveform: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Tilts the spectrum by a first-order filter, then adds noise 15-45 dB below the speech."""
    tilt = draw.uniform(-0.4, 0.4)
    filtered = lfilter([1.0, tilt], [1.0], waveform)
    level = np.sqrt(np.square(filtered).mean()) * 10 ** (-draw.uniform(15, 45) / 20)
    return (filtered + level * draw.standard_normal(len(filtered))).astype(np.float32)
