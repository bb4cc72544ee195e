"""ema_update: equation (4) by hand, restart, invariance, long sums, and parity with vector-quantize-pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import VectorQuantize

from longcat_kernels import PreparedCodebook, ema_update, native, rvq_encode
from longcat_kernels.ops.ema_update import IMPLS
from longcat_kernels.reference import ema_update as spec

ISAS = native.module().build_info()["isas_available"] if native.why_not() is None else []
BACKENDS = tuple(name for name in IMPLS if name != "cuda")  # which tests/cuda runs on the CPU


def updated(case: spec.Case, backend: str, **changes: Any) -> tuple[torch.Tensor, ...]:
    arguments = {**spec.inputs(case), **changes}
    restarted = ema_update(**arguments, backend=backend)
    return arguments["embed"], arguments["embed_ema"], arguments["cluster_size_ema"], restarted


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_equation_four(backend: str) -> None:
    embed, sums, sizes = torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [20.0]]), torch.tensor([2.0, 4.0])
    vectors, codes = torch.tensor([[3.0], [7.0], [9.0]]), torch.tensor([0, 1, 0])
    restarted = ema_update(embed, sums, sizes, vectors, codes, decay=0.5, eps=0.1, backend=backend)
    assert restarted.item() == 0
    torch.testing.assert_close(sizes, torch.tensor([2.0, 2.5]))
    torch.testing.assert_close(sums, torch.tensor([[7.0], [13.5]]))
    smoothed = 4.5 * (sizes + 0.1) / (4.5 + 2 * 0.1)
    torch.testing.assert_close(embed, sums / smoothed[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_restarted_entries_take_distinct_rows_and_reset_both_statistics(backend: str) -> None:
    vectors = torch.arange(40.0)[:, None] + 100
    sizes, codes = torch.zeros(10), torch.zeros(40, dtype=torch.int64)
    embed, sums = torch.zeros(10, 1), torch.zeros(10, 1)
    restarted = ema_update(embed, sums, sizes, vectors, codes, seed=5, backend=backend)
    assert restarted.item() == 10 - 0 - (sizes[0] != 1).item()  # entry 0 has 0.01 * 40 rows: below 1 as well
    assert len(set(embed[:, 0].tolist())) == 10 and set(embed[:, 0].tolist()) <= set(vectors[:, 0].tolist())
    assert torch.equal(sums, embed) and torch.equal(sizes, torch.ones(10))


def test_all_implementations_restart_from_the_same_rows() -> None:
    for seed in (0, 1, -7, 2**40, 2**62 + 3):
        case = spec.Case(97, 5, 60, used=0.3, ignored=0.4, seed=seed)
        want, got = updated(case, "reference"), updated(case, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(
        updated(spec.Case(97, 5, 60, seed=1), "cpu")[0], updated(spec.Case(97, 5, 60, seed=2), "cpu")[0]
    )


def test_the_restart_rule_is_fixed() -> None:
    """A change of the rule would silently change every training run."""
    assert spec.restart_rows(torch.arange(12), 0).tolist() == [5, 6, 2, 9, 4, 11, 7, 8, 10, 0, 3, 1]
    assert spec.restart_rows(torch.arange(12), 2**40 + 5).tolist() == [11, 7, 1, 9, 4, 3, 10, 8, 2, 5, 6, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_restarts_than_rows_go_round_again(backend: str) -> None:
    vectors = torch.tensor([[1.0], [2.0]])
    embed, sums, sizes = torch.zeros(5, 1), torch.zeros(5, 1), torch.zeros(5)
    ema_update(embed, sums, sizes, vectors, torch.tensor([0, 1]), backend=backend)
    assert sorted(embed[:, 0].tolist()) in ([1.0, 1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 6])
def test_without_a_usable_row_statistics_only_decay(backend: str, rows: int) -> None:
    case = spec.Case(rows, 4, 8, ignored=1.0)
    before = spec.inputs(case)
    embed, sums, sizes, restarted = updated(case, backend)
    assert restarted.item() == 0
    torch.testing.assert_close(sums, 0.99 * before["embed_ema"])
    torch.testing.assert_close(sizes, 0.99 * before["cluster_size_ema"])
    torch.testing.assert_close(embed, before["embed"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entry_with_nothing_to_divide_by_keeps_its_codeword(backend: str) -> None:
    embed, sums, sizes = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)
    rule = {"decay": 0.0, "eps": 0.0, "restart_threshold": 0.0}
    ema_update(embed, sums, sizes, torch.full((4, 3), 7.0), torch.zeros(4, dtype=torch.int64), **rule, backend=backend)
    assert embed[0].tolist() == [7.0] * 3 and embed[1].tolist() == [1.0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_that_saved_the_codebook_refuses_it_changed(backend: str) -> None:
    case = spec.Case(20, 4, 8)
    good = spec.inputs(case)
    x = torch.randn(20, 4, requires_grad=True)
    losses = rvq_encode(x, [good["embed"]]).losses
    ema_update(**good, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("rows", [0, 50])
def test_the_kernel_takes_the_codes_of_one_level_as_they_lie(rows: int) -> None:
    case = spec.Case(rows, 4, 8)
    codes_NL = torch.stack([spec.inputs(case)["codes"]] * 3, 1)
    for got, want in zip(updated(case, "cpu", codes=codes_NL[:, 1]), updated(case, "cpu"), strict=True):
        assert torch.equal(got, want)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 90),
    width=st.integers(1, 20),
    entries=st.integers(1, 50),
    used=st.floats(0.05, 1),
    seed=st.integers(0, 9),
)
def test_implementations_agree_on_any_size(rows: int, width: int, entries: int, used: float, seed: int) -> None:
    case = spec.Case(rows, width, entries, used=used, ignored=0.1, seed=seed)
    (embed, *got), (wanted_embed, *want) = updated(case, "cpu"), updated(case, "reference")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # sums and counts, to the bit
    torch.testing.assert_close(embed, wanted_embed, rtol=2.0**-23, atol=0)


def test_bits_do_not_depend_on_threads_or_on_the_order_between_codes(threads: Any) -> None:
    case = spec.Case(2000, 17, 30)
    threads(1)
    want = updated(case, "cpu", restart_threshold=0.0)
    good = spec.inputs(case)
    order = good["codes"].argsort(stable=True)
    for count in (2, 3):
        threads(count)
        got = updated(case, "cpu", restart_threshold=0.0, vectors=good["vectors"][order], codes=good["codes"][order])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_bits_of_the_definition(isa: str, dtype: torch.dtype) -> None:
    """Entries of no row to many, widths of whole vectors and not, entries that restart and that keep their codeword."""
    for width, rule in ((32, {}), (75, {}), (96, {"decay": 0.0, "eps": 0.0, "restart_threshold": 0.0})):
        good = spec.inputs(spec.Case(200, width, 80, dtype, used=0.9, ignored=0.1))
        good["codes"] = torch.where(torch.arange(200) % 3 == 0, 5, good["codes"])  # one entry of many rows
        arguments = {"eps": 1e-5, **good, **rule}
        want = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        restarted = ema_update(**want, backend="reference")
        found = torch.empty((), dtype=torch.int64)
        native.module().ema_update(**arguments, packed=None, restarted=found, threads=1, isa=isa)
        assert torch.equal(found, restarted)
        for name in ("embed_ema", "cluster_size_ema"):
            assert torch.equal(arguments[name], want[name]), (width, name)
        torch.testing.assert_close(arguments["embed"], want["embed"], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_sum_is_rounded_once(backend: str) -> None:
    rows = 3_000 if backend == "triton" else 200_000  # the interpreter is slow; float32 sums fail both
    vectors, codes = torch.full((rows, 1), 0.1), torch.zeros(rows, dtype=torch.int64)
    embed, sums, sizes = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1)
    ema_update(embed, sums, sizes, vectors, codes, decay=0.0, eps=0.0, backend=backend)
    assert embed.item() == torch.tensor(0.1).item()


def test_equals_vector_quantize_pytorch_where_their_meaning_agrees() -> None:
    torch.manual_seed(0)
    theirs = VectorQuantize(dim=6, codebook_size=12, decay=0.9, eps=1e-5, threshold_ema_dead_code=0)
    embed, sizes = torch.randn(12, 6), torch.rand(12) * 4 + 1
    sums = embed * sizes[:, None]
    book = theirs._codebook
    for buffer, value in ((book.embed, embed), (book.embed_avg, sums), (book.cluster_size, sizes)):
        buffer.copy_(value[None])
    theirs.train()
    x = torch.randn(200, 6)
    _, codes, _ = theirs(x[None])
    ema_update(embed, sums, sizes, x, codes[0], decay=0.9, eps=1e-5, restart_threshold=0.0)
    torch.testing.assert_close(embed, book.embed[0])
    torch.testing.assert_close(sums, book.embed_avg[0])
    torch.testing.assert_close(sizes, book.cluster_size[0])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 90),
    width=st.integers(1, 40),
    entries=st.integers(1, 70),
    backend=st.sampled_from(("cpu", "reference")),
    shift=st.sampled_from([0.0, 50.0]),
    seed=st.integers(0, 9),
)
def test_the_prepared_codebook_follows_in_the_same_pass(
    rows: int, width: int, entries: int, backend: str, shift: float, seed: int
) -> None:
    arguments = spec.inputs(spec.Case(rows, width, entries, used=0.5, seed=seed), seed=seed)
    arguments["vectors"] += shift
    plain = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    prepared = PreparedCodebook(arguments["embed"]).refresh()
    ema_update(**arguments, prepared=prepared, backend=backend)
    ema_update(**plain, backend=backend)
    assert prepared.is_current and torch.equal(arguments["embed"], plain["embed"])
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(seed)) + shift
    assert torch.equal(rvq_encode(x, [prepared]).codes, rvq_encode(x, [plain["embed"]], backend="reference").codes)


def test_a_prepared_codebook_with_products_is_made_anew_at_the_next_use() -> None:
    arguments = spec.inputs(spec.EDGE[-1])
    prepared = PreparedCodebook(arguments["embed"], gram=True).refresh()
    ema_update(**arguments, prepared=prepared)
    assert not prepared.is_current
    x = torch.randn(40, arguments["embed"].shape[1])
    assert torch.equal(rvq_encode(x, prepared, levels=3).codes, rvq_encode(x, arguments["embed"], levels=3).codes)


def test_refuses_the_prepared_form_of_another_codebook() -> None:
    arguments = spec.inputs(spec.EDGE[-1])
    for other in (arguments["embed"].clone(), arguments["embed"][:-1]):
        with pytest.raises(ValueError, match="ema_update: prepared must be the prepared form of embed"):
            ema_update(**arguments, prepared=PreparedCodebook(other))
