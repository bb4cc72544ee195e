"""A JSON value as a document: a list of parts, or a conversation in the official message format.

Parts, in order: {"text": "...", "loss": true}, {"image": "file.png"}, {"paint": "file.png"}, {"hear": "file.wav"},
{"say": "file.wav", "transcript": "..."}.

A conversation, {"messages": [...]}, is `longcat_model.messages`'s: every message after the marker of its role, what the
assistant says, paints and speaks is learnt, and its messages and the whole end with EOS, which is learnt too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_model import config, messages
from longcat_model.files import read_image, read_speech
from longcat_model.sequence import Document, Layout, draw_delay, join
from longcat_model.system import Tokenizers
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import BOS, EOS, Vocabulary


@dataclass(frozen=True)
class Reader:
    """Builds documents of at most `longest` positions."""

    sizes: config.Model
    text: ByteTokenizer
    see: Callable[[Tensor], Tensor]  # image [3, H, W] -> codes [h, w, L]
    listen: Callable[[Tensor], Tensor]  # waveform [samples] -> codes [n, L]
    longest: int

    @classmethod
    def of(cls, tokenizers: Tokenizers, longest: int) -> Reader:
        def see(image: Tensor) -> Tensor:
            return tokenizers.vision.encode([image])[0]

        def listen(waveform: Tensor) -> Tensor:
            return tokenizers.audio.encode([waveform])[0]

        return cls(tokenizers.sizes, tokenizers.text, see, listen, longest)

    @classmethod
    def blind(cls, sizes: config.Model, longest: int) -> Reader:
        """Reads every file and gives documents of the right lengths, with all codes 0: finds what is wrong, fast."""

        def see(image: Tensor) -> Tensor:
            height, width = (side // sizes.vision.cell for side in image.shape[1:])
            return torch.zeros(height, width, len(sizes.vocabulary.visual_sizes), dtype=torch.int64)

        def listen(waveform: Tensor) -> Tensor:
            return torch.zeros(_frames(waveform, sizes.audio), len(sizes.vocabulary.audio_sizes), dtype=torch.int64)

        return cls(sizes, ByteTokenizer(), see, listen, longest)

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
            document = join(*self._conversation(messages.parse(value["messages"], directory), generator))
        elif isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            document = self.layout.document(*(self._part(part, directory, generator) for part in value))
        else:
            raise ValueError(f"a document must be a list of parts or have messages, got {value!r:.80}")
        self._fits("document", len(document))
        return document

    def _conversation(self, parts: tuple[messages.Part, ...], generator: torch.Generator) -> Iterator[Document]:
        yield self.layout.text([BOS])
        role = None
        for part in parts:
            if isinstance(part, messages.Turn):
                if role == "assistant":
                    yield self.layout.text([EOS], loss=True)
                role = part.role
                yield self._text(part.marker)
            else:
                yield self._said(part, generator)
        yield self.layout.text([EOS], loss=True)

    def _said(self, part: messages.Part, generator: torch.Generator) -> Document:
        if isinstance(part, messages.StartImage | messages.StartSpeech | messages.Turn):
            raise ValueError("messages: an answer to be learnt must be there, got only its start")
        learnt = part.role == "assistant"
        if isinstance(part, messages.Text):
            return self._text(part.text, loss=learnt)
        if isinstance(part, messages.Image):
            return self._image(part.path, paint=learnt)
        if isinstance(part, messages.Audio):
            return self.layout.hear(self._codes(part.path), loss=learnt)
        return self._speech(part.path, part.transcript, generator)

    def _part(self, part: dict[str, Any], directory: Path, generator: torch.Generator) -> Document:
        kind = next((name for name in ("text", "image", "paint", "hear", "say") if name in part), None)
        allowed = {"text": {"text", "loss"}, "say": {"say", "transcript"}}.get(kind or "", {kind})
        if kind is None or not isinstance(part[kind], str) or part.keys() - allowed:
            raise ValueError(f"a part must be one of text, image, paint, hear, say (see --help), got {part!r:.80}")
        if kind == "text":
            return self._text(part["text"], loss=bool(part.get("loss", False)))
        file = directory / part[kind]
        if kind in ("image", "paint"):
            return self._image(file, paint=kind == "paint")
        if kind == "hear":
            return self.layout.hear(self._codes(file))
        if not isinstance(part.get("transcript"), str):
            raise ValueError(f"say needs a transcript, got {part!r:.80}")
        return self._speech(file, part["transcript"], generator)

    def _text(self, text: str, *, loss: bool = False) -> Document:
        return self.layout.text(self.text.encode(text), loss=loss)

    def _image(self, file: Path, *, paint: bool) -> Document:
        cell = self.sizes.vision.cell
        image = read_image(file, cell)
        self._fits("image", image.shape[1] // cell * (image.shape[2] // cell))  # a photo would take minutes to encode
        codes = self.see(image)
        return self.layout.generate_image(codes) if paint else self.layout.understand_image(codes)

    def _speech(self, file: Path, transcript: str, generator: torch.Generator) -> Document:
        ids, codes = self.text.encode(transcript), self._codes(file)
        return self.layout.speak(ids, codes, delay=draw_delay(len(ids), len(codes), generator=generator))

    def _codes(self, file: Path) -> Tensor:
        waveform = read_speech(file, self.sizes.audio.encoder.sample_rate)
        self._fits("speech", _frames(waveform, self.sizes.audio))
        return self.listen(waveform)

    def _fits(self, what: str, positions: int) -> None:
        if positions > self.longest:
            raise ValueError(
                f"{what} must be at most {self.longest} positions long, got {positions}; split it, or raise the limit "
                "(tokenize --longest, train --row-length)"
            )


def _frames(waveform: Tensor, sizes: config.AudioTokenizer) -> int:
    """Positions of a clip; a last part that does not fill one counts."""
    return -(-len(waveform) // (sizes.encoder.hop * 2 * sizes.pool))
