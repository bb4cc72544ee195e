"""Deferred weight gradients: the bits of undeferred ones, nothing twice, and little held in between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import Calls
from torch import Tensor, nn
from torch.nn import functional

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


def forward(module: nn.Module, x: Tensor) -> tuple[Tensor, WeightGrads]:
    with defer_weight_grads() as pending:
        return module(x), pending


def change(tensor: Tensor) -> None:
    """In place, if only by name."""
    tensor.detach()[:0].zero_()


@pytest.mark.parametrize("name", ["linear", "rms_norm", "layer_norm", "bmm", "fused_moe", "grouped_mm"])
def test_a_weight_changed_before_its_input_gradient_is_noticed(name: str) -> None:
    """As autograd does, and with its words."""
    module = MODULES[name]()
    for place, weight in module.named_parameters():
        if place == "bias":  # no gradient is made of it
            continue
        out, _ = forward(module, torch.randn(TOKENS, WIDTH, requires_grad=True))
        change(weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("half", "moe", "fused_moe_cast", "depth")])
def test_what_changes_between_the_halves_is_noticed(name: str) -> None:
    module = MODULES[name]()

    def halfway() -> WeightGrads:
        out, pending = forward(module, torch.randn(TOKENS, WIDTH, requires_grad=True))
        out.sum().backward()
        return pending

    saved = sum(len(entry.saved) for entry in halfway()._entries)
    assert saved >= 2
    for place in range(saved + len(list(module.parameters()))):
        pending = halfway()
        held = [tensor for entry in pending._entries for tensor in entry.saved]
        change([*held, *module.parameters()][place])
        with pytest.raises(RuntimeError, match="must not change in place between backward and `run`"):
            pending.run()


def test_weights_that_no_gradient_is_made_of_may_change() -> None:
    layer = nn.Linear(WIDTH, 3)
    out, pending = forward(layer, torch.ones(2, WIDTH))  # asks for no gradient
    change(layer.weight)
    out.sum().backward()
    pending.run()
    assert layer.weight.grad is not None and bool((layer.weight.grad == 2).all())


class Once(torch.autograd.Function):
    """x * weight; the weight's gradient fails while `trouble` has something."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, trouble: list[str]) -> Tensor:
        ctx.pending, ctx.trouble = WeightGrads.current(), trouble
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x, weight), trouble = ctx.saved_tensors, ctx.trouble

        def compute(grad: Tensor, x: Tensor) -> list[Tensor]:
            if trouble:
                raise OSError(trouble.pop())
            return [(grad * x).sum(0)]

        ctx.pending.add([weight], compute, (grads[0], x))
        return grads[0] * weight, None, None


def test_a_failure_loses_nothing() -> None:
    """A use of a weight before the failure, one after it, and others on both sides: the bits of a run without it."""

    def run(trouble: list[str]) -> list[Tensor]:
        torch.manual_seed(0)
        shared, first, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        scale = parameter(WIDTH)
        with defer_weight_grads() as pending:
            x = shared(first(torch.randn(TOKENS, WIDTH)))
            out = last(shared(Once.apply(x, scale, trouble)))  # type: ignore[no-untyped-call]
        out.sin().sum().backward()
        while trouble:
            with pytest.raises(OSError, match="disk full"):
                pending.run()
            assert len(pending)
        pending.run()
        assert not len(pending)
        return [dense(p.grad) for p in (*shared.parameters(), *first.parameters(), *last.parameters(), scale)]

    assert all(map(torch.equal, run([]), run(["disk full", "disk full"])))


def test_a_custom_function_gives_one_gradient_a_weight() -> None:
    with defer_weight_grads() as pending:
        out = nn.Linear(WIDTH, 1)(torch.ones(1, WIDTH))
    out.backward()
    pending._entries = [pending._entries[0]._replace(compute=lambda *saved: [])]
    with pytest.raises(RuntimeError, match="must give 2 gradients, one a weight, got 0"):
        pending.run()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", ["linear", "rms_norm", "fused_moe", "grouped_mm", "words", "rvq_decode"])
def test_a_backward_with_a_graph_is_refused(name: str) -> None:
    out, _ = forward(MODULES[name](), torch.randn(TOKENS, WIDTH, requires_grad=True))
    with pytest.raises(RuntimeError, match="must run without create_graph"):
        out.sum().backward(create_graph=True)


