"""N-gram embedding, defined: hash, lookup, projection and mean, with hand-written passes, cases and cost.

The over-embedding of LongCat-Flash-Lite: table i = (order - 2) * splits + j, for orders 2..neighbors and j < splits,
is indexed by a polynomial hash of the last `order` ids modulo its number of rows.

Dimension key
    B batch    S sequence    N tables    W width of a table    D model    V rows of the word table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from longcat_kernels.spec import Cost, Refusal


class Rule(NamedTuple):
    """How ids become n-grams."""

    base: int  # of the polynomial: the number of text ids
    neighbors: int  # largest order
    splits: int  # tables an order
    ignored: tuple[int, int]  # half-open range of ids that hash as 0 and keep their plain embedding
    eos: int = 2  # ends a segment, as id 0 does

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Rule:
        base, neighbors, splits, first, end, eos = numbers
        return cls(base, neighbors, splits, (first, end), eos)

    def numbers(self) -> list[int]:
        """As the op's schema takes it."""
        return [self.base, self.neighbors, self.splits, *self.ignored, self.eos]


def ngram_embedding(
    ids: Tensor,
    word: Tensor,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor],
    documents: Tensor | None,
    history: Tensor | None,
    numbers: Sequence[int],
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """e = (word[id] + sum_i projections[i] @ tables[i][hash_i]) / (1 + N), lookups with hash 0 left out; the hashes.

    Ids that the rule ignores keep word[id] undivided; id -1 gives zeros. `numbers` are those of a `Rule`; `sparse` is
    the form of the tables' gradients.
    """
    rule = Rule.of(numbers)
    hashes_BSN = hashes(ids, [len(table) for table in tables], rule, documents, history)
    total_BSD = functional.embedding(ids.clamp_min(0), word)
    for table, projection, hash_BS in zip(tables, projections, hashes_BSN.unbind(2), strict=True):
        rows_BSW = functional.embedding(hash_BS, table).masked_fill((hash_BS == 0)[..., None], 0)
        total_BSD = total_BSD + rows_BSW @ projection.T
    return total_BSD * shares(ids, len(tables), rule).to(total_BSD.dtype), hashes_BSN


def shares(ids: Tensor, tables: int, rule: Rule) -> Tensor:
    """[..., 1] float64 factor of a position's sum: 1 / (1 + N), 1 for an ignored id, 0 for no id."""
    ones = torch.ones_like(ids, dtype=torch.float64)
    share = torch.where(is_ignored(ids, rule), ones, 1 / (1 + tables))
    return torch.where(ids < 0, 0, share)[..., None]


def is_ignored(ids: Tensor, rule: Rule) -> Tensor:
    return (ids >= rule.ignored[0]) & (ids < rule.ignored[1])


def hashes(
    ids: Tensor,
    moduli: Sequence[int],
    rule: Rule,
    documents: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """[B, S, N] int64: id + sum over p < order of base^p * id p places before, modulo the rows of the table.

    An earlier id counts as 0 across a segment's end: behind an id 0 or eos, or in another document.
    """
    back, length = rule.neighbors - 1, ids.shape[1]
    past = ids.new_zeros(len(ids), back) if history is None else history
    context_BS = torch.cat([past, ids], dim=1)
    context_BS = context_BS.masked_fill(is_ignored(context_BS, rule) | (context_BS < 0), 0)
    breaks_BS = (context_BS == 0) | (context_BS == rule.eos)
    if documents is not None:
        documents = torch.cat([documents[:, :1].expand(-1, back if length else 0), documents], dim=1)
    current_BS = context_BS[:, back:]
    joined_BS = current_BS != 0
    moduli_N = torch.tensor(moduli, device=ids.device)
    powers_N = torch.ones_like(moduli_N)
    total_BSN = current_BS[..., None].expand(-1, -1, len(moduli)) % moduli_N
    for distance in range(1, rule.neighbors):
        earlier = slice(back - distance, back - distance + length)
        joined_BS = joined_BS & ~breaks_BS[:, earlier]
        if documents is not None:
            joined_BS = joined_BS & (documents[:, earlier] == documents[:, back:])
        powers_N = powers_N * (rule.base % moduli_N) % moduli_N
        reaching_N = torch.arange(len(moduli), device=ids.device) >= (distance - 1) * rule.splits
        earlier_BS1 = torch.where(joined_BS, context_BS[:, earlier], 0)[..., None]
        total_BSN = (total_BSN + earlier_BS1 * (powers_N * reaching_N)) % moduli_N
    return total_BSN


def forward(
    ids: Tensor,
    word: Tensor,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor],
    documents: Tensor | None,
    history: Tensor | None,
    numbers: Sequence[int],
    sparse: bool,
    out: Tensor,
    hashes_out: Tensor,
) -> None:
    """Writes out [B, S, D] and the hashes [B, S, N]: all lookups side by side, then one product."""
    rule, dtype = Rule.of(numbers), torch.promote_types(word.dtype, torch.float32)
    hashes_out.copy_(hashes(ids, [len(table) for table in tables], rule, documents, history))
    live_P = _live(hashes_out)
    total_PD = functional.embedding(ids.reshape(-1).clamp_min(0), word).to(dtype)
    rows_PI = _look_up(hashes_out.flatten(0, 1)[live_P], tables, dtype)
    total_PD[live_P] += rows_PI @ torch.cat([projection.to(dtype) for projection in projections], dim=1).T
    total_PD *= shares(ids, len(tables), rule).reshape(-1, 1).to(dtype)
    out.copy_(total_PD.view(out.shape))


