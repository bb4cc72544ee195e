"""Even use of experts: the selection bias without a loss, the balance loss with a gradient, and what to report.

LongCat-Flash report (arXiv 2509.01322), equations (2) to (5). The bias steers which experts are chosen; the loss moves
router probability between groups of experts, of which the identity experts are one, so that a token uses `target_real`
real experts on average.

Both look at the global batch, however it is cut into microbatches and spread over ranks. Which experts it chooses is
known only when all of it went forward, and by then a pipeline is long at gradients; so the loss takes the choices of
the step before, as the bias does, and the probabilities of this one. (The report counts the tokens of a microbatch, and
its loss is another for another number of them.)

Dimension key
    N, T tokens    E real experts    Z identity experts    K experts a token    G groups of real experts
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from longcat_model.config import Experts
from longcat_model.sequence import Inputs

MODALITIES = ("text", "visual", "audio")


def expert_counts(ids: Tensor, experts: Experts) -> Tensor:
    """How often each expert was chosen.

    Args:
        ids: [T, K] int64; -1 is no choice.

    Returns:
        int64 [E + Z].
    """
    chosen_R = ids.flatten()
    return torch.bincount(chosen_R[chosen_R >= 0], minlength=experts.real + experts.zero)


def use(counts: Tensor, experts: Experts, *, groups: int | None = None) -> Tensor:
    """How much a global batch used each expert's group, 1 being as much as is wanted: f of equations (3) and (4).

    A group of real experts has f = G / (K_e T) * choices, the identity experts 1 / ((K - K_e) T) * choices, with
    K_e = `target_real`.

    Args:
        counts: [E + Z] choices; there are K T in all.
        groups: G, which must divide E; None: every real expert is a group. The report's groups are devices.

    Returns:
        float32 [E + Z]; zeros where nothing was chosen.
    """
    groups = groups or experts.real
    if experts.real % groups:
        raise ValueError(f"balance_loss: groups must divide {experts.real} experts, got {groups}")
    share_E = counts.float() * experts.top_k / counts.sum().clamp(min=1)  # choices a token
    real_G = share_E[: experts.real].view(groups, -1).sum(-1) * (groups / experts.target_real)
    budget = experts.top_k - experts.target_real
    zero = share_E[experts.real :].sum() / budget if budget > 0 else share_E.new_zeros(())
    return torch.cat([real_G.repeat_interleave(experts.real // groups), zero.expand(experts.zero)])


def balance_loss(router_logits: Tensor, use: Tensor, tokens: int) -> Tensor:
    """Router probability of each group times its use, summed over groups, averaged over tokens: equations (3) to (5).

    At the wanted use the loss is 1. The gradient flows through the probabilities alone.

    Args:
        router_logits: [N, E + Z].
        use: float32 [E + Z]; see `use`.
        tokens: of the global batch, of which these may be a part: the losses of its parts add up to its loss.

    Returns:
        float32 [].
    """
    return (router_logits.float().softmax(-1).sum(0) * use).sum() / max(tokens, 1)


def bias_rate(step: int, *, first: float = 0.1, last: float = 0.01, half_life: int = 1000) -> float:
    """Rate of the bias update: halves every `half_life` steps down to `last` (released fine-tuning code)."""
    return float(max(first * 0.5 ** (step // half_life), last))


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, experts: Experts, rate: float) -> None:
    """Moves the bias towards the wanted use, equation (2): rate * (K_e / (K E) - choices / all choices).

    Args:
        bias: [E + Z], changed in place; the identity experts' entries stay.
        counts: [E + Z] choices in the global batch; without any, nothing changes.
    """
    total = counts.sum()
    wanted = experts.target_real / (experts.top_k * experts.real)
    observed_E = counts[: experts.real] / total.clamp(min=1)
    bias[: experts.real] += torch.where(total > 0, rate * (wanted - observed_E), 0.0).to(bias)


class Balancer:
    """Counts choices of a step, and keeps those of the step before, for every layer.

    Args:
        model: its `e_score_correction_bias` buffers, in order, are the layers' biases.
        experts: sizes and the wanted use.
        moves_bias: whether `step` updates the biases; without it, it only counts.

    Example: `loss(model, batch, balancer=balancer)` observes; a stage's `after_step=balancer.step` updates.
    """

    def __init__(self, model: nn.Module, experts: Experts, *, moves_bias: bool = True) -> None:
        named = (*model.named_buffers(), *model.named_parameters())
        self.biases = [bias for name, bias in named if name.endswith("e_score_correction_bias")]
        self.experts, self.moves_bias = experts, moves_bias
        self.counts = [torch.zeros_like(bias, dtype=torch.int64) for bias in self.biases]
        self.before = [torch.zeros_like(bias, dtype=torch.int64) for bias in self.biases]

    def use(self) -> list[Tensor]:
        """Of every layer's experts in the step before: see `use`."""
        return [use(count_E, self.experts) for count_E in self.before]

    def observe(self, expert_ids: Sequence[Tensor]) -> None:
        """Adds the choices of one batch: [T, K] a layer, without padding."""
        if len(expert_ids) != len(self.biases):
            raise ValueError(f"Balancer: expert_ids must have {len(self.biases)} layers, got {len(expert_ids)}")
        for layer, ids in enumerate(expert_ids):
            self.add(layer, expert_counts(ids, self.experts))

    def add(self, layer: int, counts: Tensor) -> None:
        """Adds how often each expert of one layer was chosen: int64 [E + Z]. A layer without choices keeps its bias."""
        self.counts[layer] += counts.to(self.counts[layer].device)

    def step(self, step: int) -> None:
        """Ends a step: updates every bias from its counts, and counts anew."""
        for bias, count_E, before_E in zip(self.biases, self.counts, self.before, strict=True):
            if self.moves_bias:
                update_bias(bias, count_E, self.experts, bias_rate(step))
            before_E.copy_(count_E)
            count_E.zero_()

    def tensors(self, layers: Iterable[int] | None = None) -> dict[str, Tensor]:
        """What a run needs to go on, of some layers or of all."""
        chosen = range(len(self.biases)) if layers is None else layers
        return {f"{layer}.{name}": getattr(self, name)[layer] for layer in chosen for name in ("counts", "before")}


def modality_masks(inputs: Inputs) -> dict[str, Tensor]:
    """Which positions are text, visual or audio, [B, S] bool each; padding is none of them.

    A position that carries an audio frame is audio, whether a transcript goes with it or not.
    """
    visual, audio = inputs.visual[..., 0] >= 0, inputs.audio[..., 0] >= 0
    return {"text": (inputs.documents >= 0) & ~visual & ~audio, "visual": visual, "audio": audio}


def expert_usage(expert_ids: Sequence[Tensor], inputs: Inputs, experts: Experts) -> Tensor:
    """Choices per layer, modality (in the order of `MODALITIES`) and expert.

    Args:
        expert_ids: [B * S, K] a layer.

    Returns:
        int64 [layers, 3, E + Z].
    """
    masks = [modality_masks(inputs)[name].flatten() for name in MODALITIES]
    return torch.stack([torch.stack([expert_counts(ids[mask], experts) for mask in masks]) for ids in expert_ids])
