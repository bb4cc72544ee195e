"""Measures what each module of the language model costs: the profile that placement and schedule are made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import defer_weight_grads
from longcat_model.model import LongcatNext
from longcat_model.pipeline.ir import Action, Kind, counterpart
from longcat_model.pipeline.profile import Link, Module, Profile
from longcat_model.pipeline.split import Microbatch, ModelStage
from longcat_model.pipeline.stage import Border
from longcat_model.pipeline.transport import Transport

SMALL = 1024  # bytes


def measure(
    model: LongcatNext,
    microbatch: Microbatch,
    *,
    repeats: int = 3,
    lend: Callable[[ModelStage], AbstractContextManager[Any]] = nullcontext,
) -> Profile:
    """Seconds of forward, input gradient and weight gradient of every module: the shortest of `repeats` runs each.

    Modules run one after the other, each while `lend` has it in memory.

    Gradients go to the parameters' `grad`, as in training, which is cleared first and last. `saved` counts the bytes
    that autograd keeps; for transfers see `measure_links`.
    """
    units = len(model.backbone.layers) + 3
    modules, hidden = [], None
    for unit in range(units):
        stage = ModelStage(model, range(unit, unit + 1))
        with lend(stage):
            runs = [_run(stage, hidden, microbatch) for _ in range(repeats)]
            model.zero_grad(set_to_none=True)
        forward, input, weight = (min(seconds) for seconds in zip(*(run[0] for run in runs), strict=True))
        received = 0 if hidden is None else hidden.numel() * hidden.element_size()
        modules.append(Module(forward, input, weight, saved=runs[0][1], received=received))
        hidden = runs[0][2]
    embedding, *layers, text_head, losses = modules
    return Profile(embedding, tuple(layers), text_head, losses)


def transfer_sizes(profile: Profile) -> list[int]:
    """Of what goes from device to device, in bytes, and a small one: those whose times are worth knowing."""
    modules = (*profile.layers, profile.text_head, profile.modality_losses)
    return sorted({SMALL, *(module.received for module in modules if module.received > SMALL)})


def measure_links(
    transport: Transport, sizes: Sequence[int], device: torch.device, *, repeats: int = 5
) -> tuple[Link, ...]:
    """Seconds that tensors of so many bytes, rising, take from each device to the next one.

    Half of the shortest of `repeats` times forth and back. All devices call it together; pair after pair sends, so that
    none is in another's way.
    """
    own: dict[int, Link] = {}
    for first in range(transport.devices - 1):
        transport.gather(None)
        if transport.device in (first, first + 1):
            times = [min(_there_and_back(transport, first, size, device) for _ in range(repeats)) / 2 for size in sizes]
            own[first] = tuple(zip(sizes, accumulate(times, max), strict=True))  # noise apart, more takes longer
    everyone: list[dict[int, Link]] = transport.gather(own)
    return tuple(everyone[first][first] for first in range(transport.devices - 1))


def _there_and_back(transport: Transport, first: int, size: int, device: torch.device) -> float:
    """Between device `first` and the next one, on both of them; the seconds are those of `first`."""
    forth, back = Action(first, Kind.SEND_F, 0), Action(first + 1, Kind.SEND_B, 0)
    border = Border((size,), torch.uint8, device)
    tensor, began = border.empty(), time.perf_counter()
    if transport.device == first:
        transport.send(tensor, first + 1, forth)
        transport.receive(border, first + 1, counterpart(back)).wait()
    else:
        transport.send(transport.receive(border, first, counterpart(forth)).wait(), first, back)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _run(
    stage: ModelStage, hidden: Tensor | None, microbatch: Microbatch
) -> tuple[tuple[float, float, float], int, Tensor | None]:
    """Times of F, I and W, bytes saved, and the output."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = None if hidden is None else hidden.detach().requires_grad_()
    moments = [_now(microbatch)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), defer_weight_grads() as pending:
        output = stage(leaf, microbatch)
    moments.append(_now(microbatch))
    roots = [root for root in (output.hidden, output.loss) if root is not None and root.requires_grad]
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    moments.append(_now(microbatch))
    pending.run()
    moments.append(_now(microbatch))
    weights = {weight.untyped_storage().data_ptr() for _, weight in stage.named_parameters()}
    size = sum(number for place, number in saved.items() if place not in weights)
    times = (moments[1] - moments[0], moments[2] - moments[1], moments[3] - moments[2])
    return times, size, None if output.hidden is None else output.hidden.detach()


def _now(microbatch: Microbatch) -> float:
    if microbatch.batch.inputs.text.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
