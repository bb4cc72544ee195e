"""Measures what each module of the language model costs: the profile that placement and schedule are made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import defer_weight_grads
from longcat_model.model import LongcatNext
from longcat_model.pipeline.profile import Module, Profile
from longcat_model.pipeline.split import Microbatch, ModelStage


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
    that autograd keeps; transfers are taken to be free.
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
    return Profile(embedding, tuple(layers), text_head, losses, transfer=0.0)


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
