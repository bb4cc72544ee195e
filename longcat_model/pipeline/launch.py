"""Starts the ranks of a pipeline, or joins those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn


class Rank(NamedTuple):
    """This process among its fellows; torch.distributed is ready."""

    rank: int
    ranks: int
    store: Any  # torch.distributed.Store, kept by none of the ranks


def launch(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work(rank, *arguments)` on all ranks and returns when every one is done.

    Under torchrun this process is one of the ranks, and restarts, rendezvous and several machines are torchrun's.
    Elsewhere processes are started on this machine: `work` must be a module's function and the arguments picklable.
    With a GPU for each rank the backend is NCCL, else gloo; the machine's threads are divided among the ranks.

    Raises:
        ValueError: torchrun started another number of ranks.
        ChildProcessError: a rank failed or was killed; the message is its own.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, rank, found = next(iter(rendezvous("env://")))
        if found != ranks:
            raise ValueError(f"pipeline: torchrun must start {ranks} ranks, got {found}")
        _run(store, rank, ranks, work, arguments)
        return
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // ranks)
    try:
        spawn(_child, (store.port, ranks, threads, work, arguments), nprocs=ranks)
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise ChildProcessError(f"pipeline: rank {error.error_index} failed: {_last_line(error)}") from error


def _child(rank: int, port: int, ranks: int, threads: int, work: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(threads)
    store = TCPStore("127.0.0.1", port, is_master=False)
    _run(store, rank, ranks, work, arguments)


def _run(store: Any, rank: int, ranks: int, work: Callable[..., None], arguments: Any) -> None:
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if has_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    groups = PrefixStore("groups", store)
    dist.init_process_group("nccl" if has_gpus else "gloo", store=groups, rank=rank, world_size=ranks)
    work(Rank(rank, ranks, PrefixStore("pipeline", store)), *arguments)
    dist.destroy_process_group()


def _last_line(error: Exception) -> str:
    """Of a child's traceback, which ends with what was raised."""
    return str(error).strip().split("\n")[-1]
