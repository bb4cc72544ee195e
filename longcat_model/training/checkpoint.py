"""Checkpoints of a run: every rank writes its own tensors while training goes on, any number of ranks reads them.

    <directory>/200/          all that is needed to go on after step 200, by torch.distributed.checkpoint
    <directory>/250.partial/  being written, or left behind by a run that was killed

A checkpoint gets its name when the last byte of the last rank is on the disk, and only then is the one before deleted:
whatever is interrupted, the newest complete one is there. Tensors go by their names in the whole model, so that who
wrote what does not matter to who reads it. All ranks need the same file system.

Like every torch.distributed.checkpoint, one holds a pickle: read none that you do not trust.
"""

from __future__ import annotations

import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

PARTIAL = ".partial"
Spread = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_UNWRITABLE = (OSError, RuntimeError, CheckpointException)
_DAMAGED = (  # a damaged pickle may raise almost anything
    *_UNWRITABLE, EOFError, AssertionError, ValueError, LookupError, AttributeError, ImportError, TypeError,
    pickle.UnpicklingError,
)  # fmt: skip


class Checkpoints:
    """Those of one run, of which the last complete one is kept; leaving the context waits for what is being written.

    Args:
        directory: of the run; one checkpoint is a directory in it.
        group: whoever writes together, over the CPU; used by nobody else. None: this process alone.
        leads: of a group, one process does; it names what is complete.
        spread: gives tensors on the CPU of which others have other rows as DTensors, in the same memory.
    """

    def __init__(
        self,
        directory: Path,
        group: dist.ProcessGroup | None = None,
        *,
        leads: bool = True,
        spread: Spread = dict,
    ) -> None:
        self.directory, self.group, self.leads, self.spread = directory, group, leads, spread
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if leads:
            for left in directory.glob(f"*{PARTIAL}"):
                shutil.rmtree(left)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._join()
        if exception[0] is None:
            self.check()

    def latest(self) -> int | None:
        """The step after which the last complete checkpoint was written."""
        found = [max(_steps(self.directory), default=None)]
        if self.group is not None:  # the leader's word, as files may reach others late
            dist.broadcast_object_list(found, dist.get_global_rank(self.group, 0), group=self.group)
        return found[0]

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copies `tensors` and returns; a thread writes them, after the checkpoint before is complete.

        Every process of the group calls it, with its own; of what several have, one writes it.

        Raises:
            ValueError: the checkpoint before could not be written.
        """
        if self.group is None and not self.leads:
            return
        self._join()
        self.check()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._thread = threading.Thread(target=self._write, args=(step, self.spread(copies)), daemon=True)
        self._thread.start()

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        partial, complete = self.directory / f"{step}{PARTIAL}", self.directory / str(step)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            with _without_warning():
                writer = FileSystemWriter(partial, per_thread_copy_ahead=0)  # copies from a device: there are none
                save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            if self.leads:
                _finish(partial, complete)
        except _UNWRITABLE as error:
            self._failure = f"checkpoint: {partial} could not be written{self._told(error)}; the one before it stays"

    def _told(self, error: BaseException) -> str:
        """By whom, and why."""
        ranks = {} if self.group is None else {dist.get_rank(): error}
        if isinstance(error, CheckpointException):  # of all ranks, told to all
            ranks = {rank: failure[0] for rank, failure in error.failures.items()}
        if self.group is None:
            return f": {_line(next(iter(ranks.values()), error))}"
        return " by " + ", ".join(f"rank {rank}: {_line(one)}" for rank, one in sorted(ranks.items()))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises ValueError if a checkpoint could not be written; costs nothing, so that every step may ask."""
        if self._failure is not None:
            message, self._failure = self._failure, None
            raise ValueError(message)

    def reader(self, step: int) -> Reader:
        return Reader(self.directory / str(step), self.spread)


class Reader:
    """One complete checkpoint.

    Attributes:
        shapes: of every tensor that it holds, by name.

    Raises:
        ValueError: the checkpoint is missing or damaged.
    """

    def __init__(self, path: Path, spread: Spread = dict) -> None:
        self.path, self.spread = path, spread
        with self._telling():
            entries = FileSystemReader(path).read_metadata().state_dict_metadata
            self._entries = {name: one for name, one in entries.items() if isinstance(one, TensorStorageMetadata)}
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].properties.dtype

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Reads these tensors, and no others, from the files into their memory."""
        near = {name: x if x.is_cpu else torch.empty_like(x, device="cpu") for name, x in tensors.items()}
        with self._telling(), _without_warning():
            load(self.spread(near), storage_reader=FileSystemReader(self.path), no_dist=True)
        for name, tensor in tensors.items():
            if not tensor.is_cpu:
                tensor.copy_(near[name])

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGED as error:
            raise ValueError(f"checkpoint: {self.path} must be a whole checkpoint, got: {_line(error)}") from error


def _steps(directory: Path) -> list[int]:
    return [int(path.name) for path in directory.glob("*") if path.name.isdecimal()]


def _finish(partial: Path, complete: Path) -> None:
    earlier = [step for step in _steps(complete.parent) if step != int(complete.name)]
    if complete.exists():  # a process of this run that was given up for dead was quicker: it wrote the same
        shutil.rmtree(partial)
    else:
        partial.rename(complete)
    for step in earlier:
        shutil.rmtree(complete.parent / str(step))


@contextmanager
def _without_warning() -> Iterator[None]:
    """That one process writes and reads alone is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[-1]
