"""Tables of the n-gram embedding: gradients of the rows that were looked up, their optimizers, tables elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longcat_kernels import ngram_embedding
from longcat_kernels.modules import NGramEmbedding
from longcat_kernels.ops.ngram_embedding import _row_gradient
from longcat_kernels.reference.ngram_embedding import Rule, hashes


def lookups() -> tuple[NGramEmbedding, torch.Tensor, torch.Tensor]:
    """The second half repeats the first, so that every row is looked up twice or more."""
    torch.manual_seed(1)
    embed = NGramEmbedding(12, rows=101, base=20, neighbors=3, splits=2, ignored=(20, 24))
    ids = torch.randint(0, 24, (1, 30), generator=torch.Generator().manual_seed(0))
    return embed, torch.randn(24, 12, requires_grad=True), torch.cat([ids, ids])


def test_table_gradients_have_the_rows_that_were_looked_up() -> None:
    embed, word, ids = lookups()
    embed(ids, word).square().sum().backward()
    looked_up = hashes(ids, [len(t.weight) for t in embed.embedders], Rule(20, 3, 2, (20, 24))).flatten(0, 1)
    for table, hashes_P in zip(embed.embedders, looked_up.unbind(1), strict=True):
        grad = table.weight.grad
        assert grad.is_sparse
        assert grad._indices()[0].tolist() == sorted(set(hashes_P.tolist()) - {0})
    sparse = [p.grad.to_dense() for p in (word, *embed.parameters())]
    embed.zero_grad()
    word.grad, embed.sparse = None, False
    embed(ids, word).square().sum().backward()
    for got, parameter in zip(sparse, (word, *embed.parameters()), strict=True):
        assert torch.equal(got, parameter.grad)


def test_frozen_parts_get_no_gradient() -> None:
    embed, word, ids = lookups()
    embed.embedders[1].requires_grad_(False)
    embed.post_projs.requires_grad_(False)
    embed(ids, word.detach()).sum().backward()
    assert [p.grad is None for p in embed.parameters()] == [False, True, False, False] + [True] * 4


def rowwise_adagrad(table: torch.nn.Parameter, moments_R: torch.Tensor, rate: float) -> None:
    """One number of state a row (as in large recommendation models), touched where the gradient has rows."""
    rows_U, grad_UW = table.grad._indices()[0], table.grad._values()
    moments_R[rows_U] += grad_UW.square().mean(1)
    table.data[rows_U] -= rate * grad_UW / (moments_R[rows_U, None].sqrt() + 1e-8)


@pytest.mark.parametrize("optimizer", ["SparseAdam", "row-wise"])
def test_optimizers_of_rows_move_what_was_looked_up_and_nothing_else(optimizer: str) -> None:
    embed, word, ids = lookups()
    tables = [t.weight for t in embed.embedders]
    goal = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(2))
    before, adam = [t.detach().clone() for t in tables], torch.optim.SparseAdam(tables, lr=0.3)
    state, errors = [torch.zeros(len(t)) for t in tables], []
    for _ in range(20):
        adam.zero_grad()
        error = (embed(ids, word.detach()) - goal).square().mean()
        error.backward()
        errors.append(error.item())
        if optimizer == "SparseAdam":
            adam.step()
        else:
            for table, moments in zip(tables, state, strict=True):
                rowwise_adagrad(table, moments, 0.3)
    assert errors[-1] < 0.8 * errors[0]
    for table, old in zip(tables, before, strict=True):
        moved = (table.detach() != old).any(1)
        assert set(moved.nonzero()[:, 0].tolist()) == set(table.grad._indices()[0].tolist())


def test_inside_compile_sparse_gradients_are_refused_and_whole_ones_are_right() -> None:
    embed, word, ids = lookups()
    compiled = torch.compile(lambda: embed(ids, word), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="sparse must be False inside torch"):
        compiled()
    torch._dynamo.reset()
    embed.sparse = False
    compiled().sum().backward()
    got = [p.grad.clone() for p in embed.parameters()]
    embed.zero_grad()
    embed(ids, word).sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(got, embed.parameters(), strict=True))


def test_tables_on_the_host_stay_there() -> None:
    options = {"rows": 101, "base": 20, "neighbors": 3, "splits": 2, "ignored": (20, 24)}
    embed = NGramEmbedding(12, **options, tables_on_host=True).to("meta", torch.bfloat16)
    assert {(t.weight.device.type, t.weight.dtype) for t in embed.embedders} == {("cpu", torch.float32)}
    assert {(p.weight.device.type, p.weight.dtype) for p in embed.post_projs} == {("meta", torch.bfloat16)}
    assert list(embed.state_dict()) == list(NGramEmbedding(12, **options).state_dict())


def test_takes_tables_on_the_host_with_ids_elsewhere() -> None:
    """Another device is played by the meta device: shapes and devices of results only."""
    embed, word, ids = lookups()
    projections = [p.weight.to("meta") for p in embed.post_projs]
    out = ngram_embedding(
        ids.to("meta"),
        word.to("meta"),
        [t.weight for t in embed.embedders],
        projections,
        base=20,
        neighbors=3,
        splits=2,
        ignored=(20, 24),
    )
    assert (out.device.type, out.shape) == ("meta", (2, 30, 12))


def test_rows_of_a_host_table_become_its_gradient() -> None:
    table, keys, rows = torch.zeros(6, 2), torch.tensor([1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    whole, sparse = (_row_gradient(table, keys, rows, is_sparse) for is_sparse in (False, True))
    assert not whole.is_sparse and sparse.is_coalesced() and torch.equal(whole, sparse.to_dense())
    assert torch.equal(whole[keys], rows) and whole.count_nonzero() == 4


# A table of 256 MB in a file with holes, looked up at 200 positions, with gradients and an update in place.
MAPPED = """
import sys, torch
from longcat_kernels.modules import NGramEmbedding

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

options = {"rows": 2**20 - 1, "base": 1000, "neighbors": 2, "splits": 1, "ignored": (1000, 1004)}
def build(table):
    with torch.device("meta"):
        embed = NGramEmbedding(64, **options)
    embed.load_state_dict({"embedders.0.weight": table, "post_projs.0.weight": projection}, assign=True)
    return embed

g = torch.Generator().manual_seed(0)
projection, word = torch.randn(64, 64, generator=g), torch.randn(1004, 64, generator=g)
ids = torch.randint(0, 1004, (2, 100), generator=g)
build(torch.zeros(2**20, 64))(ids[:, :1], word).sum().backward()  # code pages
before = resident_bytes()
table = torch.from_file(sys.argv[1], shared=True, size=2**26).view(2**20, 64)
table[1:1001] = torch.randn(1000, 64, generator=g)
table[5000::65536] = 1.0
embed = build(table)
out = embed(ids, word)
out.square().sum().backward()
with torch.no_grad():
    embed.embedders[0].weight.add_(embed.embedders[0].weight.grad, alpha=-0.1)
moved = embed(ids, word)
print(resident_bytes() - before)
assert torch.equal(build(table.clone())(ids, word), moved) and not torch.equal(moved, out)
"""


def test_a_mapped_table_takes_no_memory_but_for_its_rows(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MAPPED, str(tmp_path / "table")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32e6, "the table has 268 MB"
