"""Text head: one class a text id and a special token; code ids have their own heads."""

from __future__ import annotations

from torch import Tensor, nn


class TextHead(nn.Linear):
    """Hidden states after the final norm to logits; its weight is not tied to the embedding."""

    def __init__(self, hidden: int, text_rows: int) -> None:
        super().__init__(hidden, text_rows, bias=False)
        nn.init.normal_(self.weight, std=hidden**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D]; returns [..., text_rows] float32."""
        return super().forward(hidden).float()
