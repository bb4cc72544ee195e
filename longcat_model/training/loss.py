"""The language model's loss over all modalities.

The reports never write it as one equation; this is the released fine-tuning code's: cross entropy of the text head
plus a quarter of each level's cross entropy of the depth head, added over all supervised positions and divided by
their number, with a z-loss on the last hidden state, a z-loss on the router, and (which that code only displays) the
balance loss of the LongCat-Flash report.

Its parts are functions of what a part of the model gives, so that pipeline stages compute the very same numbers as the
whole model.

Dimension key
    B rows    S positions of a row    N positions or supervised positions    D model width    L quantizer levels
    E experts, identity ones included    k experts a token
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_model.config import Experts
from longcat_model.model import LongcatNext
from longcat_model.sequence import IGNORE, NONE, Batch
from longcat_model.training.balance import Balancer, balance_loss, expert_counts, use

DEPTH_HEADS = ("visual", "audio")
Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> sum and count, which add up over microbatches; detached


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Defaults are the released fine-tuning code's unless a comment says otherwise."""

    text: float = 1.0
    visual: float = 0.25  # each level
    audio: float = 0.25  # each level; audio training is unreleased, so as for vision
    hidden_z: float = 1e-7  # LongCat-Flash report, equation (10)
    router_z: float = 1e-4  # 0.2 * 5e-4, each layer
    balance: float = 5e-4  # each layer; released for display without a gradient, here with one


@dataclass(frozen=True)
class Totals:
    """What means over a global batch are divided by: known from its ids, before anything is computed."""

    labels: int  # supervised positions, once for each of their heads
    positions: int  # that are no padding

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Totals:
        labels = positions = 0
        for batch in batches:
            targets = batch.targets
            for labels_BS in (targets.text, targets.visual[..., 0], targets.audio[..., 0]):
                labels += int((labels_BS != IGNORE).sum())
            positions += int((batch.inputs.documents >= 0).sum())
        return cls(labels, positions)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Parts of the loss of one batch: all, or those of a pipeline stage. float32 [] each; None, (): not part of it."""

    text: Tensor | None = None  # cross entropy summed over labels
    visual: Tensor | None = None  # likewise, over levels too
    audio: Tensor | None = None
    hidden_z: Tensor | None = None  # mean over the positions of the global batch
    router_z: tuple[Tensor, ...] = ()  # likewise, of each layer
    balance: tuple[Tensor, ...] = ()  # likewise

    def map(self, rule: Callable[[Tensor], Tensor]) -> Terms:
        """Every term through `rule`."""
        found: dict[str, Any] = {}
        for name, term in vars(self).items():
            is_one = isinstance(term, Tensor)
            found[name] = rule(term) if is_one else None if term is None else tuple(map(rule, term))
        return Terms(**found)

    def total(self, weights: LossWeights, totals: Totals) -> Tensor | None:
        """The loss as far as these terms make it; None if there are none."""
        pairs = [(getattr(weights, name), getattr(self, name)) for name in ("text", *DEPTH_HEADS)]
        supervised = [weight * term for weight, term in pairs if term is not None]
        found = [sum(supervised[1:], supervised[0]) / max(totals.labels, 1)] if supervised else []
        found += [getattr(weights, name) * value for name, value in self.regularizers().items()]
        return sum(found[1:], found[0]) if found else None

    def regularizers(self) -> dict[str, Tensor]:
        """Unweighted, over layers."""
        layers = {name: getattr(self, name) for name in ("router_z", "balance")}
        sums = {name: torch.stack(values).sum() for name, values in layers.items() if values}
        return ({} if self.hidden_z is None else {"hidden_z": self.hidden_z}) | sums


def join(parts: Sequence[Terms]) -> Terms:
    """The terms of one batch from those of its stages, in their order."""
    found: dict[str, Any] = {"router_z": (), "balance": ()}
    for part in parts:
        for name, value in vars(part).items():
            if isinstance(value, tuple):
                found[name] = (*found[name], *value)
            elif value is not None:
                found[name] = value
    return Terms(**found)


def loss(
    model: LongcatNext,
    batch: Batch,
    *,
    weights: LossWeights | None = None,
    balancer: Balancer | None = None,
    totals: Totals | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and what to log.

    total = (weighted sum of cross entropies) / (supervised labels: a position counts once for each of its heads)
            + hidden_z * mean lse(|hidden|)^2 + sum over layers (router_z * mean lse(logits)^2 + balance * balance loss)

    Means are over positions that are no padding. Heads run at supervised positions only.

    Args:
        weights: None for the defaults.
        balancer: observes the experts chosen, and says how those of the step before were used. None: the balance loss
            takes the use in `batch` itself.
        totals: of the global batch of which `batch` is a microbatch: with a balancer, the losses of its microbatches
            add up to its loss. None: `batch` is the global batch.

    Returns:
        total: float32 [].
        metrics: detached scalars. Per modality present in the targets `<m>_loss` (mean cross entropy of a label) and
            `<m>_accuracy`, per level `<m>_loss_<l>`; `hidden_z`, `router_z`, `balance` unweighted.
    """
    weights, batch = weights or LossWeights(), batch.to(model.embed_tokens.weight.device)
    totals = totals or Totals.of([batch])
    output = model(batch.inputs)
    hidden_ND = output.hidden.flatten(0, 1)
    heads, metrics = head_terms(model, hidden_ND, batch, ("text", *DEPTH_HEADS))
    is_real_N = batch.inputs.documents.flatten() >= 0
    ids = [x[is_real_N] for x in output.expert_ids]
    used = None if balancer is None else balancer.use()
    if balancer is not None:
        balancer.observe(ids)
    logits = [x[is_real_N] for x in output.router_logits]
    hidden_z = z_loss(output.last.flatten(0, 1)[is_real_N].abs(), totals)
    routers = router_terms(logits, ids, model.sizes.backbone.experts, totals, used)
    terms = join([heads, Terms(hidden_z=hidden_z), routers])
    total = terms.total(weights, totals)
    assert total is not None  # hidden_z is always there
    return total, means(metrics) | regularizer_metrics([terms], hidden_ND)


