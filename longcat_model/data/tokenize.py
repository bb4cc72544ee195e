"""`longcat tokenize`: JSON lines into shards, once, by worker processes; a run that was stopped goes on.

Every document is checked before anything is written, with all codes 0 (see `Reader.blind`): what is wrong is told of
all documents at once, before hours of encoding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from longcat_model import config
from longcat_model.data import shards
from longcat_model.data.documents import Reader
from longcat_model.data.media import Media, changed_media, write_media
from longcat_model.data.shards import Columns, Index, Shards
from longcat_model.data.sources import Line, Sources
from longcat_model.data.workers import in_order
from longcat_model.sequence import Document
from longcat_model.system import Tokenizers, read_sizes

TOLD = 20  # bad documents that an error lists
MEDIA = "media"  # of an index: the digest of all image and sound files

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    longest: int = 32_768  # positions of a document, at most
    seed: int = 0  # of how far speech lags behind its transcript
    shard_documents: int = 1024


@dataclass(frozen=True)
class Job:
    """Which documents are tokenized, by what."""

    sources: Sources
    system_directory: Path
    settings: Settings
    made_from: dict[str, Any]  # all that the shards depend on, but for what media files hold

    @classmethod
    def of(cls, paths: Sequence[Path], system_directory: Path, settings: Settings) -> Job:
        """Reads the files through, to count their documents and to know them again.

        Args:
            paths: JSON lines files; the format is in `documents`, and paths in it are relative to its file.
            system_directory: a trained system, whose tokenizers are used.

        Raises:
            ValueError: no system, a file that cannot be read, or no document in any.
        """
        if min(settings.longest, settings.shard_documents) < 1:
            raise ValueError(f"tokenize: longest and shard_documents must be at least 1, got {settings}")
        if not paths:
            raise ValueError("tokenize: data must be one file or more, got none")
        sources = Sources.of(paths)
        files = [[str(path.resolve()), digest] for path, digest in zip(paths, sources.digests, strict=True)]
        made_from = {"documents": files, "tokenizers": tokenizers_digest(system_directory)} | asdict(settings)
        return cls(sources, system_directory, settings, made_from)

    @property
    def digest(self) -> str:
        """That of the shards."""
        return Index(self.made_from, None).digest

    def claimed(self, out: Path) -> Index | None:
        """The index in `out`, if there is one.

        Raises:
            ValueError: it is of other shards, or missing where there are shards.
        """
        index = shards.read_index(out)
        if index is None and shards.shard_path(out, 0).exists():
            raise ValueError(f"tokenize: {out} holds shards but no index of them; choose another directory")
        changed = [] if index is None else [n for n, value in self.made_from.items() if index.made_from.get(n) != value]
        if changed:
            raise ValueError(
                f"tokenize: {out} holds shards of other {', '.join(sorted(changed))}; choose another directory"
            )
        return index


def tokenize(job: Job, out: Path, *, workers: int = 0) -> Shards:
    """Writes the documents as shards to `out`; shards that are there already stay.

    Args:
        workers: processes; 0: this one alone. The shards are the same.

    Raises:
        ValueError: bad documents (each told by file and line), an `out` that holds other shards, or an image or sound
            file that has changed since they were begun.
        ChildProcessError: a worker was killed.
    """
    if workers < 0:
        raise ValueError(f"tokenize: workers must be at least 0, got {workers}")
    index = job.claimed(out)
    if index is None:
        found = _check(job, workers)
        out.mkdir(parents=True, exist_ok=True)
        index = Index(job.made_from | {MEDIA: write_media(shards.media_path(out), found)}, None)
        shards.write_index(out, index)
    elif changed := changed_media(shards.media_path(out)):
        raise ValueError(f"tokenize: {out} holds shards of what {changed} was before; choose another directory")
    if index.documents is None:
        _encode(job, index, out, workers)
    return Shards(out)


def described(index: Index) -> dict[str, str | None]:
    """What documents shards hold, as a training notes it: the `digest` of their job, and that of their media files."""
    others = {name: value for name, value in index.made_from.items() if name != MEDIA}
    return {"documents": Index(others, None).digest, MEDIA: index.made_from.get(MEDIA)}


def tokenizers_digest(system_directory: Path) -> str:
    """Of all that the ids of a document depend on, and nothing else: not of the language model's weights."""
    sizes = config.to_dict(read_sizes(system_directory))
    digest = hashlib.sha256(json.dumps([sizes[name] for name in ("vocabulary", "vision", "audio")]).encode())
    for name in ("vision", "audio"):
        path = system_directory / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                for key in sorted(file.keys()):  # a file's own order, and so its bytes, may differ
                    digest.update(key.encode())
                    digest.update(file.get_tensor(key).reshape(-1).view(torch.uint8).numpy())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"system: {path} must be a readable safetensors file, got: {error}") from error
    return digest.hexdigest()


