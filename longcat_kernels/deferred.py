"""Weight gradients apart from input gradients: what lets a pipeline run the two at different times.

    with defer_weight_grads() as pending:
        out = stage(x)
    out.backward(grad)  # B: gradients of inputs alone; each op leaves the gradient of its weight in `pending`
    pending.run()  # W: computes and accumulates them, bit for bit what backward without deferral would have

Nothing is computed twice. Between the two, `pending` holds what a weight gradient is made of (an op's input and the
gradient of its output) and nothing else that forward saved. Deferred are the ops of this package, `F.linear`,
`F.embedding`, `F.layer_norm`, `F.rms_norm` and a `torch.bmm` whose second factor is a weight, in any module that uses
them; every other op's weight gradients come with B, as ever. B and W are those of zero-bubble pipeline parallelism
(arXiv 2401.10241).

A custom `torch.autograd.Function` takes part by asking `WeightGrads.current()` in its forward and, where that is not
None, calling `add` in its backward in place of returning the gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

TOGETHER = 1 << 20  # numbers: gradients go to autograd by so many, as each call of it costs as much as a small product

_CURRENT: ContextVar[WeightGrads | None] = ContextVar("weight_grads", default=None)


@contextmanager
def defer_weight_grads() -> Iterator[WeightGrads]:
    """Ops that run forward inside leave their weight gradients, when backward reaches them, in what this gives.

    Backward itself may run anywhere, later. Contexts nest; the innermost one collects.

    Example:
        >>> layer, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2, requires_grad=True)
        >>> with defer_weight_grads() as pending:
        ...     out = layer(x)
        >>> out.sum().backward()
        >>> layer.weight.grad is None, x.grad is None, len(pending)
        (True, False, 1)
        >>> pending.run()
        >>> layer.weight.grad
        tensor([[1., 1.],
                [1., 1.]])
    """
    pending = WeightGrads()
    token = _CURRENT.set(pending)
    try:
        with _Split(pending):
            yield pending
    finally:
        _CURRENT.reset(token)


class _Entry(NamedTuple):
    weights: Sequence[Tensor]
    compute: Callable[[], Sequence[Tensor | None]]


class WeightGrads:
    """Weight gradients that backward left for later, in the order in which it reached them."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    @staticmethod
    def current() -> WeightGrads | None:
        """What the innermost `defer_weight_grads` around the caller collects; None outside of any."""
        return _CURRENT.get()

    def add(self, weights: Sequence[Tensor], compute: Callable[[], Sequence[Tensor | None]]) -> None:
        """Leaves the gradients of `weights`, parameters or functions of them, to `compute`, which gives one each."""
        self._entries.append(_Entry(weights, compute))

    def take(self, parameters: Iterable[Tensor]) -> WeightGrads:
        """Removes and gives what concerns `parameters`: what is computed for them, and with them in the same call."""
        wanted = {id(parameter) for parameter in parameters}
        taken, entries, self._entries = WeightGrads(), self._entries, []
        for entry in entries:
            concerned = any(id(_root(weight)) in wanted for weight in entry.weights)
            (taken if concerned else self)._entries.append(entry)
        return taken

    def extend(self, others: WeightGrads) -> None:
        """Moves what `others` holds to the end of this."""
        self._entries += others._entries
        others._entries = []

    def run(self) -> None:
        """Computes and accumulates all; empty afterwards.

        Gradients of one parameter are added to each other before they are added to `parameter.grad`, as backward does.
        """
        entries, self._entries = self._entries, []
        uses = Counter(_root(weight) for entry in entries for weight in entry.weights)
        sums: dict[Tensor, Tensor] = {}
        whole: dict[Tensor, Tensor] = {}
        held = 0
        entries.reverse()
        while entries:
            entry = entries.pop()  # what its closure holds goes as soon as it was used
            for weight, grad in zip(entry.weights, entry.compute(), strict=True):
                root = _root(weight)
                uses[root] -= 1
                if grad is not None and weight.requires_grad:
                    if root is not weight:
                        (grad,) = torch.autograd.grad(weight, root, grad, retain_graph=True)
                    sums[root] = sums[root] + grad if root in sums else grad
                if not uses[root] and root in sums:
                    whole[root] = sums.pop(root)
                    held += root.numel()
            if held > TOGETHER or not entries:
                torch.autograd.backward(list(whole), list(whole.values()))
                whole, held = {}, 0

    def __len__(self) -> int:
        return len(self._entries)


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that learns, or a function of one alone, such as a view or a cast of it."""
    return tensor.requires_grad and isinstance(_root(tensor), nn.Parameter)


def _root(tensor: Tensor) -> Tensor:
    """The leaf that a tensor is a function of; the tensor itself where that is none, or more than one."""
    if tensor.is_leaf:
        return tensor
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return getattr(node, "variable", tensor)


class _Split(TorchFunctionMode):
    """Runs the functions in `_SPLIT` as ops whose weight gradients can wait."""

    def __init__(self, pending: WeightGrads) -> None:
        super().__init__()
        self.pending = pending

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        split = _SPLIT.get(func)
        if split is not None and torch.is_grad_enabled():
            return split(self.pending, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(pending: WeightGrads, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    learning = [w for w in (weight, bias) if w is not None and w.requires_grad]
    if not learning or not all(map(is_weight, learning)):
        return functional.linear(input, weight, bias)
    input, weight = _cast(input), _cast(weight)
    bias = None if bias is None else _cast(bias)
    return _separate(input, pending, _LinearRule(weight, bias))


def _embedding(pending: WeightGrads, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    options = _EmbeddingRule(weight, *args, **kwargs)
    if options.max_norm is not None or not is_weight(weight):
        return functional.embedding(input, weight, *args, **kwargs)
    return _separate(input, pending, options)


def _layer_norm(
    pending: WeightGrads,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if weight is None or bias is None or torch.is_autocast_enabled(input.device.type) or not is_weight(weight):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return _separate(input, pending, _LayerNormRule(weight, bias, list(normalized_shape), eps))


def _rms_norm(
    pending: WeightGrads,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if weight is None or not is_weight(weight):
        return functional.rms_norm(input, normalized_shape, weight, eps)
    normed = functional.rms_norm(input, normalized_shape, None, eps)
    return _separate(normed, pending, _ScaleRule(weight))


def _bmm(pending: WeightGrads, input: Tensor, mat2: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or not is_weight(mat2):
        return torch.bmm(input, mat2, **kwargs)
    return _separate(_cast(input), pending, _BmmRule(_cast(mat2)))


_SPLIT: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    torch.bmm: _bmm,
}


def _cast(tensor: Tensor) -> Tensor:
    """As autocast, which does not reach into an autograd.Function's backward, would have it."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _separate(x: Tensor, pending: WeightGrads, rule: Any) -> Tensor:
    # The first input, which never gets a gradient, asks for one, so that an op of constants and weights has a node too.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    out: Tensor = _Deferred.apply(anchor, x, pending, rule)  # type: ignore[no-untyped-call]
    return out


