"""The depth transformer: released names and layout, a plain loop over levels, causality, training, the end rule."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_kernels import defer_weight_grads
from longcat_kernels.modules import DepthTransformer

SIZES = (6, 5, 4, 4)


def head(layers: int = 2) -> tuple[DepthTransformer, list[torch.Tensor]]:
    torch.manual_seed(0)
    module = DepthTransformer(hidden=10, dim=8, heads=2, layers=layers, ffn_scale=6, sizes=SIZES).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module, [torch.randn(size + 1, 10, dtype=torch.float64) for size in SIZES]


def level_by_level(module: DepthTransformer, h: torch.Tensor, codes: list[int], tables: list) -> list[torch.Tensor]:
    """One position's logits from the state dict, by the formulas of the released model, one vector at a time."""
    w = module.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * w[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    inputs = [h, *(sum(tables[j][codes[j]] for j in range(level)) for level in range(1, 4))]
    z = [w["hidden_proj.weight"] @ norm(x, "hidden_norm") for x in inputs]
    for i in range(len(module.transformer_layers)):
        at = f"transformer_layers.{i}"
        n = [norm(x, f"{at}.layernorm1") for x in z]
        q, k, v = ([linear(x, f"{at}.self_attention.{p}_proj").view(2, 4) for x in n] for p in "qkv")
        for level in range(4):
            heads = []
            for a in range(2):
                scores = torch.stack([q[level][a] @ k[j][a] for j in range(level + 1)]) * 4**-0.5
                heads.append(sum(s * v[j][a] for j, s in enumerate(scores.softmax(0))))
            z[level] = z[level] + linear(torch.cat(heads), f"{at}.self_attention.out_proj")
            rows, block = slice(level, None, 4), slice(12 * level, 12 * level + 12)
            act = functional.gelu(w[f"{at}.linear1.weight"][rows] @ norm(z[level], f"{at}.layernorm2"))
            z[level] = z[level] + w[f"{at}.linear2.weight"][:, block] @ act
    return [linear(norm(x, "headnorm"), f"heads.{level}") for level, x in enumerate(z)]


def test_equals_the_released_formulas_level_by_level() -> None:
    module, tables = head()
    h, codes = torch.randn(2, 10, dtype=torch.float64), torch.tensor([[0, 1, 2, 3], [5, 4, 4, 0]])
    got = module.logits(h, codes, tables)
    for row in range(2):
        for level, want in enumerate(level_by_level(module, h[row], codes[row].tolist(), tables)):
            torch.testing.assert_close(got[level][row], want)


def test_state_dict_names_and_shapes_are_the_released_ones() -> None:
    state = {name: tuple(tensor.shape) for name, tensor in head(layers=4)[0].state_dict().items()}
    layer = {
        "layernorm1.weight": (8,),
        "layernorm2.weight": (8,),
        **{f"self_attention.{p}_proj.weight": (8, 8) for p in ("q", "k", "v", "out")},
        **{f"self_attention.{p}_proj.bias": (8,) for p in ("q", "v", "out")},
        "linear1.weight": (48, 8),
        "linear1.bias": (48,),
        "linear2.weight": (8, 48),
        "linear2.bias": (8,),
    }
    want = {"hidden_norm.weight": (10,), "hidden_proj.weight": (8, 10), "headnorm.weight": (8,)}
    want |= {f"transformer_layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    want |= {
        f"heads.{i}.{p}": (n + 1, *rest) for i, n in enumerate(SIZES) for p, rest in (("weight", (8,)), ("bias", ()))
    }
    assert state == want


def test_every_parameter_learns_but_the_biases_that_the_model_never_adds() -> None:
    module, tables = head()
    tables = [table.requires_grad_() for table in tables]
    logits = module.logits(torch.randn(5, 10, dtype=torch.float64), torch.randint(4, (5, 4)), tables)
    sum(x.logsumexp(1).sum() for x in logits).backward()
    for name, parameter in module.named_parameters():
        is_unused = name.endswith(("linear1.bias", "linear2.bias"))
        assert parameter.requires_grad is not is_unused, name
        assert is_unused or parameter.grad.abs().sum() > 0, name
    assert [table.grad is not None for table in tables] == [True, True, True, False]


def test_a_level_sees_only_the_levels_before_it() -> None:
    module, tables = head()
    h, codes = torch.randn(2, 10, dtype=torch.float64), torch.tensor([[1, 2, 3, 1], [0, 0, 0, 0]])
    base = module.logits(h, codes, tables)
    for changed in range(4):
        other = codes.clone()
        other[:, changed] += 1
        logits = module.logits(h, other, tables)
        for level in range(4):
            assert torch.equal(base[level], logits[level]) is (level <= changed)


def test_levels_behind_nothing_but_ends_see_zeros() -> None:
    module, tables = head()
    h = torch.randn(1, 10, dtype=torch.float64)
    ended = module.logits(h, torch.tensor([SIZES]), tables)
    zeros = module.logits(h, torch.tensor([SIZES]), [torch.zeros_like(table) for table in tables])
    mixed = module.logits(h, torch.tensor([[6, 1, 2, 3]]), tables)
    for level in range(4):
        assert torch.equal(ended[level], zeros[level])
        assert torch.equal(mixed[level], zeros[level]) is (level <= 1)


def test_a_negative_code_adds_nothing() -> None:
    module, tables = head()
    h = torch.randn(1, 10, dtype=torch.float64)
    without = [table.clone() for table in tables]
    without[1][2] = 0
    got, want = (
        module.logits(h, torch.tensor([[1, -100, 3, 0]]), tables),
        module.logits(h, torch.tensor([[1, 2, 3, 0]]), without),
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_loads_a_released_state_dict_strictly() -> None:
    module, tables = head()
    other = DepthTransformer(hidden=10, dim=8, heads=2, layers=2, ffn_scale=6, sizes=SIZES).double()
    other.load_state_dict(module.state_dict())
    h = torch.randn(3, 10, dtype=torch.float64)
    assert torch.equal(other.decode(h, tables).codes, module.decode(h, tables).codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads must divide dim 8, got 3"),
        ({"heads": 0}, "heads must divide dim 8, got 0"),
        ({"sizes": ()}, r"sizes must be one or more numbers of at least 1, got \[\]"),
        ({"sizes": (3, 0)}, r"sizes must be one or more numbers of at least 1, got \[3, 0\]"),
        ({"sizes": (5, 5, 5)}, r"ffn_scale \* dim must be a multiple of 3 levels, got 32"),
    ],
)
def test_refuses_sizes_that_do_not_divide(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"DepthTransformer: {message}"):
        DepthTransformer(**{"hidden": 4, "dim": 8, "heads": 2, "layers": 1, "ffn_scale": 4, "sizes": (3, 3)} | change)


def test_refuses_codes_and_tables_of_another_level_count() -> None:
    module, tables = head()
    h = torch.randn(2, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"DepthTransformer: codes must be \[2, 4\], got \[2, 3\]"):
        module.logits(h, torch.zeros(2, 3, dtype=torch.int64), tables)
    with pytest.raises(ValueError, match="DepthTransformer: tables must be one a level, 4, got 3"):
        module.logits(h, torch.zeros(2, 4, dtype=torch.int64), tables[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_logits_are_those_that_decoding_draws_from(dtype: torch.dtype) -> None:
    """To the last bit: what reinforcement learning scores is what generation drew from."""
    module, tables = head()
    module, tables = module.to(dtype), [table.to(dtype) for table in tables]
    h = torch.randn(7, 10).to(dtype)
    decoded = module.decode(h, tables, seed=3, logits=True)
    exact = module.logits(h, decoded.codes, tables, exact=True)
    assert torch.equal(torch.cat(exact, 1), decoded.logits)
    close = {"rtol": 0, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    for a, b in zip(exact, module.logits(h, decoded.codes, tables), strict=True):
        torch.testing.assert_close(a, b.float(), **close)


def test_decodes_from_weights_prepared_once() -> None:
    module, tables = head()
    h, prepared = torch.randn(4, 10, dtype=torch.float64), module.prepared(tables)
    for _ in range(2):
        for a, b in zip(module.decode(h, prepared, seed=1), module.decode(h, tables, seed=1), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            module.transformer_layers[0].linear1.weight.neg_()
    assert not prepared.is_current


def test_prepared_weights_are_kept_until_a_tensor_is_another() -> None:
    module, tables = head()
    module, tables = module.float(), [table.float() for table in tables]
    first = module.prepared(tables)
    assert module.prepared(tables) is first and module.prepared([table.clone() for table in tables]) is not first
    rounded = module.prepared(tables, "int8")
    assert module.prepared(tables, "int8") is rounded
    with torch.no_grad():
        module.headnorm.weight.add_(1)
    assert module.prepared(tables, "int8") is not rounded
    copy = pickle.loads(pickle.dumps(module))
    assert copy._prepared is None
    h, again = torch.randn(3, 10), pickle.loads(pickle.dumps(module.prepared(tables)))
    assert torch.equal(module.decode(h, again).codes, copy.decode(h, tables).codes)


def test_gradients_of_inputs_and_of_weights_may_be_asked_for_apart() -> None:
    """As schedules without bubbles do: the first without the work of the second, the second from kept intermediates."""
    module, tables = head()
    h, codes = torch.randn(5, 10, dtype=torch.float64, requires_grad=True), torch.randint(4, (5, 4))
    parameters = [p for p in module.parameters() if p.requires_grad]

    def value() -> torch.Tensor:
        return sum(x.logsumexp(1).sum() for x in module.logits(h, codes, tables))

    together = torch.autograd.grad(value(), [h, *parameters])
    loss = value()
    (of_input,) = torch.autograd.grad(loss, [h], retain_graph=True)
    of_weights = torch.autograd.grad(loss, parameters)
    for a, b in zip(together, [of_input, *of_weights], strict=True):
        assert torch.equal(a, b)


def test_weight_gradients_can_wait_and_nothing_is_computed_twice() -> None:
    """B has no gradient of a weight and exactly the products that input gradients take, W the others; together they
    are those of one backward, and so are the gradients, bit for bit."""
    module, tables = head()
    tables = [torch.nn.Parameter(table) for table in tables]
    weights = [*(p for p in module.parameters() if p.requires_grad), *tables[:-1]]
    h, codes = torch.randn(5, 10, dtype=torch.float64, requires_grad=True), torch.randint(4, (5, 4))

    def forward(pending: AbstractContextManager[Any]) -> torch.Tensor:
        with pending:
            return sum(x.logsumexp(1).sum() for x in module.logits(h, codes, tables))

    def products(run: Callable[[], Any]) -> Counter[tuple[int, ...]]:
        with Products() as seen:
            run()
        return seen.counts

    loss = forward(nullcontext())
    together = products(loss.backward)
    want = [tensor.grad for tensor in (h, *weights)]
    for tensor in (h, *weights):
        tensor.grad = None
    inputs_alone = products(lambda: torch.autograd.grad(forward(nullcontext()), [h])) - products(
        lambda: forward(nullcontext())
    )
    with defer_weight_grads() as pending:
        loss = forward(nullcontext())
    first = products(loss.backward)
    assert torch.equal(h.grad, want[0]) and all(weight.grad is None for weight in weights)
    second = products(pending.run)
    assert not len(pending)
    for weight, grad in zip(weights, want[1:], strict=True):
        assert torch.equal(weight.grad, grad)
    assert first == inputs_alone and first + second == together and second.total() > first.total() // 2


class Products(TorchDispatchMode):
    """Counts matrix products, and attention's, by the numbers of multiplications that they do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm"):
            left, right = args[-2:]
            self.counts[tuple(sorted((*left.shape, right.shape[-1])))] += 1
        elif "attention" in name:
            self.counts[name] += 1
        return out
