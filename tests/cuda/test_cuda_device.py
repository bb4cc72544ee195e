"""Kernels on a CUDA device beyond the contract: sizes that fill tiles, graph capture, no waiting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longcat_kernels import (
    DepthDecoding,
    DepthSampling,
    PreparedCodebook,
    Workspace,
    depth_decode,
    ema_update,
    rvq_decode,
    rvq_encode,
)
from longcat_kernels.reference import depth_decode as depth
from longcat_kernels.reference import rvq_encode as spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA kernels: no CUDA device")


def rows_and_books(rows: int, dim: int, entries: tuple[int, ...], mean: float = 0.0) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(rows + dim)
    books = [torch.randn(k, dim, generator=g) * 2.0**-level for level, k in enumerate(entries)]
    return (torch.randn(rows, dim, generator=g) + mean).cuda(), [
        (books[0] + mean).cuda(),
        *(b.cuda() for b in books[1:]),
    ]


@pytest.mark.parametrize(
    ("rows", "dim", "entries"),
    [(1, 64, (256,)), (129, 64, (1024,)), (257, 192, (4096, 512)), (1000, 3584, (2048, 700)), (5000, 256, (8192,))],
)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_codes_are_the_definitions(rows: int, dim: int, entries: tuple[int, ...], mean: float) -> None:
    """Row tiles that are full, that end early and that are missing in one block of a cluster."""
    x, books = rows_and_books(rows, dim, entries, mean)
    got, want = rvq_encode(x, books, backend="cuda"), rvq_encode(x, books, backend="reference")
    assert torch.equal(got.codes, want.codes) and torch.equal(got.residual, want.residual)
    prepared = rvq_encode(x, [PreparedCodebook(book) for book in books], backend="cuda")
    assert torch.equal(prepared.codes, want.codes) and torch.equal(prepared.residual, got.residual)
    for some in (slice(0, 1), slice(3, 130)):  # a row's code does not depend on the others
        assert torch.equal(rvq_encode(x[some], books, backend="cuda").codes, want.codes[some])


def test_rows_with_more_near_codewords_than_are_kept() -> None:
    g = torch.Generator().manual_seed(0)
    book = torch.randn(1, 256, generator=g) + 1e-5 * torch.randn(3000, 256, generator=g)
    x = book[torch.randint(3000, (300,), generator=g)] + 1e-5 * torch.randn(300, 256, generator=g)
    got, want = (rvq_encode(x.cuda(), [book.cuda()], backend=b).codes for b in ("cuda", "reference"))
    assert torch.equal(got, want) and got.unique().numel() > 100


def test_a_graph_replays_a_training_step() -> None:
    """No host synchronisation, no allocation that a graph cannot hold: encode, decode, update with refresh."""
    x, (book, *_) = rows_and_books(512, 256, (2048,))
    prepared, sums, sizes = PreparedCodebook(book).refresh(), book.clone(), torch.ones(2048, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        encoding = rvq_encode(x, [prepared], backend="cuda")
        out = rvq_decode(encoding.codes, [book], backend="cuda")
        ema_update(book, sums, sizes, x, encoding.codes[:, 0], prepared=prepared, backend="cuda")
        return encoding.codes, out

    state = [t.clone() for t in (book, sums, sizes)]
    eager = [step() for _ in range(3)][-1]
    after = [t.clone() for t in (book, sums, sizes)]
    for tensor, old in zip((book, sums, sizes), state, strict=True):
        tensor.copy_(old)
    prepared.refresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((book, sums, sizes), after, strict=True))


def test_no_call_waits_for_the_device() -> None:
    x, books = rows_and_books(300, 128, (1000, 500))
    rvq_encode(x, books, backend="cuda")  # loads the kernels
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoding = rvq_encode(x.requires_grad_(), books, backend="cuda")
        (encoding.quantized.sum() + encoding.losses.sum()).backward()
        rvq_decode(encoding.codes, books, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert spec.nearest(x.detach()[:4].cpu(), books[0].cpu()).tolist() == encoding.codes[:4, 0].tolist()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_graph_decodes_what_is_written_to_its_arguments(backend: str) -> None:
    """With sampling on: the states, numbers, seeds and steps of later calls, drawn as without a graph."""
    case, rows = depth.EDGE[3], 8
    weights, hidden = depth.inputs(case, "cuda")["weights"], torch.randn(rows, case.config.hidden).cuda()
    sampling = DepthSampling(0.9, 5, 0.95).table(rows, case.config, "cuda").contiguous()
    seeds, steps, workspace = torch.arange(rows).cuda(), torch.zeros(rows).long().cuda(), Workspace()

    def decode(workspace: Workspace | None) -> DepthDecoding:
        return depth_decode(
            hidden, weights, sampling, seed=seeds, step=steps, workspace=workspace, logits=True, backend=backend
        )

    decode(workspace)  # loads the kernels
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(workspace)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    memory, graph = workspace.bytes, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(workspace)
    drawn = []
    for turn in range(3):
        hidden.normal_(), seeds.add_(7), steps.add_(1), sampling[..., 0].fill_(0.5 + turn)
        graph.replay()
        for got, want in zip(captured, decode(None), strict=True):
            assert torch.equal(got, want)
        drawn.append(captured.codes.tolist())
    assert drawn[0] != drawn[1] != drawn[2] and workspace.bytes == memory
