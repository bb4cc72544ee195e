"""Documents of mixed modalities as rows of positions: what the model reads and what it must predict.

A position holds one content: a text id, an image cell, or a moment of speech (a transcript id and a code frame at
once). A `Document` keeps beside the contents a label per position: what the position BEFORE it must predict. The
next-position shift therefore happens in one place (`Document.targets`), and joining documents is concatenation.
Layouts follow the LongCat-Next report (2.5.1, 2.5.3) and its released code; the builders' docstrings show them as
tables, in which `.` is an empty field.

Dimension key
    B rows    S positions of a row    T positions of a document    N positions of all documents
    L quantizer levels    H, W cells of an image
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_model.vocabulary import BOS, EOS, Vocabulary

NONE = -1  # a field that a position does not have
IGNORE = -100  # a label without loss
NULL = 0  # the text id that stands for a dropped condition


@dataclass(frozen=True)
class Inputs:
    """What the model reads: B rows of S positions, or one document of T positions (then without B). All int64."""

    text: Tensor  # [B, S] id whose (n-gram) text embedding is used; -1: none
    marker: Tensor  # [B, S] special id whose plain embedding row is added; -1: none
    visual: Tensor  # [B, S, L] local codes of an image cell, whose embedding replaces the text's; -1: none
    audio: Tensor  # [B, S, L] local codes of a frame, whose embedding is added to the text's; -1: none
    documents: Tensor  # [B, S] number of the document in its row; -1: padding

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same function of every field."""
        return Inputs(*map(function, _tensors(self)))

    def to(self, device: torch.device | str) -> Inputs:
        return self.map(lambda field: field.to(device))


