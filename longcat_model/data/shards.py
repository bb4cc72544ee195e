"""Tokenized documents on disk: written once, then mapped. A document is read with the few pages it lies on.

A directory holds

    index.json               what the documents were made from, and how many each shard has once all are written
    media.jsonl              the image and sound files that they were made from, each as it was: see `Media`
    counts.npy               int32 [documents, 3], what each document costs: see `COUNTS`
    shard-00000.safetensors  documents in order, a column for each field of their positions

Most positions have nothing in most fields. A column `c` therefore holds what is there: values `c` [n] or [n, L], their
positions in their document `c_at` [n], and where each document's values end `c_ends` [documents]. `lengths` [documents]
are the documents'. Integers take 2 bytes where all of an array fit, else 4 or 8.

Dimension key
    n values of a column    L quantizer levels
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longcat_model.files import read_object, replacing, require, write, write_json
from longcat_model.sequence import IGNORE, NONE, Document, Inputs, Targets

COLUMNS = ("text", "marker", "visual", "audio", "text_labels", "visual_labels", "audio_labels")
COUNTS = ("lengths", "visual_labels", "audio_labels")  # positions, and how many of them each depth head predicts
OPEN = 64  # shards mapped at a time

Array = np.ndarray
Columns = dict[str, Array]  # of one document: each column's values and positions, and its length


class Index(NamedTuple):
    """What `index.json` says."""

    made_from: dict[str, Any]
    documents: list[int] | None  # of each shard; None: not all are written yet

    @property
    def digest(self) -> str:
        """The same documents have the same digest."""
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()


def columns(document: Document) -> Columns:
    """A document as a shard has it."""
    found = {"length": np.array([len(document)])}
    for name in COLUMNS:
        values, nothing = _field(document, name)
        at = (values != nothing).view(len(document), -1).any(1).nonzero().flatten()
        found[name], found[f"{name}_at"] = _narrow(values[at].numpy()), _narrow(at.numpy())
    return found


def write_shard(directory: Path, number: int, documents: Sequence[Columns]) -> None:
    """Writes one shard, whole or not at all."""
    arrays = {"lengths": np.concatenate([found["length"] for found in documents])}
    for name in COLUMNS:
        for key in (name, f"{name}_at"):
            arrays[key] = np.concatenate([found[key] for found in documents])
        arrays[f"{name}_ends"] = np.cumsum([len(found[name]) for found in documents])
    write(shard_path(directory, number), safetensors.numpy.save({key: _narrow(a) for key, a in arrays.items()}))


def write_index(directory: Path, index: Index) -> None:
    write_json(directory / "index.json", index._asdict())


def read_index(directory: Path) -> Index | None:
    """None where there is none.

    Raises:
        ValueError: it is no index.
    """
    path = directory / "index.json"
    if not path.is_file():
        return None
    found = read_object(path)
    require(path, "it", found.keys() == set(Index._fields), "an index of shards: made_from and documents", found)
    index = Index(**found)
    require(path, "made_from", isinstance(index.made_from, dict), "an object", index.made_from)
    require(path, "documents", _are_counts(index.documents), "null or a number for each shard", index.documents)
    return index


def _are_counts(values: object) -> bool:
    if not isinstance(values, list):
        return values is None
    return bool(values) and all(type(value) is int and 0 <= value < 2**31 for value in values)


def finish(directory: Path, made_from: dict[str, Any], shards: int) -> None:
    """Counts the documents of the first `shards` shards and writes the index, which makes the directory whole."""
    sizes = [len(_open(shard_path(directory, number))["lengths"]) for number in range(shards)]
    with replacing(directory / "counts.npy") as temporary:
        counts = np.lib.format.open_memmap(temporary, "w+", np.int32, (sum(sizes), len(COUNTS)))  # type: ignore[no-untyped-call]
        for number, last in enumerate(accumulate(sizes)):
            counts[last - sizes[number] : last] = _counts(_open(shard_path(directory, number)))
        counts.flush()
    write_index(directory, Index(made_from, sizes))


class Shards:
    """The documents of a directory; it can be sent to other processes, which map it anew.

    Raises:
        ValueError: the directory holds no shards, or not all of them.
    """

    def __init__(self, directory: Path) -> None:
        index = read_index(directory)
        if index is None or index.documents is None:
            raise ValueError(f"shards: {directory} must hold whole shards (run `longcat tokenize` to its end)")
        self.directory, self.index = directory, index
        self._ends = list(accumulate(index.documents))
        try:
            self.counts = np.lib.format.open_memmap(directory / "counts.npy", mode="r")  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise ValueError(f"shards: {directory}/counts.npy must be whole, got: {error}") from error
        shape = (len(self), len(COUNTS))
        if (self.counts.shape, self.counts.dtype) != (shape, np.int32):
            found = f"{self.counts.dtype} {list(self.counts.shape)}"
            raise ValueError(f"shards: {directory}/counts.npy must be int32 {list(shape)}, got {found}")
        self._shard = lru_cache(maxsize=OPEN)(_open)

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        return Shards, (self.directory,)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def longest(self) -> int:
        """Positions of the longest document."""
        return int(self.counts[:, 0].max())

    def __getitem__(self, number: int) -> Document:
        """A document, exactly as it was written."""
        if not 0 <= number < len(self):
            raise IndexError(f"shards: number must be in [0, {len(self)}), got {number}")
        place = bisect_right(self._ends, number)
        shard = self._shard(shard_path(self.directory, place))
        at = number - (self._ends[place - 1] if place else 0)
        return _document(shard, at)


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"


def media_path(directory: Path) -> Path:
    return directory / "media.jsonl"


def _field(document: Document, column: str) -> tuple[Tensor, int]:
    """A column's values at every position, and the value that means nothing."""
    field = column.removesuffix("_labels")
    if field == column:
        return getattr(document.inputs, field), NONE
    return getattr(document.labels, field), IGNORE


