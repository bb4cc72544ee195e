"""Work done by other processes, in order: torch's `DataLoader`, whose processes it keeps in bounds and ends."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from longcat_model.processes import end_with_main

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _ByItem(Generic[Item, Result]):
    """A `DataLoader` asks its data set for what its sampler gives: here the items, so that nobody holds all of them."""

    work: Callable[[Item], Result]

    def __getitem__(self, item: Item) -> Result:
        return self.work(item)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`work` of each item, in their order; workers are few items ahead.

    Args:
        work: an instance of a module's class, picklable.
        workers: processes; 0: this one does it when asked.

    Raises:
        ChildProcessError: a worker was killed, or met with an error of torch's or of the system's.
    """
    loader: DataLoader[Result] = DataLoader(
        _ByItem(work),  # type: ignore[arg-type]
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context=_context(type(work).__module__) if workers else None,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # else it draws from everybody's
    )
    results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # the latter two where it was killed while it handed over
            if not workers:
                raise
            raise ChildProcessError(f"a worker process failed: {error}") from error
        yield result


def _context(module: str) -> BaseContext:
    """Workers that import `module` once for all of them, where a process can be forked before it has threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module])
    return context


def _begin(worker: int) -> None:
    end_with_main()


def _as_it_is(result: Result) -> Result:
    return result
