"""The language model as pipeline stages: the same modules and functions as the unsplit model, in the same order.

    unit 0              embedding, n-gram embedding and Pre-Buffer
    units 1 .. layers   the backbone's layers
    unit layers + 1     final norm, text head with its loss, z-loss of the last hidden state
    unit layers + 2     depth heads with the losses of images and speech

A stage is a range of units. What crosses a border is the hidden state [B, S, D] up to the text unit, and after it only
the rows [M, D] that have a visual or audio label. The depth heads read the joint embedding table as well: it is `Tied`
to the embedding unit.

Dimension key
    B rows    S positions of a row    M positions with a visual or audio label    D model width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longcat_kernels import WeightGrads, defer_weight_grads
from longcat_model.backbone.attention import Context
from longcat_model.model import LongcatNext
from longcat_model.pipeline.runtime import Tied
from longcat_model.pipeline.stage import Border, Output
from longcat_model.sequence import IGNORE, Batch, Targets
from longcat_model.training.balance import expert_counts
from longcat_model.training.loss import (
    DEPTH_HEADS,
    LossWeights,
    Metrics,
    Terms,
    Totals,
    head_terms,
    join,
    router_terms,
    z_loss,
)


class Microbatch(NamedTuple):
    """One microbatch, and what it has to know of the global batch that it is a part of."""

    batch: Batch
    totals: Totals
    used: Sequence[Tensor] | None = None  # how each layer's experts were used: see `router_terms`

    @classmethod
    def of(cls, batches: Sequence[Batch], used: Sequence[Tensor] | None = None) -> list[Microbatch]:
        totals = Totals.of(batches)
        return [cls(batch, totals, used) for batch in batches]


class Report(NamedTuple):
    """What a stage tells of a microbatch."""

    terms: Terms  # detached
    metrics: Metrics
    choices: dict[int, Tensor]  # layer -> how often each expert was chosen, int64 [E], padding apart


class ModelStage:
    """Units `units` of `model`, which may be on this device in part: only these units' modules are used.

    Args:
        dtype: of what crosses borders; None: that of the embedding table.
    """

    def __init__(
        self, model: LongcatNext, units: range, weights: LossWeights | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.units, self.weights = model, units, weights or LossWeights()
        self.layers = len(model.backbone.layers)
        self.dtype = dtype or model.embed_tokens.weight.dtype

    @property
    def own_layers(self) -> list[int]:
        """Of the backbone."""
        return [unit - 1 for unit in self.units if 1 <= unit <= self.layers]

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The stage's modules by their names in the model; the depth heads' include the joint embedding table."""
        names = {
            0: ["embed_tokens", "ngram", "pre_buffer"],
            self.layers + 1: ["backbone.norm", "lm_head"],
            self.layers + 2: ["embed_tokens", "visual_head", "audio_head"],
        }
        for unit in self.units:
            for name in names.get(unit, [f"backbone.layers.{unit - 1}"]):
                if name != "ngram" or self.model.ngram is not None:
                    yield name, self.model.get_submodule(name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self.modules():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter

    def takes(self, microbatch: Microbatch) -> Border:
        return self._border(self.units.start, microbatch.batch)

    def gives(self, microbatch: Microbatch) -> Border:
        return self._border(self.units.stop, microbatch.batch)

    def _border(self, unit: int, batch: Batch) -> Border:
        """Between the units before `unit` and `unit`."""
        rows = batch.targets.text.shape if unit <= self.layers + 1 else [len(_modality_rows(batch.targets))]
        device = next((p.device for _, p in self.named_parameters()), torch.device("cpu"))
        return Border((*rows, self.model.sizes.backbone.hidden), self.dtype, device)

    def __call__(self, hidden: Tensor | None, microbatch: Microbatch) -> Output:
        batch, totals, _ = microbatch
        x = self.model.embed(batch.inputs) if hidden is None else hidden
        x, own, choices = self._run_layers(x, microbatch)
        heads: list[_Heads] = []
        if self.layers + 1 in self.units:
            own = join([own, Terms(hidden_z=z_loss(x.flatten(0, 1)[_is_real(batch)].abs(), totals))])
            x = self.model.backbone.norm(x).flatten(0, 1)
            heads.append(self._run_heads(x, batch, totals, ("text",), None))
            x = x[_modality_rows(batch.targets)]
        if self.layers + 2 in self.units:
            heads.append(self._run_heads(x, batch, totals, DEPTH_HEADS, _modality_rows(batch.targets)))
        losses = [loss for loss in (own.total(self.weights, totals), *(h.loss for h in heads)) if loss is not None]
        terms = join([own.map(Tensor.detach), *(h.terms for h in heads)])
        report = Report(terms, {name: pair for h in heads for name, pair in h.metrics.items()}, choices)
        is_last = self.units.stop == self.layers + 3
        return Output(None if is_last else x, sum(losses[1:], losses[0]) if losses else None, report)

    def _run_layers(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, Terms, dict[int, Tensor]]:
        batch, totals, used = microbatch
        sizes, is_real = self.model.sizes.backbone, _is_real(batch)
        logits, ids, choices = [], [], {}
        own = self.own_layers
        if own:
            context = Context.of(sizes.attention, x, batch.inputs.documents, None)
            for index in own:
                x, logits_TE, ids_Tk = self.model.backbone.layers[index](x, context)
                logits.append(logits_TE[is_real])
                ids.append(ids_Tk[is_real])
                choices[index] = expert_counts(ids[-1], sizes.experts)
        uses = None if used is None else [used[index] for index in own]
        return x, router_terms(logits, ids, sizes.experts, totals, uses), choices

    def _run_heads(
        self, hidden_ND: Tensor, batch: Batch, totals: Totals, names: Sequence[str], rows_N: Tensor | None
    ) -> _Heads:
        """Computes the loss and at once its gradients, so that logits are never kept from F to B.

        The weights' gradients are added right here, too, but for those of the embedding table, which has to wait for
        the embedding unit. A third of a head's work, 2 N D V of 6 N D V operations, could fill a bubble if it waited
        for W as that of layers does, but it needs the gradient of the logits. To keep that is N V numbers for each
        microbatch under way, V / D = 43 times the hidden state that else is kept (V 131072, D 3072, N 8192: 2.1 GB
        in bfloat16 and not 50 MB); to compute it again is 2 N D V more, as much as what would have waited.
        """
        with defer_weight_grads() as own:
            leaf_ND = hidden_ND.detach().requires_grad_(torch.is_grad_enabled())
            terms, metrics = head_terms(self.model, leaf_ND, batch, names, rows_N)
            loss = terms.total(self.weights, totals)
        if loss is None or not torch.is_grad_enabled():
            return _Heads(loss, terms.map(Tensor.detach), metrics)
        loss.backward()
        if (later := WeightGrads.current()) is not None:
            later.extend(own.take([self.model.embed_tokens.weight]))
        own.run()
        known: Tensor = _Known.apply(hidden_ND, loss.detach(), leaf_ND.grad)  # type: ignore[no-untyped-call]
        return _Heads(known, terms.map(Tensor.detach), metrics)


class _Heads(NamedTuple):
    loss: Tensor | None
    terms: Terms
    metrics: Metrics


class _Known(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


def split(model: LongcatNext, cuts: Sequence[int], weights: LossWeights | None = None) -> list[ModelStage]:
    """Every stage of a model whose units are cut before each of `cuts`: len(cuts) + 1 stages.

    Example: with 2 layers, cuts (1, 2, 4) give embedding | layer 0 | layer 1 and text head | depth heads.

    Raises:
        ValueError: cuts decrease or lie outside; the first stage has no embedding or the last one no depth heads.
    """
    units = len(model.backbone.layers) + 3
    ends = [0, *cuts, units]
    if sorted(ends) != ends or (len(ends) > 2 and (ends[1] == 0 or ends[-2] == units)):
        raise ValueError(f"split: cuts must ascend within 1 .. {units - 1}, got {list(cuts)}")
    return [ModelStage(model, range(*pair), weights) for pair in pairwise(ends)]


def tied(model: LongcatNext, stages: int) -> Tied:
    """The embedding table, which the first and the last stage use."""
    return Tied((model.embed_tokens.weight,), source=stages - 1, into=0)


def _is_real(batch: Batch) -> Tensor:
    return batch.inputs.documents.flatten() >= 0


def _modality_rows(targets: Targets) -> Tensor:
    """Flattened positions that have a visual or audio label, [M] int64."""
    has_label = (targets.visual[..., 0] != IGNORE) | (targets.audio[..., 0] != IGNORE)
    return has_label.flatten().nonzero().squeeze(1)
