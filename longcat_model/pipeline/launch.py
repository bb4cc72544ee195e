"""Starts the ranks of a pipeline, or joins those that torchrun started."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from longcat_model.processes import end_with_main


class Rank(NamedTuple):
    """This process among its fellows; torch.distributed is ready."""

    rank: int
    ranks: int
    store: Any  # torch.distributed.Store, kept by none of the ranks
    device: torch.device  # a GPU of its own where the machine has one for each rank


def is_torchruns() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_ranks(ranks: int) -> None:
    """Raises ValueError where torchrun started another number of ranks: each would do the work of all."""
    if is_torchruns() and (found := int(os.environ["WORLD_SIZE"])) != ranks:
        raise ValueError(f"pipeline: torchrun must start {ranks} ranks, got {found}")


def launch(ranks: int, work: Callable[..., None], *arguments: Any) -> bool:
    """Runs `work(rank, *arguments)` on all ranks and returns when every one is done.

    Under torchrun this process is one of the ranks, and restarts, rendezvous and several machines are torchrun's.
    Elsewhere processes are started on this machine: `work`, of a module, and the arguments must be picklable.
    Tensors on GPUs go through NCCL, others through gloo; the machine's threads are divided among the ranks.

    Returns:
        Whether this process should go on with what is done once: True, but for torchrun's ranks other than 0.

    Raises:
        ValueError: torchrun started another number of ranks.
        ChildProcessError: a rank failed or was killed; the message is its own.
    """
    check_ranks(ranks)
    if is_torchruns():
        store, rank, _ = next(iter(rendezvous("env://")))
        _run(store, rank, ranks, work, arguments)
        return bool(rank == 0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // ranks)
    # Passed as they are, tensors would each be shared through an open file, or bring the whole storage they view.
    payload = io.BytesIO()
    torch.save((work, arguments), payload)
    children = spawn(_child, (store.port, ranks, threads, payload.getvalue()), nprocs=ranks, join=False)
    try:
        while not children.join():
            pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise ChildProcessError(f"pipeline: rank {error.error_index} failed: {_last_line(error)}") from error
    finally:  # interrupted, this process would else wait, at its end, for ranks that go on
        for process in children.processes:
            process.kill()
    return True


def _child(rank: int, port: int, ranks: int, threads: int, payload: bytes) -> None:
    end_with_main()
    torch.set_num_threads(threads)
    store = TCPStore("127.0.0.1", port, is_master=False)
    work, arguments = torch.load(io.BytesIO(payload), weights_only=False)
    _run(store, rank, ranks, work, arguments)
    gc.freeze()  # or the interpreter, before it ends, searches all of torch's objects for cycles: seconds


def _run(store: Any, rank: int, ranks: int, work: Callable[..., None], arguments: Any) -> None:
    here, number = (
        int(os.environ.get(name, plain)) for name, plain in (("LOCAL_WORLD_SIZE", ranks), ("LOCAL_RANK", rank))
    )
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= here:
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    groups, backend = PrefixStore("groups", store), "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=groups, rank=rank, world_size=ranks)
    work(Rank(rank, ranks, PrefixStore("pipeline", store), device), *arguments)
    dist.destroy_process_group()


def _last_line(error: Exception) -> str:
    """Of a child's traceback, which ends with what was raised."""
    return str(error).strip().split("\n")[-1]
