"""A run's directory: what was finished, how long it took, how much memory it needed."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from longcat_model import files
from longcat_model.training.rates import resident_bytes


class Workspace:
    """Results of finished steps under one directory, so that a rerun goes on where the last one stopped.

    Raises:
        ValueError: the directory holds a run with other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], *, fresh: bool = False) -> None:
        self.directory = directory
        if fresh and directory.exists():
            _remove_run(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.settings = json.loads(json.dumps(settings))
        found = self._read("settings.json")
        if found is None:
            self.write("settings.json", self.settings)
            self.write("commits.json", [commit()])
        elif found != self.settings:
            changed = sorted(k for k in {*found, *self.settings} if found.get(k) != self.settings.get(k))
            raise ValueError(
                f"demo: {directory} holds a run with other settings ({', '.join(changed)}); "
                "start over with --fresh, or choose another directory with --out"
            )

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returned, from `<name>.pt` if an earlier run finished it."""
        path = self.directory / f"{name}.pt"
        if path.exists():
            return _load(path)
        with self.timed(name):
            result = make()
        _save(path, result)
        return result

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the block's wall time to the record of step `name`, over interrupted runs too."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.seconds()
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began
            self.write("seconds.json", seconds)
            self.write("peak_rss_bytes.json", max(peak_rss_bytes(), self._read("peak_rss_bytes.json") or 0))

    def commits(self) -> list[str | None]:
        """The commit that began the run, then any later one that went on with it."""
        known: list[str | None] = self._read("commits.json") or []
        if commit() not in known:
            known.append(commit())
            self.write("commits.json", known)
        return known

    def seconds(self) -> dict[str, float]:
        return dict(self._read("seconds.json") or {})

    def peak_rss_bytes(self) -> int:
        return max(peak_rss_bytes(), self._read("peak_rss_bytes.json") or 0)

    def write(self, name: str, value: Any) -> None:
        """Writes JSON whole or not at all."""
        files.write_json(self.directory / name, value)

    def _read(self, name: str) -> Any:
        path = self.directory / name
        return json.loads(path.read_text()) if path.exists() else None


def peak_rss_bytes() -> int:
    """High-water mark of resident memory of this process or of its largest child."""
    return max(map(resident_bytes, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def commit() -> str | None:
    """The git commit of the source tree, with `-dirty` if it was changed; None outside a checkout."""
    where = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _save(path: Path, result: dict[str, Any]) -> None:
    """Writes tensors and plain data; an interrupted call leaves the file that was there."""
    with files.replacing(path) as temporary:
        torch.save(result, temporary)


def _load(path: Path) -> dict[str, Any]:
    """Reads what `_save` wrote, onto the CPU, without executing anything in the file."""
    try:
        result: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise ValueError(f"demo: {path} must be whole, got: {error}; start over with --fresh") from error
    return result


def _remove_run(directory: Path) -> None:
    # Only a directory that this class made is ever deleted; others may well have a settings.json, too.
    names = {path.name for path in directory.iterdir()}
    made_here = {"settings.json", "seconds.json"} <= names or names <= {"settings.json", "speech"}
    if not made_here:
        raise ValueError(f"demo: --fresh must name an earlier run, but {directory} holds other files")
    shutil.rmtree(directory)
