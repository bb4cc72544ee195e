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

LOCK = "lock"


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
        if not (directory / "settings.json").exists():
            self.write("settings.json", self.settings)
            self.write("commits.json", [commit()])
        elif (found := files.read_object(directory / "settings.json")) != self.settings:
            changed = sorted(k for k, value in self.settings.items() if found.get(k) != value) or ["more of them"]
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
            self.write("peak_rss_bytes.json", self.peak_rss_bytes())

    def commits(self) -> list[str | None]:
        """The commit that began the run, then any later one that went on with it."""
        known: list[str | None] = self._read("commits.json", [], _are_commits, "a list of commits")
        if commit() not in known:
            known.append(commit())
            self.write("commits.json", known)
        return known

    def seconds(self) -> dict[str, float]:
        return dict(self._read("seconds.json", {}, _are_seconds, "an object of numbers"))

    def peak_rss_bytes(self) -> int:
        return max(peak_rss_bytes(), self._read("peak_rss_bytes.json", 0, _is_number, "a number"))

    def write(self, name: str, value: Any) -> None:
        """Writes JSON whole or not at all."""
        files.write_json(self.directory / name, value)

    def _read(self, name: str, nothing: Any, is_valid: Callable[[Any], bool], rule: str) -> Any:
        path = self.directory / name
        found = files.read_json(path) if path.exists() else nothing
        files.require(path, "it", is_valid(found), rule, found)
        return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_seconds(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_commits(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str | None) for one in value)


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


def check_removable(directory: Path) -> None:
    """Raises ValueError unless a `Workspace` made the directory; others may well have a settings.json, too."""
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    made_here = {"settings.json", "seconds.json"} <= names or names <= {"settings.json", "speech", LOCK}
    if not made_here:
        raise ValueError(f"demo: --fresh must name an earlier run, but {directory} holds other files")


def _remove_run(directory: Path) -> None:
    """All but the lock, which this process may hold."""
    check_removable(directory)
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
