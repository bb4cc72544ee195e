"""The torch ops whose weight gradients can wait (see deferred.py), each a rule of one input and of weights it holds.

weight, weights                    what the input gradient is made of; what `weight_grads` gives the gradients of
forward(x)                         the output, and what to keep besides x
input_grad(grad, x, *kept)         where x may ask for one
weight_grads(grad, x, *kept)       one for each of `weights`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class LinearRule:
    weight: Tensor
    bias: Tensor | None
    learns: tuple[bool, bool]

    @property
    def weights(self) -> list[Tensor]:
        return [w for w, learns in zip((self.weight, self.bias), self.learns, strict=True) if learns and w is not None]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return functional.linear(x, self.weight, self.bias), ()

    def input_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return (_rows(grad) @ self.weight).view(x.shape)

    def weight_grads(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        grad_weight = [_rows(grad).T @ _rows(x)] if self.learns[0] else []
        return grad_weight + ([_rows(grad).sum(0)] if self.learns[1] else [])


@dataclass(frozen=True)
class BmmRule:
    weight: Tensor

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return torch.bmm(x, self.weight), ()

    def input_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(grad, self.weight.mT)

    def weight_grads(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        return [torch.bmm(x.mT, grad)]


@dataclass(frozen=True)
class EmbeddingRule:
    """Fields after `weight` are `F.embedding`'s."""

    weight: Tensor
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight]

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[()]]:
        return functional.embedding(ids, self.weight, self.padding_idx), ()

    def weight_grads(self, grad: Tensor, ids: Tensor) -> list[Tensor]:
        rows = len(self.weight)
        padding = -1 if self.padding_idx is None else self.padding_idx % rows
        backward = torch.ops.aten.embedding_backward
        return [backward(grad, ids, rows, padding, self.scale_grad_by_freq, self.sparse)]


@dataclass(frozen=True)
class ScaleRule:
    """x * weight, the weight broadcast over the leading axes."""

    weight: Tensor

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return x * self.weight, ()

    def input_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad * self.weight

    def weight_grads(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        return [(grad * x).sum_to_size(self.weight.shape)]


@dataclass(frozen=True)
class LayerNormRule:
    weight: Tensor
    bias: Tensor
    shape: list[int]
    eps: float

    @property
    def weights(self) -> list[Tensor]:
        return [self.weight, self.bias]  # where one does not learn, `run` drops its gradient

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, mean, inverse = torch.native_layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return out, (mean, inverse)

    def input_grad(self, grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        backward, wanted = torch.ops.aten.native_layer_norm_backward, [True, False, False]
        return backward(grad, x, self.shape, mean, inverse, self.weight, self.bias, wanted)[0]

    def weight_grads(self, grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
        backward, wanted = torch.ops.aten.native_layer_norm_backward, [False, True, True]
        return backward(grad, x, self.shape, mean, inverse, self.weight, self.bias, wanted)[1:]
