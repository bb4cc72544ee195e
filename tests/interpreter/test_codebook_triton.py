"""rvq_decode, the gradients and ema_update in Triton's interpreter: bits of the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import PreparedCodebook, ema_update, rvq_decode, rvq_encode, triton
from longcat_kernels.layouts import HalfLayout
from longcat_kernels.ops.ema_update import _op
from longcat_kernels.reference import ema_update as spec


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 40),
    entries=st.lists(st.integers(1, 12), min_size=1, max_size=11),
    seed=st.integers(0, 99),
)
def test_decode_and_its_gradient_have_the_bits_of_the_definition(
    rows: int, width: int, entries: list[int], seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(-1, k, (rows,), generator=g) for k in entries], 1)
    books = [torch.randn(k, width, generator=g).requires_grad_() for k in entries]
    grad = torch.randn(width, rows, generator=g).T
    results = []
    for backend in ("triton", "reference"):
        out = rvq_decode(codes, books, backend=backend)
        results.append((out, *torch.autograd.grad(out, books, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_code_without_an_entry_gives_nan_and_reads_nothing() -> None:
    from longcat_kernels.triton.rvq_decode import run

    out = torch.zeros(3, 4)
    run(torch.tensor([[0], [5], [1]]), [torch.ones(5, 4)], out)
    assert out.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("levels", "dtype", "through"),
    [
        (1, torch.float32, "both"),
        (3, torch.bfloat16, "losses"),
        (3, torch.float16, "quantized"),
        (9, torch.bfloat16, "both"),
        (17, torch.float32, "losses"),
    ],
)
def test_the_gradient_of_encode_is_that_of_the_definition(levels: int, dtype: torch.dtype, through: str) -> None:
    g = torch.Generator().manual_seed(levels)
    x = torch.randn(9, 13, generator=g).to(dtype).requires_grad_()
    books = [torch.randn(5, 13, generator=g) * 0.8**level for level in range(levels)]
    mask = torch.rand(9, generator=g) < 0.7
    gradients = []
    for backend in ("triton", "reference"):
        result = rvq_encode(x, books, mask=mask, residual_dtype=torch.bfloat16, backend=backend)
        parts: dict[str, Any] = {"quantized": result.quantized.float().square().sum(), "losses": result.losses.sum()}
        total = sum(parts.values()) if through == "both" else parts[through]
        gradients.append(torch.autograd.grad(total, x)[0])
    assert gradients[0].dtype == dtype and torch.equal(*gradients)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 120),
    dim=st.integers(1, 20),
    entries=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    decay=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    rule=st.sampled_from([(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.7, 0.0), (2.5, 0.1, 3.3)]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_update_has_the_bits_of_the_definition(
    rows: int, dim: int, entries: int, dtype: torch.dtype, ignored: float, decay: float, rule: Any, seed: int
) -> None:
    threshold, fraction, count = rule
    case = spec.Case(rows, dim, entries, dtype, threshold, 0.6, ignored, decay, seed, fraction, count)
    got, want = spec.inputs(case), spec.inputs(case)
    got["vectors"] = got["vectors"].T.contiguous().T
    restarted = [ema_update(**a, backend=b) for a, b in ((got, "triton"), (want, "reference"))]
    assert torch.equal(*restarted)
    for name in ("embed_ema", "cluster_size_ema"):
        assert torch.equal(got[name], want[name]), name
    # The sum of the counts may be one rounding of float64 off, and a codeword then one of float32.
    torch.testing.assert_close(got["embed"], want["embed"], rtol=2.0**-23, atol=0)


def test_update_refuses_a_codebook_that_is_not_contiguous() -> None:
    arguments = spec.inputs(spec.Case(5, 4, 6))
    arguments["embed"] = arguments["embed"].T.contiguous().T
    with pytest.raises(ValueError, match="triton: needs a contiguous codebook and statistics"):
        ema_update(**arguments, backend="triton")


def test_update_refreshes_the_packed_form() -> None:
    from longcat_kernels.triton._pack import pack

    given = spec.inputs(spec.Case(50, 9, 12, used=0.5))
    forms = [torch.zeros(HalfLayout(12, 9).bytes, dtype=torch.uint8) for _ in range(2)]
    rule = (0.99, 1e-5, 1.0, 0.0, 1.0, 0)
    statistics = (given["embed"], given["embed_ema"], given["cluster_size_ema"])
    _op(*statistics, forms[0], given["vectors"], given["codes"], *rule, "triton")
    pack(given["embed"], forms[1])
    assert torch.equal(*forms)


def test_a_prepared_codebook_is_packed_for_the_kernels_and_follows_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "on_device", lambda tensor: True)  # as on a GPU
    g = torch.Generator().manual_seed(2)
    x, words = torch.randn(20, 9, generator=g), torch.randn(12, 9, generator=g)
    book = PreparedCodebook(words)
    for _ in range(2):
        got, want = (rvq_encode(x, [b, b], backend="triton") for b in (book, words))
        assert book.packed is not None and book.packed.numel() == HalfLayout(12, 9).bytes
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        words.mul_(-0.5)
