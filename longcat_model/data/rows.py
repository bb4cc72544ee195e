"""Documents packed into rows that cost alike.

A row costs the backbone what its length says, whatever is in it; what differs is the depth heads, which run at every
cell that is painted and every frame that is spoken. Documents with such positions are therefore placed first, by
decreasing cost, then the others by decreasing length; each goes into the row with room that costs least so far
(Graham's LPT rule, with capacities).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longcat_model import config
from longcat_model.data.shards import Shards
from longcat_model.data.shuffle import shuffled
from longcat_model.files import replacing, require
from longcat_model.vocabulary import Vocabulary

WINDOW = 8192  # documents packed at once


class HeadCosts(NamedTuple):
    """Multiplications that a supervised position costs a depth head, forward."""

    visual: int
    audio: int

    @classmethod
    def of(cls, sizes: config.Model) -> HeadCosts:
        ids, hidden = Vocabulary.of(sizes.vocabulary), sizes.backbone.hidden
        return cls(
            visual=_depth(sizes.visual_head, hidden, ids.visual_sizes),
            audio=_depth(sizes.audio_head, hidden, ids.audio_sizes),
        )


def _depth(head: config.DepthHead, hidden: int, sizes: tuple[int, ...]) -> int:
    """Attention and input at each level, a share of the feed-forward units and a classifier for each level."""
    attention, feedforward = 4 * head.dim**2 * len(sizes), 2 * head.ffn_scale * head.dim**2
    return head.layers * (attention + feedforward) + head.dim * (hidden * len(sizes) + sum(size + 1 for size in sizes))


class Rows:
    """Numbers of the documents in each row that `plan` made; it can be sent to other processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._documents, self._ends = map(_mapped, _paths(directory))
        whole = bool(self._ends[-1] == len(self._documents))
        require(_paths(directory)[1], "its end", whole, f"{len(self._documents)}, remove it to go on", self._ends[-1])

    def __reduce__(self) -> tuple[type[Rows], tuple[Path]]:
        return Rows, (self.directory,)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> np.ndarray:
        first = self._ends[row - 1] if row else 0
        return np.asarray(self._documents[first : self._ends[row]])


def plan(shards: Shards, row_length: int, costs: HeadCosts, seed: int, out: Path) -> Rows:
    """Packs all documents, in shuffled order, and writes the rows to a directory in `out`, unless they are there."""
    made_from = json.dumps([shards.index.digest, row_length, costs, seed]).encode()
    directory, counts = out / f"rows-{hashlib.sha256(made_from).hexdigest()[:12]}", shards.counts
    directory.mkdir(parents=True, exist_ok=True)
    documents_path, ends_path = _paths(directory)
    if not ends_path.exists():  # it is renamed last
        with (
            replacing(ends_path) as ends_partial,
            replacing(documents_path) as documents_partial,
            documents_partial.open("wb") as documents,
            ends_partial.open("wb") as ends,
        ):
            for start in range(0, len(counts), WINDOW):
                places = np.arange(start, min(start + WINDOW, len(counts)))
                numbers = shuffled(places, len(counts), seed)
                found = counts[numbers].astype(np.int64)
                rows = pack(found[:, 0], found[:, 1:] @ np.array(costs), row_length)
                documents.write(numbers[np.concatenate(rows)].astype("<i8").tobytes())
                ends.write((start + np.cumsum([len(row) for row in rows])).astype("<i8").tobytes())
    return Rows(directory)


def pack(lengths: np.ndarray, costs: np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of at most `row_length` positions that cost alike, each as the numbers of its documents.

    Args:
        lengths: int64 [documents], none above `row_length`.
        costs: [documents], at least 0.

    Example:
        >>> pack(np.array([4, 4, 3, 3]), np.array([5, 4, 0, 0]), row_length=8)
        [[0, 3], [1, 2]]
    """
    least = -(-int(lengths.sum()) // row_length)
    rows: list[list[int]] = [[] for _ in range(least)]
    room, spent = np.full(len(lengths), row_length), np.zeros(len(lengths))
    for number in np.lexsort((-lengths, -costs)):
        fitting = np.flatnonzero(room[: len(rows)] >= lengths[number])
        if not fitting.size:
            fitting = np.array([len(rows)])
            rows.append([])
        row = int(fitting[spent[fitting].argmin()])
        rows[row].append(int(number))
        room[row] -= lengths[number]
        spent[row] += costs[number]
    return [row for row in rows if row]


def in_even_parts(costs: Sequence[float]) -> list[int]:
    """An order whose halves, quarters and so on cost alike: dearest and cheapest are paired, then the pairs, and so on.

    Example:
        >>> in_even_parts([9, 1, 8, 2])
        [0, 1, 2, 3]
        >>> in_even_parts([9, 8, 2, 1])
        [0, 3, 1, 2]
    """
    groups = [(cost, [number]) for number, cost in enumerate(costs)]
    while len(groups) > 1:
        groups.sort(key=lambda group: -group[0])
        half = len(groups) // 2
        pairs = zip(groups[:half], groups[::-1][:half], strict=True)
        groups = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs] + groups[half : len(groups) - half]
    return groups[0][1]


def _mapped(path: Path) -> np.memmap:
    try:
        return np.memmap(path, "<i8", "r")
    except ValueError as error:
        raise ValueError(f"{path} must be whole, got: {error}; remove {path.parent} to go on") from error


def _paths(directory: Path) -> tuple[Path, Path]:
    return directory / "documents.bin", directory / "ends.bin"
