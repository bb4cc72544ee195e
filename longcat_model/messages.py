"""Conversations in the official message format, as plain data.

A message is a mapping of `role` (system, user, assistant) and `content`: text with tags in it.

    <longcat_img_start>PATH<longcat_img_end>            an image
    <longcat_audio_start>PATH<longcat_audio_end>        sound
    <longcat_img_start>                                 at the end of the last message: answer with an image; may follow
                                                        its size, <longcat_img_token_size>H W</longcat_img_token_size>
    <longcat_audiogen_start>                            at the end of the last message: answer with speech
    <longcat_audiogen_start>TRANSCRIPT<longcat_audio_start>PATH<longcat_audio_end><longcat_audiogen_end>
                                                        speech that the assistant spoke

PATH is raw or JSON, {"path": "..."}. In an assistant's message media are what the model made, or shall learn to make.
The first four forms are the released ones; how a transcript and its speech stand in a message is not published.

Role markers are text to the text tokenizer: the released one has an id for each (they are not published), a byte
tokenizer spells them. No content can hold one, because every tag that does not stand above is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant")

IMAGE, IMAGE_END = "<longcat_img_start>", "<longcat_img_end>"
AUDIO, AUDIO_END = "<longcat_audio_start>", "<longcat_audio_end>"
SPEECH, SPEECH_END = "<longcat_audiogen_start>", "<longcat_audiogen_end>"
SIZE, SIZE_END = "<longcat_img_token_size>", "</longcat_img_token_size>"

_TAG = re.compile(r"(</?longcat_\w*>)")


@dataclass(frozen=True)
class Turn:
    """A message begins."""

    role: str

    @property
    def marker(self) -> str:
        """Text that stands before the message; after an assistant's message comes the end of text (EOS)."""
        return f"<longcat_{self.role}>"


@dataclass(frozen=True)
class Text:
    role: str
    text: str  # not empty


@dataclass(frozen=True)
class Image:
    role: str
    path: Path


@dataclass(frozen=True)
class Audio:
    role: str
    path: Path


@dataclass(frozen=True)
class Speech:
    """Speech of the assistant with what it says."""

    role: str
    path: Path
    transcript: str


@dataclass(frozen=True)
class StartImage:
    """The answer is an image."""

    size: tuple[int, int] | None  # cells: height, width


@dataclass(frozen=True)
class StartSpeech:
    """The answer is speech."""


Part = Turn | Text | Image | Audio | Speech | StartImage | StartSpeech


def numbered(parts: Sequence[Part]) -> Iterator[tuple[int, Part]]:
    """Each part with the number of its message, from 1, as errors name it."""
    number = 0
    for part in parts:
        number += isinstance(part, Turn)
        yield number, part