def _check(job: Job, workers: int) -> list[Media]:
    """The files that all documents together need.

    Raises:
        ValueError: documents cannot be used.
    """
    bad, listed, media = 0, [], dict[str, Media]()
    for found in _each(_Check(read_sizes(job.system_directory), job.settings), job, 0, workers, "check documents"):
        if isinstance(found, str):
            bad += 1
            listed += [found] if bad <= TOLD else []
        else:
            media |= {one.path: one for one in found}
    if bad:
        more = [f"and {bad - TOLD} more"] if bad > TOLD else []
        first = f"tokenize: {bad} of {job.sources.documents} documents cannot be used:"
        raise ValueError("\n  ".join([first, *listed, *more]))
    return list(media.values())


def _encode(job: Job, index: Index, out: Path, workers: int) -> None:
    size = job.settings.shard_documents
    whole = next(number for number in count() if not shards.shard_path(out, number).exists())
    start = min(whole * size, job.sources.documents)
    documents = _each(_Encode(job.system_directory, job.settings), job, start, workers, "tokenize documents")
    while found := list(islice(documents, size)):
        if bad := [told for told in found if isinstance(told, str)]:
            raise ValueError(f"tokenize: a file was changed meanwhile: {bad[0]}")
        shards.write_shard(out, whole, [columns for columns in found if not isinstance(columns, str)])
        whole += 1
    shards.finish(out, index.made_from, whole)


@dataclass(frozen=True)
class _Check:
    """The media files of a line, or what is wrong with it."""

    sizes: config.Model
    settings: Settings

    def __call__(self, line: Line) -> list[Media] | str:
        media: list[Media] = []
        reader = Reader.blind(self.sizes, self.settings.longest, lambda path: media.append(Media.of(path)))
        found = _read(reader, line, self.settings.seed)
        return found if isinstance(found, str) else media


@dataclass(frozen=True)
class _Encode:
    """A line as a shard has it, or what is wrong with it."""

    system_directory: Path
    settings: Settings

    @cached_property
    def reader(self) -> Reader:
        return Reader.of(Tokenizers.load(self.system_directory), self.settings.longest)

    def __call__(self, line: Line) -> Columns | str:
        found = _read(self.reader, line, self.settings.seed)
        return found if isinstance(found, str) else shards.columns(found)


def _read(reader: Reader, line: Line, seed: int) -> Document | str:
    generator = torch.Generator().manual_seed((seed << 32) + line.number)
    try:
        return reader.document(line.value(), line.path.parent, generator)
    except ValueError as error:
        return f"{line.where}: {error}"


def _each(work: Callable[[Line], T], job: Job, start: int, workers: int, what: str) -> Iterator[T]:
    """`work` of every document from number `start` on, in order, with a progress bar."""
    with tqdm(total=job.sources.documents, initial=start, desc=what, unit="document") as bar:
        for result in in_order(work, job.sources.lines(start), workers):
            bar.update()
            yield result