@dataclass(frozen=True)
class Targets:
    """What each position must predict, int64; -100: no loss.

    A visual row whose labels equal each level's size means end of image. An audio level-0 label that equals its size
    means end of audio; the other levels of that frame have no loss.
    """

    text: Tensor  # [B, S]
    visual: Tensor  # [B, S, L]
    audio: Tensor  # [B, S, L]

    def to(self, device: torch.device | str) -> Targets:
        return Targets(*(field.to(device) for field in _tensors(self)))


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents."""

    inputs: Inputs
    targets: Targets

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Document:
    """T positions and their labels; `labels` of position t is what position t - 1 must predict."""

    inputs: Inputs  # without the row dimension
    labels: Targets  # likewise; aligned with the content it names, not with the position that predicts it

    def __len__(self) -> int:
        return self.inputs.text.shape[0]

    @property
    def targets(self) -> Targets:
        """Labels moved to the positions that predict them; the last position predicts nothing."""
        return Targets(*(torch.cat([x[1:], torch.full_like(x[:1], IGNORE)]) for x in _tensors(self.labels)))


@dataclass(frozen=True)
class Layout:
    """Builds documents for one vocabulary.

    Pieces are documents too: `layout.document(layout.text(prompt), layout.generate_image(codes))`.

    Args:
        ids: the vocabulary.
        encode: the text tokenizer's `encode`, which writes an image's size.
    """

    ids: Vocabulary
    encode: Callable[[str], Sequence[int]]

    def text(self, ids: Sequence[int] | Tensor, *, loss: bool = False) -> Document:
        """Text or special ids, read and (with `loss`) predicted.

        Raises:
            ValueError: an id outside [0, text_rows).
        """
        text_T = torch.as_tensor(ids, dtype=torch.int64).reshape(-1)
        if text_T.numel() and not 0 <= int(text_T.min()) <= int(text_T.max()) < self.ids.text_rows:
            raise ValueError(f"sequence: text ids must be in [0, {self.ids.text_rows}), got {text_T.tolist()}")
        document = self._empty(text_T.shape[0])
        document.inputs.text.copy_(text_T)
        if loss:
            document.labels.text.copy_(text_T)
        return document

    def document(self, *pieces: Document) -> Document:
        """Pieces between the begin and the end of a text; the end is predicted (with loss), the begin is not."""
        return join(self.text([BOS]), *pieces, self.text([EOS], loss=True))

    def understand_image(self, codes: Tensor) -> Document:
        """An image to be read: start, H * W cells, end. No size, no newlines, no loss.

        Args:
            codes: [H, W, L] int64.
        """
        codes_NL = self._checked("visual codes", codes, 3, self.ids.visual_sizes).flatten(0, 1)
        document = self._between(self.ids.image_start, codes_NL.shape[0], self.ids.image_end)
        document.inputs.visual[1:-1] = codes_NL
        return document

    def image_prefix(self, height: int, width: int) -> Document:
        """What stands before the first cell of an image to be painted: `<size> "H W" </size> <start>`, without loss."""
        size = self.encode(f"{height} {width}")
        return self.text([self.ids.image_size_start, *size, self.ids.image_size_end, self.ids.image_start])

    def generate_image(self, codes: Tensor) -> Document:
        """An image to be painted. H = 2, W = 2, cells a b / c d, end-of-image class e:

            position                0..    k      k+1  k+2  k+3      k+4  k+5  k+6
            text                    size   start  .    .    newline  .    .    end
            visual                  .      .      a    b    .        c    d    .
            target (visual head)    .      a      b    .    c        d    e    (what follows)

        Newlines and the end are forced by counting in generation; only the end is a target (report 2.5.2 and the
        released fine-tuning code: label C_l at every level).

        Args:
            codes: [H, W, L] int64.
        """
        codes_HWL = self._checked("visual codes", codes, 3, self.ids.visual_sizes)
        height, width, _ = codes_HWL.shape
        prefix, body = self.image_prefix(height, width), self._empty(height * (width + 1))
        body.inputs.visual.copy_(F.pad(codes_HWL, (0, 0, 0, 1), value=NONE).flatten(0, 1))
        body.inputs.text[width :: width + 1] = self.ids.image_newline
        body.inputs.text[-1] = self.ids.image_end
        body.labels.visual.copy_(body.inputs.visual.masked_fill(body.inputs.visual == NONE, IGNORE))
        body.labels.visual[-1] = torch.tensor(self.ids.visual_sizes)
        return join(prefix, body)

    def hear(self, codes: Tensor, *, loss: bool = False) -> Document:
        """Pure audio: start, n frames, end. No loss on audio that is listened to (report 3.2.4).

        Args:
            codes: [n, L] int64.
            loss: predict frames and their end, as in the report's small share of pure-audio data.
        """
        codes_NL = self._checked("audio codes", codes, 2, self.ids.audio_sizes)
        document = self._between(self.ids.audio_start, codes_NL.shape[0], self.ids.audio_end)
        document.inputs.audio[1:-1] = codes_NL
        if loss:
            document.labels.audio[1:-1] = codes_NL
            document.labels.audio[-1, 0] = self.ids.audio_sizes[0]
        return document

    def speak(self, transcript: Sequence[int] | Tensor, codes: Tensor, *, delay: int | None = None) -> Document:
        """Text-guided speech: a transcript and its audio in two streams over the same positions.

        Transcript 1 2 3, frames a b, serial (`delay` None) and with delay 2. G, g are audiogen start and end, AS the
        marker that calls for the first frame, TE and AE the ends of text and audio:

            serial  text           G   1   2   3   .   .   .   g      delay 2   G   1   2   3   .   g
                    marker         .   .   .   .   AS  .   .   .                .   .   AS  .   .   .
                    audio          .   .   .   .   .   a   b   .                .   .   .   a   b   .
                    text target    1   2   3   TE  .   .   .   .                1   2   3   TE  .   .
                    audio target   .   .   .   .   a   b   AE  .                .   .   a   b   AE  .

        AS stands at position `delay` after G or right after the transcript, whichever comes first: 1 is the report's
        parallel mode, more than the transcript's length (or None) its serial mode, which waits for TE. TE and the
        positions after it have no text embedding, like the released code's pads.

        Args:
            transcript: text ids.
            codes: [n, L] int64, n >= 1.
            delay: at least 1.

        Raises:
            ValueError: the transcript does not end before the audio does, or an argument is out of range.
        """
        codes_NL = self._checked("audio codes", codes, 2, self.ids.audio_sizes)
        length, frames = len(transcript), codes_NL.shape[0]
        if delay is not None and delay < 1:
            raise ValueError(f"sequence: delay must be at least 1 or None, got {delay}")
        start = length + 1 if delay is None else min(delay, length + 1)
        if length + 1 > start + frames:
            raise ValueError(
                f"sequence: transcript must be at most {start + frames - 1} ids long for {frames} frames at delay "
                f"{delay}, got {length} (a larger delay leaves more room)"
            )
        document = self._between(self.ids.audiogen_start, start + frames, self.ids.audiogen_end)
        document.inputs.text[1 : length + 1] = document.labels.text[1 : length + 1] = self._transcript(transcript)
        document.labels.text[length + 1] = self.ids.audiotext_end
        document.inputs.marker[start] = self.ids.audiotext_start
        document.inputs.audio[start + 1 : -1] = document.labels.audio[start + 1 : -1] = codes_NL
        document.labels.audio[-1, 0] = self.ids.audio_sizes[0]
        return document

    def _transcript(self, transcript: Sequence[int] | Tensor) -> Tensor:
        text_T = torch.as_tensor(transcript, dtype=torch.int64)
        if text_T.numel() and not 0 <= int(text_T.min()) <= int(text_T.max()) < self.ids.text_size:
            raise ValueError(f"sequence: transcript must hold ids in [0, {self.ids.text_size}), got {text_T.tolist()}")
        return text_T

    def _empty(self, length: int) -> Document:
        def full(value: int, *levels: int) -> Tensor:
            return torch.full((length, *levels), value, dtype=torch.int64)

        visual, audio = len(self.ids.visual_sizes), len(self.ids.audio_sizes)
        inputs = Inputs(full(NONE), full(NONE), full(NONE, visual), full(NONE, audio), full(0))
        return Document(inputs, Targets(full(IGNORE), full(IGNORE, visual), full(IGNORE, audio)))

    def _between(self, first: int, length: int, last: int) -> Document:
        document = self._empty(length + 2)
        document.inputs.text[0], document.inputs.text[-1] = first, last
        return document

    def _checked(self, name: str, codes: Tensor, dims: int, sizes: tuple[int, ...]) -> Tensor:
        if codes.dim() != dims or codes.shape[-1] != len(sizes) or codes.numel() == 0:
            shape = f"[{'height, width' if dims == 3 else 'frames'}, {len(sizes)}]"
            raise ValueError(f"sequence: {name} must be {shape} and not empty, got {list(codes.shape)}")
        codes = codes.to(device="cpu", dtype=torch.int64)
        if bool(((codes < 0) | (codes >= torch.tensor(sizes))).any()):
            found = [f"{int(level.min())}..{int(level.max())}" for level in codes.flatten(0, -2).unbind(-1)]
            raise ValueError(f"sequence: {name} must be in [0, size) for level sizes {sizes}, got {found}")
        return codes


def join(*documents: Document) -> Document:
    """One document after another, as parts of the same document."""
    inputs = Inputs(*map(torch.cat, zip(*(_tensors(d.inputs) for d in documents), strict=True)))
    return Document(inputs, Targets(*map(torch.cat, zip(*(_tensors(d.labels) for d in documents), strict=True))))


def drop_condition(prompt: Document) -> Document:
    """The unconditional form of a prompt: as long, every position the null text id 0, nothing to predict.

    Classifier-free guidance compares with this form, and training on it now and then (report 1.2; the rate is not
    published) makes it meaningful. The size prefix and all after it stay: drop the condition before joining them.
    """
    inputs = Inputs(*(torch.full_like(x, NONE) for x in _tensors(prompt.inputs)))
    inputs.text.fill_(NULL)
    inputs.documents.fill_(0)
    return Document(inputs, Targets(*(torch.full_like(x, IGNORE) for x in _tensors(prompt.labels))))


def draw_delay(transcript: int, frames: int, *, generator: torch.Generator, parallel: float = 0.5) -> int:
    """A training delay for `Layout.speak`: parallel (1) with probability `parallel`, else uniform up to serial.

    The distribution is the released data builder's (0.5; then 1..transcript in its count, which starts at 0). A
    transcript too long for so few frames gets the smallest delay that fits where it would get a smaller one.
    """
    least = max(1, transcript + 1 - frames)
    if float(torch.rand((), generator=generator)) < parallel or transcript == 0:
        return least
    return max(least, int(torch.randint(2, transcript + 2, (), generator=generator)))


def pack(documents: Sequence[Document], length: int) -> Batch:
    """First-fit packing: each document goes into the first row that has room, in the given order.

    Args:
        length: positions of a row.

    Returns:
        as many rows as needed; see `pack_rows`.

    Raises:
        ValueError: no documents, or one longer than a row.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        row = next((r for r, left in enumerate(room) if len(document) <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(document)
        room[row] -= len(document)
    return pack_rows(rows, length)


def pack_rows(rows: Sequence[Sequence[Document]], length: int) -> Batch:
    """The documents of each row, one after another.

    Args:
        length: positions of a row; what documents leave over is padding (document -1, no input, no loss).

    Returns:
        one row each; `inputs.documents` numbers the documents of a row from 0.

    Raises:
        ValueError: no documents, or those of a row are longer than it.
    """
    documents = [document for row in rows for document in row]
    if not documents:
        raise ValueError("sequence: documents must not be empty, got 0")
    places, numbers = [], []
    for row, members in enumerate(rows):
        used = 0
        for number, document in enumerate(members):
            places.append(row * length + used + torch.arange(len(document)))
            numbers.append(torch.full((len(document),), number))
            used += len(document)
        if used > length:
            raise ValueError(f"sequence: document must fit a row of {length} positions, got {used}")
    place_N = torch.cat(places)

    def spread(parts: Sequence[Tensor], fill: int) -> Tensor:
        flat = parts[0].new_full((len(rows) * length, *parts[0].shape[1:]), fill)
        flat.index_copy_(0, place_N, torch.cat(list(parts)))
        return flat.view(len(rows), length, *flat.shape[1:])

    text, marker, visual, audio, _ = zip(*(_tensors(d.inputs) for d in documents), strict=True)
    targets = zip(*(_tensors(d.targets) for d in documents), strict=True)
    return Batch(
        Inputs(*(spread(x, NONE) for x in (text, marker, visual, audio, numbers))),
        Targets(*(spread(x, IGNORE) for x in targets)),
    )


def _tensors(of: Inputs | Targets) -> tuple[Tensor, ...]:
    return tuple(getattr(of, field.name) for field in fields(of))
