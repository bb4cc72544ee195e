"""JSON lines files as a stream of lines, each with where it stands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One document, unread."""

    number: int  # of the document, from 0, over all files
    path: Path
    line: int  # from 1
    content: bytes

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.line}"

    def value(self) -> Any:
        """The line's JSON.

        Raises:
            ValueError: it has none.
        """
        try:
            return json.loads(self.content)
        except RecursionError as error:
            raise ValueError("JSON must not be nested so deep") from error


@dataclass(frozen=True)
class Sources:
    """Files that were read once, to count and to know them again.

    Args:
        paths: JSON lines files; empty lines are none of their documents.
        digests: of each file's content.
        documents: of all files.
    """

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    documents: int

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Sources:
        """Reads the files through.

        Raises:
            ValueError: a file cannot be read, or all together have no document.
        """
        digests, documents = [], 0
        for path in paths:
            digest = hashlib.sha256()
            for line in _lines(path):
                digest.update(line)
                documents += bool(line.strip())
            digests.append(digest.hexdigest())
        if not documents:
            raise ValueError(f"data must hold at least one document, got none in {', '.join(map(str, paths))}")
        return cls(tuple(paths), tuple(digests), documents)

    def lines(self, start: int = 0) -> Iterator[Line]:
        """Documents from number `start` on."""
        return islice(self._all(), start, None)

    def _all(self) -> Iterator[Line]:
        number = 0
        for path in self.paths:
            for line, content in enumerate(_lines(path), 1):
                if content.strip():
                    yield Line(number, path, line, content)
                    number += 1


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise ValueError(f"data must be a readable text file, got {path}: {error}") from error
