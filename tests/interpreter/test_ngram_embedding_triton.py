"""ngram_embedding in Triton's interpreter: what the cases of the definition leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import ngram_embedding
from longcat_kernels.reference import ngram_embedding as spec
from longcat_kernels.testing import assert_close


def results(arguments: dict[str, Any], backend: str) -> list[torch.Tensor]:
    """The output and the gradients to word, tables and projections."""
    leaves = [arguments["word"], *arguments["tables"], *arguments["projections"]]
    out = ngram_embedding(**arguments, backend=backend)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad)
    return [out.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().double().requires_grad_() if value.is_floating_point() else value
        return [wide(v) for v in value] if isinstance(value, list) else value

    return {name: wide(value) for name, value in arguments.items()}


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    neighbors=st.integers(2, 4),
    splits=st.integers(1, 2),
    given_=st.tuples(st.booleans(), st.booleans()),
    sparse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_truth_on_any_ids(
    batch: int, length: int, neighbors: int, splits: int, given_: tuple[bool, bool], sparse: bool, seed: int
) -> None:
    case = spec.Case(batch, length, 5, 7, 30, neighbors, splits, 2, *given_, sparse)
    arguments = spec.inputs(case, seed=seed)
    arguments["projections"] = [p.detach().mT.contiguous().mT.requires_grad_() for p in arguments["projections"]]
    for got, want in zip(results(arguments, "triton"), results(widened(arguments), "reference"), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dim", [72, 80])
def test_more_positions_than_the_smallest_tiles_hold(dim: int) -> None:
    arguments = spec.inputs(spec.Case(2, 150, 9, 11, dim, dtype=torch.float16))
    got, want = (ngram_embedding(**a, backend=b) for a, b in ((arguments, "triton"), (widened(arguments), "reference")))
    assert_close(got, want)


def test_tables_that_are_elsewhere_are_read_there(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    from longcat_kernels.triton import ngram_embedding as kernels

    arguments = spec.inputs(spec.Case(2, 9, 9, 11, 24))
    near = ngram_embedding(**arguments, backend="triton")
    monkeypatch.setattr(kernels, "_is_near", lambda table, ids: False)
    assert torch.equal(ngram_embedding(**arguments, backend="triton"), near)


def test_an_id_beyond_the_words_gives_nan_and_reads_nothing() -> None:
    from longcat_kernels.triton.ngram_embedding import run

    a = spec.inputs(spec.Case(1, 3, 9, 11, 24))
    ids, out = torch.tensor([[1, 10**12, 2]]), torch.zeros(1, 3, 24)
    tables, projections = ([t.detach() for t in a[name]] for name in ("tables", "projections"))
    rule = spec.Rule(9, 3, 2, (9, 12)).numbers()
    run(ids, a["word"].detach(), tables, projections, None, None, rule, False, out, torch.zeros(1, 3, 4).long())
    assert out.isnan().all(2).tolist() == [[False, True, False]]
