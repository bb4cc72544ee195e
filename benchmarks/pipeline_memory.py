"""What the pipeline's runtime keeps, in bytes: against the plan, with more microbatches, and of logits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from longcat_model import presets
from longcat_model.model import LongcatNext
from longcat_model.pipeline.ir import Schedule, v_placement
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.measure import measure
from longcat_model.pipeline.profile import Split, stage_costs
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import peak_bytes
from longcat_model.pipeline.split import Microbatch, split, tied
from longcat_model.pipeline.transport import InProcess
from longcat_model.sequence import Layout, pack
from longcat_model.training.plan import unit_cuts
from longcat_model.vocabulary import Vocabulary
from pipeline_stages import Observed

DEVICES, SPLIT = 2, Split((0, 1, 1, 0), 2)  # embedding | layer | layer and text head | depth heads


class Memory(NamedTuple):
    by_plan: float  # most bytes alive after an action, on the device that has most, by what the plan says
    growth: float  # the same with 16 microbatches a device by that with 4
    logits: int  # bytes of logits alive after an action


def memory() -> Memory:
    """Of the demo's model on two devices; weights and their gradients apart."""
    torch.manual_seed(0)
    sizes = presets.demo()
    layout = Layout(Vocabulary.of(sizes.vocabulary), lambda text: list(text.encode()))
    part = pack([layout.document(layout.text([i % 250 for i in range(250)], loss=True))], 256)
    model = LongcatNext(sizes)
    profile = measure(model, Microbatch.of([part])[0], repeats=1)
    most: list[int] = []
    planned: list[int] = []
    logits = 0
    for count in (4 * DEVICES, 16 * DEVICES):
        schedule = lower(v_half(DEVICES, count), v_placement(DEVICES), count)
        planned.append(max(peak_bytes(schedule, stage_costs(profile, SPLIT, count))))
        if not most:  # the first step makes the gradients of the weights
            observe(model, schedule, Microbatch.of([part] * count))
        observed = observe(model, schedule, Microbatch.of([part] * count))
        most.append(max(total for one in observed for _, total, _ in one.samples))
        logits = max(logits, *(wanted for one in observed for _, _, wanted in one.samples))
    return Memory(most[0] / planned[0], most[1] / most[0], logits)


def observe(model: LongcatNext, schedule: Schedule, microbatches: Sequence[Microbatch]) -> list[Observed]:
    """One step on devices that are threads."""
    placement, stages, ends = v_placement(DEVICES), split(model, unit_cuts(SPLIT)), InProcess.connect(DEVICES)
    rows = model.ids.text_rows

    def run(device: int) -> Observed:
        torch.set_num_threads(1)
        own = {s: stages[s] for s, home in enumerate(placement) if home == device}
        runtime = Observed(schedule, placement, own, ends[device], tied(model, len(placement)))
        runtime.wanted = lambda shape: shape[-1:] == (rows,)
        runtime.step(microbatches)
        return runtime

    with ThreadPoolExecutor(DEVICES) as pool:
        return list(pool.map(run, range(DEVICES)))
