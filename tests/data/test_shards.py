"""Shards: what was written is read, bit for bit, in any process, without being brought into memory."""

from __future__ import annotations

import gc
import pickle
from dataclasses import fields
from pathlib import Path

import make
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_model.data.shards import Shards, columns, read_index, shard_path
from longcat_model.sequence import IGNORE, NONE, Document, Inputs, Targets


def assert_same(one: Document, two: Document) -> None:
    for a, b in ((one.inputs, two.inputs), (one.labels, two.labels)):
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert x.dtype == y.dtype == torch.int64 and torch.equal(x, y), field.name


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    documents = make.documents()
    shards = make.shards(tmp_path, [documents, documents[3:], documents[:1]])
    expected = [*documents, *documents[3:], *documents[:1]]
    assert len(shards) == len(expected)
    for number, document in reversed(list(enumerate(expected))):
        assert_same(shards[number], document)
    again = pickle.loads(pickle.dumps(shards))
    assert_same(again[2], documents[2])
    for number in (-1, len(expected)):
        with pytest.raises(IndexError, match=r"number must be in \[0, 8\)"):
            shards[number]


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_content_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Also values that no builder makes, and those that need 4 or 8 bytes."""
    length, levels = data.draw(st.integers(1, 6)), data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    values = st.one_of(st.sampled_from([NONE, IGNORE]), st.integers(-(2**63), 2**63 - 1))

    def tensor(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        drawn = data.draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.int64).view(shape)

    visual, audio = ((length, n) for n in levels)
    zeros = torch.zeros(length, dtype=torch.int64)
    inputs = Inputs(tensor(length), tensor(length), tensor(*visual), tensor(*audio), zeros)
    document = Document(inputs, Targets(tensor(length), tensor(*visual), tensor(*audio)))
    directory = tmp_path_factory.mktemp("shards")
    assert_same(make.shards(directory, [[document, document]])[1], document)


def test_counts_are_what_a_document_costs(tmp_path: Path) -> None:
    documents = make.documents()
    shards = make.shards(tmp_path, [documents[:2], documents[2:]])
    for counts, document in zip(shards.counts.tolist(), documents, strict=True):
        labels = document.targets
        supervised = [(x != IGNORE).view(len(x), -1).any(1).sum() for x in (labels.visual, labels.audio)]
        assert counts == [len(document), *supervised]
    assert shards.longest == max(map(len, documents))


def test_two_bytes_where_they_do(tmp_path: Path) -> None:
    """A painted cell: its codes and labels in 2 bytes, and two positions; nothing for the fields it does not have."""
    cells = torch.zeros(60, 50, 3, dtype=torch.int64)
    make.shards(tmp_path, [[make.LAYOUT.generate_image(cells)]])
    assert shard_path(tmp_path, 0).stat().st_size < 60 * 50 * (2 * 3 * 2 + 2 * 2) + 60 * 4 + 3000


def anonymous_bytes() -> int:
    gc.collect()
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told apart by Linux alone")
def test_reading_maps_and_does_not_load(tmp_path: Path) -> None:
    document = make.LAYOUT.text(torch.arange(20_000) % 200, loss=True)
    shards = make.shards(tmp_path, [[document] * 300] * 2)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert_same(shards[599], document)
    before = anonymous_bytes()
    for number in range(len(shards)):
        assert len(shards[number]) == 20_000
    grown = anonymous_bytes() - before
    assert size > 90e6 and grown < 8e6, f"{grown / 1e6:.0f} MB after reading {size / 1e6:.0f} MB"


def test_refuses_what_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold whole shards"):
        Shards(tmp_path)
    documents = make.documents()
    make.shards(tmp_path, [documents, documents])
    (tmp_path / "counts.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"counts\.npy must be whole"):
        Shards(tmp_path)
    shards = make.shards(tmp_path, [documents, documents])
    shard_path(tmp_path, 1).write_bytes(shard_path(tmp_path, 1).read_bytes()[:-1])
    assert_same(shards[0], documents[0])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors must be a whole shard"):
        shards[7]
    (tmp_path / "index.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="must be an index of shards"):
        read_index(tmp_path)


def test_columns_hold_only_what_is_there() -> None:
    found = columns(make.LAYOUT.text([7, 8, 9]))
    assert found["text"].tolist() == [7, 8, 9] and found["text_at"].tolist() == [0, 1, 2]
    assert all(not len(found[name]) for name in found if name not in ("length", "text", "text_at"))
