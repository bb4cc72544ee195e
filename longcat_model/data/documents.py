"""A JSON value as a document: a list of parts, or a conversation in the official message format.

Parts, in order: {"text": "...", "loss": true}, {"image": "file.png"}, {"paint": "file.png"}, {"hear": "file.wav"},
{"say": "file.wav", "transcript": "..."}.

A conversation, {"messages": [...]}, is `longcat_model.messages`'s, laid out as `longcat_model.conversation` says; it
ends with EOS, which is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_model import config, messages
from longcat_model.conversation import blank, pieces
from longcat_model.files import read_image, read_speech
from longcat_model.sequence import Document, Layout, draw_delay, join
from longcat_model.system import Tokenizers
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import EOS, Vocabulary


@dataclass(frozen=True)
class Reader:
    """Builds documents of at most `longest` positions."""

    sizes: config.Model
    text: ByteTokenizer
    see: Callable[[Tensor], Tensor]  # image [3, H, W] -> codes [h, w, L]
    listen: Callable[[Tensor], Tensor]  # waveform [samples] -> codes [n, L]
    longest: int
    tell: Callable[[Path], None] = lambda path: None  # called with every file that was read

    @classmethod
    def of(cls, tokenizers: Tokenizers, longest: int) -> Reader:
        def see(image: Tensor) -> Tensor:
            return tokenizers.vision.encode([image])[0]

        def listen(waveform: Tensor) -> Tensor:
            return tokenizers.audio.encode([waveform])[0]

        return cls(tokenizers.sizes, tokenizers.text, see, listen, longest)

    @classmethod
    def blind(cls, sizes: config.Model, longest: int, tell: Callable[[Path], None] = lambda path: None) -> Reader:
        """Reads every file and gives documents of the right lengths, with all codes 0: finds what is wrong, fast."""
        codes = partial(blank, sizes=sizes)
        return cls(sizes, ByteTokenizer(), codes, codes, longest, tell)

    @property
    def layout(self) -> Layout:
        return Layout(Vocabulary.of(self.sizes.vocabulary), self.text.encode)

    def document(self, value: Any, directory: Path, generator: torch.Generator) -> Document:
        """The document that a JSON value means.

        Args:
            directory: what relative paths start from.
            generator: draws how far speech lags behind its transcript.

        Raises:
            ValueError: it means none, a file cannot be read, or it is too long.
        """
        if isinstance(value, dict):
            if value.keys() != {"messages"} or not isinstance(value["messages"], list):
                raise ValueError(f"a document must be a list of parts or a list of messages alone, got {value!r:.80}")
            document = self._conversation(messages.parse(value["messages"], directory), generator)
        elif isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            document = self.layout.document(*(self._part(part, directory, generator) for part in value))
        else:
            raise ValueError(f"a document must be a list of parts or have messages, got {value!r:.80}")
        self._fits("document", len(document))
        return document

    def _conversation(self, parts: Sequence[messages.Part], generator: torch.Generator) -> Document:
        if any(isinstance(part, messages.StartImage | messages.StartSpeech) for part in parts):
            raise ValueError("messages: an answer to be learnt must be there, got only its start")

        def codes(part: messages.Image | messages.Audio | messages.Speech) -> Tensor:
            return self._cells(part.path) if isinstance(part, messages.Image) else self._frames(part.path)

        def delay(ids: int, frames: int) -> int:
            return draw_delay(ids, frames, generator=generator)

        return join(*pieces(parts, self.layout, codes, delay), self.layout.text([EOS], loss=True))

    def _part(self, part: dict[str, Any], directory: Path, generator: torch.Generator) -> Document:
        kind = next((name for name in ("text", "image", "paint", "hear", "say") if name in part), None)
        allowed = {"text": {"text", "loss"}, "say": {"say", "transcript"}}.get(kind or "", {kind})
        if kind is None or not isinstance(part[kind], str) or part.keys() - allowed:
            raise ValueError(f"a part must be one of text, image, paint, hear, say (see --help), got {part!r:.80}")
        if kind == "text":
            return self.layout.text(self.text.encode(part["text"]), loss=bool(part.get("loss", False)))
        file = directory / part[kind]
        if kind == "image":
            return self.layout.understand_image(self._cells(file))
        if kind == "paint":
            return self.layout.generate_image(self._cells(file))
        if kind == "hear":
            return self.layout.hear(self._frames(file))
        if not isinstance(part.get("transcript"), str):
            raise ValueError(f"say needs a transcript, got {part!r:.80}")
        ids, codes = self.text.encode(part["transcript"]), self._frames(file)
        return self.layout.speak(ids, codes, delay=draw_delay(len(ids), len(codes), generator=generator))

    def _cells(self, file: Path) -> Tensor:
        image = read_image(file, self.sizes.vision.cell)
        self.tell(file)
        self._fits("image", len(blank(image, self.sizes).flatten(0, 1)))  # a photo would take minutes to encode
        return self.see(image)

    def _frames(self, file: Path) -> Tensor:
        waveform = read_speech(file, self.sizes.audio.encoder.sample_rate)
        self.tell(file)
        self._fits("speech", len(blank(waveform, self.sizes)))
        return self.listen(waveform)

    def _fits(self, what: str, positions: int) -> None:
        if positions > self.longest:
            raise ValueError(
                f"{what} must be at most {self.longest} positions long, got {positions}; split it, or raise the limit "
                "(tokenize --longest, train --row-length)"
            )
