"""The runtime on processes with gloo: the gradients of one process, and the end when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed as dist
from torch import Tensor

from longcat_model.pipeline.ir import Placement, Schedule, loop_placement, v_placement
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.runtime import Runtime
from longcat_model.pipeline.schedules.linear import zb_h1
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.split import Microbatch
from longcat_model.pipeline.stage import Border, Output
from longcat_model.pipeline.transport import Distributed, PipelineError

MICROBATCHES = 6
CASES: dict[str, tuple[Schedule, Placement]] = {
    f"{name}_{devices}": (make(devices, MICROBATCHES), place(devices))
    for devices in (2, 4, 8)
    for name, make, place in (("v_half", v_half, v_placement), ("zb_h1", zb_h1, loop_placement))
}


def run_cases(rank: Rank, folder: str) -> None:
    torch.set_num_threads(1)
    for name, (schedule, placement) in CASES.items():
        end = Distributed.connect(len(placement), [range(len(schedule))], store=rank.store, timeout_s=60)
        if end is None:
            continue
        whole = small.model()
        own = small.runtime(whole, lower(schedule, placement, MICROBATCHES), placement, end)
        for _ in range(2):  # shapes of the second step meet the first one's
            whole.zero_grad()
            own.step(Microbatch.of(small.batches(MICROBATCHES)))
            own.share_tied(MICROBATCHES)
        torch.save(small.gradients([whole]), f"{folder}/{name}.{rank.rank}.pt")
        end.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one start of eight processes, each on the first few of them."""
    folder = tmp_path_factory.mktemp("gradients")
    launch(8, run_cases, str(folder))
    return folder


@pytest.fixture(scope="module")
def wanted() -> dict[str, Tensor]:
    whole = small.model()
    small.one_process(whole, small.batches(MICROBATCHES))
    return small.gradients([whole])


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(name: str, folder: Path, wanted: dict[str, Tensor]) -> None:
    schedule, placement = CASES[name]
    found: dict[str, Tensor] = {}
    for rank in range(len(schedule)):
        for weight, grad in torch.load(folder / f"{name}.{rank}.pt").items():
            assert weight not in found or torch.equal(found[weight], grad)
            found[weight] = grad
    assert found.keys() == wanted.keys()
    for weight, grad in found.items():
        if weight == "embed_tokens.weight" and placement[0] != placement[-1]:
            torch.testing.assert_close(grad, wanted[weight], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(grad, wanted[weight]), weight


class Mortal:
    """A stage that takes its process with it, in the forward of microbatch 2 on stage 1."""

    def __init__(self, stage: int, stages: int) -> None:
        self.stage, self.is_last = stage, stage == stages - 1
        self.weight = torch.nn.Parameter(torch.eye(2))

    def __call__(self, hidden: Tensor | None, microbatch: int) -> Output:
        if (self.stage, microbatch) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        out = torch.nn.functional.linear(torch.ones(1, 2) if hidden is None else hidden, self.weight)
        return Output(None, out.sum()) if self.is_last else Output(out)

    def takes(self, microbatch: int) -> Border:
        return Border((1, 2), torch.float32, torch.device("cpu"))

    gives = takes


def die(rank: int, port: int, words: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("groups", store), rank=rank, world_size=4)
    placement = v_placement(4)
    end = Distributed.connect(8, store=dist.PrefixStore("pipeline", store), timeout_s=20)
    own = {s: Mortal(s, 8) for s, home in enumerate(placement) if home == rank}
    try:
        Runtime(lower(v_half(4, 4), placement, 4), placement, own, end).step(range(4))
    except PipelineError as error:
        words.put((rank, str(error)))
        words.close()
        words.join_thread()
        os._exit(1)  # as a crash does: nobody says goodbye


def test_when_a_rank_dies_all_others_stop_and_name_it() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    words: Any = context.Queue()
    ranks = [context.Process(target=die, args=(rank, store.port, words)) for rank in range(4)]
    began = time.monotonic()
    for process in ranks:
        process.start()
    said = dict(words.get(timeout=60) for _ in range(3))
    for process in ranks:
        process.join(30)
    assert time.monotonic() - began < 60
    assert sorted(said) == [0, 2, 3] and ranks[1].exitcode == -signal.SIGKILL
    for message in said.values():
        assert "from device 1 stopped" in message and "(microbatch " in message
