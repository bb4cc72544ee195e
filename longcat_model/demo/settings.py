"""What the demo does and for how long: the default that reaches the goals, and a smoke run of the same path."""

from __future__ import annotations

from dataclasses import dataclass, field

from longcat_model.training.audio_stages import AudioTraining
from longcat_model.training.loss import LossWeights
from longcat_model.training.vision_stages import Settings as VisionTraining


@dataclass(frozen=True, kw_only=True)
class LanguageTraining:
    """The language model's part of the demo."""

    pictures: int = 20_000  # numbers tokenized for training
    utterances: int = 8000
    documents: int = 64  # of every step, a quarter of each task
    row_length: int = 128  # positions
    pre_align_steps: int = 60
    joint_steps: int = 1100
    pre_align_rate: float = 2e-3
    joint_rate: float = 2e-3
    weights: LossWeights = field(default_factory=LossWeights)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How many held-out examples every task is judged on, and how it is sampled."""

    numbers: int = 400  # pictures of one to three digits, and as many spoken numbers
    digits: int = 200  # single digits painted, heard and said in each mode
    temperature: float = 0.5
    top_p: float = 0.9
    guidance: float = 1.5  # of painting


@dataclass(frozen=True, kw_only=True)
class Settings:
    vision: VisionTraining = field(default_factory=VisionTraining)
    audio: AudioTraining = field(default_factory=AudioTraining)
    language: LanguageTraining = field(default_factory=LanguageTraining)
    evaluation: Evaluation = field(default_factory=Evaluation)
    clips: int = 16  # spoken numbers of every audio training step
    speech_takes: int = 12  # of every digit and voice, when speech is synthesized
    speech_voices: int = 20
    smoke: bool = False

    @classmethod
    def small(cls) -> Settings:
        """A few steps a stage: the whole path, but no result."""
        return cls(
            vision=VisionTraining.smoke(),
            audio=AudioTraining(warm_up_steps=3, joint_steps=3, flow_steps=3),
            language=LanguageTraining(pictures=100, utterances=60, documents=16, pre_align_steps=2, joint_steps=6),
            evaluation=Evaluation(numbers=8, digits=10),
            clips=8,
            speech_takes=6,
            speech_voices=2,
            smoke=True,
        )
