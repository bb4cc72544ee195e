"""Which op a call becomes: without a gradient the one that lacks autograd, and always one that modes and traces see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from longcat_kernels import fused_moe, moe_route, rvq_decode
from longcat_kernels.library import wants_grad
from longcat_kernels.ops import OPS
from longcat_kernels.spec import Op
from longcat_kernels.testing import record

DIFFERENTIABLE = [op for op in OPS if hasattr(torch.ops.longcat, f"{op.name}_inference")]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_differentiable_op = pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)


class Names(TorchDispatchMode):
    """Keeps the names of the package's ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "longcat":
            self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


class Seen(torch.Tensor):
    """A tensor that keeps the names of the ops it is given to."""

    inner: torch.Tensor
    found: list[str]

    @staticmethod
    def of(tensor: torch.Tensor, found: list[str]) -> Seen:
        seen: Seen = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Seen, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, requires_grad=tensor.requires_grad
        )
        seen.inner, seen.found = tensor.detach(), found
        return seen

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Seen)]
        if func.namespace == "longcat":
            seen[0].found.append(func._opname)
        return func(*tree_map_only(Seen, lambda tensor: tensor.inner, args), **(kwargs or {}))


def arguments(op: Op, gradient: bool) -> dict[str, Any]:
    """A call of the op whose tensors want a gradient, or none at all."""
    given = op.spec.inputs(op.spec.EDGE[-1], "cpu")
    return given if gradient else tree_map_only(torch.Tensor, torch.Tensor.detach, given)


def names_of(op: Op, gradient: bool) -> list[str]:
    """What a call's dispatch may show, backward's ops apart."""
    return [op.name if gradient or op not in DIFFERENTIABLE else f"{op.name}_inference"]


def test_ops_with_a_gradient_are_the_ones_that_have_two() -> None:
    assert {op.name for op in OPS} - {op.name for op in DIFFERENTIABLE} == {"moe_plan", "ema_update", "depth_decode"}


@pytest.mark.parametrize("gradient", [True, False])
@every_op
def test_a_mode_sees_the_op(op: Op, gradient: bool) -> None:
    call = arguments(op, gradient)
    with Names() as names:
        op.run(**call)
    assert names.found == names_of(op, gradient)


@every_differentiable_op
def test_without_grad_mode_no_result_wants_a_gradient(op: Op) -> None:
    call = arguments(op, True)
    assert any(leaf.requires_grad for leaf in tree_leaves(op.run(**call)))
    for off in (torch.no_grad, torch.inference_mode):
        with Names() as names, off():
            results = tree_leaves(op.run(**call))
        assert names.found == names_of(op, False)
        assert not any(leaf.requires_grad for leaf in results)


@every_op
def test_a_fake_call_runs_no_kernel(op: Op) -> None:
    call = arguments(op, False)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, call)
        results = tree_leaves(op.run(**fake))
    assert all(isinstance(result, FakeTensor) for result in results)
    assert [r.shape for r in results] == [r.shape for r in tree_leaves(op.run(**call))]


@every_op
def test_a_trace_keeps_the_op(op: Op) -> None:
    given = arguments(op, False)
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]

    def run(*leaves: torch.Tensor) -> Any:
        left = iter(leaves)
        return op.run(**tree_map_only(torch.Tensor, lambda _: next(left), given))

    nodes = make_fx(run)(*leaves).graph.nodes
    found = [node.target._opname for node in nodes if getattr(node.target, "namespace", "") == "longcat"]
    assert found == names_of(op, False)


@pytest.mark.parametrize("gradient", [True, False])
@every_differentiable_op
def test_a_subclass_sees_the_op(op: Op, gradient: bool) -> None:
    found: list[str] = []
    call = tree_map_only(torch.Tensor, lambda tensor: Seen.of(tensor, found), arguments(op, gradient))
    op.run(**call)
    assert found == names_of(op, gradient)


@every_differentiable_op
def test_forward_mode_derivatives_are_refused(op: Op) -> None:
    given = arguments(op, True)
    wanted = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(wanted[0].detach(), torch.ones_like(wanted[0]))
        with pytest.raises(NotImplementedError, match=f"{op.name}: inputs must have no tangents"):
            op.run(**tree_map_only(torch.Tensor, lambda leaf: dual if leaf is wanted[0] else leaf.detach(), given))
        op.run(**given)


@every_differentiable_op
def test_vmap_calls_the_op_for_each_element(op: Op) -> None:
    """With the gradients of what is batched and of what is not."""
    given = arguments(op, True)
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    batched = torch.stack([leaves[0].detach(), leaves[0].detach().flip(0)], 1).requires_grad_()

    def run(element: torch.Tensor) -> list[torch.Tensor]:
        return tree_leaves(op.run(**tree_map_only(torch.Tensor, lambda t: element if t is leaves[0] else t, given)))

    got, elements = torch.vmap(run, in_dims=1)(batched), batched.unbind(1)
    want = [torch.stack(parts) for parts in zip(*map(run, elements), strict=True)]
    wanted, inputs = [i for i, result in enumerate(want) if result.requires_grad], [batched, *leaves[1:]]
    gradients = [
        torch.autograd.grad([results[i] for i in wanted], inputs, [want[i].detach() for i in wanted], allow_unused=True)
        for results in (got, want)
    ]
    for a, b in zip([*got, *gradients[0]], [*want, *gradients[1]], strict=True):
        assert b is not None and torch.equal(a, b)


def test_vmap_takes_lists_and_optional_tensors_and_refuses_an_empty_batch() -> None:
    codes, books = torch.randint(0, 3, (4, 5, 2)), [torch.randn(3, 8), torch.randn(3, 8)]
    got = torch.vmap(rvq_decode, in_dims=(0, None))(codes, books)
    assert torch.equal(got, torch.stack([rvq_decode(element, books) for element in codes]))
    x, ids, weights = torch.randn(3, 2, 4), torch.tensor([[0, -1], [1, 2]]), torch.rand(2, 2)
    up, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    got = torch.vmap(lambda x: fused_moe(x, up, down, ids, weights, residual=x))(x)
    want = [fused_moe(element, up, down, ids, weights, residual=element) for element in x]
    assert torch.equal(got, torch.stack(want))
    with pytest.raises(ValueError, match=r"fused_moe: what torch.vmap batches must not be empty, got 0 elements"):
        torch.vmap(lambda x: fused_moe(x, up, down, ids, weights))(x[:0])


@every_differentiable_op
def test_the_op_without_autograd_is_registered_rightly(op: Op) -> None:
    operands = tree_map_only(torch.Tensor, torch.Tensor.detach, record(op, arguments(op, True)).arguments)
    torch.library.opcheck(getattr(torch.ops.longcat, f"{op.name}_inference").default, operands)


def test_a_gradient_is_wanted_by_tensors_and_by_lists_of_them() -> None:
    plain, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert wants_grad("auto", None, 3, leaf) and wants_grad(plain, [plain, leaf]) and wants_grad((plain, leaf))
    assert not wants_grad("auto", None, 3, [1, 2], plain, [plain], [])
    with torch.no_grad():
        assert not wants_grad(leaf, [leaf])


@pytest.mark.parametrize("gradient", [True, False])
def test_a_sign_that_torch_has_put_off_is_not_lost(gradient: bool) -> None:
    logits = torch.randn(5, 6)
    negated = torch.complex(logits, logits).conj().imag.requires_grad_(gradient)
    assert negated.is_neg()
    for got, want in zip(moe_route(negated, 2, n_real=4), moe_route(-logits, 2, n_real=4), strict=True):
        assert torch.equal(got, want)
