"""Weight gradients apart from input gradients: what lets a pipeline run the two at different times.

    with defer_weight_grads() as pending:
        out = stage(x)
    out.backward(grad)  # B: gradients of inputs alone; each op leaves the gradient of its weight in `pending`
    pending.run()  # W: computes and accumulates them, bit for bit what backward without deferral would have

Nothing is computed twice. Between the two, `pending` holds what a weight gradient is made of (an op's input and the
gradient of its output) and nothing else that forward saved; neither that nor a weight may change in place before W.
Deferred are the ops of this package, `F.linear`, `F.embedding`, `F.layer_norm`, `F.rms_norm` and a `torch.bmm` whose
second factor is a weight, in any module that uses them; every other op's weight gradients come with B, as ever. B and W
are those of zero-bubble pipeline parallelism (arXiv 2401.10241).

An op cannot see for whose sake backward runs: `torch.autograd.grad` of inputs alone leaves weight gradients, too.
Hooks of a weight that this package's own ops use are called in B as well, with None.

A custom `torch.autograd.Function` takes part by asking `WeightGrads.current()` in its forward and, where that is not
None, calling `add` in its backward in place of returning the gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from longcat_kernels.deferred_rules import BmmRule, EmbeddingRule, LayerNormRule, LinearRule, ScaleRule

# Numbers: until there are so many, gradients wait to go to autograd together, as each call of it costs; more would not
# be in a cache any longer.
TOGETHER = 1 << 16

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
    compute: Callable[..., Sequence[Tensor | None]]
    saved: Sequence[Tensor]
    versions: Sequence[int]

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], compute: Callable[..., Sequence[Tensor | None]], saved: Sequence[Tensor]
    ) -> _Entry:
        return cls(weights, compute, saved, [tensor._version for tensor in (*weights, *saved)])

    def grads(self) -> Sequence[Tensor | None]:
        """One for each weight."""
        for tensor, version in zip((*self.weights, *self.saved), self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    "defer_weight_grads: weights and saved tensors must not change in place between backward and "
                    f"`run`, got a tensor {list(tensor.shape)} at version {tensor._version} that was saved at version "
                    f"{version}: call `run` before the optimizer's step, or clone what changes"
                )
        grads = self.compute(*self.saved)
        if len(grads) != len(self.weights):
            raise RuntimeError(
                f"defer_weight_grads: compute must give {len(self.weights)} gradients, one a weight, got {len(grads)}"
            )
        return grads


class WeightGrads:
    """Weight gradients that backward left for later, in the order in which it reached them."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    @staticmethod
    def current() -> WeightGrads | None:
        """What the innermost `defer_weight_grads` around the caller collects; None outside of any."""
        return _CURRENT.get()

    def add(
        self,
        weights: Sequence[Tensor],
        compute: Callable[..., Sequence[Tensor | None]],
        saved: Sequence[Tensor] = (),
    ) -> None:
        """Leaves the gradients of `weights`, parameters or functions of them, to `compute(*saved)`: one, or None, each.

        Raises:
            RuntimeError: backward runs with `create_graph`.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "defer_weight_grads: backward must run without create_graph, as gradients that wait have no graph: "
                "run this forward outside of defer_weight_grads"
            )
        self._entries.append(_Entry.of(weights, compute, saved))

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
        moved, others._entries = others._entries, []
        self._entries += moved

    def run(self) -> None:
        """Computes and accumulates all; empty afterwards.

        Gradients of one parameter are added to each other before they are added to `parameter.grad`, as one backward
        does. Where a computation raises, nothing is lost: it and what is still to do stay here, and `run` may be called
        again.

        Raises:
            RuntimeError: a weight, or what its gradient is made of, has changed in place since backward.
        """
        entries, self._entries = self._entries[::-1], []
        sums = _Sums(entries)
        try:
            with torch.no_grad():
                while entries:
                    for weight, grad in zip(entries[-1].weights, entries[-1].grads(), strict=True):
                        sums.add(weight, grad)
                    entries.pop()  # what it holds goes as soon as it was used
                    if sums.held > TOGETHER or not entries:
                        sums.accumulate()
        finally:
            if entries:
                self._entries = [*sums.entries(), *reversed(entries), *self._entries]

    def __len__(self) -> int:
        return len(self._entries)


class _Sums:
    """Gradients on their way to the parameters: of all uses of a weight first, then of all weights of a parameter."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._uses = Counter(w for entry in entries for weight in entry.weights for w in {weight, _root(weight)})
        self._sums: dict[Tensor, Tensor] = {}
        self._whole: dict[Tensor, Tensor] = {}
        self.held = 0  # numbers in gradients that are whole

    def add(self, weight: Tensor, grad: Tensor | None) -> None:
        root = _root(weight)
        self._use(weight, grad if weight.requires_grad else None)
        if root is weight:
            return
        if not self._uses[weight] and weight in self._sums:
            (grad,) = torch.autograd.grad(weight, root, self._sums.pop(weight), retain_graph=True)
            self._use(root, grad)
        else:
            self._use(root, None)

    def _use(self, weight: Tensor, grad: Tensor | None) -> None:
        self._uses[weight] -= 1
        if grad is not None:
            self._sums[weight] = self._sums[weight] + grad if weight in self._sums else grad
        if not self._uses[weight] and weight in self._sums and _root(weight) is weight:
            self._whole[weight] = self._sums.pop(weight)
            self.held += weight.numel()

    def accumulate(self) -> None:
        """Adds what is whole to the parameters' `grad`."""
        whole, self._whole, self.held = self._whole, {}, 0
        torch.autograd.backward(list(whole), list(whole.values()))

    def entries(self) -> list[_Entry]:
        """What is known so far, to be added to again."""
        known = {**self._whole, **self._sums}
        return [_Entry.of([weight], lambda known: [known], [grad]) for weight, grad in known.items()]


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
    learns = (weight.requires_grad, bias is not None and bias.requires_grad)
    if not _can_wait(input, *(w for w, learn in zip((weight, bias), learns, strict=True) if learn)):
        return functional.linear(input, weight, bias)
    input, weight = _cast(input), _cast(weight)
    bias = None if bias is None else _cast(bias)
    return _separate(input, pending, LinearRule(weight, bias, learns))