def gradients_of(make: Callable[[], nn.Module], x: Tensor, defers: bool, autocast: bool = False) -> list[Tensor]:
    """Output, gradient of x, and all weights' gradients."""
    torch.manual_seed(0)
    module, leaf = make(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, pending = forward(module, leaf) if defers else (module(leaf), WeightGrads())
    out.backward(torch.ones_like(out).cumsum(0))
    pending.run()
    return [out.detach(), dense(leaf.grad), *(dense(p.grad) for p in module.parameters())]


class Shared(nn.Module):
    """One cast of a weight for two uses: they add up in the cast's dtype, as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.bfloat16()
        return functional.linear(functional.linear(x.bfloat16(), weight), weight)


class Joined(nn.Module):
    """A weight that is made of two parameters is no weight: its gradient comes with B."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = parameter(3, WIDTH), parameter(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, torch.cat([self.upper, self.lower]))


ODD: dict[str, tuple[Callable[[], nn.Module], Tensor, bool]] = {
    "double_under_autocast": (lambda: nn.Linear(WIDTH, 7).double(), torch.randn(3, WIDTH).double(), True),
    "norm_under_autocast": (lambda: nn.RMSNorm(WIDTH), torch.randn(3, WIDTH), True),
    "narrow_input_of_a_wide_norm": (lambda: nn.RMSNorm(WIDTH), torch.randn(3, WIDTH).bfloat16(), False),
    "wide_input_of_a_narrow_norm": (lambda: nn.RMSNorm(WIDTH).bfloat16(), torch.randn(3, WIDTH), False),
    "complex": (lambda: nn.Linear(WIDTH, 7, dtype=torch.complex64), torch.randn(3, WIDTH) + 0j, False),
    "one_cast_for_two_uses": (Shared, torch.randn(3, WIDTH), False),
    "made_of_two": (Joined, torch.randn(3, WIDTH), False),
    "no_rows": (lambda: nn.Linear(WIDTH, 7), torch.randn(0, WIDTH), False),
    "a_vector": (lambda: nn.Linear(WIDTH, 7), torch.randn(WIDTH), False),
    "columns": (lambda: nn.Linear(WIDTH, 7), torch.randn(WIDTH, 3).T, False),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", ODD)
def test_odd_inputs_are_those_of_one_backward(name: str) -> None:
    make, x, autocast = ODD[name]
    for found, want in zip(*(gradients_of(make, x, defers, autocast) for defers in (True, False)), strict=True):
        assert found.dtype == want.dtype and torch.equal(found, want)


def test_a_bias_that_is_no_weight_gives_its_gradient_with_the_inputs() -> None:
    weight, x = parameter(WIDTH), torch.randn(3, WIDTH, requires_grad=True)

    def normed() -> Tensor:
        return functional.layer_norm(x, (WIDTH,), weight, x.mean(0))

    with defer_weight_grads():
        out = normed()
    (found,), (want,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, normed()))
    assert torch.equal(found, want)


def test_a_kept_graph_gives_every_gradient_again() -> None:
    layer = nn.Linear(WIDTH, 3)
    out, pending = forward(layer, torch.ones(2, WIDTH))
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert len(pending) == 2
    pending.run()
    assert bool((dense(layer.weight.grad) == 4).all())


def test_hooks_of_weights_see_the_second_half() -> None:
    layer, seen = nn.Linear(WIDTH, 3), []
    layer.weight.register_hook(lambda grad: grad * 10)
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(len(seen)))
    out, pending = forward(layer, torch.ones(2, WIDTH))
    out.sum().backward()
    assert not seen
    pending.run()
    assert seen == [0] and bool((dense(layer.weight.grad) == 20).all())


def test_regions_without_gradients_and_other_threads_leave_nothing() -> None:
    layer, x, outs = nn.Linear(WIDTH, 3), torch.ones(2, WIDTH), []
    with defer_weight_grads() as pending:
        with torch.no_grad():
            assert not layer(x).requires_grad
        thread = threading.Thread(target=lambda: outs.append(layer(x)))
        thread.start()
        thread.join()
    outs[0].sum().backward()
    assert not len(pending) and layer.weight.grad is not None


def test_pending_gradients_move_once() -> None:
    layer = nn.Linear(WIDTH, 3)
    out, pending = forward(layer, torch.ones(2, WIDTH))
    out.sum().backward()
    pending.extend(pending)
    assert len(pending) == 1
