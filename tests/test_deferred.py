"""Deferred weight gradients: the bits of undeferred ones, nothing twice, and little held in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_kernels import WeightGrads, defer_weight_grads, fused_moe, grouped_mm, ngram_embedding, rvq_decode
from longcat_kernels.modules import DepthTransformer, MoE, Routed

TOKENS, WIDTH = 12, 16


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Bmm(nn.Module):
    """As the depth transformer's feed-forward: the second factor is a view of a stored matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = parameter(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight_LDF = self.stored.unflatten(0, (-1, 2)).transpose(0, 1).mT
        return torch.bmm(x.view(2, -1, WIDTH), weight_LDF)


class Experts(nn.Module):
    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        self.gate_up, self.down = parameter(3, 10, WIDTH), parameter(3, WIDTH, 5)
        self.ids, self.weights = torch.randint(-1, 4, (TOKENS, 2)), torch.rand(TOKENS, 2)
        self.dtype, self.options = dtype, options

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up.to(self.dtype), self.down.to(self.dtype)
        return fused_moe(x.to(self.dtype), gate_up, down, self.ids, self.weights, **self.options)


class Grouped(nn.Module):
    """A weight as the second factor, then one as the first, then two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = parameter(3, WIDTH, 5), parameter(3, 4, 5)
        self.offs = torch.tensor([5, 5, TOKENS])

    def forward(self, x: Tensor) -> Tensor:
        rows_RN = grouped_mm(x, self.second, self.offs)
        columns_MR = grouped_mm(self.first, rows_RN.mT, self.offs)
        return grouped_mm(columns_MR, rows_RN, self.offs)


class Words(nn.Module):
    """The table is used three times: by the n-gram embedding, whole, and in part."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.word, self.sparse = nn.Embedding(20, WIDTH), sparse
        self.tables = nn.ParameterList([parameter(31, 4), parameter(33, 4)])
        self.projections = nn.ParameterList([parameter(WIDTH, 4), parameter(WIDTH, 4)])
        self.ids = torch.randint(-1, 20, (2, 6))

    def forward(self, x: Tensor) -> Tensor:
        options: Any = {"base": 18, "neighbors": 2, "splits": 2, "ignored": (18, 20), "sparse": self.sparse}
        grams = ngram_embedding(self.ids, self.word.weight, list(self.tables), list(self.projections), **options)
        rows = functional.embedding(self.ids.clamp(0, 4), self.word.weight[10:15])
        return grams + self.word(self.ids.clamp(min=0)) + rows + x.sum()


