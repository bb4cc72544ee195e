"""Routing plan: row by row what a loop over slots gives, tiles that cover, and plans of rows that came from afar."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import RoutingPlan, fused_moe, grouped_mm, moe_plan


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    k=st.integers(1, 4),
    n_real=st.integers(1, 6),
    tile=st.integers(1, 5),
    seed=st.integers(0, 99),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_equals_a_loop_over_slots(tokens: int, k: int, n_real: int, tile: int, seed: int, backend: str) -> None:
    ids = torch.randint(-2, n_real + 3, (k, tokens), generator=torch.Generator().manual_seed(seed)).T
    plan = moe_plan(ids, n_real, tile=tile, backend=backend)
    flat = ids.flatten().tolist()
    order = [slot for expert in range(n_real) for slot, i in enumerate(flat) if i == expert]
    padding = [-1] * (len(flat) - len(order))
    assert plan.counts.tolist() == [flat.count(expert) for expert in range(n_real)]
    assert plan.offsets.tolist() == [sum(plan.counts.tolist()[:e]) for e in range(n_real + 1)]
    assert plan.slots.tolist() == order + padding
    assert plan.tokens.tolist() == [slot // k for slot in order] + padding
    assert plan.rows.flatten().tolist() == [order.index(s) if s in order else -1 for s in range(len(flat))]
    tiles = [[e, row] for e in range(n_real) for row in range(int(plan.offsets[e]), int(plan.offsets[e + 1]), tile)]
    assert plan.tiles.tolist() == tiles + [[-1, -1]] * (len(plan.tiles) - len(tiles))
    assert len(plan.tiles) == n_real + -(-len(flat) // tile)
    assert all(tensor.dtype == torch.int32 for tensor in plan)


def test_one_expert_with_everything_needs_no_more_tiles_than_there_are() -> None:
    plan = moe_plan(torch.zeros(100, 2, dtype=torch.int64), 3, tile=7)
    assert (plan.tiles[:, 0] == 0).sum() == -(-200 // 7) and plan.counts.tolist() == [200, 0, 0]


def test_the_plan_is_what_grouped_products_need() -> None:
    """Gather, two grouped products and a gather-and-sum by the plan: the mixture itself."""
    g = torch.Generator().manual_seed(0)
    x, weights = torch.randn(13, 8, generator=g), torch.rand(13, 3, generator=g)
    gate_up, down = torch.randn(4, 12, 8, generator=g), torch.randn(4, 8, 6, generator=g)
    ids = torch.randint(-1, 4, (13, 3), generator=g)
    plan = moe_plan(ids, 4)
    ends = plan.offsets[1:]
    gate, up = grouped_mm(x[plan.tokens], gate_up.mT, ends).chunk(2, 1)
    y = grouped_mm(torch.nn.functional.silu(gate) * up, down.mT, ends)
    got = (torch.where(plan.rows < 0, 0, weights)[..., None] * y[plan.rows]).sum(1)
    torch.testing.assert_close(got, fused_moe(x, gate_up, down, ids, weights), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4),
    spare=st.integers(0, 3),
    backend=st.sampled_from(["auto", "reference"]),
)
def test_rows_that_an_all_to_all_brought_are_found(counts: list[list[int]], spare: int, backend: str) -> None:
    experts = [e for source in counts for e, n in enumerate(source) for _ in range(n)]  # of each row as it arrives
    plan = RoutingPlan.from_counts(torch.tensor(counts), len(experts) + spare, backend=backend)
    order = sorted(range(len(experts)), key=lambda row: experts[row])
    assert plan.tokens.tolist() == order + [-1] * spare
    assert plan.counts.tolist() == [experts.count(e) for e in range(3)]


@pytest.mark.parametrize("counts", [torch.ones(3), torch.ones(2, 2), torch.ones(0, 2, dtype=torch.int64)])
def test_refuses_counts_that_are_none(counts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^moe_plan: counts must be integers \[S, E\], got "):
        RoutingPlan.from_counts(counts, 4)


@pytest.mark.parametrize(
    ("counts", "total", "message"),
    [
        ([2, 3], 4, "total must be at least the sum of counts, 5, got 4"),
        ([2, 3], -1, "total must be at least 0, got -1"),
        ([4, -1], 5, "counts must be at least 0, got -1"),
    ],
)
def test_refuses_rows_that_there_is_no_room_for(counts: list[int], total: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^moe_plan: {message}"):
        RoutingPlan.from_counts(torch.tensor([counts]), total)


def test_compiles_to_one_graph_from_counts_too() -> None:
    counts = torch.tensor([[1, 2], [0, 3]])
    compiled = torch.compile(lambda c: RoutingPlan.from_counts(c, 8), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(counts), RoutingPlan.from_counts(counts, 8), strict=True):
        assert torch.equal(got, want)