class _Deferred(torch.autograd.Function):
    """An op as its rule says: `forward(x)` gives the output and what to keep; then `input_grad` and `weight_grads`.

    Weights reach it inside the rule, where autograd does not see them: it would look for their gradients in B.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, pending: WeightGrads, rule: Any) -> Tensor:
        ctx.pending, ctx.rule = pending, rule
        out, kept = rule.forward(x)
        ctx.save_for_backward(x, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None]:
        rule, saved, (grad,) = ctx.rule, ctx.saved_tensors, grads
        ctx.pending.add(rule.weights, lambda: rule.weight_grads(grad, *saved))
        return None, rule.input_grad(grad, *saved) if ctx.needs_input_grad[1] else None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class _LinearRule:
    weight: Tensor
    bias: Tensor | None

    @property
    def weights(self) -> list[Tensor]:
        return [w for w in (self.weight, self.bias) if w is not None and w.requires_grad]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return functional.linear(x, self.weight, self.bias), ()

    def input_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return (_rows(grad) @ self.weight).view(x.shape)

    def weight_grads(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        grad_weight = [_rows(grad).T @ _rows(x)] if self.weight.requires_grad else []
        return grad_weight + ([_rows(grad).sum(0)] if self.bias is not None and self.bias.requires_grad else [])


@dataclass(frozen=True)
class _BmmRule:
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
class _EmbeddingRule:
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
class _ScaleRule:
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
class _LayerNormRule:
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
