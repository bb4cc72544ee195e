"""Starts the ranks of a pipeline, or joins those that torchrun started."""

from __future__ import annotations

import os
import pickle
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


def launch(ranks: int, work: Callable[..., None], *arguments: Any) -> bool:
    """Runs `work(rank, *arguments)` on all ranks and returns when every one is done.

    Under torchrun this process is one of the ranks, and restarts, rendezvous and several machines are torchrun's.
    Elsewhere processes are started on this machine: `work` must be a module's function and the arguments picklable.
    With a GPU for each rank the backend is NCCL, else gloo; the machine's threads are divided among the ranks.

    Returns:
        Whether this process should go on with what is done once: True, but for torchrun's ranks other than 0.

    Raises:
        ValueError: torchrun started another number of ranks.
        ChildProcessError: a rank failed or was killed; the message is its own.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, rank, found = next(iter(rendezvous("env://")))
        if found != ranks:
            raise ValueError(f"pipeline: torchrun must start {ranks} ranks, got {found}")
        _run(store, rank, ranks, work, arguments)
        return bool(rank == 0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // ranks)
    # torch's own pickling would share tensors with the children, each through an open file.
    payload = pickle.dumps((work, arguments))
    try:
        spawn(_child, (store.port, ranks, threads, payload), nprocs=ranks)
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise ChildProcessError(f"pipeline: rank {error.error_index} failed: {_last_line(error)}") from error
    return True


def _child(rank: int, port: int, ranks: int, threads: int, payload: bytes) -> None:
    torch.set_num_threads(threads)
    store = TCPStore("127.0.0.1", port, is_master=False)
    work, arguments = pickle.loads(payload)
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
