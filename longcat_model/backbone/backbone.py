"""The stack of shortcut layers and its final norm.

Dimension key
    B batch    S sequence    D model    T = B * S tokens    E experts, identity ones included    k experts a token
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from longcat_model import config
from longcat_model.backbone.attention import Context
from longcat_model.backbone.cache import Cache
from longcat_model.backbone.moe import ShortcutLayer
from longcat_model.backbone.norm import RMSNorm

RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight", "down")  # a layer has five: two attentions, three networks


@dataclass(frozen=True)
class BackboneOutput:
    """What heads and losses read; the lists have one entry a layer. Padding positions hold finite, unused numbers."""

    hidden: Tensor  # [B, S, D] after the final norm: the heads' input
    last: Tensor  # [B, S, D] before the final norm: the hidden z-loss's input
    router_logits: list[Tensor]  # [T, E] float32
    expert_ids: list[Tensor]  # [T, k] int64


class Backbone(nn.Module):
    """Attention and experts over embeddings of any modality; parameter names are the released ones."""

    def __init__(self, sizes: config.Backbone) -> None:
        super().__init__()
        self.sizes = sizes
        self.layers = nn.ModuleList(ShortcutLayer(sizes, index) for index in range(sizes.layers))
        self.norm = RMSNorm(sizes.hidden, eps=sizes.norm_eps)
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights of deviation hidden^-0.5 (0.018 at the released width), scaled down where the residual sums.

        One deviation for all readers is what the attention's scale corrections assume.
        """
        deviation = self.sizes.hidden**-0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            if name.endswith(RESIDUAL_WRITERS):
                nn.init.normal_(parameter, std=(parameter.shape[-1] * 5 * self.sizes.layers) ** -0.5)
            else:
                nn.init.normal_(parameter, std=deviation)

    def forward(
        self, embeddings: Tensor, documents: Tensor | None = None, cache: Cache | None = None
    ) -> BackboneOutput:
        """Runs S positions after those the cache holds, and adds them to it.

        Args:
            embeddings: [B, S, D].
            documents: [B, S] int64; positions of different numbers do not see each other, -1 is padding. None: one
                document, number 0.
            cache: earlier positions of the same rows; needs `torch.no_grad()`.
        Raises:
            ValueError: shapes disagree with each other or with the cache, or the cache is full.
        """
        self._check(embeddings, documents)
        context = Context.of(self.sizes.attention, embeddings, documents, cache)
        hidden, router_logits, expert_ids = embeddings, [], []
        for layer in self.layers:
            hidden, logits, ids = layer(hidden, context)
            router_logits.append(logits)
            expert_ids.append(ids)
        if cache is not None:
            cache.advance(embeddings.shape[1])
        return BackboneOutput(self.norm(hidden), hidden, router_logits, expert_ids)

    def _check(self, embeddings: Tensor, documents: Tensor | None) -> None:
        if embeddings.dim() != 3 or embeddings.shape[-1] != self.sizes.hidden:
            raise ValueError(f"Backbone: embeddings must be [B, S, {self.sizes.hidden}], got {list(embeddings.shape)}")
        if documents is not None and documents.shape != embeddings.shape[:2]:
            raise ValueError(
                f"Backbone: documents must be {list(embeddings.shape[:2])} like the embeddings, "
                f"got {list(documents.shape)}"
            )
