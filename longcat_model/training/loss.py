"""The language model's loss over all modalities.

The reports never write it as one equation; this is the released fine-tuning code's: cross entropy of the text head
plus a quarter of each level's cross entropy of the depth head, added over all supervised positions and divided by
their number, with a z-loss on the last hidden state, a z-loss on the router, and (which that code only displays) the
balance loss of the LongCat-Flash report.

Dimension key
    B rows    S positions of a row    N supervised positions    D model width    L quantizer levels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_model.model import LongcatNext
from longcat_model.sequence import IGNORE, NONE, Batch
from longcat_model.training.balance import Balancer, balance_loss


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Defaults are the released fine-tuning code's unless a comment says otherwise."""

    text: float = 1.0
    visual: float = 0.25  # each level
    audio: float = 0.25  # each level; audio training is unreleased, so as for vision
    hidden_z: float = 1e-7  # LongCat-Flash report, equation (10)
    router_z: float = 1e-4  # 0.2 * 5e-4, each layer
    balance: float = 5e-4  # each layer; released for display without a gradient, here with one


def loss(
    model: LongcatNext, batch: Batch, *, weights: LossWeights | None = None, balancer: Balancer | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and what to log.

    total = (weighted sum of cross entropies) / (supervised labels: a position counts once for each of its heads)
            + hidden_z * mean lse(|hidden|)^2 + sum over layers (router_z * mean lse(logits)^2 + balance * balance loss)

    Means are over positions that are no padding. Heads run at supervised positions only.

    Args:
        weights: None for the defaults.
        balancer: observes the experts chosen, for its next bias update.

    Returns:
        total: float32 [].
        metrics: detached scalars. Per modality present in the targets `<m>_loss` (mean cross entropy of a label) and
            `<m>_accuracy`, per level `<m>_loss_<l>`; `hidden_z`, `router_z`, `balance` unweighted.
    """
    weights, batch = weights or LossWeights(), batch.to(model.embed_tokens.weight.device)
    output = model(batch.inputs)
    hidden_ND = output.hidden.flatten(0, 1)
    text, visual, audio = (x.flatten(0, 1) for x in (batch.targets.text, batch.targets.visual, batch.targets.audio))
    metrics: dict[str, Tensor] = {}

    text_sum, text_count = _text_loss(model, hidden_ND, text, metrics)
    visual_sum, visual_count = _depth_loss("visual", model, hidden_ND, visual, metrics)
    audio_sum, audio_count = _depth_loss("audio", model, hidden_ND, audio, metrics)
    supervised = weights.text * text_sum + weights.visual * visual_sum + weights.audio * audio_sum
    total = supervised / max(text_count + visual_count + audio_count, 1)

    real = batch.inputs.documents.flatten() >= 0
    logits, ids = [x[real] for x in output.router_logits], [x[real] for x in output.expert_ids]
    if balancer is not None:
        balancer.observe(ids)
    experts = model.sizes.backbone.experts
    regularizers = {
        "hidden_z": _z_loss(output.last.flatten(0, 1)[real].abs()),
        "router_z": _layer_sum([_z_loss(x) for x in logits], total),
        "balance": _layer_sum([balance_loss(x, i, experts) for x, i in zip(logits, ids, strict=True)], total),
    }
    for name, value in regularizers.items():
        total = total + getattr(weights, name) * value
        metrics[name] = value.detach()
    return total, metrics


def _text_loss(model: LongcatNext, hidden_ND: Tensor, labels: Tensor, metrics: dict[str, Tensor]) -> tuple[Tensor, int]:
    supervised = (labels != IGNORE).nonzero().squeeze(1)
    if not supervised.numel():
        return hidden_ND.new_zeros((), dtype=torch.float32), 0
    logits, labels = model.text_logits(hidden_ND[supervised]).float(), labels[supervised]
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    metrics["text_loss"] = entropy.detach() / labels.numel()
    metrics["text_accuracy"] = (logits.argmax(-1) == labels).float().mean()
    return entropy, labels.numel()


def _depth_loss(
    modality: str, model: LongcatNext, hidden_ND: Tensor, labels_NL: Tensor, metrics: dict[str, Tensor]
) -> tuple[Tensor, int]:
    """Cross entropy summed over positions and levels, and the number of positions."""
    supervised = (labels_NL[:, 0] != IGNORE).nonzero().squeeze(1)
    if not supervised.numel():
        return hidden_ND.new_zeros((), dtype=torch.float32), 0
    labels_NL = labels_NL[supervised]
    head, tables = {
        "visual": (model.visual_head, model.visual_tables),
        "audio": (model.audio_head, model.audio_tables),
    }[modality]
    # A level without a loss adds nothing to what later levels see; none of those has a loss either.
    levels = head.logits(hidden_ND[supervised], labels_NL.clamp(min=NONE), tables())
    entropies, right, labels_count = [], [], []
    for level, logits in enumerate(levels):
        labels = labels_NL[:, level]
        entropies.append(F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum"))
        right.append((logits.argmax(-1) == labels).sum())
        labels_count.append((labels != IGNORE).sum().clamp(min=1))
        metrics[f"{modality}_loss_{level}"] = entropies[-1].detach() / labels_count[-1]
    entropy, count = torch.stack(entropies).sum(), torch.stack(labels_count).sum()
    metrics[f"{modality}_loss"] = entropy.detach() / count
    metrics[f"{modality}_accuracy"] = torch.stack(right).sum() / count
    return entropy, supervised.numel()


def _z_loss(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(-1).square().sum() / max(logits.shape[0], 1)


def _layer_sum(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(values)).sum() if values else like.new_zeros(())