class Codewords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.books = nn.ParameterList([parameter(7, WIDTH), parameter(5, WIDTH)])
        self.codes = torch.randint(-1, 5, (TOKENS, 2))

    def forward(self, x: Tensor) -> Tensor:
        return rvq_decode(self.codes, list(self.books)) * x.sum()


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = DepthTransformer(hidden=WIDTH, dim=8, heads=2, layers=2, ffn_scale=6, sizes=(5, 4, 3))
        self.tables = nn.ParameterList([parameter(size + 1, WIDTH) for size in (5, 4, 3)])
        self.codes = torch.randint(-1, 4, (TOKENS, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.head.logits(x, self.codes, list(self.tables)), 1)


class Half(nn.Module):
    """Some weights learn and some do not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, 8), nn.LayerNorm(8))
        self.layers[0].weight.requires_grad_(False)
        self.layers[1].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, 7),
    "linear_without_bias": lambda: nn.Linear(WIDTH, 7, bias=False),
    "rms_norm": lambda: nn.RMSNorm(WIDTH, 1e-6),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "bmm": Bmm,
    "half": Half,
    "moe": lambda: MoE(WIDTH, 6, real=4, zero=2, top_k=3, scale=2.0),
    "fused_moe": lambda: Experts(torch.float32),
    "fused_moe_recomputed": lambda: Experts(torch.float32, save="x"),
    "fused_moe_cast": lambda: Experts(torch.bfloat16),
    "grouped_mm": Grouped,
    "words": lambda: Words(sparse=False),
    "words_sparse": lambda: Words(sparse=True),
    "rvq_decode": Codewords,
    "depth": Depth,
}


class Calls(TorchDispatchMode):
    """Counts what does the work: products, lookups, kernels of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "longcat" in name or any(mark in name for mark in (".mm.", "addmm", "bmm", "embedding")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(make())
    return modules[0], modules[1]


def inputs(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(TOKENS, WIDTH), ()] * count
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def loss_of(out: Tensor | Routed, scale: Tensor) -> Tensor:
    out = out.output if isinstance(out, Routed) else out
    return (out.float().sin() * scale).sum()


@pytest.mark.parametrize("name", MODULES)
def test_the_same_bits_in_two_parts_and_no_work_twice(name: str) -> None:
    whole, split = pair(MODULES[name])
    before, after = Calls(), Calls()
    for x, scale in inputs(3):
        leaf = x.clone().requires_grad_()
        loss = loss_of(whole(leaf), scale)
        with before:
            loss.backward()

        own = x.clone().requires_grad_()
        with defer_weight_grads() as pending:
            out = split(own)
        loss = loss_of(out, scale)
        untouched = [p.grad if p.grad is None else p.grad.clone() for p in split.parameters()]
        with after:
            loss.backward()
        assert torch.equal(own.grad, leaf.grad)  # type: ignore[arg-type]
        for p, old in zip(split.parameters(), untouched, strict=True):
            assert p.grad is None if old is None else torch.equal(dense(p.grad), dense(old))
        assert len(pending)
        with after:
            pending.run()
        assert not len(pending)
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(dense(p.grad), dense(q.grad))
    assert after.counts == before.counts


def dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_dense() if grad.is_sparse else grad


def test_main_grads_get_their_part_in_the_second_half() -> None:
    module = Experts(torch.float32)
    main = (torch.zeros_like(module.gate_up), torch.zeros_like(module.down))
    module.options = {"main_grads": main}
    with defer_weight_grads() as pending:
        out = module(torch.randn(TOKENS, WIDTH))
    out.sum().backward()
    assert not main[0].any() and not main[1].any()
    pending.run()
    assert main[0].any() and main[1].any() and module.gate_up.grad is None


def test_autocast_casts_as_ever() -> None:
    whole, split = pair(lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)))
    x = torch.randn(TOKENS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        want = whole(x)
        with defer_weight_grads() as pending:
            found = split(x)
    assert found.dtype == want.dtype == torch.bfloat16 and torch.equal(found, want)
    want.sum().backward(), found.sum().backward()
    pending.run()
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(dense(p.grad), dense(q.grad))


def test_taken_gradients_run_elsewhere_and_join_there() -> None:
    """A table used by two stages: the sum of both uses is added to what was there, as one backward would."""
    table = nn.Embedding(6, WIDTH)
    with defer_weight_grads() as first:
        a = table(torch.tensor([1, 2, 2]))
    head = nn.Linear(WIDTH, 3)
    with defer_weight_grads() as second:
        b = head(functional.embedding(torch.tensor([0, 1]), table.weight[1:4]))
    a.sum().backward(), b.sum().backward()
    moved = second.take([table.weight])
    assert (len(second), len(moved)) == (1, 1)
    first.extend(moved)
    second.run()
    assert table.weight.grad is None and head.weight.grad is not None
    first.run()
    assert len(moved) == 0
    want = torch.zeros_like(table.weight)
    want[[1, 2]] += torch.tensor([[1.0], [2.0]])
    want[[1, 2]] += head.weight.detach().sum(0)
    assert torch.allclose(dense(table.weight.grad), want)


def test_contexts_nest_and_leave_nothing_behind() -> None:
    layer, x = nn.Linear(WIDTH, 2), torch.randn(1, WIDTH)
    assert WeightGrads.current() is None
    with defer_weight_grads() as outer:
        with defer_weight_grads() as inner:
            assert WeightGrads.current() is inner
            out = layer(x)
        assert WeightGrads.current() is outer
    assert WeightGrads.current() is None
    out.sum().backward()
    assert (len(outer), len(inner)) == (0, 1)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_only_inputs_and_output_gradients_are_held_in_between() -> None:
    """Of a SwiGLU: three products' inputs and gradients, not the factors that forward saved for silu and product."""
    gate, up, down = (nn.Linear(a, b, bias=False) for a, b in ((64, 128), (64, 128), (128, 64)))
    x = torch.randn(256, 64, requires_grad=True)
    with defer_weight_grads() as pending:
        out = down(functional.silu(gate(x)) * up(x))
    out.backward(torch.ones_like(out))
    del out
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(pending))
    unit = 256 * 64 * 4
    assert held == unit * (1 + 2 + 2) + unit * (2 + 1)  # x, both gradients of the hidden units; the product, ones


def tensors_of(pending: WeightGrads) -> list[Tensor]:
    """What is held besides weights, each storage once."""
    saved = (tensor for entry in pending._entries for tensor in entry.saved)
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in saved}.values())
