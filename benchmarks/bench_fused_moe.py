"""fused_moe against its peers: forward, forward and backward, decoding, and a whole layer with identity experts.

On a GPU also the block of LongCat-Flash-Lite, see lite_moe.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

import lite_moe
import peers_moe as peers
from harness import Call, Case, Contender, WrongResult
from longcat_kernels import fused_moe
from longcat_kernels.reference import fused_moe as spec
from longcat_kernels.spec import Cost

SMALL, LARGE = (256, 256, 128, 16, 4), (2048, 512, 256, 64, 8)  # T D F E k
DECODE = (16, 1024, 512, 64, 8)
TINY = (32, 64, 32, 4, 2)
CEILINGS = {torch.float32: "fma_avx512", torch.bfloat16: "bf16_dot_avx512"}
TRUSTED_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, by the 2-norm: more is another result
PEERS: dict[str, Callable[[], peers.Experts]] = {
    "eager loop": lambda: peers.eager_loop,
    "F.grouped_mm": lambda: peers.grouped,
    "transformers grouped_mm": peers.hf_grouped,
    "padded bmm": lambda: peers.padded_bmm,
    "transformers LongcatFlashExperts": peers.hf_longcat,
}


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """torch's default, and its fastest float32 products where there are any."""
    return ("highest", "medium") if dtype == torch.float32 else ("highest",)


def products(dtype: torch.dtype, precision: str) -> torch.dtype:
    """To what our products round their operands on a processor that multiplies bfloat16."""
    return torch.bfloat16 if dtype == torch.float32 and precision == "medium" else dtype


def ours(
    name: str, make: Callable[[], Call], judge: Callable[[list[Tensor]], dict[str, float]], dtype: torch.dtype
) -> list[Contender]:
    """At each precision, beside the ceiling of the products that it allows."""
    return [
        Contender(name, make, judge, ceiling=CEILINGS[products(dtype, precision)], precisions=(precision,))
        for precision in precisions(dtype)
    ]


class Judge:
    """Relative errors, by the 2-norm, against float64 on the same inputs; the truth is made when first asked for."""

    def __init__(self, dtype: torch.dtype, make: Callable[[], list[Tensor]]) -> None:
        self.dtype, self.make = dtype, make

    @cached_property
    def truth(self) -> list[Tensor]:
        return self.make()

    def error(self, found: Sequence[Tensor]) -> dict[str, float]:
        """Of the worst of out and gradients; raises WrongResult where that is not one of rounding.

        At precision "medium" products may be those of bfloat16.
        """
        allowed = TRUSTED_ERROR[products(self.dtype, torch.get_float32_matmul_precision())]
        errors = []
        for tensor, truth in zip(found, self.truth, strict=False):
            own = tensor[: len(truth)].double()  # transformers' layer has weights that nobody reads, too
            errors.append(((own - truth).norm() / truth.norm()).item())
        worst = max(errors)
        if not worst <= allowed:
            raise WrongResult(f"is off by {', '.join(f'{e:.1e}' for e in errors)}")
        return {"error": worst}


def experts_truth(arguments: dict[str, Tensor], grad_TD: Tensor | None) -> list[Tensor]:
    """In float64: out, and gradients where there is one of out."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in arguments.items()}

    def reference(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_moe(x, gate_up, down, ids, weights, backend="reference")

    call = peers.forward(reference, wide) if grad_TD is None else peers.step(reference, wide, grad_TD.double())
    found: list[Tensor] = call()
    return found


def contenders(case: spec.Case, backward: bool, device: str) -> list[Contender]:
    """Ours, the peers, and the dense pair, which has one expert's weights and neither sorts nor sums."""
    inputs = spec.inputs(case, device)
    arguments = {name: inputs[name].detach() for name in ("x", "gate_up", "down", "ids", "weights")}
    arguments["ids"] = arguments["ids"].contiguous()  # as a router gives them; weights are float32
    generator = torch.Generator().manual_seed(1)
    grad_TD = torch.randn(case.tokens, case.dim, generator=generator).to(device, case.dtype)
    judge = Judge(case.dtype, lambda: experts_truth(arguments, grad_TD if backward else None))

    def parts(
        make: Callable[[], peers.Experts],
    ) -> tuple[Callable[[], Call], Callable[[list[Tensor]], dict[str, float]]]:
        def judged(found: list[Tensor]) -> dict[str, float]:
            saved = {"saved_mb": peers.saved_mb(make(), arguments)} if backward else {}
            return {**judge.error(found), **saved}

        run = partial(peers.step, grad_TD=grad_TD) if backward else peers.forward
        return lambda: run(make(), arguments), judged

    both, ceiling = precisions(case.dtype), CEILINGS[case.dtype]
    found = ours("ours", *parts(peers.ours), case.dtype)
    if backward:
        found += ours("ours, save x", *parts(lambda: peers.ours("x")), case.dtype)
    else:
        found += ours("ours, prepared", lambda: peers.ours_prepared(arguments), judge.error, case.dtype)
    found += [Contender(name, *parts(make), ceiling=ceiling, precisions=both) for name, make in PEERS.items()]
    dense = peers.dense_arguments(arguments)
    run = partial(peers.step, grad_TD=grad_TD.repeat(case.k, 1)) if backward else peers.forward
    found.append(
        Contender(
            "dense pair",
            lambda: run(peers.dense_pair, dense),
            ceiling=ceiling,
            precisions=both,
        )
    )
    return found