def weight_grad(
    grad: Tensor,
    ids: Tensor,
    hashes: Tensor,
    slots: Tensor,
    sizes: Sequence[int],
    tables: Sequence[Tensor],
    projections: Sequence[Tensor],
    numbers: Sequence[int],
    words: int,
    projected: bool,
    grad_word: Tensor,
    *grads: Tensor,
) -> None:
    """Writes the gradients of the word table [words, D], of rows of the tables, and of the projections.

    A table's gradient is [size, W]: row slots[b, s, i] of it is that of its row hashes[b, s, i]. Those of size 0, no
    words and projections that are not `projected` are not wanted.
    """
    rule, dtype = Rule.of(numbers), torch.promote_types(grad.dtype, torch.float32)
    grad_PD = grad.reshape(-1, grad.shape[2]).to(dtype) * shares(ids, len(tables), rule).reshape(-1, 1).to(dtype)
    if words:
        grad_word.copy_(_add_rows(grad_PD, ids.reshape(-1), words))
    live_P = _live(hashes)
    grad_PD, hashes_PN, slots_PN = grad_PD[live_P], hashes.flatten(0, 1)[live_P], slots.flatten(0, 1)[live_P]
    slots_PN = slots_PN.masked_fill(hashes_PN == 0, -1)
    for out, projection, slots_P in zip(grads, projections, slots_PN.unbind(1), strict=False):
        if len(out):
            out.copy_(_add_rows(grad_PD @ projection.to(dtype), slots_P, len(out)))
    if projected:
        widths = [projection.shape[1] for projection in projections]
        rows_PI = _look_up(hashes_PN, tables, dtype)
        for out, part_DW in zip(grads[len(tables) :], (grad_PD.T @ rows_PI).split(widths, 1), strict=True):
            out.copy_(part_DW)


def _live(hashes: Tensor) -> Tensor:
    """The positions whose hashes are not all 0."""
    return hashes.flatten(0, 1).any(1).nonzero()[:, 0]


