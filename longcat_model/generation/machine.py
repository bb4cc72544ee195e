"""What comes next in a row: generation as plain states and pure functions from (state, answer) to (state, positions).

Each step `ask` says which heads to ask at the row's last position, `advance` takes their answer and returns the next
state, or None where the row has ended, and the positions to feed. Those are the positions of `sequence.Layout`'s
documents; tests hold them equal. States are numbers on the CPU: their decisions steer the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longcat_model.generation.sampling import Sampling
from longcat_model.sequence import NONE, Inputs
from longcat_model.vocabulary import EOS, Vocabulary

Codes = tuple[int, ...]  # one a level; empty: none


class Position(NamedTuple):
    """What one position holds, as `sequence.Inputs` does for many."""

    text: int = NONE
    marker: int = NONE
    visual: Codes = ()
    audio: Codes = ()


class Answer(NamedTuple):
    """What the heads that were asked chose."""

    text: int = NONE
    visual: Codes = ()
    audio: Codes = ()  # level 0 equal to its size: end of audio


@dataclass(frozen=True)
class Ask:
    """Which heads to ask, and how they choose; None: not this one."""

    text: Sampling | None = None
    allowed: str = "text"  # ids the text head may choose: see `chooser.text_masks`
    visual: Sampling | None = None
    guidance: float | None = None  # scale of classifier-free guidance of the visual head
    audio: Sampling | None = None
    audio_may_end: bool = False


class State(Protocol):
    @property
    def mode(self) -> str:
        """What it writes: text, image or speech."""
        ...

    @property
    def guidance(self) -> float | None:
        """Scale of classifier-free guidance; the row then has an unconditional partner."""
        ...

    @property
    def longest(self) -> int:
        """Most positions that it will still write."""
        ...

    def ask(self) -> Ask: ...

    def advance(self, answer: Answer) -> tuple[State | None, tuple[Position, ...]]: ...


def stack(ids: Vocabulary, positions: Sequence[Position]) -> Inputs:
    """Inputs [N] of N positions of document 0."""

    def codes(given: list[Codes], levels: int) -> Tensor:
        none = (NONE,) * levels
        return torch.tensor([one or none for one in given], dtype=torch.int64).view(len(positions), levels)

    text, marker, visual, audio = map(list, zip(*positions, strict=True))
    return Inputs(
        torch.tensor(text),
        torch.tensor(marker),
        codes(visual, len(ids.visual_sizes)),
        codes(audio, len(ids.audio_sizes)),
        torch.zeros(len(positions), dtype=torch.int64),
    )


@dataclass(frozen=True, kw_only=True)
class TextState:
    """Text until EOS or `limit` ids."""

    limit: int
    sampling: Sampling
    allowed: str = "text"
    step: int = 0  # ids written
    mode = "text"
    guidance = None

    @property
    def longest(self) -> int:
        return self.limit - self.step

    def ask(self) -> Ask:
        return Ask(text=self.sampling, allowed=self.allowed)

    def advance(self, answer: Answer) -> tuple[TextState | None, tuple[Position, ...]]:
        goes_on = answer.text != EOS and self.step + 1 < self.limit
        return replace(self, step=self.step + 1) if goes_on else None, (Position(text=answer.text),)


@dataclass(frozen=True, kw_only=True)
class ImageState:
    """Cells in raster order; after a row's last cell a newline, after the last row's the end."""

    ids: Vocabulary
    height: int
    width: int
    sampling: Sampling
    guidance: float | None = None
    step: int = 0  # positions written after the start of the image
    mode = "image"

    @property
    def longest(self) -> int:
        return self.height * (self.width + 1) - self.step

    def ask(self) -> Ask:
        is_cell = (self.step + 1) % (self.width + 1) != 0
        return Ask(visual=self.sampling, guidance=self.guidance) if is_cell else Ask()

    def advance(self, answer: Answer) -> tuple[ImageState | None, tuple[Position, ...]]:
        if (self.step + 1) % (self.width + 1):
            return replace(self, step=self.step + 1), (Position(visual=answer.visual),)
        if self.longest == 1:
            return None, (Position(text=self.ids.image_end),)
        return replace(self, step=self.step + 1), (Position(text=self.ids.image_newline),)


@dataclass(frozen=True, kw_only=True)
class SpeechState:
    """A transcript and its frames after the start of speech, as `sequence.Layout.speak` lays them out.

    The transcript goes on until the text head says TE, or a pad as the released model does; the frames begin `delay`
    positions after the start or at TE and go on until the audio head says AE, which it may once the transcript has
    ended and a frame has come.
    """

    ids: Vocabulary
    sampling: Sampling  # of the codes
    text_sampling: Sampling  # of the transcript
    delay: int | None  # None: serial
    max_text: int  # then the transcript ends
    max_frames: int  # then the audio ends
    transcript: tuple[int, ...] | None = None  # said as given; None: the text head writes it
    text_ended: bool = False
    started: bool = False  # AS has been fed
    frames: int = 0
    step: int = 0  # positions written after the start of speech
    mode = "speech"
    guidance = None

    @property
    def longest(self) -> int:
        return self.max_text + self.max_frames + 2 - self.step

    def ask(self) -> Ask:
        return Ask(
            text=self.text_sampling if self.transcript is None and not self.text_ended else None,
            allowed="transcript",
            audio=self.sampling if self.started else None,
            audio_may_end=self.started and self.text_ended and self.frames > 0,
        )

    def advance(self, answer: Answer) -> tuple[SpeechState | None, tuple[Position, ...]]:
        if self.started and (answer.audio[0] == self.ids.audio_sizes[0] or self.frames >= self.max_frames):
            return None, (Position(text=self.ids.audiogen_end),)
        said = self._said(answer)
        text_ended = self.text_ended or said in (self.ids.audiotext_end, self.ids.audiotext_pad)
        starts = not self.started and (text_ended or self.step + 1 == self.delay)
        position = Position(
            text=NONE if text_ended else said,
            marker=self.ids.audiotext_start if starts else NONE,
            audio=answer.audio if self.started else (),
        )
        state = replace(
            self,
            text_ended=text_ended,
            started=self.started or starts,
            frames=self.frames + self.started,
            step=self.step + 1,
        )
        return state, (position,)

    def _said(self, answer: Answer) -> int:
        if self.step >= self.max_text:
            return self.ids.audiotext_end
        if self.transcript is None:
            return answer.text
        return self.transcript[self.step] if self.step < len(self.transcript) else self.ids.audiotext_end


@dataclass(frozen=True, kw_only=True)
class ReplyState:
    """Text in which the text head may begin images and speech, at most `media` of them; after each the text goes on.

    Neither released runtime does so: both look at the prompt's last token alone. The text head says only that an image
    begins; its size, which stands before the start in the documents, is fed.
    """

    ids: Vocabulary
    text: TextState
    image: ImageState
    speech: SpeechState
    opening: tuple[Position, ...]  # of an image: its size and its start
    media: int
    inside: ImageState | SpeechState | None = None  # what is being written; None: text

    @property
    def mode(self) -> str:
        return "text" if self.inside is None else self.inside.mode

    @property
    def guidance(self) -> float | None:
        return None if self.inside is None else self.inside.guidance

    @property
    def longest(self) -> int:
        medium = max(len(self.opening) + self.image.longest, 1 + self.speech.longest)
        return self.text.longest + self.media * medium + (0 if self.inside is None else self.inside.longest)

    def ask(self) -> Ask:
        if self.inside is not None:
            return self.inside.ask()
        return replace(self.text.ask(), allowed="reply" if self.media else "text")

    def advance(self, answer: Answer) -> tuple[ReplyState | None, tuple[Position, ...]]:
        if self.inside is not None:
            inside, positions = self.inside.advance(answer)
            return replace(self, inside=inside), positions
        if answer.text == self.ids.image_start:
            return replace(self, inside=self.image, media=self.media - 1), self.opening
        if answer.text == self.ids.audiogen_start:
            return replace(self, inside=self.speech, media=self.media - 1), (Position(text=answer.text),)
        text, positions = self.text.advance(answer)
        return None if text is None else replace(self, text=text), positions
