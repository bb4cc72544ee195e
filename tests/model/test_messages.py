"""The official message format: what it means, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_model.messages import (
    AUDIO,
    AUDIO_END,
    IMAGE,
    IMAGE_END,
    SIZE,
    SIZE_END,
    SPEECH,
    SPEECH_END,
    Audio,
    Image,
    Part,
    Speech,
    StartImage,
    StartSpeech,
    Text,
    Turn,
    parse,
)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    for name in ("a.png", "b c.wav"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_a_conversation_is_its_parts_in_order(media: Path) -> None:
    messages = [
        {"role": "system", "content": f"Speak like this: {AUDIO}b c.wav{AUDIO_END}"},
        user(f"{IMAGE}a.png{IMAGE_END}What is it?"),
        {"role": "assistant", "content": f"This: {IMAGE}a.png{IMAGE_END}"},
        user("Say it."),
        {"role": "assistant", "content": f"{SPEECH}a cat{AUDIO}b c.wav{AUDIO_END}{SPEECH_END}"},
    ]
    assert parse(messages, media) == (
        Turn("system"),
        Text("system", "Speak like this: "),
        Audio("system", media / "b c.wav"),
        Turn("user"),
        Image("user", media / "a.png"),
        Text("user", "What is it?"),
        Turn("assistant"),
        Text("assistant", "This: "),
        Image("assistant", media / "a.png"),
        Turn("user"),
        Text("user", "Say it."),
        Turn("assistant"),
        Speech("assistant", media / "b c.wav", "a cat"),
    )
    assert Turn("user").marker == "<longcat_user>"


@pytest.mark.parametrize(
    ("suffix", "start"),
    [
        (IMAGE, StartImage(None)),
        (f"{SIZE}12 7{SIZE_END}{IMAGE}\n", StartImage((12, 7))),
        (f"{SPEECH} ", StartSpeech()),
    ],
)
def test_a_start_at_the_end_is_the_answers(suffix: str, start: Part) -> None:
    """The released template moves it behind the assistant's marker."""
    prompt = (Turn("user"), Text("user", "A cat"), Turn("assistant"))
    assert parse([user(f"A cat{suffix}")]) == (*prompt, start)
    begun = {"role": "assistant", "content": f"Here: {suffix}"}
    assert parse([user("A cat"), begun]) == (*prompt, Text("assistant", "Here: "), start)


@given(name=st.text(st.characters(codec="utf-8", exclude_characters="</\\\0", exclude_categories=["C"]), min_size=1))
@settings(deadline=None)
def test_a_path_is_raw_or_json(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"x{name[:20]}x"
    path.write_bytes(b"")
    for written in (str(path), json.dumps({"path": str(path)})):
        assert parse([user(f"{AUDIO}{written}{AUDIO_END}")]) == (Turn("user"), Audio("user", path))


@given(st.lists(st.sampled_from([IMAGE, IMAGE_END, AUDIO, AUDIO_END, SPEECH, SPEECH_END, SIZE, SIZE_END, "x", " "])))
@settings(deadline=None)
def test_any_row_of_tags_is_parsed_whole_or_refused_in_a_line(pieces: list[str]) -> None:
    """Nothing is dropped: without media on disk only plain text and a start at the end can pass."""
    content = "".join(pieces)
    try:
        parts = parse([user(content)])
    except ValueError as error:
        assert str(error).startswith("messages: message 1: ") and "\n" not in str(error)
        return
    text = "".join(part.text for part in parts if isinstance(part, Text))
    suffix = {StartImage: IMAGE, StartSpeech: SPEECH}.get(type(parts[-1]), "")
    assert (text + suffix).strip() == content.strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{IMAGE}none.png{IMAGE_END}", f"message 2: {IMAGE} must name a file, got 'none.png'"),
        (f"{IMAGE}{IMAGE_END}", f"message 2: {IMAGE} must name a file, got '.'"),
        (f"{AUDIO}a\0b{AUDIO_END}", f"message 2: {AUDIO} must name a file"),
        (f"{IMAGE}{'a' * 300}{IMAGE_END}", f"message 2: {IMAGE} must name a file, got 'aaa"),
        (IMAGE + '{"a":' * 20_000 + IMAGE_END, f"message 2: {IMAGE} must be followed by a path or JSON"),
        (f'{AUDIO}{{"file": "a.wav"}}{AUDIO_END}', f"message 2: {AUDIO} must be followed by a path or"),
        (f"{AUDIO}{{a.wav{AUDIO_END}", f"message 2: {AUDIO} must be followed by a path or JSON"),
        (f"{IMAGE}a.png", f"message 2: {IMAGE} must be followed by a path and {IMAGE_END}, or end the last message"),
        (f"{IMAGE}a.png{AUDIO_END}", f"message 2: {IMAGE} must be followed by"),
        (f"{AUDIO}", f"message 2: {AUDIO} must be followed by a path and {AUDIO_END}, got ''"),
        (f"a{IMAGE_END}", f"message 2: {IMAGE_END} must follow its start"),
        (f"{SPEECH}a{AUDIO}a.wav{AUDIO_END}{SPEECH_END}", f"message 2: {SPEECH} with its end must stand in an ass"),
        (f"{SPEECH}a{SPEECH_END}", f"message 2: {SPEECH} must be followed by a transcript"),
        (f"{SIZE}4 4{SIZE_END}", f"message 2: {SIZE} must be followed by"),
        (f"{SIZE}4 4{SIZE_END}a{IMAGE}", f"message 2: {SIZE} must be followed by"),
        (f"{SIZE}4 0{SIZE_END}{IMAGE}", f"message 2: {SIZE} must be followed by a height and a width in cells"),
        ("<longcat_user>", "message 2: unknown tag <longcat_user>"),
        ("a</longcat_s>", "message 2: unknown tag </longcat_s>"),
        ("a\ud800", r"message 2: content must be Unicode text, got the lone surrogate '\ud800'"),
    ],
)
def test_bad_content_is_refused_by_number_and_tag(content: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse([user("good"), user(content)])
    assert str(refusal.value).startswith(f"messages: {message}")


def test_a_transcript_is_unicode_text(media: Path) -> None:
    said = {"role": "assistant", "content": f"{SPEECH}\udc80{AUDIO}b c.wav{AUDIO_END}{SPEECH_END}"}
    with pytest.raises(ValueError, match=r"messages: message 2: content must be Unicode text, got the lone surrogate"):
        parse([user("say"), said], media)


@pytest.mark.parametrize("tag", [IMAGE, SPEECH])
def test_only_the_last_message_starts_an_answer(tag: str) -> None:
    with pytest.raises(ValueError, match=f"message 1: {tag} without its end must stand in the last message"):
        parse([user(tag), user("b")])
    with pytest.raises(ValueError, match="not in a system's"):
        parse([{"role": "system", "content": tag}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list with at least one message"),
        ("text", "must be a list with at least one message"),
        (3, "must be a list with at least one message, got 3"),
        (user("a"), "must be a list with at least one message"),
        (["text"], "message 1: must have role and content and nothing else, got 'text'"),
        ([user("a"), {"role": "user"}], "message 2: must have role and content"),
        ([{"role": "user", "content": "a", "loss": "1"}], "message 1: must have role and content and nothing else"),
        ([{"role": "tool", "content": "a"}], "message 1: role must be one of system, user, assistant, got 'tool'"),
        ([{"role": "user", "content": ["a"]}], "message 1: content must be a string"),
    ],
)
def test_bad_messages_are_refused(messages: object, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse(messages)  # type: ignore[arg-type]
    assert message in str(refusal.value)
