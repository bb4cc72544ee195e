"""ngram_embedding against torch's embedding and linear functions: forward, and forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench_fused_moe import CEILINGS, Judge, precisions
from harness import Call, Case, Contender
from longcat_kernels import ngram_embedding
from longcat_kernels.reference import ngram_embedding as spec
from longcat_kernels.spec import Cost

BASE, ROWS, DIM = 30_000, 20_000, 3072  # text ids, rows of a table, width: the released width, fewer rows
LENGTHS = (16, 256, 2048)


def ours(arguments: dict[str, Any], backend: str = "auto") -> Tensor:
    """The op; gradients of the tables are sparse."""
    return ngram_embedding(**arguments, backend=backend)


def table_by_table(arguments: dict[str, Any]) -> Tensor:
    """The usual way: an embedding and a linear a table, added up; hashes by torch's integer functions."""
    hashes_BSN, rule = _hashes(arguments)
    total_BSD = F.embedding(arguments["ids"], arguments["word"])
    for i, (table, projection) in enumerate(zip(arguments["tables"], arguments["projections"], strict=True)):
        total_BSD = total_BSD + F.linear(F.embedding(hashes_BSN[..., i], table, sparse=True), projection)
    return total_BSD * _shares(arguments, rule, total_BSD)


def side_by_side(arguments: dict[str, Any]) -> Tensor:
    """All lookups side by side and one product; the projections are joined in every call, as they may change."""
    hashes_BSN, rule = _hashes(arguments)
    rows = [F.embedding(hashes_BSN[..., i], table, sparse=True) for i, table in enumerate(arguments["tables"])]
    total_BSD = F.linear(torch.cat(rows, dim=2), torch.cat(arguments["projections"], dim=1))
    total_BSD = total_BSD + F.embedding(arguments["ids"], arguments["word"])
    return total_BSD * _shares(arguments, rule, total_BSD)


def joined(arguments: dict[str, Any]) -> Call:
    """The same with the projections joined beforehand: the best that torch does in inference."""
    weight_DI = torch.cat([projection.detach() for projection in arguments["projections"]], dim=1)

    @torch.no_grad()
    def call() -> list[Tensor]:
        hashes_BSN, rule = _hashes(arguments)
        rows = [F.embedding(hashes_BSN[..., i], table) for i, table in enumerate(arguments["tables"])]
        total_BSD = F.linear(torch.cat(rows, dim=2), weight_DI) + F.embedding(arguments["ids"], arguments["word"])
        return [total_BSD * _shares(arguments, rule, total_BSD)]

    return call


def product_alone(arguments: dict[str, Any]) -> Call:
    """One dense product of as many operations, operands ready-made: neither hashes nor lookups."""
    weight_DI = torch.cat([projection.detach() for projection in arguments["projections"]], dim=1)
    rows_PI = torch.randn(arguments["ids"].numel(), weight_DI.shape[1]).to(weight_DI.device, weight_DI.dtype)
    return lambda: F.linear(rows_PI, weight_DI)


def _hashes(arguments: dict[str, Any]) -> tuple[Tensor, spec.Rule]:
    rule = spec.Rule(*(arguments[name] for name in spec.Rule._fields))
    moduli = [len(table) for table in arguments["tables"]]
    return spec.hashes(arguments["ids"], moduli, rule), rule


def _shares(arguments: dict[str, Any], rule: spec.Rule, total_BSD: Tensor) -> Tensor:
    return spec.shares(arguments["ids"], len(arguments["tables"]), rule).to(total_BSD.dtype)


def inputs(case: spec.Case, device: str) -> dict[str, Any]:
    """Text ids without special ones, and lookups that hit: the peers add row 0, too, where the op adds nothing."""
    found = spec.inputs(case, device)
    ids_BS = torch.randint(3, case.base, (case.batch, case.length), generator=torch.Generator().manual_seed(1))
    found["ids"] = ids_BS.to(device)
    for table in found["tables"]:
        table.detach()[0] = 0
    del found["documents"], found["history"]
    return found


