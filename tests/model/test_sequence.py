"""Documents against layouts written out by hand, and packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_model import presets
from longcat_model.sequence import (
    IGNORE,
    NONE,
    Batch,
    Document,
    Layout,
    draw_delay,
    drop_condition,
    join,
    pack,
)
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import BOS, EOS, Vocabulary

IDS = Vocabulary.of(presets.tiny().vocabulary)  # levels: visual 8 8 8, audio 8 6 4 4
LAYOUT = Layout(IDS, ByteTokenizer().encode)
G, GE, TE, AS = IDS.audiogen_start, IDS.audiogen_end, IDS.audiotext_end, IDS.audiotext_start
FRAMES = torch.tensor([[1, 2, 3, 0], [7, 5, 3, 3]])
CELLS = torch.tensor([[[0, 1, 2], [3, 4, 5]], [[6, 7, 0], [1, 1, 1]]])
A, B = FRAMES.tolist()
NO_FRAME, NO_FRAME_LOSS, AUDIO_END = [NONE] * 4, [IGNORE] * 4, [8, IGNORE, IGNORE, IGNORE]
NO_CELL, NO_CELL_LOSS, IMAGE_END = [NONE] * 3, [IGNORE] * 3, [8, 8, 8]


def test_text_is_predicted_one_position_early_and_only_with_loss() -> None:
    document = LAYOUT.document(LAYOUT.text([10, 11]), LAYOUT.text([12, 13], loss=True))
    assert document.inputs.text.tolist() == [BOS, 10, 11, 12, 13, EOS]
    assert document.targets.text.tolist() == [IGNORE, IGNORE, 12, 13, EOS, IGNORE]
    assert_silent(document, ("visual", "audio"))


def test_an_image_to_understand_has_no_size_no_newlines_and_no_loss() -> None:
    document = LAYOUT.understand_image(CELLS)
    assert document.inputs.text.tolist() == [IDS.image_start, NONE, NONE, NONE, NONE, IDS.image_end]
    assert document.inputs.visual.tolist() == [NO_CELL, *CELLS.flatten(0, 1).tolist(), NO_CELL]
    assert_silent(document, ("text", "visual", "audio"))


def test_an_image_to_generate_is_laid_out_as_the_reports_table() -> None:
    document = LAYOUT.generate_image(CELLS)
    size = [IDS.image_size_start, ord("2") + 4, ord(" ") + 4, ord("2") + 4, IDS.image_size_end]
    a, b, c, d = CELLS.flatten(0, 1).tolist()
    assert document.inputs.text.tolist() == [
        *size,
        IDS.image_start,
        NONE,
        NONE,
        IDS.image_newline,
        NONE,
        NONE,
        IDS.image_end,
    ]
    assert document.inputs.visual.tolist() == [*[NO_CELL] * 6, a, b, NO_CELL, c, d, NO_CELL]
    assert document.targets.visual.tolist() == [*[NO_CELL_LOSS] * 5, a, b, NO_CELL_LOSS, c, d, IMAGE_END, NO_CELL_LOSS]
    assert_silent(document, ("text", "audio"))


def test_the_size_prefix_says_height_first() -> None:
    prefix = LAYOUT.image_prefix(2, 13).inputs.text.tolist()
    assert ByteTokenizer().decode(prefix) == "2 13"
    assert prefix[-1] == IDS.image_start


def test_audio_to_hear_has_no_loss_unless_asked_for() -> None:
    document = LAYOUT.hear(FRAMES)
    assert document.inputs.text.tolist() == [IDS.audio_start, NONE, NONE, IDS.audio_end]
    assert document.inputs.audio.tolist() == [NO_FRAME, A, B, NO_FRAME]
    assert_silent(document, ("text", "visual", "audio"))
    assert LAYOUT.hear(FRAMES, loss=True).targets.audio.tolist() == [A, B, AUDIO_END, NO_FRAME_LOSS]


def test_serial_speech() -> None:
    for delay in (None, 4, 99):
        document = LAYOUT.speak([10, 11, 12], FRAMES, delay=delay)
        assert document.inputs.text.tolist() == [G, 10, 11, 12, NONE, NONE, NONE, GE]
        assert document.inputs.marker.tolist() == [NONE, NONE, NONE, NONE, AS, NONE, NONE, NONE]
        assert document.inputs.audio.tolist() == [*[NO_FRAME] * 5, A, B, NO_FRAME]
        assert document.targets.text.tolist() == [10, 11, 12, TE, *[IGNORE] * 4]
        assert document.targets.audio.tolist() == [*[NO_FRAME_LOSS] * 4, A, B, AUDIO_END, NO_FRAME_LOSS]
        assert_silent(document, ("visual",))


def test_delayed_speech() -> None:
    document = LAYOUT.speak([10, 11, 12], FRAMES, delay=2)
    assert document.inputs.text.tolist() == [G, 10, 11, 12, NONE, GE]
    assert document.inputs.marker.tolist() == [NONE, NONE, AS, NONE, NONE, NONE]
    assert document.inputs.audio.tolist() == [*[NO_FRAME] * 3, A, B, NO_FRAME]
    assert document.targets.text.tolist() == [10, 11, 12, TE, IGNORE, IGNORE]
    assert document.targets.audio.tolist() == [NO_FRAME_LOSS, NO_FRAME_LOSS, A, B, AUDIO_END, NO_FRAME_LOSS]


def test_parallel_speech_is_the_reports_figure() -> None:
    """Three transcript ids, five frames: text T1 T2 T3 TE, audio one position later, then its end."""
    frames = torch.arange(5)[:, None] % torch.tensor(IDS.audio_sizes)
    document = LAYOUT.speak([10, 11, 12], frames, delay=1)
    assert document.inputs.text.tolist() == [G, 10, 11, 12, NONE, NONE, NONE, GE]
    assert document.inputs.marker.tolist() == [NONE, AS, *[NONE] * 6]
    assert document.targets.text.tolist() == [10, 11, 12, TE, *[IGNORE] * 4]
    assert document.targets.audio.tolist() == [NO_FRAME_LOSS, *frames.tolist(), AUDIO_END, NO_FRAME_LOSS]


def test_what_follows_speech_is_predicted_at_its_end() -> None:
    document = join(LAYOUT.speak([10], FRAMES), LAYOUT.text([EOS], loss=True))
    assert document.inputs.text[-2:].tolist() == [GE, EOS]
    assert document.targets.text[-2:].tolist() == [EOS, IGNORE]


def test_a_dropped_condition_keeps_the_length_and_nothing_else() -> None:
    prompt = join(LAYOUT.text([BOS, 10]), LAYOUT.understand_image(CELLS), LAYOUT.text([11], loss=True))
    dropped = drop_condition(prompt)
    assert dropped.inputs.text.tolist() == [0] * len(prompt)
    assert bool((dropped.inputs.visual == NONE).all()) and bool((dropped.inputs.marker == NONE).all())
    assert_silent(dropped, ("text", "visual", "audio"))


@given(
    transcript=st.integers(0, 12),
    frames=st.integers(1, 12),
    parallel=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_every_delay_drawn_fits(transcript: int, frames: int, parallel: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    delay = draw_delay(transcript, frames, generator=generator, parallel=parallel)
    document = LAYOUT.speak([10] * transcript, torch.zeros(frames, 4), delay=delay)
    assert int((document.targets.text == TE).sum()) == 1
    assert 1 <= delay <= transcript + 1


def test_delays_reach_from_parallel_to_serial() -> None:
    generator = torch.Generator().manual_seed(0)
    delays = [draw_delay(3, 9, generator=generator) for _ in range(400)]
    assert set(delays) == {1, 2, 3, 4}
    assert 150 < delays.count(1) < 250


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LAYOUT.text([0, IDS.text_rows]), r"text ids must be in \[0, 313\), got"),
        (lambda: LAYOUT.generate_image(CELLS[0]), r"visual codes must be \[height, width, 3\] and not empty"),
        (lambda: LAYOUT.understand_image(CELLS + 1), r"visual codes must be in \[0, size\) .* got \['1..7', '2..8'"),
        (lambda: LAYOUT.hear(FRAMES[:, :3]), r"audio codes must be \[frames, 4\] and not empty, got \[2, 3\]"),
        (lambda: LAYOUT.speak([10], FRAMES[:0]), r"audio codes must be \[frames, 4\] and not empty, got \[0, 4\]"),
        (lambda: LAYOUT.hear(-FRAMES), r"audio codes must be in \[0, size\)"),
        (lambda: LAYOUT.speak([TE], FRAMES), r"transcript must hold ids in \[0, 260\), got \[309\]"),
        (
            lambda: LAYOUT.speak([10] * 3, FRAMES, delay=1),
            r"transcript must be at most 2 ids long for 2 frames at delay 1",
        ),
        (lambda: LAYOUT.speak([10], FRAMES, delay=0), r"delay must be at least 1 or None, got 0"),
        (lambda: pack([LAYOUT.hear(FRAMES)], 3), r"document must fit a row of 3 positions, got 4"),
        (lambda: pack([], 3), r"documents must not be empty"),
    ],
)
def test_refuses(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=f"sequence: {message}"):
        build()


def test_first_fit() -> None:
    batch = pack([LAYOUT.text([10 + n] * n) for n in (4, 3, 2, 1, 5)], 6)
    assert batch.inputs.documents.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, -1, -1], [0, 0, 0, 0, 0, -1]]
    assert batch.inputs.text.tolist() == [[14] * 4 + [12] * 2, [13] * 3 + [11, -1, -1], [15] * 5 + [-1]]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), room=st.integers(9, 20))
@settings(deadline=None)
def test_packing_keeps_every_document_whole(lengths: list[int], room: int) -> None:
    documents = [LAYOUT.text(range(10 * n, 10 * n + length), loss=True) for n, length in enumerate(lengths)]
    batch = pack(documents, room)
    found = sorted(unpacked(batch), key=lambda pair: pair[0][0])
    assert found == [(d.inputs.text.tolist(), d.targets.text.tolist()) for d in documents]
    rows = batch.inputs.text.shape[0]
    assert rows == 1 or sum(lengths) > (rows - 1) * room / 2  # first fit leaves at most one row half empty


def test_padding_has_no_input_and_no_loss() -> None:
    batch = pack([LAYOUT.speak([10], FRAMES), LAYOUT.generate_image(CELLS)], 20)
    padding = batch.inputs.documents == -1
    for field in (batch.inputs.text, batch.inputs.marker, batch.inputs.visual, batch.inputs.audio):
        assert bool((field[padding] == NONE).all())
    for field in (batch.targets.text, batch.targets.visual, batch.targets.audio):
        assert bool((field[padding] == IGNORE).all())
    assert batch.inputs.text.dtype == batch.targets.audio.dtype == torch.int64


def unpacked(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Text and text targets of every document."""
    found = []
    for text, targets, documents in zip(batch.inputs.text, batch.targets.text, batch.inputs.documents, strict=True):
        for number in range(int(documents.max()) + 1):
            here: Tensor = documents == number
            found.append((text[here].tolist(), targets[here].tolist()))
    return found


def assert_silent(document: Document, streams: tuple[str, ...]) -> None:
    for stream in streams:
        assert bool((getattr(document.targets, stream) == IGNORE).all()), stream
