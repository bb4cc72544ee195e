"""What rows write, as text, images and speech: told piece by piece while it comes, and whole at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longcat_model.generation.machine import Codes, Position
from longcat_model.vocabulary import EOS, Vocabulary

UNFINISHED = "�"  # what a tokenizer gives for the first bytes of a character


@dataclass(frozen=True)
class Event:
    """A piece of an answer: some text (of kind text or transcript), or the codes of a cell or a frame."""

    conversation: int  # number of the answer's conversation, from 0
    kind: str  # text, transcript, cell, frame
    text: str = ""
    codes: Codes = ()  # one a level


@dataclass(frozen=True)
class Painted:
    codes: Tensor  # int64 [height, width, L]
    image: Tensor  # float32 [3, height * cell, width * cell] in [0, 1]


@dataclass(frozen=True)
class Spoken:
    text: str
    codes: Tensor  # int64 [frames, L]
    waveform: Tensor  # float32 [samples]
    rate: int  # samples a second


@dataclass(frozen=True)
class Answer:
    """All that one conversation was answered, in order."""

    parts: tuple[str | Painted | Spoken, ...]
    ended: str  # "end", as the model said; "stop", at a stop string; "length", at a limit

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass
class TextStream:
    """Text of ids that come one by one: characters when they are whole, and nothing from a stop string on."""

    decode: Callable[[Iterable[int]], str]
    stops: Sequence[str] = ()
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)
    _whole: int = 0  # of the ids, those before the last place where every character was whole
    _taken: int = 0  # characters of all ids that were taken
    _held: str = ""  # taken but not given away: a stop string may begin here

    def push(self, token: int) -> str:
        """The text that is sure now that `token` has come."""
        self._ids.append(token)
        text = self.decode(self._ids)
        if text.endswith(UNFINISHED):
            return self._take(text[:-1])
        new = self._take(text)
        # The ids before stay one turn longer: many tokenizers drop the space that a text begins with.
        self._ids = self._ids[self._whole :]
        self._whole, self._taken = len(self._ids), len(self.decode(self._ids))
        return new

    def finish(self) -> str:
        """The rest."""
        rest = self._take(self.decode(self._ids))
        rest, self._held = rest + self._held, ""
        return rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text[self._taken :]
        self._taken = len(text)
        found = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            _, at = min(found)  # the one complete first, however the text came
            sure, self._held = self._held[:at], ""
        else:
            at = len(self._held) - self._beginning_of_stop()
            sure, self._held = self._held[:at], self._held[at:]
        return sure

    def _beginning_of_stop(self) -> int:
        """Characters at the end that a stop string begins with, as many as possible."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stops)), 0)


@dataclass
class Listener:
    """Follows one row: `observe` every position, then `finish`; `parts` then holds text, codes of images, and
    transcripts with codes of speech."""

    conversation: int
    ids: Vocabulary
    decode: Callable[[Iterable[int]], str]
    stops: Sequence[str]
    tell: Callable[[Event], None]
    parts: list[str | Tensor | tuple[str, Tensor]] = field(default_factory=list)
    _mode: str | None = None
    _stream: TextStream = field(init=False)
    _text: str = ""
    _codes: list[Codes] = field(default_factory=list)
    stopped: bool = False

    def observe(self, mode: str, position: Position) -> bool:
        """Returns whether a stop string has come."""
        if self._mode is None:
            self._mode = mode
            self._stream = TextStream(self.decode, self.stops if mode == "text" else ())
        elif mode != self._mode:
            self.finish()
            return self.observe(mode, position)
        if position.visual or position.audio:
            self._codes.append(position.visual or position.audio)
            self.tell(Event(self.conversation, "cell" if position.visual else "frame", codes=self._codes[-1]))
        if 0 <= position.text < self.ids.text_size and position.text != EOS and mode != "image":
            self._say(self._stream.push(position.text))
        if position.text in (self.ids.image_end, self.ids.audiogen_end):
            self.finish()
        return self.stopped

    def finish(self) -> None:
        """Closes what is being written."""
        if self._mode is None:
            return
        self._say(self._stream.finish())
        codes = torch.tensor(self._codes, dtype=torch.int64)
        if self._mode == "image":
            self.parts.append(codes)
        elif self._mode == "speech":
            self.parts.append((self._text, codes))
        elif self._text:
            self.parts.append(self._text)
        self._mode, self._text, self._codes = None, "", []

    def _say(self, text: str) -> None:
        self._text += text
        self.stopped |= self._stream.stopped
        if text:
            self.tell(Event(self.conversation, "text" if self._mode == "text" else "transcript", text=text))
