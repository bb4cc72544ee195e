"""How answers are generated: everything a user may choose, with the released model's recommendations as defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from longcat_model.generation.machine import ImageState, Position, ReplyState, SpeechState, State, TextState
from longcat_model.generation.sampling import GREEDY, HEAR, IMAGE, SEE, SPEECH, TRANSCRIPT, Sampling
from longcat_model.messages import Audio, Image, Part, StartImage, StartSpeech
from longcat_model.released.differences import HERE, Unconditional
from longcat_model.vocabulary import Vocabulary

NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
RECOMMENDED_SPEECH = replace(SPEECH, repetition_penalty=1.3)
RECOMMENDED_TRANSCRIPT = replace(TRANSCRIPT, repetition_penalty=1.1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one answer.

    With `media` at 0 an answer is one thing: text up to the end of text, or the image or speech that the last message
    starts. With more, the text goes on after that, and may begin images and speech of its own, so many in all.

    Raises:
        ValueError: a number is out of range, or a word is none of those there are.
    """

    text: Sampling | None = None  # None: greedy, or as recommended for a conversation with an image or with sound
    image: Sampling = IMAGE
    speech: Sampling = RECOMMENDED_SPEECH  # of the codes
    transcript: Sampling = RECOMMENDED_TRANSCRIPT
    numbers: Mapping[str, float] = field(default_factory=dict)  # of all of the above alike, such as {"top_k": 5}
    truncation: str | None = None  # "sequential" or "joint", of all of the above: `Sampling.order`
    guidance: float | None = HERE.guidance  # classifier-free, of images; None: none
    cfg_uncond: Unconditional = HERE.cfg_uncond  # what it compares with: `released.differences.unconditional`
    height: int = 37  # cells of an image whose size the last message does not say
    width: int = 37
    mode: str = "serial"  # "parallel": a transcript and its speech together
    max_tokens: int = 1024  # of text
    max_text: int = 512  # ids of a transcript
    max_frames: int = 1000  # of an utterance: 80 s
    stop: tuple[str, ...] = ()  # the first of these to be complete ends the answer before it
    media: int = 0  # images and utterances that the text may begin

    def __post_init__(self) -> None:
        for name in ("height", "width", "max_tokens", "max_text", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {getattr(self, name)}")
        if self.media < 0:
            raise ValueError(f"generate: media must be at least 0, got {self.media}")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise ValueError(f"generate: guidance must be at least 0 and finite, or None, got {self.guidance}")
        words = {
            "truncation": (None, "sequential", "joint"),
            "cfg_uncond": get_args(Unconditional),
            "mode": ("serial", "parallel"),
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"generate: {name} must be one of {known}, got {getattr(self, name)!r}")
        if unknown := sorted({*self.numbers} - {*NUMBERS}):
            raise ValueError(f"generate: numbers must be of {', '.join(NUMBERS)}, got {', '.join(unknown)}")
        self._adjusted(GREEDY)  # refuses what is out of range
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"generate: stop must be a tuple of strings that are not empty, got {self.stop!r}")

    def state(self, ids: Vocabulary, parts: Sequence[Part], opening: Sequence[Position]) -> State:
        """What answers a conversation; `opening` begins an image in mid-text."""
        text = TextState(limit=self.max_tokens, sampling=self._adjusted(self.text or _recommended(parts)))
        height, width = self.size(parts)
        image = ImageState(
            ids=ids, height=height, width=width, sampling=self._adjusted(self.image), guidance=self.guidance
        )
        speech = SpeechState(
            ids=ids,
            sampling=self._adjusted(self.speech),
            text_sampling=self._adjusted(self.transcript),
            delay=1 if self.mode == "parallel" else None,
            max_text=self.max_text,
            max_frames=self.max_frames,
        )
        inside: ImageState | SpeechState | None = None
        if isinstance(parts[-1], StartImage | StartSpeech):
            inside = image if isinstance(parts[-1], StartImage) else speech
        if not self.media:
            return inside or text
        return ReplyState(
            ids=ids, text=text, image=image, speech=speech, opening=tuple(opening), media=self.media, inside=inside
        )

    def size(self, parts: Sequence[Part]) -> tuple[int, int]:
        """Cells of the conversation's images: what its last message says, or what stands here."""
        start = parts[-1]
        return start.size if isinstance(start, StartImage) and start.size else (self.height, self.width)

    def _adjusted(self, sampling: Sampling) -> Sampling:
        order = {} if self.truncation is None else {"order": self.truncation}
        return replace(sampling, **self.numbers, **order)  # type: ignore[arg-type]


def _recommended(parts: Sequence[Part]) -> Sampling:
    if any(isinstance(part, Image) for part in parts):
        return SEE
    return HEAR if any(isinstance(part, Audio) for part in parts) else GREEDY