def layer_contenders(case: spec.Case, device: str) -> list[Contender]:
    """A layer with router and identity experts, forward and backward."""
    sizes = (case.tokens, case.dim, case.width, case.real, case.zero, case.k)
    layers = peers.Layers(sizes, case.dtype, device)

    def truth() -> list[Tensor]:
        wide = peers.Layers(sizes, torch.float64, device)
        wide.ours.load_state_dict(layers.ours.state_dict())
        wide.x_TD, wide.grad_TD = layers.x_TD.detach().double().requires_grad_(), layers.grad_TD.double()
        found: list[Tensor] = wide.step_of_ours()()
        return found

    judge, ceiling = Judge(case.dtype, truth), CEILINGS[case.dtype]
    name, both = "transformers LongcatFlashMoE", precisions(case.dtype)
    return [
        *ours("ours", layers.step_of_ours, judge.error, case.dtype),
        Contender(name, layers.step_of_theirs, judge.error, ceiling=ceiling, precisions=both),
    ]


def _shape(sizes: Sequence[int], dtype: torch.dtype, zero: int = 0) -> spec.Case:
    tokens, dim, width, real, k = sizes
    return spec.Case(tokens, dim, width, real, zero, k, dtype=dtype)


def name(title: str, case: spec.Case) -> str:
    """Such as "forward T256 D256 F128 E16 k4 float32"."""
    zero = f" Z{case.zero}" if case.zero else ""
    sizes = f"T{case.tokens} D{case.dim} F{case.width} E{case.real}{zero} k{case.k}"
    return f"{title} {sizes} {str(case.dtype).removeprefix('torch.')}"


def _case(title: str, case: spec.Case, make: Callable[[str], list[Contender]], backward: bool) -> Case:
    """A backward has twice the operations of its forward."""
    cost = spec.cost(case)
    if backward:
        cost = Cost(3 * cost.flops, 3 * cost.bytes)
    return Case(name(title, case), cost, make)


def _forward(sizes: Sequence[int], dtype: torch.dtype, title: str = "forward") -> Case:
    case = _shape(sizes, dtype)
    return _case(title, case, partial(contenders, case, False), False)


def _train(sizes: Sequence[int], dtype: torch.dtype) -> Case:
    case = _shape(sizes, dtype)
    return _case("train", case, partial(contenders, case, True), True)


def _layer(sizes: Sequence[int], dtype: torch.dtype) -> Case:
    case = _shape(sizes, dtype, zero=sizes[3] // 2)
    return _case("layer", case, partial(layer_contenders, case), True)


DTYPES = (torch.float32, torch.bfloat16)
CASES = (
    _forward(TINY, torch.float32),
    *(_forward(sizes, dtype) for dtype in DTYPES for sizes in (SMALL, LARGE)),
    *(_forward(DECODE, dtype, "decode") for dtype in DTYPES),
    *(_train(sizes, dtype) for dtype in DTYPES for sizes in (SMALL, LARGE)),
    *(_layer(LARGE, dtype) for dtype in DTYPES),
    *lite_moe.cases(),
)
