"""The pipeline's runtime: against its plan, against torch's V schedules, against one process.

`python benchmarks/run.py pipeline` measures all parts; `--case NAME` those whose name contains NAME. Ranks are
processes with gloo, one thread each. Sleeping stages take their time and no processor, so that four ranks fit on two
cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longcat_kernels import WeightGrads, defer_weight_grads
from longcat_model import config
from longcat_model.backbone.attention import Context
from longcat_model.backbone.moe import ShortcutLayer
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import Placement, Schedule, v_placement
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.runtime import Runtime
from longcat_model.pipeline.schedules.v import v_half, v_zb
from longcat_model.pipeline.simulate import bubble, peak_bytes, simulate, unit_bytes
from longcat_model.pipeline.transport import Distributed, InProcess, Transport
from longcat_model.pipeline.validation import Norms, PostValidation, gradient_norms
from peers_pipeline import SCHEDULES, TorchPipeline
from peers_schedules import torch_dualpipev, torch_zbv
from pipeline_memory import memory
from pipeline_stages import DURATIONS, SHORT, SIZE, OurStage, Sleeper, Watched, blocks, loss_of, parameters

TESTS = ("tests/pipeline", "tests/test_deferred.py")
KEEPING_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_MMAP_THRESHOLD_": str(1 << 34)}
ORDERS = {"ours, V-Half": v_half, "ours, V-ZB": v_zb}
PEERS = {"torch ZBV": torch_zbv, "torch DualPipeV": torch_dualpipev}
WIDTH, TOKENS, BLOCKS, MICROBATCHES = 256, 128, 2, 8  # of the real stages, on two ranks

Table = list[dict[str, Any]]


def on_ranks(ranks: int, work: Callable[..., None], *arguments: Any) -> Any:
    """Runs `work(rank, file, *arguments)` on all ranks and gives what rank 0 wrote into the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        launch(ranks, work, str(file), *arguments)
        return json.loads(file.read_text())


def connected(rank: Rank, stages: int) -> Distributed:
    torch.set_num_threads(1)
    end = Distributed.connect(stages, store=rank.store)
    assert end is not None  # all ranks are one pipeline
    return end


def our_runtime(schedule: Schedule, placement: Placement, make: Callable[[int], nn.Module], end: Transport) -> Runtime:
    last = len(placement) - 1
    own = {s: OurStage(make(s), s == last) for s, device in enumerate(placement) if device == end.device}
    return Runtime(schedule, placement, own, end)


