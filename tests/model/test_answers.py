"""Text as it comes: whole characters, and nothing from a stop string on."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longcat_model import presets
from longcat_model.generation.answers import Event, Listener, TextStream
from longcat_model.generation.machine import Position
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import EOS, Vocabulary

IDS = Vocabulary.of(presets.tiny().vocabulary)
TOKENIZER = ByteTokenizer()
TEXTS = st.text(st.sampled_from(list("ab €é猫🙂")), max_size=12)


@given(
    text=st.one_of(TEXTS.map(TOKENIZER.encode), st.lists(st.integers(0, 259), max_size=20)),
    stops=st.lists(st.one_of(TEXTS.filter(bool), st.sampled_from(["�", "a�"])), max_size=3),
)
@settings(deadline=None)
@example(text=TOKENIZER.encode(" aa"), stops=["a", " aa"])
def test_pieces_are_the_text_up_to_the_first_stop(text: list[int], stops: list[str]) -> None:
    """Whole characters and bytes of none alike; of two stop strings the one that is complete first."""
    stream = TextStream(TOKENIZER.decode, stops)
    pieces = []
    for token in text:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    whole = TOKENIZER.decode(text)
    ends = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    assert "".join(pieces) == whole[: min(ends)[1] if ends else len(whole)]
    assert stream.stopped == bool(ends)


def test_text_comes_at_once_unless_it_may_have_to_go() -> None:
    stream = TextStream(TOKENIZER.decode, ["abc"])
    assert [stream.push(token) for token in TOKENIZER.encode("é abab")] == ["", "é", " ", "", "", "ab", ""]
    assert stream.finish() == "ab"


def test_tokenizers_that_drop_the_first_space_keep_the_others() -> None:
    words = ["a", " b", " ", "c"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).lstrip())
    assert [stream.push(i) for i in (1, 0, 1, 1, 3)] == ["b", "a", " b", " b", "c"]


def test_a_listener_takes_an_answer_apart() -> None:
    events: list[Event] = []
    listener = Listener(7, IDS, TOKENIZER.decode, (), events.append)
    cells, frames = [(1, 2, 3), (4, 5, 6)], [(1, 2, 3, 0), (7, 5, 3, 3)]
    written = [
        *(("text", Position(text=i)) for i in TOKENIZER.encode("hi")),
        *(("image", Position(text=i)) for i in (IDS.image_size_start, *TOKENIZER.encode("2 1"), IDS.image_start)),
        ("image", Position(visual=cells[0])),
        ("image", Position(text=IDS.image_newline)),
        ("image", Position(visual=cells[1])),
        ("image", Position(text=IDS.image_end)),
        ("speech", Position(text=IDS.audiogen_start)),
        *(("speech", Position(text=i)) for i in TOKENIZER.encode("yo")),
        *(("speech", Position(audio=frame)) for frame in frames),
        ("speech", Position(text=IDS.audiogen_end)),
        ("text", Position(text=TOKENIZER.encode("!")[0])),
        ("text", Position(text=EOS)),
    ]
    assert not any(listener.observe(mode, position) for mode, position in written)
    listener.finish()
    first, image, (transcript, speech), last = listener.parts
    assert (first, transcript, last) == ("hi", "yo", "!")
    assert torch.equal(image, torch.tensor(cells)) and torch.equal(speech, torch.tensor(frames))
    assert [(event.kind, event.text or event.codes) for event in events] == [
        ("text", "h"),
        ("text", "i"),
        *(("cell", cell) for cell in cells),
        ("transcript", "y"),
        ("transcript", "o"),
        *(("frame", frame) for frame in frames),
        ("text", "!"),
    ]
    assert {event.conversation for event in events} == {7}