def head_terms(
    model: LongcatNext, hidden_ND: Tensor, batch: Batch, heads: Sequence[str], rows_N: Tensor | None = None
) -> tuple[Terms, Metrics]:
    """Cross entropies of the given heads ("text", "visual", "audio") at their supervised positions.

    Args:
        hidden_ND: after the final norm.
        rows_N: int64, which of the batch's flattened positions these are; None: all.
    """
    found: dict[str, Any] = {}
    metrics: Metrics = {}
    for name in heads:
        labels = getattr(batch.targets, name).flatten(0, 1)
        labels = labels if rows_N is None else labels[rows_N]
        supervised = ((labels if name == "text" else labels[:, 0]) != IGNORE).nonzero().squeeze(1)
        if supervised.numel():
            rule = _text_entropy if name == "text" else _depth_entropy
            found[name] = rule(name, model, hidden_ND[supervised], labels[supervised], metrics)
    return Terms(**found), metrics


def _text_entropy(name: str, model: LongcatNext, hidden_ND: Tensor, labels_N: Tensor, metrics: Metrics) -> Tensor:
    logits, count = model.text_logits(hidden_ND).float(), labels_N.new_tensor(len(labels_N))
    entropy = F.cross_entropy(logits, labels_N, reduction="sum")
    metrics["text_loss"] = entropy.detach(), count
    metrics["text_accuracy"] = (logits.argmax(-1) == labels_N).sum(), count
    return entropy


def _depth_entropy(name: str, model: LongcatNext, hidden_ND: Tensor, labels_NL: Tensor, metrics: Metrics) -> Tensor:
    """Cross entropy summed over positions and levels."""
    head, tables = {
        "visual": (model.visual_head, model.visual_tables),
        "audio": (model.audio_head, model.audio_tables),
    }[name]
    # A level without a loss adds nothing to what later levels see; none of those has a loss either.
    levels = head.logits(hidden_ND, labels_NL.clamp(min=NONE), tables())
    entropies, right, counts = [], [], []
    for level, logits in enumerate(levels):
        labels_N = labels_NL[:, level]
        entropies.append(F.cross_entropy(logits.float(), labels_N, ignore_index=IGNORE, reduction="sum"))
        right.append((logits.argmax(-1) == labels_N).sum())
        counts.append((labels_N != IGNORE).sum())
        metrics[f"{name}_loss_{level}"] = entropies[-1].detach(), counts[-1]
    entropy, count = torch.stack(entropies).sum(), torch.stack(counts).sum()
    metrics[f"{name}_loss"] = entropy.detach(), count
    metrics[f"{name}_accuracy"] = torch.stack(right).sum(), count
    return entropy


def router_terms(
    logits: Sequence[Tensor],
    ids: Sequence[Tensor],
    experts: Experts,
    totals: Totals,
    used: Sequence[Tensor] | None = None,
) -> Terms:
    """Of layers with router logits [N, E] and choices [N, k] at positions that are no padding.

    `used` says how the experts [E] of each layer were used (`balance.use`); None: as these choices use them.
    """
    used = [use(expert_counts(i, experts), experts) for i in ids] if used is None else used
    losses = (balance_loss(x, use_E, totals.positions) for x, use_E in zip(logits, used, strict=True))
    return Terms(router_z=tuple(z_loss(x, totals) for x in logits), balance=tuple(losses))


def z_loss(logits: Tensor, totals: Totals) -> Tensor:
    """Sum of lse^2 over rows that are no padding, by the number of such rows in the global batch."""
    return logits.float().logsumexp(-1).square().sum() / max(totals.positions, 1)


def means(metrics: Metrics) -> dict[str, Tensor]:
    return {name: total / count.clamp(min=1) for name, (total, count) in metrics.items()}


def merge(parts: Iterable[Metrics]) -> Metrics:
    """Sums and counts of several microbatches, or stages, together."""
    merged: Metrics = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = merged.get(name, (0, 0))
            merged[name] = total + before[0], count + before[1]
    return merged


def regularizer_metrics(terms: Sequence[Terms], like: Tensor) -> dict[str, Tensor]:
    """`hidden_z`, `router_z` and `balance`, unweighted, of all microbatches together."""
    found = {name: like.new_zeros((), dtype=torch.float32) for name in ("hidden_z", "router_z", "balance")}
    for part in terms:
        for name, value in part.regularizers().items():
            found[name] = found[name] + value.detach()
    return found