def timed(end: Distributed, step: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Seconds of the median step, from when all ranks begin until the last one ends, and what the last one gave.

    One more comes first.
    """
    seconds, found = [], None
    for _ in range(repeats + 1):
        end.gather(None)
        began = time.perf_counter()
        found = step()
        seconds.append(max(end.gather(time.perf_counter() - began)))
    return statistics.median(seconds[1:]), found


def sleeping(ranks: int, microbatches: int) -> Table:
    """Wall time of a step of sleeping stages by its simulated makespan, and peaks in stage units."""
    found = on_ranks(ranks, sleep_on_rank, microbatches)
    return [{"ranks": ranks, "microbatches": microbatches, **row} for row in found]


def sleep_on_rank(rank: Rank, file: str, microbatches: int) -> None:
    ranks, end, rows = rank.ranks, connected(rank, 2 * rank.ranks), []
    placement, data = v_placement(ranks), torch.zeros(microbatches * SIZE[0], SIZE[1])
    for name, make in ORDERS.items():
        plan = make(ranks, microbatches)
        runtime = our_runtime(lower(plan, placement, microbatches), placement, lambda stage: Sleeper(), end)
        wall, result = timed(end, partial(runtime.step, data.chunk(microbatches)), 2)
        rows.append({"schedule": name, **timing(plan, wall), "peak, units": max(end.gather(result.peak_live)) / 2})
    for name in SCHEDULES:
        plan = PEERS[name](ranks, microbatches) or ()
        modules = {s: Sleeper() for s, device in enumerate(placement) if device == rank.rank}
        peer = TorchPipeline(name, rank.rank, ranks, modules, data, microbatches)
        rows.append({"schedule": name, **timing(plan, timed(end, peer.step, 2)[0]), "peak, units": None})
    finish(end, file, rows)


def timing(plan: Schedule, wall: float) -> dict[str, float]:
    """Of a V schedule of sleepers: as it was, and as planned."""
    placement, microbatches = v_placement(len(plan)), 1 + max(action.microbatch for action in plan[0])
    costs = uniform(len(placement), microbatches, *DURATIONS)
    makespan = simulate(plan, placement, costs).makespan
    return {
        "wall, s": wall,
        "by plan": wall / makespan,
        "bubble, %": 100 * (1 - 2 * microbatches * sum(DURATIONS) / wall),
        "bubble planned, %": 100 * bubble(makespan, placement, costs),
        "peak planned, units": max(peak_bytes(plan, costs)) / unit_bytes(costs, len(plan)),
    }


def post_validation(ranks: int, microbatches: int) -> Table:
    """Time from step to step where ranks wait for the gradient's norm, and where they do not."""
    found = on_ranks(ranks, post_validate_on_rank, microbatches)
    return [{"ranks": ranks, "microbatches": microbatches, **row} for row in found]


def post_validate_on_rank(rank: Rank, file: str, microbatches: int) -> None:
    ranks, end, rows = rank.ranks, connected(rank, 2 * rank.ranks), []
    batch, steps, placement = [torch.zeros(SIZE)] * microbatches, 3, v_placement(ranks)
    for name, make in ORDERS.items():
        schedule = lower(make(ranks, microbatches), placement, microbatches)
        runtime = our_runtime(schedule, placement, lambda stage: Sleeper(SHORT), end)
        own = {str(s): weight for s, stage in runtime.stages.items() for weight in parameters(stage)}
        optimizer = torch.optim.AdamW(own.values())
        checks = PostValidation(end, optimizer, own, [], total_norm)
        ways = {
            "waits, s": partial(step_and_wait, runtime, batch, optimizer, own),
            "goes on, s": partial(step_and_go_on, runtime, batch, optimizer, checks),
        }
        seconds = {way: timed(end, partial(repeat, step, steps), 1)[0] / steps for way, step in ways.items()}
        checks.settle()
        rows.append({"schedule": name, **seconds, "less, %": 100 * (1 - seconds["goes on, s"] / seconds["waits, s"])})
    finish(end, file, rows)


def step_and_wait(runtime: Runtime, batch: list[Tensor], optimizer: Optimizer, own: dict[str, nn.Parameter]) -> None:
    runtime.step(batch)
    runtime.transport.gather(gradient_norms(own))
    optimizer.step()
    optimizer.zero_grad()


def step_and_go_on(runtime: Runtime, batch: list[Tensor], optimizer: Optimizer, checks: PostValidation) -> None:
    runtime.step(batch, lambda: not checks.is_open or checks.settle()[1])
    checks.begin(1.0)
    optimizer.step()
    optimizer.zero_grad()


def total_norm(everyone: Norms) -> Tensor:
    return torch.stack([norm for devices in everyone for norms in devices for norm in norms.values()]).norm()


def repeat(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


def training_step(ranks: int) -> Table:
    """A step of real stages on processes of one thread each, and in one process; peak memory besides weights.

    No optimizer, no norms: forwards and backwards of the same modules alone. Contenders take turns, as a machine is
    not equally fast all the time. "ours, torch ZBV's order" and "torch ZBV" differ in the runtime alone. On more than
    two ranks V-Half idles longer than V-ZB, by design, and holds less; on two, with F, I and W equally long, they plan
    the same bubble and peak.
    """
    found = on_ranks(ranks, train_on_rank)
    ours = found[0]["step, ms"]
    return [{**row, "by ours": row["step, ms"] / ours} for row in found]


def train_on_rank(rank: Rank, file: str) -> None:
    ranks, end = rank.ranks, connected(rank, 2 * rank.ranks)
    placement, data = v_placement(ranks), torch.randn(MICROBATCHES * TOKENS, WIDTH)
    batch = list(data.chunk(MICROBATCHES))
    plans: dict[str, Schedule | None] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in {**ORDERS, "ours, torch ZBV's order": torch_zbv}.items():
        plans[name] = plan = make(ranks, MICROBATCHES)
        schedule = lower(plan, placement, MICROBATCHES)
        runtime = our_runtime(schedule, placement, lambda s: blocks(s, WIDTH, BLOCKS), end)
        steps[name] = partial(runtime.step, batch)
    for name in SCHEDULES:
        plans[name] = PEERS[name](ranks, MICROBATCHES)
        modules = {s: blocks(s, WIDTH, BLOCKS) for s, device in enumerate(placement) if device == rank.rank}
        steps[name] = TorchPipeline(name, rank.rank, ranks, modules, data, MICROBATCHES, defers=False).step
    whole = nn.Sequential(*(blocks(s, WIDTH, BLOCKS) for s in range(2 * ranks))) if rank.rank == 0 else None
    steps["one process"] = partial(alone, whole, batch)
    taken = in_turns(end, steps, 9)
    finish(end, file, [taken[name] | planned(plans.get(name)) | watched(end, step) for name, step in steps.items()])


def in_turns(end: Distributed, steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each contender, the median step, as `timed` has it, and processor time of the rank that takes most."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            end.gather(None)
            wall, processor = time.perf_counter(), time.process_time()
            step()
            ranks = end.gather((time.perf_counter() - wall, time.process_time() - processor))
            found[name].append((max(one[0] for one in ranks), max(one[1] for one in ranks)))
    taken = {}
    for name, pairs in found.items():
        wall, processor = (1e3 * statistics.median(x) for x in zip(*pairs[1:], strict=True))
        taken[name] = {"contender": name, "step, ms": wall, "processor, ms": processor}
    return taken


def planned(plan: Schedule | None) -> dict[str, float | None]:
    """With F, I and W of equal length, as matrix products have them."""
    if plan is None:
        return {"bubble planned, %": None, "peak planned, units": None}
    placement = v_placement(len(plan))
    costs = uniform(len(placement), MICROBATCHES)
    return {
        "bubble planned, %": 100 * bubble(simulate(plan, placement, costs).makespan, placement, costs),
        "peak planned, units": max(peak_bytes(plan, costs)) / unit_bytes(costs, len(plan)),
    }


def watched(end: Distributed, step: Callable[[], Any]) -> dict[str, float]:
    """Most bytes alive in a step, on the rank that has most and on the one that has least."""
    with Watched() as alive:
        step()
    peaks = end.gather(alive.peak)
    return {"most MB": max(peaks) / 1e6, "least MB": min(peaks) / 1e6}


def alone(whole: nn.Module | None, batch: list[Tensor]) -> None:
    """Nothing on the ranks that have no model."""
    if whole is not None:
        for part in batch:
            loss_of(whole(part)).backward()


def finish(end: Distributed, file: str, rows: Table) -> None:
    if end.device == 0:
        Path(file).write_text(json.dumps(rows))
    end.close()


def dispatch_on_rank(rank: Rank, file: str) -> None:
    end = connected(rank, 2 * rank.ranks)
    finish(end, file, [{"us": dispatch(end)}])


def dispatch(end: Transport) -> float:
    """Microseconds of processor an action of stages that do nothing takes of the thread that runs it: the least."""
    placement, batch, seconds = v_placement(end.devices), [torch.zeros(SIZE)] * 64, []
    schedule = lower(v_half(end.devices, len(batch)), placement, len(batch))
    runtime = our_runtime(schedule, placement, lambda stage: Sleeper(None), end)
    for _ in range(10):
        end.gather(None)
        began = time.thread_time()
        runtime.step(batch)
        seconds.append(time.thread_time() - began)
    return 1e6 * min(seconds) / len(runtime.actions)


def two_parts(width: int, tokens: int) -> float:
    """Processor time of input and weight gradients apart by that of one backward, of a shortcut layer."""
    attention = config.Attention(
        heads=8,
        q_rank=width // 2,
        kv_rank=width // 4,
        nope_dim=width // 16,
        rope_dim=width // 32,
        value_dim=width // 16,
    )
    experts = config.Experts(real=8, zero=4, top_k=3, width=width // 2, scale=3.0, target_real=2.0)
    sizes = config.Backbone(hidden=width, layers=1, ffn_width=2 * width, attention=attention, experts=experts)
    torch.manual_seed(0)
    layer = ShortcutLayer(sizes, 0)
    x, grad = torch.randn(1, tokens, width), torch.randn(1, tokens, width)
    context = Context.of(attention, x, torch.zeros(1, tokens, dtype=torch.int64), None)

    def seconds(split: bool) -> float:
        leaf, pending = x.clone().requires_grad_(), WeightGrads()
        with defer_weight_grads() if split else contextlib.nullcontext(pending) as pending:
            out = layer(leaf, context)[0]
        began = time.process_time()
        out.backward(grad)
        pending.run()
        return time.process_time() - began

    return statistics.median(seconds(True) / seconds(False) for _ in range(30))


def two_parts_in_a_process(environment: dict[str, str]) -> float:
    """In a process of its own, whose allocator reads its settings at the start."""
    settings = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-c",
        "import bench_pipeline as b, torch; torch.set_num_threads(1); print(b.two_parts(512, 256))",
    ]
    return float(subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout)


def costs() -> Table:
    """Against what must be reached."""
    plan, growth, logits = memory()
    keeping, plain = two_parts_in_a_process(KEEPING_MALLOC), two_parts_in_a_process({})
    (gloo,) = on_ranks(2, dispatch_on_rank)
    return [
        {
            "what": "an action of empty stages, one process, us",
            "value": dispatch(InProcess.connect(1)[0]),
            "at most": 50,
        },
        {"what": "an action of empty stages, gloo, us", "value": gloo["us"], "at most": 50},
        {"what": "B and W by one backward, width 512, memory kept by malloc", "value": keeping, "at most": 1.05},
        {"what": "the same, malloc as it is", "value": plain, "at most": None},
        {"what": "most bytes alive after an action, by the plan", "value": plan, "at most": 1.05},
        {"what": "the same with 32 microbatches by that with 8, two devices", "value": growth, "at most": 1.0},
        {"what": "bytes of logits alive after an action", "value": logits, "at most": 0},
    ]


PARTS: dict[str, Callable[[], Table]] = {
    "costs": costs,
    "sleeping stages, 2 ranks": partial(sleeping, 2, 4),
    "sleeping stages, 4 ranks": partial(sleeping, 4, 8),
    "post-validation, 4 ranks": partial(post_validation, 4, 8),
    "training step, 2 ranks": partial(training_step, 2),
}
QUICK = "training step, 2 ranks"
PLOTTED = {
    "sleeping stages, 4 ranks": ("schedule", ("bubble, %", "bubble planned, %")),
    "post-validation, 4 ranks": ("schedule", ("waits, s", "goes on, s")),
    "training step, 2 ranks": ("contender", ("step, ms", "most MB")),
}
