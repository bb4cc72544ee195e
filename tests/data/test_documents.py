"""Lines of JSON as documents: both formats mean what they say, written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make
import pytest
import torch
from torch import Tensor

from longcat_model import presets
from longcat_model.data.documents import Reader
from longcat_model.generation import converse
from longcat_model.sequence import IGNORE, Document, join
from longcat_model.system import System, Tokenizers
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import BOS, EOS

CELLS = torch.arange(12).view(2, 2, 3) % 8  # of a.png
FRAMES = torch.arange(28).view(7, 4) % 4  # of a.wav
IMAGE, AUDIO = "<longcat_img_start>a.png<longcat_img_end>", "<longcat_audio_start>a.wav<longcat_audio_end>"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    make.media(tmp_path)
    reader = Reader(presets.tiny(), ByteTokenizer(), lambda _: CELLS, lambda _: FRAMES, longest=200)
    return lambda value, seed=0: reader.document(value, tmp_path, torch.Generator().manual_seed(seed))


def ids(text: str) -> list[int]:
    return ByteTokenizer().encode(text)


def assert_same(one: Document, two: Document) -> None:
    for a, b in ((one.inputs, two.inputs), (one.labels, two.labels)):
        for name in vars(a):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def text(content: str, *, loss: bool = False) -> Document:
    return make.LAYOUT.text(ids(content), loss=loss)


END = make.LAYOUT.text([EOS], loss=True)


def test_a_conversation_learns_what_the_assistant_says_and_paints(read: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"This {IMAGE} and {AUDIO}?"},
        {"role": "assistant", "content": f"This: {IMAGE}"},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": AUDIO},
    ]
    expected = join(
        make.LAYOUT.text([BOS]),
        text("<longcat_system>Be brief."),
        text("<longcat_user>This "),
        make.LAYOUT.understand_image(CELLS),
        text(" and "),
        make.LAYOUT.hear(FRAMES),
        text("?"),
        text("<longcat_assistant>"),
        text("This: ", loss=True),
        make.LAYOUT.generate_image(CELLS),
        END,
        text("<longcat_user>Again."),
        text("<longcat_assistant>"),
        make.LAYOUT.hear(FRAMES, loss=True),
        END,
    )
    assert_same(read({"messages": messages}), expected)


def test_a_conversation_learns_speech_with_its_transcript(read: Any) -> None:
    content = (
        '<longcat_audiogen_start>ab<longcat_audio_start>{"path": "a.wav"}<longcat_audio_end><longcat_audiogen_end>'
    )
    lines = {"messages": [{"role": "user", "content": "Say ab."}, {"role": "assistant", "content": content}]}
    before = [make.LAYOUT.text([BOS]), text("<longcat_user>Say ab."), text("<longcat_assistant>")]
    found = {}
    for seed in range(12):
        document = read(lines, seed)
        delay = int((document.inputs.marker >= 0).nonzero()) - sum(map(len, before))
        found[delay] = document
    assert set(found) == {1, 2, 3}
    for delay, document in found.items():
        assert_same(document, join(*before, make.LAYOUT.speak(ids("ab"), FRAMES, delay=delay), END))


@pytest.mark.parametrize(
    ("start", "answer"),
    [
        ("", "This."),
        ("<longcat_img_token_size>2 2</longcat_img_token_size><longcat_img_start>", IMAGE),
        ("<longcat_audiogen_start>", f"<longcat_audiogen_start>ab{AUDIO}<longcat_audiogen_end>"),
    ],
)
def test_a_conversation_begins_with_the_prompt_that_generation_builds(tmp_path: Path, start: str, answer: str) -> None:
    system = System.load(make.system(make.media(tmp_path)))
    reader = Reader(system.sizes, system.text, lambda _: CELLS, lambda _: FRAMES, longest=200)
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"This {IMAGE} and {AUDIO}?"},
        {"role": "assistant", "content": f"This: {IMAGE}{AUDIO}"},
    ]
    asked, answered = {"role": "user", "content": f"Again.{start}"}, {"role": "assistant", "content": answer}
    job = converse.prepare([[*before, asked]], system, directory=tmp_path)
    prompt = job.request(job.prompts[0], {tmp_path / "a.png": CELLS, tmp_path / "a.wav": FRAMES}).prompt
    learnt = {"messages": [*before, {"role": "user", "content": "Again."}, answered]}
    document = reader.document(learnt, tmp_path, torch.Generator().manual_seed(0))
    length = len(prompt.text)
    assert length < len(document) and bool((document.targets.text != IGNORE).any())
    for name, tensor in vars(prompt).items():
        assert torch.equal(tensor, getattr(document.inputs, name)[:length]), name


def test_a_conversation_that_ends_with_the_user_learns_the_end_alone(read: Any) -> None:
    labels = read({"messages": [{"role": "user", "content": "Hello"}]}).labels.text
    assert labels[-1] == EOS and bool((labels[:-1] == IGNORE).all())


def test_parts(read: Any) -> None:
    parts = [{"text": "a"}, {"text": "b", "loss": True}, {"image": "a.png"}, {"paint": "a.png"}, {"hear": "a.wav"}]
    pieces = [text("a"), text("b", loss=True), make.LAYOUT.understand_image(CELLS), make.LAYOUT.generate_image(CELLS)]
    assert_same(read(parts), make.LAYOUT.document(*pieces, make.LAYOUT.hear(FRAMES)))
    spoken = read([{"say": "a.wav", "transcript": "abc"}])
    delay = int((spoken.inputs.marker >= 0).nonzero()) - 1
    assert_same(spoken, make.LAYOUT.document(make.LAYOUT.speak(ids("abc"), FRAMES, delay=delay)))


def test_blind_documents_are_as_long_as_those_of_the_tokenizers(tmp_path: Path) -> None:
    """So that what is too long is found without encoding."""
    make.media(tmp_path)
    seeing = Reader.of(Tokenizers.load(make.system(tmp_path / "system")), 200)
    blind = Reader.blind(presets.tiny(), 200)

    def length(reader: Reader, value: Any) -> tuple[int, list[Tensor]]:
        document = reader.document(value, tmp_path, torch.Generator().manual_seed(0))
        return len(document), [document.labels.text, document.inputs.visual >= 0, document.inputs.audio >= 0]

    for value in make.LINES:
        (one, *some), (two, *others) = length(seeing, value), length(blind, value)
        assert one == two and all(torch.equal(a, b) for a, b in zip(some[0], others[0], strict=True))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be a list of parts or have messages, got 3"),
        ([], "must be a list of parts or have messages, got \\[\\]"),
        (["text"], "must be a list of parts"),
        ({"text": "a"}, "must be a list of parts or a list of messages alone"),
        ({"messages": [], "id": 1}, "must be a list of parts or a list of messages alone"),
        ({"messages": 3}, "must be a list of parts or a list of messages alone"),
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": [3]}, "message 1: must have role and content"),
        ({"messages": [{"role": "user", "content": "Paint.<longcat_img_start>"}]}, "must be there, got only its start"),
        (
            {"messages": [{"role": "user", "content": "<longcat_audio_start>b.wav<longcat_audio_end>"}]},
            "message 1.*file",
        ),
        ([{"text": 3}], "a part must be one of text, image"),
        ([{"smell": "rose"}], "a part must be one of text, image"),
        ([{"text": "a", "transcript": "b"}], "a part must be one of"),
        ([{"image": "none.png"}], "image: path must name a readable image"),
        ([{"hear": "a.png"}], "speech: path must name a readable sound file"),
        ([{"say": "a.wav"}], "say needs a transcript"),
        ([{"text": "a" * 199}], "document must be at most 200 positions long, got 201; .*--row-length"),
        ([{"text": "\ud800"}], "surrogates not allowed"),
    ],
)
def test_refuses_what_means_nothing(read: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read(value)
    assert len(str(refusal.value)) < 300
