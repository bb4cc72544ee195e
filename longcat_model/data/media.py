"""Image and sound files that shards were made from: what they were then, so that a change is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from longcat_model.files import replacing, require

BLOCK = 1 << 20  # bytes read at a time


class Media(NamedTuple):
    """A file as it was. Only where size or time differ is its content looked at again, as git does."""

    path: str  # absolute
    size: int  # bytes
    changed_ns: int  # time of the last change
    digest: str

    @classmethod
    def of(cls, path: Path) -> Media:
        """Raises OSError where the file cannot be read."""
        found = path.stat()
        return cls(str(path.resolve()), found.st_size, found.st_mtime_ns, _digest(path))

    def has_changed(self) -> bool:
        """Whether the file has another content now; one that is gone, as a user may tidy up, has not."""
        path = Path(self.path)
        try:
            found = path.stat()
            if found.st_size != self.size:
                return True
            return found.st_mtime_ns != self.changed_ns and _digest(path) != self.digest
        except OSError:
            return False


def write_media(path: Path, media: Iterable[Media]) -> str:
    """Writes a line for each, whole or not at all; gives the digest of all names and contents."""
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("w") as file:
        for one in media:
            digest.update(json.dumps([one.path, one.digest]).encode())
            file.write(json.dumps(one) + "\n")
    return digest.hexdigest()


def changed_media(path: Path) -> str | None:
    """The first file of those in `path` whose content is another one now."""
    with path.open("rb") as file:
        found = (_media(path, number, line) for number, line in enumerate(file, 1))
        return next((one.path for one in found if one.has_changed()), None)


def _media(path: Path, number: int, line: bytes) -> Media:
    """Raises ValueError where the line is none that `write_media` writes."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = line
    kinds = [type(value) for value in found] if isinstance(found, list) else []
    require(path, f"line {number}", kinds == [str, int, int, str], "[path, size, time, digest]", found)
    return Media(*found)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
