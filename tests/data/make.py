"""A tiny system, media and documents of all kinds: shared by the tests of data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longcat_model import presets
from longcat_model.data.shards import Index, Shards, columns, finish, write_index, write_shard
from longcat_model.files import png, wav, write
from longcat_model.sequence import Document, Layout
from longcat_model.system import System
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import Vocabulary

IDS = Vocabulary.of(presets.tiny().vocabulary)
LAYOUT = Layout(IDS, ByteTokenizer().encode)

LINES: list[Any] = [
    [{"text": "say hello:"}, {"text": "hello", "loss": True}],
    [{"image": "a.png"}, {"text": "noise", "loss": True}],
    [{"text": "paint"}, {"paint": "a.png"}],
    [{"hear": "a.wav"}, {"say": "a.wav", "transcript": "tone"}],
    {"messages": [{"role": "user", "content": "Say tone."}, {"role": "assistant", "content": "tone"}]},
]


def system(directory: Path) -> Path:
    torch.manual_seed(0)
    System.create(presets.tiny()).save(directory)
    return directory


def media(directory: Path, shade: float = 1.0) -> Path:
    directory.mkdir(exist_ok=True)
    write(directory / "a.png", png(shade * torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))))
    write(directory / "a.wav", wav(0.1 * torch.sin(torch.arange(8000) / 20), 16_000))
    return directory


def jsonl(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def documents() -> list[Document]:
    frames, cells = torch.tensor([[1, 2, 3, 0], [7, 5, 3, 3], [0, 0, 1, 1]]), torch.arange(12).view(2, 2, 3) % 8
    prompt, answer = LAYOUT.text([70, 71]), LAYOUT.text([72, 73, 74], loss=True)
    return [
        LAYOUT.document(prompt, LAYOUT.understand_image(cells), answer),
        LAYOUT.document(prompt, LAYOUT.generate_image(cells)),
        LAYOUT.document(LAYOUT.hear(frames), answer, LAYOUT.speak([75, 76], frames, delay=1)),
        LAYOUT.hear(frames, loss=True),
        LAYOUT.text([5]),  # nothing to predict
    ]


def shards(directory: Path, groups: Sequence[Sequence[Document]]) -> Shards:
    directory.mkdir(parents=True, exist_ok=True)
    write_index(directory, Index({"made by": "a test"}, None))
    for number, group in enumerate(groups):
        write_shard(directory, number, [columns(document) for document in group])
    finish(directory, {"made by": "a test"}, len(groups))
    return Shards(directory)
