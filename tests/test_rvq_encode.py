"""rvq_encode: exactness on hard data, invariance of the codes, masks, bad rows, gradients, layouts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_kernels import PreparedCodebook, native, rvq_encode
from longcat_kernels.ops.rvq_encode import IMPLS
from longcat_kernels.reference import rvq_encode as spec

BACKENDS = tuple(name for name in IMPLS if name != "cuda")  # which tests/cuda runs on the CPU
HARD = [case for case in spec.EDGE if case.data != "normal"]
ISAS = native.module().build_info()["isas_available"] if native.why_not() is None else []


def encode_by(isa: str, x: Tensor, codebooks: list[Tensor], threads: int = 1) -> tuple[Tensor, ...]:
    """quantized, residual, losses, codes of the compiled implementation with one instruction set."""
    rows, width, levels = *x.shape, len(codebooks)
    outputs = (torch.empty_like(x), torch.empty(rows, width), torch.empty(levels), torch.empty(rows, levels).long())
    native.module().rvq_encode(x, codebooks, [], None, None, torch.float32, *outputs, threads=threads, isa=isa)
    return outputs


def assert_exact(x: Tensor, codebooks: list[Tensor], codes: Tensor) -> None:
    """No other codeword is nearer in float64 by more than 2^-40 (|r|^2 + max |c|^2), on the code's own residuals."""
    residual = x.float()
    for level, book in enumerate(codebooks):
        r, c, chosen = residual.double(), book.double(), codes[:, level]
        distances = c.square().sum(1) - 2 * r @ c.T
        slack = 2.0**-40 * (r.square().sum(1) + c.square().sum(1).max())
        assert (distances.gather(1, chosen[:, None])[:, 0] <= distances.amin(1) + slack).all()
        residual = residual - book[chosen]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", HARD, ids=lambda case: case.data)
@pytest.mark.parametrize("seed", [1, 2])
def test_codes_are_exact_on_data_that_catches_imprecise_kernels(backend: str, case: spec.Case, seed: int) -> None:
    arguments = spec.inputs(case, seed=seed)
    codes = rvq_encode(**{**arguments, "mask": None}, backend=backend).codes
    assert_exact(arguments["x"].detach(), arguments["codebooks"], codes)


