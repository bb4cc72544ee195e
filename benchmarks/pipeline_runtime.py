"""What the pipeline's runtime costs: dispatch, wall time against the plan, and backward in two parts against one.

    .venv/bin/python benchmarks/pipeline_runtime.py

Prints one JSON line a measurement. Sleeping stages take real time and no processor, so that processes share two cores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from longcat_kernels import WeightGrads, defer_weight_grads
from longcat_model import config
from longcat_model.backbone.attention import Context
from longcat_model.backbone.moe import ShortcutLayer
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import v_placement
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.runtime import Runtime
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import simulate
from longcat_model.pipeline.stage import Border, Output
from longcat_model.pipeline.transport import Distributed, InProcess

FORWARD_S, INPUT_S, WEIGHT_S = 0.030, 0.036, 0.024


class Sleep(torch.autograd.Function):
    """Forward, input gradient and weight gradient that take their time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.pending, ctx.weight, ctx.scale = WeightGrads.current(), weight, scale
        time.sleep(scale * FORWARD_S)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.weight, ctx.scale

        def weight_grad() -> list[Tensor]:
            time.sleep(scale * WEIGHT_S)
            return [torch.zeros_like(weight)]

        time.sleep(scale * INPUT_S)
        ctx.pending.add([weight], weight_grad)
        return grads[0], None, None


class Sleeper:
    """A stage that sleeps, or with scale 0 does nothing."""

    def __init__(self, is_last: bool, scale: float) -> None:
        self.is_last, self.scale, self.weight, self.x = is_last, scale, nn.Parameter(torch.zeros(1)), torch.zeros(4, 8)

    def __call__(self, hidden: Tensor | None, microbatch: int) -> Output:
        x = self.x.clone().requires_grad_() if hidden is None else hidden
        out: Tensor = Sleep.apply(x, self.weight, self.scale) if self.scale else x  # type: ignore[no-untyped-call]
        return Output(None, out.sum()) if self.is_last else Output(out)

    def takes(self, microbatch: int) -> Border:
        return Border((4, 8), torch.float32, torch.device("cpu"))

    gives = takes


def sleepers(devices: int, microbatches: int, end: Distributed | InProcess, scale: float) -> Runtime:
    placement = v_placement(devices)
    own = {s: Sleeper(s == 2 * devices - 1, scale) for s, home in enumerate(placement) if home == end.device}
    return Runtime(lower(v_half(devices, microbatches), placement, microbatches), placement, own, end)


def dispatch() -> dict[str, Any]:
    """Microseconds an action, all stages on one device."""
    (end,) = InProcess.connect(1)
    runtime = sleepers(1, 64, end, 0.0)
    return {"what": "dispatch_us", "value": 1e6 * best(lambda: runtime.step(range(64))) / len(runtime.actions)}


def wall(rank: Rank, microbatches: int, scale: float) -> None:
    """Rank 0 prints wall time of a step against the simulated makespan, or with scale 0 microseconds an action."""
    torch.set_num_threads(1)
    end = Distributed.connect(2 * rank.ranks, store=rank.store)
    assert end is not None
    runtime = sleepers(rank.ranks, microbatches, end, scale)
    seconds, busy = [], []
    for _ in range(4):
        end.gather(None)
        began = time.perf_counter()
        result = runtime.step(range(microbatches))
        seconds.append(max(end.gather(time.perf_counter() - began)))
        busy.append(sum(ran.end_s - ran.start_s for ran in result.timeline))
    if rank.rank == 0 and scale:
        costs = uniform(2 * rank.ranks, microbatches, FORWARD_S, INPUT_S, WEIGHT_S)
        plan = simulate(v_half(rank.ranks, microbatches), v_placement(rank.ranks), costs).makespan
        show({"what": "wall_by_plan", "ranks": rank.ranks, "value": median(seconds[1:]) / plan, "plan_s": plan})
    elif rank.rank == 0:
        value, whole = (1e6 * min(total) / len(runtime.actions) for total in (busy, seconds))
        show({"what": "gloo_dispatch_us", "ranks": rank.ranks, "value": value, "with_waits": whole})
    end.close()


def two_parts(width: int, tokens: int) -> dict[str, Any]:
    """Time of input and weight gradients apart, by that of one backward, of a shortcut layer."""
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

    def run(split: bool) -> float:
        leaf = x.clone().requires_grad_()
        with defer_weight_grads() as pending:
            out = layer(leaf, context)[0] if split else None
        out = layer(leaf, context)[0] if out is None else out
        began = time.perf_counter()
        out.backward(grad)
        pending.run()
        return time.perf_counter() - began

    pairs = [(run(False), run(True)) for _ in range(31)]
    whole, parts = (median(seconds) for seconds in zip(*pairs[1:], strict=True))
    return {"what": "two_parts_by_one", "width": width, "tokens": tokens, "value": parts / whole, "one_s": whole}


def best(run: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def show(row: dict[str, Any]) -> None:
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    show(dispatch())
    for measure in (partial(two_parts, 512, 256), partial(two_parts, 512, 512), partial(two_parts, 128, 256)):
        show(measure())
    launch(2, wall, 64, 0.0)
    for ranks, microbatches in ((2, 8), (4, 16)):
        launch(ranks, wall, microbatches, 1.0)


if __name__ == "__main__":
    main()
