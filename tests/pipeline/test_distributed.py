"""The runtime on processes with gloo: the gradients of one process, and the end when one of them dies."""

from __future__ import annotations

import functools
import itertools
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

from longcat_model.model import LongcatNext
from longcat_model.pipeline.ir import Action, Kind, Placement, Schedule, v_placement
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.runtime import Runtime
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.split import Microbatch
from longcat_model.pipeline.stage import Border, Output
from longcat_model.pipeline.transport import Distributed, PipelineError

MICROBATCHES = 6
CASES = {f"{name}_{devices}": (name, devices) for devices in (2, 4, 8) for name in small.SCHEDULES}
KINDS = dict(zip(CASES, itertools.cycle(small.KINDS[1:]), strict=False))  # of a case's second step


def plan(case: str) -> tuple[Schedule, Placement]:
    name, devices = CASES[case]
    make, place = small.SCHEDULES[name]
    return make(devices, MICROBATCHES), place(devices)


def run_step(whole: LongcatNext, own: Runtime, end: Distributed, kind: str) -> None:
    """Announces on the way; if not of mixed microbatches, forwards are done again."""
    whole.zero_grad()
    told = end.announce((kind, end.device))

    def stands() -> bool:
        assert told() == [[(kind, device) for device in range(end.devices)]]
        if kind != "mixed":
            whole.zero_grad()
        return kind == "mixed"

    own.step(Microbatch.of(small.batches(MICROBATCHES, kind)), stands)
    own.share_tied(MICROBATCHES)


def run_cases(rank: Rank, folder: str) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        schedule, placement = plan(case)
        end = Distributed.connect(len(placement), [range(len(schedule))], store=rank.store, timeout_s=60)
        if end is None:
            continue
        whole, steps = small.model(), {}
        own = small.runtime(whole, lower(schedule, placement, MICROBATCHES), placement, end)
        for kind in ("mixed", KINDS[case]):  # shapes of the second step meet the first one's
            run_step(whole, own, end, kind)
            steps[kind] = small.gradients([whole])
        torch.save(steps, f"{folder}/{case}.{rank.rank}.pt")
        end.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one start of eight processes, each on the first few of them."""
    folder = tmp_path_factory.mktemp("gradients")
    launch(8, run_cases, str(folder))
    return folder


@functools.cache
def wanted(kind: str) -> dict[str, Tensor]:
    whole = small.model()
    small.one_process(whole, small.batches(MICROBATCHES, kind))
    return small.gradients([whole])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case: str, folder: Path) -> None:
    """To the bit, but for a table whose two uses are on two devices: each is summed over the microbatches first."""
    schedule, placement = plan(case)
    ranks = [torch.load(folder / f"{case}.{rank}.pt") for rank in range(len(schedule))]
    for kind in ("mixed", KINDS[case]):
        found: dict[str, Tensor] = {}
        for rank in ranks:
            for weight, grad in rank[kind].items():
                assert weight not in found or torch.equal(found[weight], grad)
                found[weight] = grad
        assert found.keys() == wanted(kind).keys()
        for weight, grad in found.items():
            if weight == "embed_tokens.weight" and placement[0] != placement[-1]:
                torch.testing.assert_close(grad, wanted(kind)[weight], rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(grad, wanted(kind)[weight]), weight


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


def send_in_vain(rank: Rank, folder: str) -> None:
    end = Distributed.connect(4, store=rank.store, timeout_s=20)
    assert end is not None
    if rank.rank == 0:
        until = time.monotonic() + 30
        with pytest.raises(PipelineError) as error:
            while time.monotonic() < until:  # the first may leave before it is known that nobody is there
                end.send(torch.ones(4), 1, Action(0, Kind.SEND_F, 3))
        Path(folder, "said").write_text(str(error.value))
    os._exit(0)


def test_a_send_to_a_rank_that_is_gone_names_it(tmp_path: Path) -> None:
    launch(2, send_in_vain, str(tmp_path))
    said = (tmp_path / "said").read_text()
    assert said.startswith("pipeline: device 0, 0SEND_F3 (microbatch 3) to device 1 stopped: ")


def stay(rank: Rank, folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    while True:
        time.sleep(1)


def launch_attentively(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins deaf to it
    launch(2, stay, folder)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_main_process(how: signal.Signals, tmp_path: Path) -> None:
    """Or they would train on, beside those of a restart."""
    main = multiprocessing.get_context("spawn").Process(target=launch_attentively, args=(str(tmp_path),))
    main.start()
    deadline = time.monotonic() + 60
    while len(ranks := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(ranks) == 2
    os.kill(main.pid or 0, how)
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    main.join()
