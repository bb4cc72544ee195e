"""Conversations as positions: what training learns and generation continues has one layout, made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longcat_model import config
from longcat_model.messages import Audio, Image, Part, Speech, StartImage, StartSpeech, Text, Turn
from longcat_model.sequence import Document, Layout
from longcat_model.vocabulary import BOS, EOS


def pieces(
    parts: Sequence[Part],
    layout: Layout,
    codes: Callable[[Image | Audio | Speech], Tensor],
    delay: Callable[[int, int], int | None],
    *,
    roles: bool = True,
) -> Iterator[Document]:
    """BOS, then every message after the marker of its role; an assistant's message that another follows ends with EOS.

    What the assistant says, paints and speaks is learnt, the ends of its messages too. The start of an image or of
    speech that is still to come gives nothing.

    Args:
        codes: of an image, int64 [H, W, L]; of sound, [n, L].
        delay: of speech, by the number of ids of its transcript and of its frames: see `Layout.speak`.
        roles: write role markers.
    """
    yield layout.text([BOS])
    role = None
    for part in parts:
        if isinstance(part, Turn):
            if role == "assistant":
                yield layout.text([EOS], loss=True)
            role = part.role
            if roles:
                yield layout.text(layout.encode(part.marker))
        elif not isinstance(part, StartImage | StartSpeech):
            yield _content(part, layout, codes, delay)


def blank(media: Tensor, sizes: config.Model) -> Tensor:
    """Codes of 0 of the shape that the codes of an image [3, H, W] or of a waveform [samples] will have."""
    if media.ndim == 3:
        height, width = (side // sizes.vision.cell for side in media.shape[1:])
        return torch.zeros(height, width, len(sizes.vocabulary.visual_sizes), dtype=torch.int64)
    frames = -(-len(media) // sizes.audio.samples_per_position)  # a last one that is not filled counts
    return torch.zeros(frames, len(sizes.vocabulary.audio_sizes), dtype=torch.int64)


def _content(
    part: Text | Image | Audio | Speech,
    layout: Layout,
    codes: Callable[[Image | Audio | Speech], Tensor],
    delay: Callable[[int, int], int | None],
) -> Document:
    is_learnt = part.role == "assistant"
    if isinstance(part, Text):
        return layout.text(layout.encode(part.text), loss=is_learnt)
    if isinstance(part, Image):
        return layout.generate_image(codes(part)) if is_learnt else layout.understand_image(codes(part))
    if isinstance(part, Audio):
        return layout.hear(codes(part), loss=is_learnt)
    ids, codes_NL = layout.encode(part.transcript), codes(part)
    return layout.speak(ids, codes_NL, delay=delay(len(ids), len(codes_NL)))
