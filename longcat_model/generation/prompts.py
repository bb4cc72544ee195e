"""Conversations as prompts, and the codes of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from longcat_model.conversation import pieces
from longcat_model.files import read_image, read_speech
from longcat_model.messages import Audio, Image, Part, Speech, Turn, numbered
from longcat_model.sequence import Document, Layout, join
from longcat_model.system import System

Files = Mapping[Path, Tensor]  # by path: an image [3, H, W], a waveform [samples], or the codes of either


def read_files(parts: Sequence[Part], system: System) -> dict[Path, Tensor]:
    """Images and waveforms of a conversation.

    Raises:
        ValueError: a file is no image or no sound, or serves as both; the message names the message's number.
    """
    found: dict[Path, Tensor] = {}
    for number, part in numbered(parts):
        if not isinstance(part, Image | Audio | Speech):
            continue
        is_image = isinstance(part, Image)
        try:
            if part.path not in found:
                rate = system.sizes.audio.encoder.sample_rate
                cell = system.vision.sizes.cell
                found[part.path] = (
                    read_image(part.path, cell, pixels=system.pixels) if is_image else read_speech(part.path, rate)
                )
            elif is_image != (found[part.path].ndim == 3):
                raise ValueError(f"a file must be an image or sound, got both of {part.path}")
        except ValueError as error:
            raise ValueError(f"messages: message {number}: {error}") from error
    return found


def encode(media: Tensor, system: System) -> Tensor:
    """Codes of one image or waveform, whatever else there is to encode."""
    return (system.vision if media.ndim == 3 else system.audio).encode([media])[0]


def context(parts: Sequence[Part], codes: Files, layout: Layout, *, roles: bool, mode: str) -> Document:
    """Everything that an answer follows, without the start of an image or of speech.

    A message of the assistant at the end is gone on with; those before it have ended, with EOS. Labels are not read.

    Args:
        codes: of every file.
        roles: write role markers.
        mode: how speech in assistants' messages was spoken, serial or parallel.
    """
    delay = 1 if mode == "parallel" else None
    found = list(pieces(parts, layout, lambda part: codes[part.path], lambda ids, frames: delay, roles=roles))
    last = [part.role for part in parts if isinstance(part, Turn)][-1]
    if roles and last != "assistant":
        found.append(layout.text(layout.encode(Turn("assistant").marker)))
    return join(*found)