def _document(shard: Mapping[str, Tensor], at: int) -> Document:
    length = int(shard["lengths"][at])
    fields = {name: _column(shard, name, at, length) for name in COLUMNS}
    inputs, labels = ({name: fields[name + kind] for name in ("text", "visual", "audio")} for kind in ("", "_labels"))
    documents = torch.zeros(length, dtype=torch.int64)
    return Document(Inputs(**inputs, marker=fields["marker"], documents=documents), Targets(**labels))


def _column(shard: Mapping[str, Tensor], name: str, at: int, length: int) -> Tensor:
    ends = shard[f"{name}_ends"]
    there = slice(int(ends[at - 1]) if at else 0, int(ends[at]))
    values, where = shard[name][there].long(), shard[f"{name}_at"][there].long()
    nothing = IGNORE if name.endswith("_labels") else NONE
    return torch.full((length, *values.shape[1:]), nothing, dtype=torch.int64).index_copy_(0, where, values)


def _open(path: Path) -> dict[str, Tensor]:
    """A shard's arrays, mapped: safetensors reads none of them."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"shards: {path} must be a whole shard, got: {error}") from error
    for name in ("lengths", *COLUMNS):
        require(path, name, _is_whole(found, name), "arrays of integers that fit each other", found.keys())
    return found


def _is_whole(shard: Mapping[str, Tensor], name: str) -> bool:
    """Whether a column's arrays are there and have the shapes that the others' say, as far as that costs no reading."""
    keys = [name] if name == "lengths" else [name, f"{name}_at", f"{name}_ends"]
    arrays = [shard[key] for key in keys if key in shard]
    if len(arrays) != len(keys) or any(x.is_floating_point() or x.dtype == torch.bool for x in arrays):
        return False
    if name == "lengths":
        return arrays[0].dim() == 1
    values, at, ends = arrays
    return values.dim() in (1, 2) and at.shape == values.shape[:1] and ends.shape == shard["lengths"].shape


def _counts(shard: Mapping[str, Tensor]) -> Array:
    """What each document of a shard costs, int32 [documents, 3]."""
    ends = [shard[f"{name}_ends"].numpy() for name in COUNTS[1:]]
    return np.stack([shard["lengths"].numpy(), *(np.diff(e, prepend=0) for e in ends)], 1).astype(np.int32)


def _narrow(values: Array) -> Array:
    least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
    kinds = (np.int16, np.int32, np.int64)
    return values.astype(next(kind for kind in kinds if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max))