def parse(messages: Sequence[Mapping[str, str]], directory: Path = Path()) -> tuple[Part, ...]:
    """The parts of a conversation in order, a `Turn` before each message's.

    A start of an image or of speech belongs to the answer: where a user's message ends with one, the assistant's
    `Turn` stands before it, as in the released chat template.

    Args:
        directory: what relative paths start from.

    Raises:
        ValueError: no messages, another key or role, an unknown or unbalanced tag, or a missing file; the message
            names the message's number, from 1, and the tag.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages: messages must be a list with at least one message, got {messages!r}")
    parts: list[Part] = []
    for number, message in enumerate(messages, 1):
        try:
            parts += _message(message, number == len(messages), directory)
        except ValueError as error:
            raise ValueError(f"messages: message {number}: {error}") from error
    return tuple(parts)


def _message(message: Mapping[str, str], is_last: bool, directory: Path) -> Iterator[Part]:
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        raise ValueError(f"must have role and content and nothing else, got {message!r}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"content must be a string, got {content!r}")
    yield Turn(role)
    for part in _content(content, role, directory):
        if isinstance(part, StartImage | StartSpeech):
            if not is_last or role == "system":
                tag = IMAGE if isinstance(part, StartImage) else SPEECH
                raise ValueError(f"{tag} without its end must stand in the last message, and not in a system's")
            if role == "user":
                yield Turn("assistant")
        yield part


def _content(content: str, role: str, directory: Path) -> Iterator[Part]:
    pieces = _TAG.split(content)
    texts, tags = pieces[::2], pieces[1::2]
    at = 0
    while True:
        if texts[at]:
            yield Text(role, _unicode(texts[at]))
        if at == len(tags):
            return
        part, used = _tagged(tags[at:], texts[at + 1 :], role, directory)
        yield part
        if isinstance(part, StartImage | StartSpeech):
            return
        at += used


def _tagged(tags: Sequence[str], texts: Sequence[str], role: str, directory: Path) -> tuple[Part, int]:
    """The part that the first tag begins, and how many tags it takes; `texts[i]` follows `tags[i]`."""
    if _begin(tags, IMAGE, IMAGE_END):
        return Image(role, _file(texts[0], IMAGE, directory)), 2
    if _begin(tags, AUDIO, AUDIO_END):
        return Audio(role, _file(texts[0], AUDIO, directory)), 2
    if _begin(tags, SPEECH, AUDIO, AUDIO_END, SPEECH_END) and not texts[2].strip():
        if role != "assistant":
            raise ValueError(f"{SPEECH} with its end must stand in an assistant's message, got a {role}'s")
        return Speech(role, _file(texts[1], AUDIO, directory), _unicode(texts[0])), 4
    if tags == [SIZE, SIZE_END, IMAGE] and not "".join(texts[1:]).strip():
        return StartImage(_size(texts[0])), 3
    if tags in ([IMAGE], [SPEECH]) and not texts[0].strip():
        return (StartImage(None) if tags[0] == IMAGE else StartSpeech()), 1
    raise ValueError(_why_not(tags, texts))


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise ValueError(f"content must be Unicode text, got the lone surrogate {found!r}") from error
    return text


def _begin(tags: Sequence[str], *wanted: str) -> bool:
    return tuple(tags[: len(wanted)]) == wanted


_RULES = {
    IMAGE: f"a path and {IMAGE_END}, or end the last message",
    AUDIO: f"a path and {AUDIO_END}",
    SPEECH: f"a transcript, {AUDIO}, a path, {AUDIO_END} and {SPEECH_END}, or end the last message",
    SIZE: f"a height, a width, {SIZE_END} and an {IMAGE} that ends the last message",
}


def _why_not(tags: Sequence[str], texts: Sequence[str]) -> str:
    if tags[0] in _RULES:
        found = "".join(map(str.__add__, ["", *tags[1:]], texts))
        return f"{tags[0]} must be followed by {_RULES[tags[0]]}, got {found[:80]!r}"
    if tags[0] in (IMAGE_END, AUDIO_END, SPEECH_END, SIZE_END):
        return f"{tags[0]} must follow its start, got it alone"
    return f"unknown tag {tags[0]}; the known ones begin with {', '.join(_RULES)}"


def _file(text: str, tag: str, directory: Path) -> Path:
    name = text.strip()
    if name.startswith("{"):
        try:
            found = json.loads(name)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{tag} must be followed by a path or JSON, got {name[:80]!r}: {error}") from error
        if found.keys() != {"path"} or not isinstance(found["path"], str):
            raise ValueError(f'{tag} must be followed by a path or {{"path": ...}}, got {name!r}')
        name = found["path"]
    path = directory / name
    try:
        exists = path.is_file()
    except (ValueError, OSError) as error:  # a zero byte, a name too long, a directory that may not be read
        raise ValueError(f"{tag} must name a file, got {name[:80]!r}: {error}") from error
    if not exists:
        raise ValueError(f"{tag} must name a file, got {str(path)!r}")
    return path


def _size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\s*[1-9]\d{0,4}\s+[1-9]\d{0,4}\s*", text, re.ASCII):
        raise ValueError(f"{SIZE} must be followed by a height and a width in cells, got {text!r}")
    height, width = map(int, text.split())
    return height, width
