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
from longcat_model.pipeline.ir import Placement, Schedule
from longcat_model.pipeline.runtime import Runtime, StepResult
from longcat_model.pipeline.split import Microbatch, split, tied
from longcat_model.pipeline.transport import InProcess, Transport
from longcat_model.sequence import Batch, Document, Layout, pack
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.training.checkpoint import Checkpoints
from longcat_model.training.loss import LossWeights, Terms, Totals, join, loss
from longcat_model.vocabulary import Vocabulary

T = TypeVar("T")
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


def batches(count: int) -> list[Batch]:
    """Mixed, image only, speech only, text only, without anything supervised; of different lengths."""
    docs = documents()
    kinds = [pack(docs, 40), pack(docs[6:7], 13), pack(docs[7:], 12), pack(docs[4:5], 11), pack(docs[5:6], 5)]
    kinds.append(pack(docs[:3], 37))
    return [kinds[i % len(kinds)] for i in range(count)]


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


def saved(directory: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint of a run."""
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest()
        assert step is not None
        reader = checkpoints.reader(step)
    tensors = {name: torch.empty(shape, dtype=reader.dtype(name)) for name, shape in reader.shapes.items()}
    reader.read(tensors)
    return tensors