def forward(embed: Any, arguments: dict[str, Any]) -> Call:
    """Without gradients; gives [out]."""

    @torch.no_grad()
    def call() -> list[Tensor]:
        return [embed(arguments)]

    return call


def step(embed: Any, arguments: dict[str, Any], grad_BSD: Tensor) -> Call:
    """Forward and backward; gives out and the gradients of tables and projections.

    The word table is left out: its gradient is dense, and filling it takes all of them longer than the rest.
    """
    own = {**arguments, "word": arguments["word"].detach()}
    wanted = [*own["tables"], *own["projections"]]

    def call() -> list[Tensor]:
        out_BSD = embed(own)
        return [out_BSD, *torch.autograd.grad(out_BSD, wanted, grad_BSD)]

    return call


def truth(arguments: dict[str, Any], grad_BSD: Tensor | None) -> list[Tensor]:
    """In float64: out and, with its gradient, those of tables and projections."""

    def wide(value: Any) -> Any:
        return [wide(v) for v in value] if isinstance(value, list) else value.detach().double().requires_grad_()

    own = {**arguments, **{name: wide(arguments[name]) for name in ("word", "tables", "projections")}}
    embed = partial(ours, backend="reference")
    call = forward(embed, own) if grad_BSD is None else step(embed, own, grad_BSD.double())
    return [tensor.to_dense() for tensor in call()]


def contenders(case: spec.Case, backward: bool, device: str) -> list[Contender]:
    """Ours, the same by torch, and a dense product of as many operations."""
    arguments = inputs(case, device)
    grad_BSD = torch.randn(case.batch, case.length, case.dim, generator=torch.Generator().manual_seed(2))
    grad_BSD = grad_BSD.to(device, case.dtype)
    judge = Judge(case.dtype, lambda: truth(arguments, grad_BSD if backward else None))

    def judged(found: Sequence[Tensor]) -> dict[str, float]:
        return judge.error([tensor.to_dense() for tensor in found])

    run = partial(step, grad_BSD=grad_BSD) if backward else forward
    ceiling, both = CEILINGS[case.dtype], precisions(case.dtype)
    peers = {"embedding and linear a table": table_by_table, "side by side, one product": side_by_side}
    found = [Contender("ours", lambda: run(ours, arguments), judged, ceiling=ceiling)]
    for name, embed in peers.items():
        found.append(Contender(name, partial(run, embed, arguments), judged, ceiling=ceiling, precisions=both))
    if not backward:
        extra = [("side by side, joined before", joined, judged), ("product alone", product_alone, lambda _: None)]
        for name, make, judge_it in extra:
            found.append(Contender(name, partial(make, arguments), judge_it, ceiling=ceiling, precisions=both))
    return found


def _case(length: int, dtype: torch.dtype, backward: bool = False, tiny: bool = False) -> Case:
    case = spec.Case(1, length, BASE, ROWS, DIM, 4, 4, 3, sparse=True, dtype=dtype)
    if tiny:
        case = spec.Case(1, length, 50, 40, 96, 3, 2, 3, sparse=True, dtype=dtype)
    cost = spec.cost(case)
    if backward:
        cost = Cost(3 * cost.flops, 3 * cost.bytes)
    title = f"{'train' if backward else 'forward'} T{length} D{case.dim} N{(case.neighbors - 1) * case.splits}"
    name = f"{title} {str(dtype).removeprefix('torch.')}"
    return Case(name, cost, partial(contenders, case, backward))


DTYPES = (torch.float32, torch.bfloat16)
CASES = (
    _case(32, torch.float32, tiny=True),
    *(_case(length, dtype) for dtype in DTYPES for length in LENGTHS),
    *(_case(256, dtype, backward=True) for dtype in DTYPES),
)