def test_float32_arithmetic_alone_would_fail_on_this_data() -> None:
    """The data are hard enough: plain float32 scores pick other codes somewhere."""
    wrong = 0
    for case in HARD:
        arguments = spec.inputs(case, seed=1)
        x, book = arguments["x"].detach(), arguments["codebooks"][0]
        plain = torch.addmm(book.square().sum(1), x, book.T, alpha=-2).argmin(1)
        wrong += int((plain != rvq_encode(x, [book]).codes[:, 0]).sum())
    assert wrong > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_codewords_go_to_the_lowest_index(backend: str) -> None:
    book = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    codes = rvq_encode(book[:50] + 0.01, [book], backend=backend).codes[:, 0]
    assert codes.tolist() == [row % 3 for row in range(50)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mirrored_codewords_tie_exactly(backend: str) -> None:
    book = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]])
    assert rvq_encode(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), [book], backend=backend).codes.tolist() == [[0], [0]]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    width=st.integers(1, 70),
    entries=st.integers(1, 80),
    grid=st.sampled_from([1.0, 4.0, 256.0]),
    seed=st.integers(0, 99),
)
def test_all_implementations_and_instruction_sets_agree_to_the_bit(
    rows: int, width: int, entries: int, grid: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    # On a coarse grid many distances are equal, so the tie rule decides.
    x = torch.randn(rows, width, generator=g).mul(grid).round().div(grid)
    books = [torch.randn(entries, width, generator=g).mul(grid).round().div(grid) for _ in range(2)]
    want = rvq_encode(x, books, backend="reference")
    for isa in ISAS:
        quantized, residual, _, codes = encode_by(isa, x, books)
        assert torch.equal(codes, want.codes), isa
        assert torch.equal(residual, want.residual) and torch.equal(quantized, want.quantized), isa


@pytest.mark.parametrize("case", [spec.Case((203,), 40, (100, 60)), HARD[1]], ids=lambda case: case.data)
def test_codes_do_not_depend_on_batch_order_threads_or_instruction_set(case: spec.Case) -> None:
    arguments = spec.inputs(case)
    x, books = arguments["x"].detach(), arguments["codebooks"]
    want = rvq_encode(x, books, backend="cpu").codes
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for isa in ISAS:
        for threads in (1, 2, 3):
            assert torch.equal(encode_by(isa, x[order], books, threads)[3], want[order])
        for size in (1, 7, 50):
            parts = [encode_by(isa, part, books)[3] for part in x.split(size)]
            assert torch.equal(torch.cat(parts), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_are_left_out_even_if_they_are_nan(backend: str) -> None:
    x = torch.randn(4, 6, 8)
    mask = torch.rand(4, 6) < 0.5
    books = [torch.randn(9, 8), torch.randn(5, 8)]
    got = rvq_encode(torch.where(mask[..., None], x, torch.nan), books, mask=mask, backend=backend)
    alone = rvq_encode(x[mask], books, backend=backend)
    assert (got.codes[~mask] == -1).all() and (got.quantized[~mask] == 0).all() and (got.residual[~mask] == 0).all()
    assert torch.equal(got.codes[mask], alone.codes) and torch.equal(got.quantized[mask], alone.quantized)
    torch.testing.assert_close(got.losses, alone.losses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_gets_code_zero_and_changes_no_other_row(backend: str, bad: float) -> None:
    x, books = torch.randn(50, 24), [torch.randn(30, 24), torch.randn(30, 24)]
    clean = rvq_encode(x, books, backend=backend)
    x[17, 3] = bad
    got = rvq_encode(x.requires_grad_(), books, backend=backend)
    others = torch.arange(50) != 17
    assert (
        got.codes[17].tolist() == [0, 0] and not got.residual[17].isfinite().all() and not got.losses.isfinite().any()
    )
    assert torch.equal(got.codes[others], clean.codes[others])
    assert torch.equal(got.quantized[others], clean.quantized[others]) and got.quantized.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_codeword_is_never_chosen(backend: str) -> None:
    x, book = torch.randn(40, 12), torch.randn(20, 12)
    book[3, 0], book[5, 1], book[7] = torch.nan, torch.inf, -torch.inf
    codes = rvq_encode(x, [book], backend=backend).codes
    good = torch.tensor([k for k in range(20) if k not in (3, 5, 7)])
    assert torch.equal(codes[:, 0], good[rvq_encode(x, [book[good]], backend=backend).codes[:, 0]])
    assert (rvq_encode(x, [torch.full((4, 12), torch.nan)], backend=backend).codes == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_scales_that_leave_the_range_of_float32_products_are_still_exact(scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    x, book = torch.randn(64, 33, generator=g) * scale, torch.randn(50, 33, generator=g) * scale
    want = torch.cdist(x.double() / scale, book.double() / scale).argmin(1)
    for isa in ISAS:
        assert torch.equal(encode_by(isa, x, [book])[3][:, 0], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_straight_through_gradient_is_one_whatever_the_number_of_levels(backend: str) -> None:
    x = torch.randn(10, 6, requires_grad=True)
    rvq_encode(x, [torch.randn(8, 6) for _ in range(4)], backend=backend).quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones(10, 6))


def test_losses_are_the_cumulative_commitment_losses() -> None:
    x, books = torch.randn(20, 6), [torch.randn(8, 6) for _ in range(3)]
    got = rvq_encode(x, books)
    for level in range(3):
        cumulative = sum(books[j][got.codes[:, j]] for j in range(level + 1))
        torch.testing.assert_close(got.losses[level], (x - cumulative).square().mean())


def test_no_gradient_reaches_residual_codes_or_codebooks() -> None:
    book = torch.randn(8, 6, requires_grad=True)
    x = torch.randn(10, 6, requires_grad=True)
    got = rvq_encode(x, [book])
    assert not got.residual.requires_grad and not got.codes.requires_grad
    (got.quantized.sum() + got.losses.sum()).backward()
    assert book.grad is None


def test_a_second_derivative_is_refused_and_not_lost() -> None:
    x = torch.randn(10, 6, requires_grad=True)
    losses = rvq_encode(x, [torch.randn(8, 6)]).losses
    (first,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rvq_encode: gradients must not be differentiated"):
        torch.autograd.grad(first.square().sum(), x)


def test_backward_keeps_no_residual_of_any_level() -> None:
    x, books = torch.randn(64, 32, requires_grad=True), [torch.randn(16, 32) for _ in range(6)]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rvq_encode(x, books)
    mine = {book.data_ptr() for book in books} | {x.data_ptr()}
    assert sum(t.numel() for t in saved if t.data_ptr() not in mine) == 64 * 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_a_padded_codebook_view_give_the_same_bits(backend: str) -> None:
    x, padded = torch.randn(6, 5, 7), torch.randn(10, 14)[:, :7]
    want = rvq_encode(x, [padded[:-1].contiguous()], backend=backend)
    got = rvq_encode(x.permute(2, 0, 1).contiguous().permute(1, 2, 0), [padded[:-1]], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_auto_takes_the_reference_for_codebooks_the_kernel_cannot_read() -> None:
    book = torch.randn(7, 9).T
    with pytest.raises(
        ValueError, match="rvq_encode: no backend takes these tensors:\n  cpu: needs codebooks whose rows"
    ):
        rvq_encode(torch.randn(3, 7), [book], backend="cpu")
    assert torch.equal(
        rvq_encode(book[:3], [book]).codes, rvq_encode(book[:3], [book.contiguous()], backend="cpu").codes
    )


def test_inference_is_an_op_of_its_own_with_the_same_bits() -> None:
    x, books = torch.randn(12, 6), [torch.randn(9, 6), torch.randn(5, 6)]
    got, want = rvq_encode(x, books), rvq_encode(x.clone().requires_grad_(), books)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert want.quantized.requires_grad and not got.quantized.requires_grad
    operands = (x, books, [], None, None, torch.float32, "auto")
    torch.library.opcheck(torch.ops.longcat.rvq_encode_inference.default, operands)


def test_residual_dtype_rounds_between_levels() -> None:
    x, books = torch.randn(30, 16).bfloat16(), [torch.randn(8, 16), torch.randn(8, 16) / 2]
    got = rvq_encode(x, books, residual_dtype=torch.bfloat16)
    residual = (x.float() - books[0][got.codes[:, 0]]).bfloat16().float()
    assert torch.equal(got.residual, (residual - books[1][got.codes[:, 1]]).bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flush", [False, True])
def test_sixteen_bit_conversions_are_those_of_torch_for_every_value(
    dtype: torch.dtype, flush: bool, request: pytest.FixtureRequest, threads: Any
) -> None:
    threads(1)  # flushing is a thread's own affair
    request.addfinalizer(lambda: torch.set_flush_denormal(False))
    torch.set_flush_denormal(flush)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()][:, None]
    zero = torch.zeros(1, 1)
    got = rvq_encode(every, [zero], backend="cpu")
    assert torch.equal(got.residual, every.float())
    halfway = torch.cat([every.float() * (1 + 2.0**-k) for k in (8, 9, 11, 12, 13)])
    got = rvq_encode(halfway, [zero], residual_dtype=dtype, backend="cpu")
    assert torch.equal(got.residual, halfway.to(dtype).float())


def test_the_environment_name_overrides_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"x": torch.randn(3, 4), "codebooks": [torch.randn(5, 4)]}
    monkeypatch.setenv("LONGCAT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="cuda: takes tensors on a CUDA device, got cpu"):
        rvq_encode(**arguments)
    others = {name: impl for name, impl in IMPLS.items() if name != "cuda"}
    monkeypatch.setattr("longcat_kernels.ops.rvq_encode.IMPLS", others)  # an op without one: its own order stands
    rvq_encode(**arguments)
    monkeypatch.setenv("LONGCAT_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match="LONGCAT_BACKEND must be one of auto, cuda, triton, cpu, reference, got 'gpu'"
    ):
        rvq_encode(**arguments)
    rvq_encode(**arguments, backend="reference")


def test_lengths_are_a_mask() -> None:
    x, book = torch.randn(3, 5, 4), torch.randn(6, 4)
    lengths = torch.tensor([5, 0, 2])
    got = rvq_encode(x, [book], lengths=lengths)
    want = rvq_encode(x, [book], mask=torch.arange(5) < lengths[:, None])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="rvq_encode: mask and lengths must not both be given"):
        rvq_encode(x, [book], lengths=lengths, mask=torch.ones(3, 5, dtype=torch.bool))
    for bad in (lengths[:2], lengths.float(), lengths.bool()):
        with pytest.raises(ValueError, match=r"rvq_encode: lengths must be integers \[B\] with x \[B, S, D\], got"):
            rvq_encode(x, [book], lengths=bad)


def packed_for(isa: str, words: Tensor) -> Tensor:
    packed = torch.empty(native.module().packed_bytes(*words.shape, isa=isa), dtype=torch.uint8)
    native.module().pack_codebook(words, packed, threads=1, isa=isa)
    return packed


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_levels_packed_for_different_instruction_sets_give_the_same_bits(threads: int) -> None:
    """Whose tiles differ, and with them the rows that a thread has."""
    g = torch.Generator().manual_seed(0)
    x, books = torch.randn(100, 20, generator=g), [torch.randn(40, 20, generator=g) / 2**level for level in range(6)]
    mask = torch.rand(100, generator=g) < 0.9
    packed = [packed_for(ISAS[level // 2 % len(ISAS)], book) for level, book in enumerate(books)]
    got = (torch.empty_like(x), torch.empty(100, 20), torch.empty(6), torch.empty(100, 6).long())
    native.module().rvq_encode(x, books, packed, None, mask, torch.float32, *got, threads=threads)
    want = rvq_encode(x, books, mask=mask)
    for actual, expected in zip(got, (want.quantized, want.residual, want.losses, want.codes), strict=True):
        assert torch.equal(actual, expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    width=st.integers(1, 70),
    entries=st.integers(1, 80),
    grid=st.sampled_from([1.0, 4.0, 256.0]),
    mean=st.sampled_from([0.0, 30.0]),
    levels=st.integers(1, 9),
    isa=st.sampled_from(ISAS or ["portable"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_gram_form_gives_the_same_bits(
    rows: int, width: int, entries: int, grid: float, mean: float, levels: int, isa: str, threads: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    isa = "avx512" if isa == "avx512_bf16" else isa  # products of all pairs need the float32 form
    words = torch.randn(entries, width, generator=g).mul(grid).round().div(grid) + mean
    x = torch.randn(rows, width, generator=g) * 3 + mean
    mask = torch.rand(rows, generator=g) < 0.9
    x[:1] = torch.nan if seed % 3 == 0 else 0
    packed = packed_for(isa, words)
    gram = torch.empty(entries, native.module().packed_entries(entries, isa=isa))
    native.module().rvq_gram(words, packed, gram, threads=threads)
    got = (torch.empty_like(x), torch.empty(rows, width), torch.empty(levels), torch.empty(rows, levels).long())
    arguments = ([words] * levels, [packed] * levels, gram, mask, torch.float32)
    native.module().rvq_encode(x, *arguments, *got, threads=threads)
    want = rvq_encode(x, words, levels=levels, mask=mask, backend="reference")
    assert torch.equal(got[3], want.codes) and torch.equal(got[0], want.quantized)
    assert torch.equal(got[1].nan_to_num(7), want.residual.nan_to_num(7))


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_a_shared_codebook_with_its_products_gives_the_same_bits(residual_dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    words = torch.randn(300, 24, generator=g)
    words[7] = torch.nan
    x = sum(words[torch.randint(8, 300, (500,), generator=g)] * 0.6**level for level in range(8))
    x[3], x[4] = torch.inf, 1e25
    options: dict[str, Any] = {"levels": 32, "residual_dtype": residual_dtype}
    got = rvq_encode(x, PreparedCodebook(words, gram=True), **options)
    for a, b in zip(got, rvq_encode(x, words, **options), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("copies", [33, 700])
def test_more_rivals_than_the_kernel_holds_are_all_scored(isa: str, copies: int) -> None:
    """Hundreds of codewords within a float32 rounding of each other, worse ones before better ones."""
    g = torch.Generator().manual_seed(copies)
    width = 40
    base = torch.randn(4, width, generator=g)
    gap = 2.0**-22 * torch.linspace(1, 0.1, copies)[:, None]
    book = torch.cat([word * (1 + gap * torch.randn(copies, width, generator=g)) for word in base])
    x = base[torch.arange(64) % 4]
    codes = encode_by(isa, x, [book])[3]
    assert torch.equal(codes, rvq_encode(x, [book], backend="reference").codes)


@pytest.mark.parametrize("isa", ISAS)
def test_a_codeword_too_long_for_float32_products_leaves_the_others_exact(isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, book = torch.randn(30, 20, generator=g), torch.randn(50, 20, generator=g)
    book[9], x[5] = 1e25, 1e30
    assert torch.equal(encode_by(isa, x, [book])[3], rvq_encode(x, [book], backend="reference").codes)


def test_a_codebook_that_is_packed_in_pieces_and_rows_that_come_in_batches() -> None:
    g = torch.Generator().manual_seed(0)
    x, book = torch.randn(30, 300, generator=g), torch.randn(16411, 300, generator=g)  # 10 MB packed
    want = rvq_encode(x, [book, book], backend="reference")
    for isa in ISAS:
        codes = encode_by(isa, x, [book, book], threads=2)[3]
        assert torch.equal(codes, want.codes)
    x, book = torch.randn(140_000, 3, generator=g), torch.randn(5, 3, generator=g)  # 9 MB of prepared rows
    got, want = rvq_encode(x, [book, book / 2]), rvq_encode(x, [book, book / 2], backend="reference")
    assert torch.equal(got.codes, want.codes) and torch.equal(got.quantized, want.quantized)
    torch.testing.assert_close(got.losses, want.losses)


PEAK = """
import torch
from longcat_kernels import PreparedCodebook, rvq_encode
x, books = torch.randn(4096, 64), [PreparedCodebook(torch.randn(16384, 64)).refresh() for _ in range(2)]
rvq_encode(x[:64], books)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
encoding = rvq_encode(x, books)
print(peak() - before, sum(t.nbytes for t in encoding) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_scores_of_all_pairs_are_never_held() -> None:
    """They would be 256 MB."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    grown_kb, results_kb = map(int, run.stdout.split())
    assert grown_kb - results_kb < 24 * 1024
