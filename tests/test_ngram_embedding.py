"""N-gram embedding: golden hashes, the segment rule position by position, cached decoding, documents, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import ngram_embedding
from longcat_kernels.modules import NGramEmbedding
from longcat_kernels.reference.ngram_embedding import Rule, hashes

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


@pytest.mark.parametrize(("ids", "position", "expected"), GOLDEN)
def test_hashes_are_the_released_ones(ids: list[int], position: int, expected: list[int]) -> None:
    assert hashes(torch.tensor([ids]), RELEASED_ROWS, RELEASED)[0, position].tolist() == expected


def test_hashes_stay_exact_at_the_largest_ids() -> None:
    ids = [131_071, 131_070, 131_069, 131_068]
    want = [sum(n * 131_072**p for p, n in enumerate(ids[: i // 4 + 2])) % rows for i, rows in enumerate(RELEASED_ROWS)]
    assert hashes(torch.tensor([ids[::-1]]), RELEASED_ROWS, RELEASED)[0, 3].tolist() == want


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
        return ngram_embedding(ids, word, tables, projections, base=6, neighbors=3, splits=1, ignored=(6, 8), eos=2)

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
    assert all((table.weight.grad[0] == 0).all() for table in embed.embedders)


def test_state_dict_names_are_the_released_ones() -> None:
    names = set(module()[0].state_dict())
    assert names == {f"{part}.{i}.weight" for part in ("embedders", "post_projs") for i in range(6)}


def test_refuses_a_width_that_the_tables_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"NGramEmbedding: \(neighbors - 1\) \* splits must divide hidden 12, got 5"):
        module(neighbors=2, splits=5)
