"""The compiled kernels of depth_decode: every instruction set, bits that depend on nothing else, the sampler alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_kernels import DepthSampling, PreparedDepth, depth_decode, native
from longcat_kernels.ops import _depth_cpu
from longcat_kernels.ops.depth_decode import OP
from longcat_kernels.prepared import packed_depth
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference.depth_weights import DepthConfig
from longcat_kernels.reference.sampling import draw, gumbel
from longcat_kernels.testing import assert_close, record

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
ISAS = native.module().build_info()["isas_available"] if native.why_not() is None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Depths that are odd, or longer than a chunk of a panel; columns that fill no panel; more rows than a tile has.
WIDE = spec.Case(
    37,
    DepthConfig((70, 33), 301, 299, 1, 3, 1, 27, 331, ends=True, ffn_sets=(0, 1)),
    sampling=DepthSampling(0.8, 9),
)


def by_kernel(case: spec.Case, isa: str, *, packed: bool, threads: int = 1, **changes: Any) -> list[torch.Tensor]:
    """Outputs of the kernel in the order of the schema."""
    call = record(OP, {**spec.inputs(case), **changes})
    arguments = [*call.arguments[:-1]]
    config = arguments[12]
    if packed:
        arguments[2] = [packed_depth(arguments[1], config, isa=isa)]
    rows, levels, sizes = len(arguments[0]), config[0], DepthConfig.of(config, arguments[13])
    classes = sum(sizes.classes[sizes.given :]) if arguments[14] else 0
    outputs = [
        torch.full((rows, levels), 7.0),
        torch.full((rows, levels), 7.0),
        torch.full((rows, sizes.width), 7.0, dtype=case.dtype),
        torch.full((rows, classes), 7.0),
        torch.full((rows, levels), 7),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _depth_cpu.decode(*arguments, *outputs, isa=isa)
    finally:
        torch.set_num_threads(before)
    return outputs


def assert_same(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(nan=9e9), b.nan_to_num(nan=9e9))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", [*spec.EDGE, WIDE])
def test_every_instruction_set_is_right(case: spec.Case, packed: bool, isa: str) -> None:
    truth = record(OP, spec.inputs(case)).truth(OP)
    for got, want in zip(by_kernel(case, isa, packed=packed), truth, strict=True):
        assert_close(got, want, case.tolerance, case.inner)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_packing_nor_threads_nor_batch(dtype: torch.dtype, isa: str) -> None:
    case = replace(WIDE, dtype=dtype)
    whole = by_kernel(case, isa, packed=True)
    assert_same(by_kernel(case, isa, packed=False), whole)
    assert_same(by_kernel(case, isa, packed=True, threads=3), whole)
    assert_same(by_kernel(case, isa, packed=False, threads=2), whole)
    hidden, seeds = spec.inputs(case)["hidden"], torch.arange(case.tokens)
    for rows in ([0], [36], [5, 30], [1, 2, 3, 4, 5], list(range(7, 20))):
        some = by_kernel(case, isa, packed=True, hidden=hidden[rows], seed=seeds[rows])
        assert_same(some, [output[rows] for output in by_kernel(case, isa, packed=True, seed=seeds)])


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_row(isa: str) -> None:
    hidden = spec.inputs(WIDE)["hidden"]
    clean = by_kernel(WIDE, isa, packed=True)
    hidden[3], hidden[20, 7] = torch.nan, torch.inf
    dirty = by_kernel(WIDE, isa, packed=True, hidden=hidden)
    others = [row for row in range(WIDE.tokens) if row not in (3, 20)]
    assert_same([output[others] for output in dirty], [output[others] for output in clean])
    assert dirty[0][[3, 20], 0].isnan().all() and (dirty[4][[3, 20], 0] == 0).all()


def test_int8_weights_compute_what_their_rounded_weights_do() -> None:
    arguments = spec.inputs(WIDE)
    prepared = PreparedDepth(arguments["weights"], "int8")
    got = depth_decode(**{**arguments, "weights": prepared}, backend="cpu")
    want = depth_decode(**{**arguments, "weights": prepared.weights}, backend="reference")
    assert torch.equal(got.codes, want.codes)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    assert prepared.packed[0].numel() < 0.4 * packed_depth(*_flat(arguments["weights"])).numel()


def _flat(weights: Any) -> tuple[list[torch.Tensor], list[int]]:
    return weights.tensors(), weights.config.numbers()


def test_packed_weights_of_another_config_are_refused() -> None:
    arguments = spec.inputs(WIDE)
    prepared = PreparedDepth(arguments["weights"])
    other = arguments["weights"]._replace(config=replace(WIDE.config, ffn=330))
    prepared.refresh().weights = other
    with pytest.raises(ValueError, match="depth_decode: packed must be what pack_depth made of weights of this config"):
        depth_decode(**{**arguments, "weights": prepared}, backend="cpu")


def drawn(logits: torch.Tensor, params: torch.Tensor, seed: int, isa: str) -> tuple[torch.Tensor, ...]:
    """Ids and both logprobs, by the compiled sampler."""
    rows = len(logits)
    outputs = (torch.empty(rows), torch.empty(rows), torch.empty(rows, dtype=torch.int64))
    numbers = params.expand(rows, 8).contiguous()
    seeds, steps = torch.arange(rows) + seed, torch.full((rows,), 2**40 + 3)
    native.module().draw_codes(logits, numbers, seeds, steps, 5, *outputs, isa=isa)
    return outputs[2], *outputs[:2]


def assert_draws_agree(logits: torch.Tensor, params: torch.Tensor, seed: int, isa: str) -> None:
    rows, classes = logits.shape
    noise = gumbel(torch.arange(rows) + seed, torch.full((rows,), 2**40 + 3), [(5, classes)])[0]
    want = draw(logits, params.expand(rows, 8), noise, None, None)
    ids, logprobs, drawn_logprobs = drawn(logits, params, seed, isa)
    assert torch.equal(ids, want.ids)
    torch.testing.assert_close(logprobs, want.logprobs, rtol=3e-6, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(drawn_logprobs, want.drawn_logprobs, rtol=3e-6, atol=3e-5, equal_nan=True)


NUMBERS = st.tuples(
    st.sampled_from([0.0, 1e-3, 0.3, 1.0, 4.0]),
    st.sampled_from([0, 1, 2, 7, 40, 1000]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01, 0.999]),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.just(1.0),
    st.sampled_from([0, 1]),
    st.just(1.0),
    st.sampled_from([0, 1]),
)


@settings(max_examples=150, deadline=None)
@given(
    numbers=NUMBERS,
    classes=st.integers(2, 90),
    kind=st.sampled_from(["normal", "ties", "wide", "holes", "lost"]),
    seed=st.integers(0, 99),
    isa=st.sampled_from(ISAS),
)
def test_the_sampler_draws_what_its_definition_draws(
    numbers: tuple[float, ...], classes: int, kind: str, seed: int, isa: str
) -> None:
    logits = torch.randn(5, classes, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "wide":
        logits = logits.sign() * logits.exp() ** 4
    elif kind == "holes":
        logits[:, 1::3] = -torch.inf
    elif kind == "lost":
        logits[1, 0], logits[2, classes // 2], logits[3] = torch.nan, torch.inf, -torch.inf
    assert_draws_agree(logits, torch.tensor(numbers), seed, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("top_k", [0, 1, 5, 1024, 16_000])
def test_the_sampler_at_the_size_of_the_model(top_k: int, isa: str) -> None:
    logits = torch.randn(8, 16_385, generator=torch.Generator().manual_seed(top_k)) * 2
    for temperature, top_p in ((1.0, 1.0), (0.5, 0.75)):
        assert_draws_agree(logits, torch.tensor([temperature, top_k, top_p, 0, 1, 1, 1, 0]), 3, isa)
