"""What comes next: generation as plain states and pure functions from (state, sampled ids) to (state, next inputs).

A state knows N rows that started together. Each step `heads` says which heads to ask at the last position, `advance`
takes the answers and returns the next state, the next position to feed, and the rows which that position finishes.
The inputs that come out are those of `sequence.Layout`'s documents, position for position; tests hold them equal.
States live on the CPU: their decisions steer the loop.

Dimension key
    N rows    L quantizer levels    T transcript ids
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from longcat_model.sequence import NONE, Inputs
from longcat_model.vocabulary import EOS, Vocabulary

Self = TypeVar("Self", bound="State")


@dataclass(frozen=True)
class Heads:
    """Which rows ask which head, bool [N] each."""

    text: Tensor
    visual: Tensor
    audio: Tensor
    audio_may_end: Tensor  # among `audio`: rows that may answer with the end of audio


@dataclass(frozen=True)
class Answers:
    """What the heads chose; rows that did not ask hold anything."""

    text: Tensor  # int64 [N]
    visual: Tensor  # int64 [N, L]
    audio: Tensor  # int64 [N, L]; level 0 equal to its size: end of audio


class State(Protocol):
    def heads(self) -> Heads: ...

    def advance(self: Self, answers: Answers) -> tuple[Self, Inputs, Tensor]:
        """The next state, the next position's inputs [N, 1], and which rows [N] it finishes."""
        ...

    def select(self: Self, rows: Tensor) -> Self:
        """The state of the given rows alone, int64 [N']."""
        ...


def position(
    ids: Vocabulary,
    text: Tensor,
    *,
    marker: Tensor | None = None,
    visual: Tensor | None = None,
    audio: Tensor | None = None,
) -> Inputs:
    """Inputs [N, 1] of one position: text and marker int64 [N], codes int64 [N, L]; what is not given is none."""

    def codes(given: Tensor | None, levels: int) -> Tensor:
        return text.new_full((text.shape[0], 1, levels), NONE) if given is None else given[:, None]

    return Inputs(
        text[:, None],
        torch.full_like(text, NONE)[:, None] if marker is None else marker[:, None],
        codes(visual, len(ids.visual_sizes)),
        codes(audio, len(ids.audio_sizes)),
        torch.zeros_like(text)[:, None],
    )


@dataclass(frozen=True)
class TextState:
    """Text until EOS or `limit` ids."""

    ids: Vocabulary
    size: int  # N
    limit: int
    step: int = 0  # ids written

    def heads(self) -> Heads:
        asks = torch.ones(self.size, dtype=torch.bool)
        return Heads(asks, ~asks, ~asks, ~asks)

    def advance(self, answers: Answers) -> tuple[TextState, Inputs, Tensor]:
        done = (answers.text == EOS) | (self.step + 1 >= self.limit)
        return replace(self, step=self.step + 1), position(self.ids, answers.text), done

    def select(self, rows: Tensor) -> TextState:
        return replace(self, size=rows.shape[0])


@dataclass(frozen=True)
class ImageState:
    """Cells in raster order; after a row's last cell a newline, after the last row's the end. All rows keep in step."""

    ids: Vocabulary
    size: int  # N
    height: int
    width: int
    step: int = 0  # positions written after the start of the image

    def heads(self) -> Heads:
        nobody, is_cell = torch.zeros(self.size, dtype=torch.bool), (self.step + 1) % (self.width + 1) != 0
        return Heads(nobody, torch.full_like(nobody, is_cell), nobody, nobody)

    def advance(self, answers: Answers) -> tuple[ImageState, Inputs, Tensor]:
        written, last = self.step + 1, self.height * (self.width + 1)
        if written % (self.width + 1):
            inputs = position(self.ids, torch.full((self.size,), NONE), visual=answers.visual)
        else:
            text = self.ids.image_end if written == last else self.ids.image_newline
            inputs = position(self.ids, torch.full((self.size,), text))
        return replace(self, step=written), inputs, torch.full((self.size,), written == last)

    def select(self, rows: Tensor) -> ImageState:
        return replace(self, size=rows.shape[0])


@dataclass(frozen=True)
class SpeechState:
    """A transcript and its frames after the start of speech, as `sequence.Layout.speak` lays them out.

    The transcript goes on until the text head says TE, the frames begin `delay` positions after the start or at TE and
    go on until the audio head says AE, which it may once the transcript has ended and a frame has come.
    """

    ids: Vocabulary
    delay: int | None  # None: serial
    max_text: int  # then the transcript ends
    max_frames: int  # then the audio ends
    transcript: Tensor | None  # int64 [N, T + 1] said as given, filled up with TE; None: the text head writes it
    text_ended: Tensor  # bool [N]
    started: Tensor  # bool [N]: AS has been fed
    frames: Tensor  # int64 [N]
    step: int = 0  # positions written after the start of speech

    @classmethod
    def start(
        cls,
        ids: Vocabulary,
        size: int,
        *,
        delay: int | None,
        max_text: int,
        max_frames: int,
        transcript: Tensor | None = None,
    ) -> SpeechState:
        zeros = torch.zeros(size, dtype=torch.int64)
        return cls(
            ids=ids,
            delay=delay,
            max_text=max_text,
            max_frames=max_frames,
            transcript=transcript,
            text_ended=zeros.bool(),
            started=zeros.bool(),
            frames=zeros,
        )

    def heads(self) -> Heads:
        asks_text = torch.zeros_like(self.text_ended) if self.transcript is not None else ~self.text_ended
        may_end = self.started & self.text_ended & (self.frames > 0)
        return Heads(asks_text, torch.zeros_like(self.started), self.started, may_end)

    def advance(self, answers: Answers) -> tuple[SpeechState, Inputs, Tensor]:
        written = self.step + 1
        said = answers.text if self.transcript is None else self._given(self.step)
        if written > self.max_text:
            said = torch.full_like(said, self.ids.audiotext_end)
        text_ended = self.text_ended | (said == self.ids.audiotext_end)
        text = said.masked_fill(text_ended, NONE)

        starts = ~self.started & (text_ended | (written == self.delay))
        marker = torch.where(starts, self.ids.audiotext_start, NONE)

        done = self.started & ((answers.audio[:, 0] == self.ids.audio_sizes[0]) | (self.frames >= self.max_frames))
        speaks = self.started & ~done
        audio = answers.audio.masked_fill(~speaks[:, None], NONE)
        text = text.masked_fill(done, self.ids.audiogen_end)

        state = replace(
            self,
            text_ended=text_ended,
            started=self.started | starts,
            frames=self.frames + speaks,
            step=written,
        )
        return state, position(self.ids, text, marker=marker, audio=audio), done

    def _given(self, index: int) -> Tensor:
        assert self.transcript is not None
        return self.transcript[:, min(index, self.transcript.shape[1] - 1)]

    def select(self, rows: Tensor) -> SpeechState:
        return replace(
            self,
            transcript=None if self.transcript is None else self.transcript[rows],
            text_ended=self.text_ended[rows],
            started=self.started[rows],
            frames=self.frames[rows],
        )
