"""Training stages of the language model: Pre-Align with the backbone frozen, then everything (report 4.1.3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from longcat_model.model import LongcatNext
from longcat_model.sequence import Batch
from longcat_model.training.balance import Balancer
from longcat_model.training.loop import Stage
from longcat_model.training.loss import LossWeights, loss


def pre_align(model: LongcatNext, batch: Callable[[int], Batch], *, steps: int, learning_rate: float) -> Stage:
    """Embeddings, Pre-Buffer and depth heads learn the new modalities; backbone and text head stay as they are."""
    modules: tuple[nn.Module, ...] = (model.embed_tokens, model.pre_buffer, model.visual_head, model.audio_head)
    parameters = tuple(p for module in modules for p in module.parameters())
    balancer = Balancer(model, model.sizes.backbone.experts, moves_bias=False)
    return Stage(
        name="language_pre_align",
        module=model,
        parameters=parameters,
        batch=batch,
        loss=lambda rows: loss(model, rows, balancer=balancer),
        steps=steps,
        learning_rate=learning_rate,
        after_step=balancer.step,
        balancer=balancer,
    )


def joint(
    model: LongcatNext,
    batch: Callable[[int], Batch],
    *,
    steps: int,
    learning_rate: float,
    weights: LossWeights | None = None,
    name: str = "language_joint",
) -> Stage:
    """Every parameter learns, with loss-free balancing of the experts after each step."""
    balancer = Balancer(model, model.sizes.backbone.experts)
    return Stage(
        name=name,
        module=model,
        parameters=tuple(model.parameters()),
        batch=batch,
        loss=lambda rows: loss(model, rows, weights=weights, balancer=balancer),
        steps=steps,
        learning_rate=learning_rate,
        after_step=balancer.step,
        balancer=balancer,
    )