def _look_up(hashes_PN: Tensor, tables: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[P, sum of widths]: the table rows of each position side by side, fetched from where the tables are."""
    rows = []
    for table, hash_P in zip(tables, hashes_PN.unbind(1), strict=True):
        rows_PW = functional.embedding(hash_P.to(table.device), table).to(hash_P.device, dtype)
        rows.append(rows_PW.masked_fill((hash_P == 0)[:, None], 0))
    return torch.cat(rows, dim=1)


def _add_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """[size, W]: each row added at its index, in order; rows of negative index are left out."""
    kept = (index >= 0).nonzero()[:, 0]
    return rows.new_zeros(size, rows.shape[1]).index_add_(0, index[kept], rows[kept])


@dataclass(frozen=True)
class Case:
    """One problem size; `ids` may hold ignored ids, 0, eos and -1, `documents` and `history` say what else is given."""

    batch: int
    length: int
    base: int
    rows: int
    dim: int
    neighbors: int = 3
    splits: int = 2
    special: int = 3  # ignored ids, which follow the text ids
    documents: bool = False
    history: bool = False
    sparse: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def rule(self) -> Rule:
        return Rule(self.base, self.neighbors, self.splits, (self.base, self.base + self.special))


EDGE = (
    Case(0, 4, 8, 5, 8),
    Case(2, 0, 8, 5, 8, documents=True),
    Case(1, 1, 3, 1, 4, neighbors=2, splits=1),
    Case(3, 17, 9, 11, 12, neighbors=4),
    Case(3, 17, 9, 11, 12, neighbors=4, sparse=True),
    Case(2, 17, 9, 11, 8, documents=True, history=True),
    Case(2, 50, 9, 11, 408, sparse=True),
    Case(2, 50, 9, 11, 408, sparse=True, dtype=torch.bfloat16),
    Case(3, 17, 9, 11, 16, neighbors=4, dtype=torch.bfloat16),
)
MODEL = (Case(1, 4096, 131_072, 100_000, 3072, 4, 4, 53, dtype=torch.bfloat16),)


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    count, shape = (case.neighbors - 1) * case.splits, (case.batch, case.length)
    width = case.dim // count

    def normal(*sides: int, fan: int = 1) -> Tensor:
        return torch.randn(sides, generator=g).div(fan**0.5).to(device, case.dtype).requires_grad_()

    def ids(*sides: int) -> Tensor:
        return torch.randint(-1, case.base + case.special, sides, generator=g).to(device)

    starts_BS = torch.rand(shape, generator=g).lt(0.2).to(device)
    return {
        "ids": ids(*shape),
        "word": normal(case.base + case.special, case.dim),
        "tables": [normal(case.rows + 2 * i, width) for i in range(count)],
        "projections": [normal(case.dim, width, fan=width) for _ in range(count)],
        **case.rule._asdict(),
        "documents": starts_BS.cumsum(1) if case.documents else None,
        "history": ids(case.batch, case.neighbors - 1) if case.history else None,
        "sparse": case.sparse,
    }


def cost(case: Case) -> Cost:
    """A word row and one row of each table read a position, projections read once, one row written a position."""
    positions, count = case.batch * case.length, (case.neighbors - 1) * case.splits
    inner = case.dim // count * count
    moved = case.dtype.itemsize * (positions * (2 * case.dim + inner) + inner * case.dim) + 8 * positions
    return Cost(flops=2 * positions * inner * case.dim, bytes=moved)


REFUSALS = (
    Refusal("ids must be int64 [B, S], got torch.float32 [0, 4]", lambda a: {"ids": a["ids"].float()}),
    Refusal("ids must be int64 [B, S], got torch.int64 [3]", lambda a: {"ids": torch.ones(3).long()}),
    Refusal("ids must be in [-1, 11), got 11", lambda a: {"ids": torch.tensor([[11]])}),
    Refusal("ids must be in [-1, 11), got -2", lambda a: {"ids": torch.tensor([[-2]])}),
    Refusal("word must be [V, D] floating point, got torch.float32 [11]", lambda a: {"word": torch.ones(11)}),
    Refusal("neighbors must be at least 2, got 1", lambda a: {"neighbors": 1}),
    Refusal("splits must be at least 1, got 0", lambda a: {"splits": 0}),
    Refusal("base must be at least 1, got 0", lambda a: {"base": 0}),
    Refusal("tables must be (neighbors - 1) * splits = 4 tensors, got 3", lambda a: {"tables": a["tables"][:3]}),
    Refusal("projections must be one a table, 4, got 3", lambda a: {"projections": a["projections"][:3]}),
    Refusal(
        "projections must be [8, 2] to follow word and its table, got [8, 3]",
        lambda a: {"projections": [torch.ones(8, 3)] * 4},
    ),
    Refusal(
        "tables must be torch.float32 as word is, got torch.float64",
        lambda a: {"tables": [torch.ones(5, 2).double()] * 4},
    ),
    Refusal("tables must be on cpu as word is, got meta", lambda a: {"tables": [t.to("meta") for t in a["tables"]]}),
    Refusal("documents must be int64 [0, 4], got torch.int64 [0, 3]", lambda a: {"documents": a["ids"][:, :3]}),
    Refusal("ids must be on cpu as word is, got meta", lambda a: {"ids": a["ids"].to("meta")}),
    Refusal("documents must be on cpu as word is, got meta", lambda a: {"documents": a["ids"].to("meta")}),
    Refusal("history must be int64 [0, 2], got torch.int64 [0, 3]", lambda a: {"history": a["ids"][:, :3]}),
    Refusal("backend must be one of auto, ", lambda a: {"backend": "gpu"}),
)
