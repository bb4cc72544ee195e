"""N-gram embedding: golden hashes, the segment rule position by position, cached decoding, documents, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import native, ngram_embedding
from longcat_kernels.modules import NGramEmbedding
from longcat_kernels.ops.ngram_embedding import OP
from longcat_kernels.reference.ngram_embedding import EDGE, Case, Rule, hashes, inputs
from longcat_kernels.testing import assert_close, record

RELEASED = Rule(base=131_072, neighbors=4, splits=4, ignored=(131_072, 131_125))
RELEASED_ROWS = [78 * 131_072 + 2 * i + 1 for i in range(12)]
START = [3014857, 3014855, 3014853, 3014851, 3014849, 3014847, 3014845, 3014843, 3014841, 3014839, 3014837, 3014835]
GOLDEN = (
    ([101, 202, 303, 404], 0, [101] * 12),
    ([101, 202, 303, 404], 1, START),
    (
        [101, 202, 303, 404],
        2,
        [6029613, 6029609, 6029605, 6029601, 8958556, 8619110, 8279664, 7940218, 7600772, 7261326, 6921880, 6582434],
    ),
    (
        [101, 202, 303, 404],
        3,
        [9044369, 9044363, 9044357, 9044351, 4678638, 3999746, 3320854, 2641962, 6470303, 7668821, 8884747, 10118081],
    ),
    ([101, 2, 202, 303], 1, [n - 200 for n in START]),
    ([101, 2, 202, 303], 2, [202] * 12),
    ([101, 131_106, 202, 303], 1, [0] * 12),
    ([101, 131_106, 202, 303], 2, [202] * 12),
)


def op_hashes(ids: list[int], backend: str, rule: Rule = RELEASED) -> torch.Tensor:
    """[S, N]: the hashes by an implementation, of tables that take no memory."""
    tables = [torch.zeros(1, 1).expand(rows, 1) for rows in RELEASED_ROWS]
    numbers, word = rule.numbers(), torch.zeros(1, 1).expand(RELEASED.ignored[1], 1)
    overload = torch.ops.longcat.ngram_embedding.default
    inputs = (torch.tensor([ids]), word, tables, [torch.zeros(1, 1)] * 12, None, None, numbers, True)
    return overload(*inputs, backend)[1][0]


@pytest.mark.parametrize("backend", OP.impls)
@pytest.mark.parametrize(("ids", "position", "expected"), GOLDEN)
def test_hashes_are_the_released_ones(ids: list[int], position: int, expected: list[int], backend: str) -> None:
    assert hashes(torch.tensor([ids]), RELEASED_ROWS, RELEASED)[0, position].tolist() == expected
    assert op_hashes(ids, backend)[position].tolist() == expected


@pytest.mark.parametrize("backend", OP.impls)
def test_hashes_stay_exact_at_the_largest_ids(backend: str) -> None:
    ids = [131_071, 131_070, 131_069, 131_068]
    want = [sum(n * 131_072**p for p, n in enumerate(ids[: i // 4 + 2])) % rows for i, rows in enumerate(RELEASED_ROWS)]
    assert hashes(torch.tensor([ids[::-1]]), RELEASED_ROWS, RELEASED)[0, 3].tolist() == want
    assert op_hashes(ids[::-1], backend)[3].tolist() == want


@pytest.mark.parametrize("backend", OP.impls)
def test_hashes_stay_exact_for_any_base(backend: str) -> None:
    rule, ids, rows = RELEASED._replace(base=2**62 + 1), [131_071, 131_070, 131_069], RELEASED_ROWS[-1]
    want = sum(n * rule.base**p for p, n in enumerate(ids)) % rows
    assert hashes(torch.tensor([ids[::-1]]), RELEASED_ROWS, rule)[0, 2, -1] == want
    assert op_hashes(ids[::-1], backend, rule)[2, -1] == want


def module(**changes: Any) -> tuple[NGramEmbedding, torch.Tensor]:
    torch.manual_seed(0)
    options = {"rows": 37, "base": 20, "neighbors": 4, "splits": 2, "ignored": (20, 24)} | changes
    return NGramEmbedding(12, **options).double(), torch.randn(24, 12, dtype=torch.float64, requires_grad=True)


def position_by_position(
    embed: NGramEmbedding, word: torch.Tensor, ids: list[int], documents: list[int]
) -> torch.Tensor:
    """One row, by Python integers: walk back from each position until its segment ends."""
    out = []
    ids_read = [0 if n < 0 or embed.ignored[0] <= n < embed.ignored[1] else n for n in ids]
    for t, n in enumerate(ids):
        before = []
        for p in range(1, embed.neighbors):
            q = t - p
            if q < 0 or ids_read[t] == 0 or ids_read[q] in (0, embed.eos) or documents[q] != documents[t]:
                break
            before.append(ids_read[q])
        total = word[n].clone() if n >= 0 else torch.zeros(12, dtype=torch.float64)
        for i, (table, projection) in enumerate(zip(embed.embedders, embed.post_projs, strict=True)):
            order = i // embed.splits + 2
            terms = enumerate([ids_read[t], *before[: order - 1]])
            key = sum(number * embed.base**p for p, number in terms) % table.num_embeddings
            if key:
                total = total + projection(table.weight[key])
        is_ignored = embed.ignored[0] <= n < embed.ignored[1]
        out.append(total if is_ignored else total / (1 + len(embed.embedders)))
    return torch.stack(out)


ROWS = st.lists(st.integers(-1, 23), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(ids=ROWS, breaks=st.lists(st.booleans(), min_size=12, max_size=12))
def test_equals_walking_back_position_by_position(ids: list[int], breaks: list[bool]) -> None:
    embed, word = module()
    documents = torch.tensor(breaks[: len(ids)]).long().cumsum(0)
    got = embed(torch.tensor([ids]), word, documents[None])[0]
    torch.testing.assert_close(got, position_by_position(embed, word, ids, documents.tolist()))


@settings(max_examples=40, deadline=None)
@given(ids=ROWS, chunks=st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_cached_decoding_equals_the_whole_row(ids: list[int], chunks: list[int]) -> None:
    embed, word = module()
    whole, pieces, past, start = embed(torch.tensor([ids]), word), [], [-1] * 3, 0
    for size in chunks:
        piece = ids[start : start + size]
        if not piece:
            break
        pieces.append(embed(torch.tensor([piece]), word, history=torch.tensor([past[-3:]])))
        past, start = past + piece, start + size
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)


def test_a_row_does_not_see_its_batch_mates() -> None:
    embed, word = module()
    ids = torch.randint(-1, 24, (5, 9), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([embed(row[None], word) for row in ids])
    torch.testing.assert_close(embed(ids, word), alone, rtol=0, atol=1e-12)


def test_gradients_are_exact() -> None:
    embed, word = module(neighbors=3, splits=1, rows=5, base=6, ignored=(6, 8))
    word = word[:8].detach().requires_grad_()
    ids = torch.tensor([[4, 5, 5, 7, -1, 0, 2, 3, 1]])
    leaves = (word, *embed.parameters())

    def run(word: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        tables, projections = list(weights[:2]), list(weights[2:])
        return ngram_embedding(
            ids, word, tables, projections, base=6, neighbors=3, splits=1, ignored=(6, 8), sparse=False
        )

    assert torch.autograd.gradcheck(run, leaves)


def test_row_zero_of_a_table_is_never_read_nor_moved() -> None:
    embed, word = module()
    ids = torch.tensor([[0, 21, -1, 5, 6]])
    clean = embed(ids, word)
    for table in embed.embedders:
        with torch.no_grad():
            table.weight[0] = torch.nan
    out = embed(ids, word)
    out.sum().backward()
    assert torch.equal(out, clean)
    assert all((table.weight.grad.to_dense()[0] == 0).all() for table in embed.embedders)


def test_state_dict_names_are_the_released_ones() -> None:
    names = set(module()[0].state_dict())
    assert names == {f"{part}.{i}.weight" for part in ("embedders", "post_projs") for i in range(6)}


def test_refuses_a_width_that_the_tables_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"NGramEmbedding: \(neighbors - 1\) \* splits must divide hidden 12, got 5"):
        module(neighbors=2, splits=5)


needs_native = pytest.mark.skipif(native.why_not() is not None, reason=f"compiled module: {native.why_not()}")
ISAS = native.module().build_info()["isas_available"] if native.why_not() is None else []
WIDE = Case(2, 37, 9, 11, 444, neighbors=4, dtype=torch.bfloat16)  # widths of 74: whole steps and a rest
LONG = Case(1, 601, 9, 11, 30, neighbors=2, splits=1)  # tokens of several blocks


def by_kernel(case: Case, *, isa: str = "auto", threads: int = 1, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = record(OP, {**inputs(case), **changes}).arguments[:-2]
    ids, word, tables = arguments[:3]
    out, hashed = torch.empty(*ids.shape, word.shape[1], dtype=word.dtype), ids.new_empty(*ids.shape, len(tables))
    detached = [
        [t.detach() for t in a] if isinstance(a, list) and isinstance(a[0], torch.Tensor) else a for a in arguments
    ]
    native.module().ngram_embedding(*detached, out, hashed, threads=threads, isa=isa)
    return out, hashed


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [EDGE[4], WIDE, Case(2, 37, 9, 11, 444, neighbors=4)], ids=["edge", "bf16", "fp32"])
def test_every_instruction_set_gives_the_truth(case: Case, isa: str) -> None:
    truth, hashed = record(OP, inputs(case)).truth(OP)
    got = by_kernel(case, isa=isa)
    assert_close(got[0], truth)
    assert torch.equal(got[1], hashed)
    assert torch.equal(by_kernel(case, isa=isa, threads=3)[0], got[0])


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(isa: str) -> None:
    ids = inputs(WIDE)["ids"]
    whole = by_kernel(WIDE, isa=isa)[0]
    for row, want in zip(ids, whole, strict=True):
        assert torch.equal(by_kernel(WIDE, isa=isa, ids=row[None])[0][0], want)
        assert torch.equal(by_kernel(WIDE, isa=isa, ids=row[None, :5])[0][0], want[:5])


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(ROWS, min_size=1, max_size=3),
    starts=st.lists(st.booleans(), min_size=12, max_size=12),
    past=st.none() | st.lists(st.integers(-1, 23), min_size=3, max_size=3),
    neighbors=st.integers(2, 4),
    splits=st.integers(1, 3),
)
def test_the_kernel_equals_the_definition(
    ids: list[list[int]], starts: list[bool], past: list[int] | None, neighbors: int, splits: int
) -> None:
    length, count = min(map(len, ids)), (neighbors - 1) * splits
    rows, g = torch.tensor([row[:length] for row in ids]), torch.Generator().manual_seed(0)
    documents = torch.tensor(starts[:length]).long().cumsum(0).expand(len(ids), -1)
    history = None if past is None else torch.tensor(past[: neighbors - 1]).expand(len(ids), -1)
    tables = [torch.randn(29 + i, 5, generator=g) for i in range(count)]
    projections = [torch.randn(7, 5, generator=g) for _ in range(count)]
    numbers = Rule(20, neighbors, splits, (20, 24)).numbers()
    arguments = (rows, torch.randn(24, 7, generator=g), tables, projections, documents, history, numbers, True)
    got, want = (torch.ops.longcat.ngram_embedding.default(*arguments, name) for name in ("cpu", "reference"))
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)


def grads_by_kernel(case: Case, *, isa: str, threads: int = 1) -> list[torch.Tensor]:
    """Of word, tables (whole) and projections, for a fixed gradient of the output."""
    ids, word, tables, projections, _, _, numbers = record(OP, inputs(case)).arguments[:7]
    hashed, dim, dtype = by_kernel(case)[1], word.shape[1], word.dtype
    grad = torch.randn(ids.numel(), dim, generator=torch.Generator().manual_seed(4)).to(dtype)
    outputs = [torch.full_like(tensor, torch.nan) for tensor in (word, *tables, *projections)]
    parts = (outputs[0], outputs[1 : 1 + len(tables)], outputs[1 + len(tables) :])
    native.module().ngram_embedding_weight_grad(
        grad, ids, hashed, hashed, tables, projections, numbers, *parts, threads=threads, isa=isa
    )
    return outputs


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", [EDGE[3], WIDE, LONG], ids=["edge", "bf16", "long"])
def test_every_instruction_set_gives_the_true_gradients(case: Case, isa: str) -> None:
    call = record(OP, inputs(case))
    leaves = [
        [t.detach().double().requires_grad_() for t in part] for part in ([call.arguments[1]], *call.arguments[2:4])
    ]
    rest = call.arguments[4:-1]
    out = OP.spec.ngram_embedding(call.arguments[0], leaves[0][0], leaves[1], leaves[2], *rest)[0]
    grad = torch.randn(out.numel() // out.shape[2], out.shape[2], generator=torch.Generator().manual_seed(4)).to(
        case.dtype
    )
    truth = torch.autograd.grad(out, [t for part in leaves for t in part], grad.double().view_as(out))
    got = grads_by_kernel(case, isa=isa)
    for actual, wanted in zip(got, truth, strict=True):
        assert_close(actual, wanted)
    again = grads_by_kernel(case, isa=isa, threads=3)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ids_of_any_strides(backend: str) -> None:
    case = Case(3, 17, 9, 11, 8, documents=True, history=True)
    good = inputs(case)
    strided = {name: good[name].mT.contiguous().mT for name in ("ids", "documents", "history")}
    assert strided["ids"].stride(1) != 1
    got, want = (ngram_embedding(**{**good, **changes}, backend=backend) for changes in (strided, {}))
    assert torch.equal(got, want)
    got.sum().backward()
