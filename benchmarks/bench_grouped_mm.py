"""grouped_mm against torch: forward, forward and backward, and the product that gives the gradient of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench_fused_moe import CEILINGS, Judge, ours, precisions
from harness import Call, Case, Contender
from longcat_kernels import grouped_mm
from longcat_kernels.reference import grouped_mm as spec
from longcat_kernels.spec import Cost

SMALL, LARGE = (1024, 256, 256, 16), (16384, 512, 512, 64)  # rows of all groups, K, N, groups
TINY = (64, 32, 32, 4)

Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # a, b, offs -> out


def loop(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """A product a group."""
    ends = offs.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if b.ndim == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    return torch.cat([a[start:end] @ matrix for (start, end), matrix in zip(spans, b.unbind(), strict=True)])


def padded_bmm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Groups padded to the largest, and one batched product."""
    counts_E = offs.diff(prepend=offs.new_zeros(1)).long()
    room, experts_R = int(counts_E.max()), torch.arange(len(offs), device=a.device).repeat_interleave(counts_E)
    place_R = torch.arange(len(a), device=a.device) + experts_R * room - (offs.long() - counts_E)[experts_R]
    padded = a.new_zeros(len(offs) * room, a.shape[1]).index_copy(0, place_R, a)
    return torch.bmm(padded.view(len(offs), room, -1), b).flatten(0, 1)[place_R]


PEERS: dict[str, Product] = {
    "F.grouped_mm": lambda a, b, offs: F.grouped_mm(a, b, offs=offs),
    "loop of products": loop,
    "padded bmm": padded_bmm,
}


def run(product: Product, inputs: list[Tensor], grad: Tensor | None) -> Call:
    """Gives out and, with a gradient of it, those of both sides."""
    a, b, offs = inputs
    leaves = [tensor.detach().requires_grad_(grad is not None) for tensor in (a, b)]

    def call() -> list[Tensor]:
        out = product(leaves[0], leaves[1], offs)
        return [out] if grad is None else [out, *torch.autograd.grad(out, leaves, grad)]

    return call


def dense(case: spec.Case, device: str) -> Call:
    """One product of as many operations: all rows with one matrix."""
    g = torch.Generator().manual_seed(3)
    shapes = ((case.ends[-1], case.sides[0]), case.sides)
    a, b = (torch.randn(shape, generator=g).to(device, case.dtype) for shape in shapes)
    return lambda: a @ b


def contenders(case: spec.Case, backward: bool, device: str) -> list[Contender]:
    """Ours, the peers that have this form, and a dense product."""
    found = spec.inputs(case, device)
    inputs = [found[name].detach() for name in ("a", "b", "offs")]
    ones = grouped_mm(*inputs)
    grad = torch.randn(ones.shape, generator=torch.Generator().manual_seed(1)).to(ones) if backward else None

    def truth() -> list[Tensor]:
        wide = [inputs[0].double(), inputs[1].double(), inputs[2]]
        call = run(partial(grouped_mm, backend="reference"), wide, None if grad is None else grad.double())
        result: list[Tensor] = call()
        return result

    judge, ceiling, both = Judge(case.dtype, truth), CEILINGS[case.dtype], precisions(case.dtype)
    made = ours("ours", partial(run, grouped_mm, inputs, grad), judge.error, case.dtype)
    for name, product in PEERS.items():
        if case.form == "2x3" or product is not padded_bmm:
            make = partial(run, product, inputs, grad)
            made.append(Contender(name, make, judge.error, ceiling=ceiling, precisions=both))
    if not backward:
        made.append(Contender("dense product", partial(dense, case, device), ceiling=ceiling, precisions=both))
    return made


def _case(title: str, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """Groups as even dice fill them. A backward has twice the operations of its forward."""
    rows, inner, columns, groups = sizes
    dice_R = torch.randint(groups, (rows,), generator=torch.Generator().manual_seed(0))
    ends = tuple(torch.bincount(dice_R, minlength=groups).cumsum(0).tolist())
    case = spec.Case("2x2" if title == "weights" else "2x3", ends, (inner, columns), dtype=dtype)
    cost, backward = spec.cost(case), title == "train"
    if backward:
        cost = Cost(3 * cost.flops, 3 * cost.bytes)
    name = f"{title} R{rows} K{inner} N{columns} E{groups} {str(dtype).removeprefix('torch.')}"
    return Case(name, cost, partial(contenders, case, backward))


DTYPES = (torch.float32, torch.bfloat16)
CASES = (
    _case("forward", TINY, torch.float32),
    *(_case(title, sizes, dtype) for title in ("forward", "train") for dtype in DTYPES for sizes in (SMALL, LARGE)),
    *(_case("weights", LARGE, dtype) for dtype in DTYPES),
)
