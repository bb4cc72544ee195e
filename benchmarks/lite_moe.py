"""The experts of LongCat-Flash-Lite on a GPU: a block with its routing plan, combine and identity experts.

Cases of `bench_fused_moe` that a processor is too slow for. Peers that know no identity experts get them added beside.

Dimension key
    T tokens    k slots of a token    E real experts    Z identity experts    D model    F hidden units of an expert
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor

import peers_moe as peers
from harness import Call, Case, Contender, Skip, WrongResult
from longcat_kernels import fused_moe
from longcat_kernels.reference import fused_moe as spec
from longcat_kernels.spec import Cost

SIDES = (3072, 1024, 256, 128, 12)  # D F E Z k
TOKENS = {  # a decoding step is replayed as a CUDA graph
    "decode": (16,),
    "forward": (512, 4096, 32768),
    "backward": (4096, 32768),
    "train": (4096,),
}
JUDGED = 6  # tokens whose results are compared with float64
TRUSTED_ERROR = 2e-2  # relative, by the 2-norm: more is another result
LIGER = "Liger, expert 0 for identities"


def arguments_of(case: spec.Case, device: str) -> dict[str, Tensor]:
    """Made where they stay: 4.8 GB of weights would take a processor longer than all measurements."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sides: int, fan: int = 1) -> Tensor:
        return torch.randn(sides, generator=generator, device=device, dtype=case.dtype).div_(fan**0.5)

    scores = torch.rand(case.tokens, case.real + case.zero, generator=generator, device=device)
    return {
        "x": normal(case.tokens, case.dim),
        "gate_up": normal(case.real, 2 * case.width, case.dim, fan=case.dim),
        "down": normal(case.real, case.dim, case.width, fan=case.width),
        "ids": scores.topk(case.k).indices,
        "weights": torch.rand(case.tokens, case.k, generator=generator, device=device),
    }


class Judge:
    """Compares a few tokens' results, and what their backward gives to x and weights, with float64."""

    def __init__(self, arguments: dict[str, Tensor], grad_TD: Tensor | None) -> None:
        self.arguments, self.grad_TD = arguments, grad_TD
        self.tokens = torch.linspace(0, len(arguments["x"]) - 1, JUDGED).long().unique().tolist()

    @cached_property
    def truth(self) -> list[list[Tensor]]:
        return [self._truth_of(token) for token in self.tokens]

    def _truth_of(self, token: int) -> list[Tensor]:
        """[out], or the gradients of x and weights; only the token's own experts are widened."""
        x, gate_up, down, ids, weights = self.arguments.values()
        real = ids[token] < len(down)
        own = torch.cat([ids[token][real], ids.new_zeros(1)])  # one more, as there must be one
        number = torch.full_like(ids[token], len(own)).masked_scatter(real, torch.arange(len(own), device=own.device))
        x_1D, weights_1k = (t[token : token + 1].double().requires_grad_() for t in (x, weights))
        experts = (gate_up[own].double(), down[own].double())
        out_1D = fused_moe(x_1D, *experts, number[None], weights_1k, backend="reference")
        if self.grad_TD is None:
            return [out_1D.detach()]
        return list(torch.autograd.grad(out_1D, (x_1D, weights_1k), self.grad_TD[token : token + 1].double()))

    def error(self, found: list[Tensor]) -> dict[str, float]:
        """Relative, of the worst; raises WrongResult where that is not one of rounding."""
        results = [found[0]] if self.grad_TD is None else [found[-4], found[-1]]
        errors = [
            ((result[token].double() - want[0]).norm() / want.norm()).item()
            for token, truth in zip(self.tokens, self.truth, strict=True)
            for result, want in zip(results, truth, strict=True)
        ]
        if not max(errors) <= TRUSTED_ERROR:
            raise WrongResult(f"is off by {max(errors):.1e}")
        return {"error": max(errors)}


def backward(experts: peers.Experts, arguments: dict[str, Tensor], grad_TD: Tensor) -> Call:
    """The backward alone: gradients of x, gate_up, down and weights, from a forward that is done."""
    own = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in arguments.values()]
    out_TD, leaves = experts(*own), [tensor for tensor in own if tensor.requires_grad]
    return lambda: list(torch.autograd.grad(out_TD, leaves, grad_TD, retain_graph=True))


def graphed(call: Call, device: str) -> Call:
    """`call` as a CUDA graph, which gives its results; itself where there is no GPU."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or measured at first is no part of the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return list(results)

    return replay


def hf_grouped() -> peers.Experts:
    """transformers' experts by grouped_mm, whose rows of identities no product touches, and the identities beside."""
    experts = peers.hf_grouped(beyond=True)

    def run(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(x, gate_up, down, ids, weights) + _identities(x, ids, weights, len(down))

    return run


def liger() -> peers.Experts:
    """Liger's experts; a slot of an identity goes to expert 0 with weight 0, as serving engines do it."""
    try:
        experts = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    except (ImportError, RuntimeError) as error:  # its import asks Triton for a GPU
        raise Skip(f"Liger-Kernel is not installed, or finds no GPU ({error})") from error

    def run(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        other = ids >= len(down)
        out: Tensor = experts.apply(x, gate_up, down, ids.masked_fill(other, 0).int(), weights.masked_fill(other, 0))
        return out + _identities(x, ids, weights, len(down))

    return run


def _identities(x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, experts: int) -> Tensor:
    return weights_Tk.masked_fill(ids_Tk < experts, 0).sum(1, keepdim=True).to(x_TD.dtype) * x_TD


PASSES = {"backward": backward, "train": peers.step}


def contenders(case: spec.Case, title: str, device: str) -> list[Contender]:
    """Ours and the peers; of a decoding step each as a CUDA graph, and ours without one too."""
    arguments = arguments_of(case, device)
    grad_TD = torch.randn_like(arguments["x"]) if title in PASSES else None
    judge = Judge(arguments, grad_TD)

    def call(make: Callable[[], peers.Experts], graph: bool) -> Call:
        if grad_TD is not None:
            return PASSES[title](make(), arguments, grad_TD)
        plain = peers.forward(make(), arguments)
        return graphed(plain, device) if graph else plain

    def contender(name: str, make: Callable[[], peers.Experts], graph: bool = title == "decode") -> Contender:
        return Contender(name, partial(call, make, graph), judge.error, slow=name == LIGER)

    found = [contender("ours", peers.ours), contender("transformers grouped_mm", hf_grouped), contender(LIGER, liger)]
    if title == "decode":
        found.append(contender("ours, no graph", peers.ours, graph=False))
    return found


def _case(title: str, tokens: int, sides: tuple[int, int, int, int, int], dtype: torch.dtype) -> Case:
    dim, width, real, zero, k = sides
    case = spec.Case(tokens, dim, width, real, zero, k, dtype=dtype)
    cost = spec.cost(case)
    times = {"backward": 2, "train": 3}.get(title, 1)
    cost = Cost(times * cost.flops, times * cost.bytes)
    name = f"Lite {title} T{tokens} D{dim} F{width} E{real} Z{zero} k{k} {str(dtype).removeprefix('torch.')}"
    return Case(name, cost, partial(contenders, case, title), memory=True, only_gpu=True)


def cases(
    sides: tuple[int, int, int, int, int] = SIDES, tokens: Mapping[str, tuple[int, ...]] = TOKENS
) -> tuple[Case, ...]:
    return tuple(_case(title, size, sides, torch.bfloat16) for title, sizes in tokens.items() for size in sizes)
