"""A tiny model, microbatches of all kinds, and devices that are threads: shared by the tests of the runtime."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from longcat_model import presets
from longcat_model.model import LongcatNext
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import Placement, Schedule, loop_placement, v_placement
from longcat_model.pipeline.runtime import Runtime, StepResult
from longcat_model.pipeline.schedules.linear import interleaved_1f1b, one_f_one_b, zb_h1
from longcat_model.pipeline.schedules.searched import Effort, searched
from longcat_model.pipeline.schedules.v import v_half, v_min, v_zb
from longcat_model.pipeline.split import Microbatch, split, tied
from longcat_model.pipeline.stage import Border, Output
from longcat_model.pipeline.transport import InProcess, Transport
from longcat_model.sequence import Batch, Document, Layout, pack
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.training.checkpoint import Checkpoints
from longcat_model.training.loss import LossWeights, Terms, Totals, join, loss
from longcat_model.vocabulary import Vocabulary

T = TypeVar("T")
EFFORT = Effort(moves=2000, tries=20, blocks=1, starts=2)


def found(devices: int, microbatches: int) -> Schedule:
    """What the search finds for stages that differ."""
    scales = [1.6, *[1.0] * (2 * devices - 2), 1.3]
    return searched(uniform(2 * devices, microbatches, 10, 16, 5, 1, stage_scales=scales), effort=EFFORT)


SCHEDULES: dict[str, tuple[Callable[[int, int], Schedule], Callable[[int], Placement]]] = {
    "1f1b": (one_f_one_b, loop_placement),
    "interleaved_1f1b": (interleaved_1f1b, lambda devices: loop_placement(devices, 2)),
    "zb_h1": (zb_h1, loop_placement),
    "v_zb": (v_zb, v_placement),
    "v_min": (v_min, v_placement),
    "v_half": (v_half, v_placement),
    "searched": (found, v_placement),
}
LAYOUT = Layout(Vocabulary.of(presets.tiny().vocabulary), ByteTokenizer().encode)
WEIGHTS = LossWeights(hidden_z=1e-3, router_z=1e-2, balance=1e-1)  # the regularizers show in the gradients


def model(seed: int = 0) -> LongcatNext:
    torch.manual_seed(seed)
    return LongcatNext(presets.tiny())


def documents() -> list[Document]:
    frames, cells = torch.tensor([[1, 2, 3, 0], [7, 5, 3, 3], [0, 0, 1, 1]]), torch.arange(12).view(2, 2, 3) % 8
    prompt, answer = LAYOUT.text([70, 71]), LAYOUT.text([72, 73, 74], loss=True)
    return [
        LAYOUT.document(prompt, LAYOUT.understand_image(cells), answer),
        LAYOUT.document(prompt, LAYOUT.generate_image(cells)),
        LAYOUT.document(LAYOUT.hear(frames), answer, LAYOUT.speak([75, 76], frames, delay=1)),
        LAYOUT.document(prompt, LAYOUT.speak([75, 76], frames)),
        LAYOUT.document(prompt, answer),
        LAYOUT.hear(frames),  # nothing to predict
        LAYOUT.generate_image(cells),  # no text to predict
        LAYOUT.hear(frames, loss=True),  # speech alone
    ]


KINDS = ("mixed", "image", "speech", "text", "nothing")


def batches(count: int, kind: str = "mixed") -> list[Batch]:
    """What is supervised in all of them: image, speech, text or nothing alone, or of mixed ones each in turn, and all.

    Of different lengths.
    """
    docs = documents()
    pure = {
        "image": [pack(docs[6:7], 13), pack([docs[6], docs[6]], 26)],
        "speech": [pack(docs[7:], 12), pack([docs[7], docs[7]], 24)],
        "text": [pack(docs[4:5], 11), pack([docs[4], docs[4]], 22)],
        "nothing": [pack(docs[5:6], 5), pack([docs[5], docs[5]], 10)],
    }
    mixed = [pack(docs, 40), *(parts[0] for parts in pure.values()), pack(docs[:3], 37)]
    parts = mixed if kind == "mixed" else pure[kind]
    return [parts[i % len(parts)] for i in range(count)]


def one_process(reference: LongcatNext, parts: Sequence[Batch]) -> list[Tensor]:
    """The loss of every microbatch, after adding its gradients, in order."""
    totals, losses = Totals.of(parts), []
    for part in parts:
        total, _ = loss(reference, part, weights=WEIGHTS, totals=totals)
        total.backward()
        losses.append(total.detach())
    return losses


def cuts(layers: int, stages: int) -> tuple[int, ...]:
    """Layers spread over the stages, many of them empty where layers are few; the depth heads alone in the last."""
    if stages == 1:
        return ()
    return (*(1 + layers * s // (stages - 1) for s in range(1, stages - 1)), layers + 2)


def in_threads(work: Callable[[int], T], devices: int) -> list[T]:
    """Runs every device's work in a thread of its own; raises what the first of them raised."""
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(device: int) -> None:
        try:
            results[device] = work(device)
        except (Exception, KeyboardInterrupt) as error:
            errors[device] = error

    threads = [threading.Thread(target=run, args=(device,)) for device in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device in sorted(errors):
        raise errors[device]
    return [results[device] for device in range(devices)]


def runtime(whole: LongcatNext, schedule: Schedule, placement: Placement, transport: Transport) -> Runtime:
    stages = split(whole, cuts(len(whole.backbone.layers), len(placement)), WEIGHTS)
    own = {s: stages[s] for s, device in enumerate(placement) if device == transport.device}
    return Runtime(schedule, placement, own, transport, tied(whole, len(placement)))


def piped(
    source: LongcatNext, schedule: Schedule, placement: Placement, parts: Sequence[Batch]
) -> tuple[list[LongcatNext], list[StepResult]]:
    """One step on devices that are threads, each with a model of its own; the models have the gradients."""
    devices = len(schedule)
    ends, models = InProcess.connect(devices), [copy.deepcopy(source) for _ in range(devices)]

    def work(device: int) -> StepResult:
        own = runtime(models[device], schedule, placement, ends[device])
        result = own.step(Microbatch.of(parts))
        own.share_tied(len(parts))
        return result

    return models, in_threads(work, devices)


def losses(results: Sequence[StepResult], placement: Placement, parts: Sequence[Batch]) -> list[Tensor]:
    """The loss of every microbatch, from what all stages report."""
    totals = Totals.of(parts)
    reports: dict[Any, Any] = {place: report for result in results for place, report in result.reports.items()}
    terms: list[Terms] = [
        join([reports[s, k].terms for s in range(len(placement))]) for k in range(len(parts))
    ]  # fmt: skip
    found = [part.total(WEIGHTS, totals) for part in terms]
    return [total for total in found if total is not None]


def gradients(models: Sequence[LongcatNext]) -> dict[str, Tensor]:
    """By name, from whichever device has it; devices that have the same must agree."""
    found: dict[str, Tensor] = {}
    for own in models:
        for name, parameter in own.named_parameters():
            if parameter.grad is not None:
                assert name not in found or torch.equal(found[name], parameter.grad), name
                found[name] = parameter.grad
    return found


class Toy:
    """A stage of one product, other for each microbatch; `trouble` is called before each forward."""

    def __init__(self, is_last: bool, trouble: Callable[[int], None] = lambda microbatch: None) -> None:
        self.weight, self.is_last, self.trouble = torch.nn.Parameter(torch.eye(2) + 0.1), is_last, trouble

    def __call__(self, hidden: Tensor | None, microbatch: int) -> Output:
        self.trouble(microbatch)
        x = torch.tensor([[1.0, 2.0 + microbatch]]) if hidden is None else hidden
        out = torch.nn.functional.linear(x, self.weight).sin()
        return Output(None, out.sum()) if self.is_last else Output(out)

    def takes(self, microbatch: int) -> Border:
        return Border((1, 2), torch.float32, torch.device("cpu"))

    gives = takes


def saved(directory: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint of a run."""
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest()
        assert step is not None
        reader = checkpoints.reader(step)
    tensors = {name: torch.empty(shape, dtype=reader.dtype(name)) for name, shape in reader.shapes.items()}
    reader.read(tensors)
    return tensors
