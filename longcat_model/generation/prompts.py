"""Conversations as prompts: files as codes, parts as positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longcat_model.files import read_image, read_speech
from longcat_model.messages import Audio, Image, Part, Speech, StartImage, StartSpeech, Text, Turn
from longcat_model.sequence import Document, Layout, join
from longcat_model.system import System
from longcat_model.vocabulary import BOS, EOS

Files = Mapping[Path, Tensor]  # by path: an image [3, H, W], a waveform [samples], or the codes of either


def read_files(parts: Sequence[Part], system: System) -> dict[Path, Tensor]:
    """Images and waveforms of a conversation.

    Raises:
        ValueError: a file is no image or no sound, or serves as both.
    """
    found: dict[Path, Tensor] = {}
    for part in parts:
        if not isinstance(part, Image | Audio | Speech):
            continue
        is_image = isinstance(part, Image)
        if part.path not in found:
            rate = system.sizes.audio.encoder.sample_rate
            found[part.path] = (
                read_image(part.path, system.vision.sizes.cell) if is_image else read_speech(part.path, rate)
            )
        elif is_image != (found[part.path].ndim == 3):
            raise ValueError(f"messages: a file must be an image or sound, got both of {part.path}")
    return found


def blank(media: Tensor, system: System) -> Tensor:
    """Codes of 0 of the shape that the medium's codes will have."""
    if media.ndim == 3:
        height, width = (side // system.vision.sizes.cell for side in media.shape[1:])
        return torch.zeros(height, width, len(system.model.ids.visual_sizes), dtype=torch.int64)
    frames = -(-len(media) // system.audio.samples_per_position)
    return torch.zeros(frames, len(system.model.ids.audio_sizes), dtype=torch.int64)


def encode(media: Tensor, system: System) -> Tensor:
    """Codes of one image or waveform, whatever else there is to encode."""
    return (system.vision if media.ndim == 3 else system.audio).encode([media])[0]


def context(parts: Sequence[Part], codes: Files, layout: Layout, *, roles: bool, mode: str) -> Document:
    """Everything that an answer follows, without the start of an image or of speech.

    A message of the assistant at the end is gone on with; those before it have ended, with EOS.

    Args:
        codes: of every file.
        roles: write role markers.
        mode: how speech in assistants' messages was spoken, serial or parallel.
    """
    return join(layout.text([BOS]), *_pieces(parts, codes, layout, roles, 1 if mode == "parallel" else None))


def _pieces(parts: Sequence[Part], codes: Files, layout: Layout, roles: bool, delay: int | None) -> Iterator[Document]:
    role = None
    for part in parts:
        if isinstance(part, Turn):
            if role == "assistant":
                yield layout.text([EOS])
            role = part.role
            if roles:
                yield _written(part.marker, layout)
        elif not isinstance(part, StartImage | StartSpeech):
            yield _piece(part, codes, layout, delay)
    if role != "assistant" and roles:
        yield _written(Turn("assistant").marker, layout)


def _piece(part: Text | Image | Audio | Speech, codes: Files, layout: Layout, delay: int | None) -> Document:
    """What the assistant painted or spoke stands as it was generated, other media as they are read."""
    if isinstance(part, Text):
        return _written(part.text, layout)
    if isinstance(part, Speech):
        return layout.speak(layout.encode(part.transcript), codes[part.path], delay=delay)
    if isinstance(part, Audio):
        return layout.hear(codes[part.path])
    show: Callable[[Tensor], Document] = layout.generate_image if part.role == "assistant" else layout.understand_image
    return show(codes[part.path])


def _written(text: str, layout: Layout) -> Document:
    return layout.text(layout.encode(text))