def _embedding(pending: WeightGrads, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    options = EmbeddingRule(weight, *args, **kwargs)
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
    if weight is None or bias is None or _is_autocast(input) or not is_weight(weight):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    if bias.requires_grad and not is_weight(bias):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return _separate(input, pending, LayerNormRule(weight, bias, list(normalized_shape), eps))


def _rms_norm(
    pending: WeightGrads,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if weight is None or weight.dtype != input.dtype or _is_autocast(input) or not _can_wait(input, weight):
        return functional.rms_norm(input, normalized_shape, weight, eps)
    normed = functional.rms_norm(input, normalized_shape, None, eps)
    return _separate(normed, pending, ScaleRule(weight))


def _bmm(pending: WeightGrads, input: Tensor, mat2: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or not _can_wait(input, mat2):
        return torch.bmm(input, mat2, **kwargs)
    return _separate(_cast(input), pending, BmmRule(_cast(mat2)))


_SPLIT: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    torch.bmm: _bmm,
}


def _can_wait(input: Tensor, *learning: Tensor | None) -> bool:
    is_known = all(w is not None and is_weight(w) for w in learning)
    return bool(learning) and is_known and not input.is_complex()  # the rules do not conjugate


def _is_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _cast(tensor: Tensor) -> Tensor:
    """As autocast, which does not reach into an autograd.Function's backward, would have it.

    But for its cache: where a weight is used twice, the gradients of both uses are added in the weight's own dtype.
    """
    wanted = _is_autocast(tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if wanted else tensor


def _separate(x: Tensor, pending: WeightGrads, rule: Any) -> Tensor:
    # An op of constants and weights alone needs a node, too: an input asks for a gradient that it never gets.
    anchor = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
    out: Tensor = _Deferred.apply(anchor, x, pending, rule)  # type: ignore[no-untyped-call]
    return out


class _Deferred(torch.autograd.Function):
    """An op as its rule says: `forward(x)` gives the output and what to keep; then `input_grad` and `weight_grads`.

    Weights reach it inside the rule, where autograd does not see them: it would look for their gradients in B.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor | None, x: Tensor, pending: WeightGrads, rule: Any) -> Tensor:
        ctx.pending, ctx.rule, ctx.weights = pending, rule, rule.weights
        out, kept = rule.forward(x)
        # The weight, which the rule has, is saved so that autograd sees where it changes before the input gradient.
        ctx.save_for_backward(x, *kept, *([rule.weight] if ctx.needs_input_grad[1] else []))
        ctx.kept = 1 + len(kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None]:
        rule, saved, (grad,) = ctx.rule, ctx.saved_tensors[: ctx.kept], grads
        ctx.pending.add(ctx.weights, rule.weight_grads, (grad, *saved))
        return None, rule.input_grad(grad, *saved) if ctx.needs_input_grad[1] else None, None, None
