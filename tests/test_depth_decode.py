"""Depth decoding of any configuration, by every implementation: teacher forcing, the sampler, pairs, histories, NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from depths import hidden, longcat, runnable, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch._dynamo.testing import CompileCounter

from longcat_kernels import DepthConfig, DepthDecoding, DepthSampling, DepthWeights, depth_decode
from longcat_kernels.modules import depth_logits
from longcat_kernels.ops.depth_decode import OP
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference._depth_cases import CLOSE_DRAWS, random_weights
from longcat_kernels.reference.sampling import draw, gumbel, seen

GREEDY = DepthSampling(temperature=0.0)
WARM = DepthSampling(0.8, top_k=4, top_p=0.9)


@pytest.fixture(scope="module", params=list(OP.impls))
def backend(request: pytest.FixtureRequest) -> str:
    return runnable(request.param)


def assert_rows_equal(a: DepthDecoding, b: DepthDecoding, rows_a: Any, rows_b: Any) -> None:
    for name in DepthDecoding._fields:
        assert torch.equal(getattr(a, name)[rows_a], getattr(b, name)[rows_b]), name


@st.composite
def configurations(draw: Any) -> tuple[DepthConfig, str]:
    """Any transformer that the op can be: sets shared, own and mixed, every conditioning, with and without options."""
    levels = draw(st.integers(1, 5))
    sets = st.sampled_from([(), tuple(range(levels)), (0,) * (levels - 1) + (min(1, levels - 1),)])
    conditioning = draw(st.sampled_from(["sum", "last", "last+hidden"]))
    kv_heads, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    like = draw(st.sampled_from(["longcat", "moshi", "csm", "qwen"]))
    ends = draw(st.booleans())
    config = DepthConfig(
        classes=tuple(draw(st.lists(st.integers(2, 9), min_size=levels, max_size=levels))),
        hidden=6 if like == "qwen" else draw(st.integers(4, 7)),
        dim=6,
        layers=draw(st.integers(0, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=5,
        conditioning=conditioning,
        given=draw(st.integers(0, levels - 1)) if conditioning == "last" else 0,
        ends=ends and conditioning == "sum",
        gated=draw(st.booleans()),
        attention_sets=draw(sets),
        ffn_sets=draw(sets),
        projection_sets=draw(sets),
        norm_sets=draw(sets),
    )
    return config, like


@settings(max_examples=60, deadline=None)
@given(described=configurations(), rows=st.integers(0, 4), temperature=st.sampled_from([0.0, 1.0]))
def test_step_by_step_equals_teacher_forcing(
    backend: str, described: tuple[DepthConfig, str], rows: int, temperature: float
) -> None:
    """The logits of the drawn codes, those of the same codes forced, and the ones of a single pass."""
    config, like = described
    weights, h = weights_of(config, like), hidden(rows, width=config.hidden)
    start = hidden(rows, 2, config.dim) if config.conditioning == "last+hidden" else None
    given_codes = torch.full((rows, config.given), 1)
    options = {"start": start, "logits": True, "seed": 5}
    decoded = depth_decode(
        h, weights, DepthSampling(temperature, end="allow"), prefix=given_codes, **options, backend=backend
    )
    forced = depth_decode(h, weights, prefix=decoded.codes, **options, backend=backend)
    assert torch.equal(decoded.logits, forced.logits) and torch.equal(decoded.codes, forced.codes)
    assert torch.equal(decoded.logprobs, forced.logprobs) and torch.equal(decoded.embedding, forced.embedding)
    at_once = torch.cat(depth_logits(weights, h, decoded.codes, start), 1)
    torch.testing.assert_close(decoded.logits, at_once, rtol=5e-5, atol=5e-5)
    heads = decoded.logits.split(config.classes[config.given :], 1)
    for level, logits in enumerate(heads, config.given):
        codes = decoded.codes[:, level, None]
        torch.testing.assert_close(decoded.logprobs[:, level], logits.log_softmax(1).gather(1, codes)[:, 0])
        assert temperature or torch.equal(logits.argmax(1), codes[:, 0])


NUMBERS = {
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    "top_k": st.integers(0, 9),
    "top_p": st.floats(0.05, 1.0),
    "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
    "order": st.sampled_from(["sequential", "joint"]),
    "end": st.sampled_from(["mask", "level0", "allow"]),
}


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.fixed_dictionaries(NUMBERS), min_size=5, max_size=5), seed=st.integers(-(2**62), 2**62))
def test_codes_are_what_the_sampler_draws_from_the_logits(
    backend: str, numbers: list[dict[str, Any]], seed: int
) -> None:
    """Row by row with numbers of its own: the same ids and logprobs from the same logits, whoever computed these."""
    weights, rows, classes = longcat((8, 37)), 5, (8, 37)
    tables = [DepthSampling(**own).table(1, weights.config) for own in numbers]
    codes = torch.randint(0, 37, (10, 2), generator=torch.Generator().manual_seed(1))
    history, steps = (codes, torch.arange(6) * 2), torch.arange(5) * 2**31
    params = torch.cat(tables)
    decoded = depth_decode(
        hidden(rows), weights, params, seed=seed, step=steps, history=history, logits=True, backend=backend
    )
    noise = gumbel(torch.arange(rows) + seed, steps, list(enumerate(classes)))
    for level, logits in enumerate(decoded.logits.split(classes, 1)):
        past = seen(codes[:, level], history[1], classes[level])
        ids, logprobs, drawn_logprobs = draw(logits, params[:, level], noise[level], past, None)
        assert torch.equal(decoded.codes[:, level], ids)
        torch.testing.assert_close(decoded.logprobs[:, level], logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoded.drawn_logprobs[:, level], drawn_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, None), (torch.bfloat16, 1.5), (torch.float16, 1.5)])
@pytest.mark.parametrize("like", ["longcat", "qwen"])
def test_logits_are_near_the_truth_at_every_level(
    backend: str, dtype: torch.dtype, factor: float | None, like: str
) -> None:
    """float32: within 5e-5 of their rms, and greedy codes are the truth's wherever its best logit leads by 5e-3; else
    at most 1.5 times as far off as a plain program in that dtype is."""
    config = replace(longcat((257,) * 6).config, hidden=64, dim=64, layers=4, heads=4, kv_heads=4, head_dim=16, ffn=96)
    config = config if like == "longcat" else replace(config, kv_heads=2, gated=True, conditioning="last", ends=False)
    weights = random_weights(spec.Case(1, config, like, dtype=dtype), "cpu", torch.Generator().manual_seed(2))
    wide = DepthWeights.of([t.double() for t in weights.tensors()], config)
    h = hidden(24, width=64).to(dtype)
    decoded = depth_decode(h, weights, GREEDY, logits=True, backend=backend)
    truth = depth_logits(wide, h.double(), decoded.codes)
    plain = depth_decode(h, weights, GREEDY, prefix=decoded.codes, logits=True, backend="reference").logits
    for level, (got, other, want) in enumerate(
        zip(decoded.logits.split(257, 1), plain.split(257, 1), truth, strict=True)
    ):
        error, rms = (got - want).square().mean().sqrt(), want.square().mean().sqrt()
        allowed = 5e-5 * rms if factor is None else factor * (other - want).square().mean().sqrt()
        assert error <= allowed
        if factor is None:
            top = want[:, : 257 - config.ends].topk(2, dim=1)
            is_clear = top.values[:, 0] - top.values[:, 1] > 5e-3
            assert is_clear.any() and torch.equal(decoded.codes[is_clear, level], top.indices[is_clear, 0])


@given(end=st.sampled_from(["mask", "level0", "allow"]), seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_the_end_is_drawn_where_it_may_be_and_sums_to_nothing(backend: str, end: str, seed: int) -> None:
    weights = longcat((2, 2, 2))
    decoded = depth_decode(hidden(32), weights, DepthSampling(end=end), seed=seed, backend=backend)
    is_end = decoded.codes == 1
    first_barred = {"mask": 0, "level0": 1, "allow": 3}[end]
    assert not is_end[:, first_barred:].any() and is_end[:, :first_barred].any(0).all()
    summed = sum(table[codes] for table, codes in zip(weights.tables, decoded.codes.T, strict=True))
    torch.testing.assert_close(decoded.embedding, summed.masked_fill(is_end.all(1, keepdim=True), 0))


def test_a_last_level_without_a_table_changes_nothing_about_the_end(backend: str) -> None:
    weights = longcat((2, 2))
    first = weights.tables[0]
    assert first is not None
    decoded = depth_decode(
        hidden(32), weights._replace(tables=[first, None]), DepthSampling(end="allow"), backend=backend
    )
    is_end = decoded.codes == 1
    assert (is_end[:, 0] & ~is_end[:, 1]).any()
    assert torch.equal(decoded.embedding, first[decoded.codes[:, 0]].masked_fill(is_end[:, :1], 0))


def test_ends_may_be_had_by_row_and_level(backend: str) -> None:
    may_end = torch.tensor([[True, False, True], [False, False, False]]).repeat(32, 1)
    is_end = depth_decode(hidden(64), longcat((2, 2, 2)), DepthSampling(end=may_end), backend=backend).codes == 1
    assert not is_end[~may_end].any() and is_end[::2, 0].any() and is_end[::2, 2].any()


def test_draws_are_decided_in_float64(backend: str) -> None:
    config = DepthConfig((4,), hidden=8, dim=8, layers=0, heads=1, kv_heads=1, head_dim=8, ffn=8)
    weights = weights_of(config, "csm")._replace(head_weights=[torch.zeros(4, 8)])
    seeds = torch.tensor(CLOSE_DRAWS)
    noise = gumbel(seeds, torch.zeros_like(seeds), [(0, 4)])[0]
    decoded = depth_decode(hidden(len(seeds), width=8), weights, seed=seeds, backend=backend)
    assert torch.equal(decoded.codes[:, 0], noise.argmax(1))


# The distribution


def test_draws_follow_the_joint_distribution_of_the_levels(backend: str) -> None:
    weights, rows = longcat((3, 2)), 20_000
    decoded = depth_decode(hidden(1).expand(rows, -1), weights, DepthSampling(end="allow"), seed=3, backend=backend)
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    p = depth_decode(hidden(1).expand(6, -1), weights, prefix=grid, backend=backend).logprobs.double().sum(1).exp()
    counts = torch.bincount(decoded.codes[:, 0] * 2 + decoded.codes[:, 1], minlength=6)
    assert chisquare(counts, p / p.sum() * rows).pvalue > 1e-4


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_draws_of_a_level_follow_its_conditional_distribution(backend: str, order: str) -> None:
    """With all limits at once, different ones at the levels, given the code of the level before, and guided."""
    weights, pairs, draws = longcat((8, 9)), 8_000, 16_000
    h = hidden(2).repeat(pairs, 1)
    sampling = DepthSampling(
        torch.tensor([0.0, 1.6]), torch.tensor([1, 6]), torch.tensor([1.0, 0.85]), 0.02, guidance=1.3, order=order
    )
    first = torch.full((draws, 1), 4)
    drawn = depth_decode(h, weights, sampling, pairs="interleaved", prefix=first, seed=9, backend=backend)
    every = torch.stack([torch.full((18,), 4), torch.arange(9).repeat_interleave(2)], 1)
    forced = depth_decode(h[:18], weights, sampling, pairs="interleaved", prefix=every, backend=backend)
    p = forced.drawn_logprobs[::2, 1].double().exp()
    assert 2 <= (p > 0).sum() < 8 and p.sum() == pytest.approx(1, abs=1e-5)
    counts = torch.bincount(drawn.codes[::2, 1], minlength=9)
    assert (counts[p == 0] == 0).all()
    assert chisquare(counts[p > 0], p[p > 0] / p.sum() * pairs).pvalue > 1e-4


# Classifier-free guidance


@pytest.mark.parametrize("layout", ["interleaved", "split", "mixed"])
def test_pairs_draw_from_the_mixed_logits(backend: str, layout: str) -> None:
    weights, scale = longcat(), 2.5
    conditional, unconditional = hidden(4, 1), hidden(4, 2)
    rows, pairs = torch.cat([conditional, unconditional]), torch.arange(8) % 4
    if layout == "interleaved":
        rows, first, second = torch.stack([conditional, unconditional], 1).flatten(0, 1), slice(0, 8, 2), slice(1, 8, 2)
    else:
        first, second = slice(0, 4), slice(4, 8)
    if layout == "mixed":  # the last row goes unguided, and its partner is a row of its own
        pairs[7] = 7
    decoded = depth_decode(
        rows,
        weights,
        DepthSampling(temperature=0.0, guidance=scale),
        pairs=pairs if layout == "mixed" else layout,
        logits=True,
        backend=backend,
    )
    codes, logits = decoded.codes[first], decoded.logits
    guided = 3 if layout == "mixed" else 4
    assert torch.equal(codes[:guided], decoded.codes[second][:guided])
    for of_c, of_u, level in zip(*(logits[x].split((8, 6, 5), 1) for x in (first, second)), range(3), strict=True):
        mixed = scale * (of_c - of_u) + of_u
        mixed[guided:] = of_c[guided:]
        assert torch.equal(mixed[:, :-1].argmax(1), codes[:, level])
        want = mixed.log_softmax(1).gather(1, codes[:, level, None])[:, 0]
        torch.testing.assert_close(decoded.logprobs[first][:, level], want)
        assert torch.equal(decoded.logprobs[second][:guided], decoded.logprobs[first][:guided])


def test_guidance_of_one_is_the_conditional_draw_and_a_pair_uses_the_numbers_of_its_conditional_row(
    backend: str,
) -> None:
    weights, seeds = longcat(), torch.arange(12)
    rows = torch.stack([hidden(6, 1), hidden(6, 2)], 1).flatten(0, 1)
    temperature = torch.tensor([0.9, 0.0]).repeat(6)[:, None]
    prefix = torch.tensor([[2], [1]]).repeat(6, 1)
    history = (torch.zeros(6, 3).long(), torch.tensor([0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]))
    options = {"seed": seeds, "step": seeds * 3, "prefix": prefix, "history": history}
    numbers = DepthSampling(temperature, repetition_penalty=3.0)
    guided = depth_decode(
        rows, weights, numbers, pairs="interleaved", active=seeds % 12 < 11, **options, backend=backend
    )
    options = {"seed": seeds[::2], "step": seeds[::2] * 3, "prefix": prefix[::2]}
    alone = depth_decode(
        hidden(6, 1),
        weights,
        DepthSampling(0.9, repetition_penalty=3.0),
        history=(history[0], torch.arange(7)),
        **options,
        backend=backend,
    )
    assert torch.equal(guided.codes[::2], alone.codes) and torch.equal(guided.codes[1::2], alone.codes)
    torch.testing.assert_close(guided.drawn_logprobs[::2], alone.drawn_logprobs)


# Forced levels, rows that are not active, company


def test_forced_levels_are_kept_and_leave_the_other_draws_alone(backend: str) -> None:
    weights, h = longcat(), hidden(8)
    free = depth_decode(h, weights, seed=2, backend=backend)
    again = depth_decode(h, weights, seed=2, prefix=free.codes[:, :2], backend=backend)
    for a, b in zip(free, again, strict=True):
        assert torch.equal(a, b)
    middle = torch.full((8, 2), -1)
    middle[::2, 1] = free.codes[::2, 1]
    assert torch.equal(depth_decode(h, weights, seed=2, prefix=middle, backend=backend).codes, free.codes)
    assert (depth_decode(h, weights, seed=2, prefix=torch.full((8, 3), 2), backend=backend).codes == 2).all()


@pytest.mark.parametrize(
    "numbers", [DepthSampling(0.7), DepthSampling(0.7, 2, 0.9, 0.1), DepthSampling(1.0, order="joint")]
)
def test_where_only_the_end_is_possible_and_barred_nothing_is_drawn(backend: str, numbers: DepthSampling) -> None:
    weights, h = longcat((4, 3)), hidden(3)
    for bias in weights.head_biases:
        assert bias is not None
        bias[:-1] = -torch.inf
    drawn = depth_decode(h, weights, numbers, backend=backend)
    forced = depth_decode(h, weights, numbers, prefix=torch.ones(3, 2).long(), backend=backend)
    assert not drawn.codes.any() and (forced.codes == 1).all()
    for decoded in (drawn, forced):
        assert (decoded.logprobs == -torch.inf).all() and (decoded.drawn_logprobs == -torch.inf).all()


def test_logprobs_of_forced_codes_say_what_the_draw_would_have(backend: str) -> None:
    weights, h = longcat(), hidden(1).expand(5, -1)
    prefix = torch.arange(5)[:, None]
    forced = depth_decode(h, weights, DepthSampling(0.7, top_k=2), prefix=prefix, logits=True, backend=backend)
    logits = forced.logits[0, :8]
    torch.testing.assert_close(forced.logprobs[:, 0], logits.log_softmax(0)[:5])
    best, second = logits[:7].topk(2)
    kept = (best.double() / 0.7).float().double().log_softmax(0)
    want = torch.full((8,), -torch.inf, dtype=torch.float64).scatter(0, second, kept)[:5]
    torch.testing.assert_close(forced.drawn_logprobs[:, 0].double(), want, rtol=0, atol=1e-5)
    greedy = depth_decode(h, weights, GREEDY, prefix=prefix, backend=backend)
    point = torch.where(torch.arange(5) == logits[:7].argmax(), 0.0, -torch.inf)
    assert torch.equal(greedy.drawn_logprobs[:, 0], point)
    assert (greedy.drawn_logprobs[:, 1:] == 0).all()


@settings(max_examples=15, deadline=None)
@given(active=st.lists(st.booleans(), min_size=6, max_size=6), seed=st.integers(0, 2**40))
def test_rows_that_are_not_active_are_not_read_and_leave_the_others_alone(
    backend: str, active: list[bool], seed: int
) -> None:
    weights, h, mask = longcat(), hidden(6), torch.tensor(active)
    everyone = depth_decode(h, weights, WARM, seed=seed, logits=True, backend=backend)
    some = depth_decode(
        h.masked_fill(~mask[:, None], torch.nan), weights, WARM, seed=seed, active=mask, logits=True, backend=backend
    )
    assert_rows_equal(everyone, some, mask, mask)
    assert (some.codes[~mask] == -1).all()
    for name in ("logprobs", "drawn_logprobs", "embedding", "logits"):
        assert (getattr(some, name)[~mask] == 0).all()


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=8),
    seed=st.integers(-(2**62), 2**62),
    step=st.integers(0, 2**62),
    order=st.sampled_from(["sequential", "joint"]),
)
def test_a_row_draws_the_same_whatever_its_batch_and_place(
    backend: str, rows: list[int], seed: int, step: int, order: str
) -> None:
    """To the last bit."""
    weights, everyone = longcat(), torch.arange(8)
    lengths = torch.tensor([0, 0, 1, 4, 2, 0, 3, 1, 2])
    past, offsets = torch.randint(0, 5, (13, 3), generator=torch.Generator().manual_seed(3)), lengths.cumsum(0)

    def draw(chosen: torch.Tensor) -> DepthDecoding:
        temperature = torch.tensor([0.5, 0.0, 1.0, 2.0, 0.7, 1.1, 0.9, 3.0])[chosen, None]
        parts = [past[offsets[i] : offsets[i + 1]] for i in chosen.tolist()]
        history = (torch.cat(parts), torch.tensor([0, *(len(part) for part in parts)]).cumsum(0))
        sampling = DepthSampling(temperature, 4, 0.9, 0.01, 1.5, order=order)
        return depth_decode(
            hidden(8)[chosen],
            weights,
            sampling,
            seed=seed ^ chosen * 7,
            step=step + chosen,
            history=history,
            backend=backend,
        )

    together, chosen = draw(everyone), torch.tensor(rows)
    for got, want in zip(draw(chosen), together, strict=True):
        if backend == "reference":  # torch's matrix products round by their sizes
            torch.testing.assert_close(got, want[chosen], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(got, want[chosen])


def test_nan_in_a_row_stays_in_its_row(backend: str) -> None:
    weights, h = longcat(), hidden(6)
    clean = depth_decode(h, weights, WARM, seed=1, logits=True, backend=backend)
    h[2] = torch.nan
    dirty = depth_decode(h, weights, WARM, seed=1, logits=True, backend=backend)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert_rows_equal(dirty, clean, others, others)
    assert dirty.logprobs[2, 0].isnan() and dirty.drawn_logprobs[2, 0].isnan() and dirty.codes[2, 0] == 0
    paired = depth_decode(h, weights, WARM, seed=1, pairs="interleaved", backend=backend)
    assert paired.logprobs[2:4, 0].isnan().all() and not paired.logprobs[others[[0, 1, 3, 4]]].isnan().any()


@pytest.mark.parametrize("name", ["q_weight", "k_weight"])
def test_nan_of_attentions_weights_is_not_lost(backend: str, name: str) -> None:
    """Every score is NaN then; they count from the second level on."""
    weights, h = longcat(), hidden(3)
    clean = depth_decode(h, weights, WARM, seed=1, backend=backend)
    getattr(weights.layers[0], name)[0, 0, 0] = torch.nan
    decoded = depth_decode(h, weights, WARM, seed=1, backend=backend)
    assert torch.equal(decoded.codes[:, 0], clean.codes[:, 0]) and torch.equal(
        decoded.logprobs[:, 0], clean.logprobs[:, 0]
    )
    assert decoded.logprobs[:, 1:].isnan().all() and (decoded.codes[:, 1:] == 0).all()


# Histories


def test_a_history_is_the_rows_own_and_each_id_counts_once(backend: str) -> None:
    weights, h = longcat(), hidden(1).expand(4, -1)
    codes = torch.tensor([[1, 0, 0], [1, 2, 0], [3, 9, -1], [-5, 2, 99]])
    numbers = DepthSampling(repetition_penalty=1e6)
    decoded = depth_decode(
        h,
        weights,
        numbers,
        history=(codes, torch.tensor([0, 0, 2, 3, 4])),
        prefix=torch.full((4, 1), 1),
        logits=True,
        backend=backend,
    )
    logits = decoded.logits[:, :8].double()
    penalised = torch.where(logits < 0, logits * 1e6, logits / 1e6)
    for row, ids in enumerate([[], [1], [3], []]):
        scores = logits[row].clone()
        scores[ids] = penalised[row, ids]
        scores[-1] = -torch.inf
        torch.testing.assert_close(
            decoded.drawn_logprobs[row, 0].double(), scores.log_softmax(0)[1], rtol=1e-5, atol=1e-5
        )


def test_an_empty_history_and_a_penalty_of_one_change_nothing(backend: str) -> None:
    weights, h = longcat(), hidden(5)
    plain = depth_decode(h, weights, WARM, seed=3, backend=backend)
    nothing = (torch.zeros(0, 3).long(), torch.zeros(6).long())
    full = (torch.zeros(10, 3).long(), torch.arange(6) * 2)
    for sampling, history in ((replace(WARM, repetition_penalty=5.0), nothing), (WARM, full)):
        for a, b in zip(
            plain, depth_decode(h, weights, sampling, seed=3, history=history, backend=backend), strict=True
        ):
            assert torch.equal(a, b)


def test_orders_of_truncation_may_be_had_by_row_and_level(backend: str) -> None:
    weights, h, is_joint = longcat(), hidden(64), torch.rand(64, 3) < 0.5
    sampling, forced = DepthSampling(2.0, 3, 0.6), torch.ones(64, 3, dtype=torch.int64)

    def logprobs(order: str | torch.Tensor) -> torch.Tensor:
        numbers = replace(sampling, order=order)
        return depth_decode(h, weights, numbers, prefix=forced, backend=backend).drawn_logprobs

    joint, sequential = logprobs("joint"), logprobs("sequential")
    assert torch.equal(logprobs(is_joint), torch.where(is_joint, joint, sequential))
    assert ((joint != sequential).any(0) & is_joint.any(0) & ~is_joint.all(0)).all()


# Prepared weights, tables of numbers, compilation


def test_numbers_may_come_as_a_table(backend: str) -> None:
    weights, h = longcat(), hidden(6)
    numbers = DepthSampling(torch.tensor([0.5, 0.0, 1.0]), 3, end="level0")
    for a, b in zip(
        depth_decode(h, weights, numbers, backend=backend),
        depth_decode(h, weights, numbers.table(6, weights.config), backend=backend),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_one_compiled_graph_serves_every_step_seed_and_top_k() -> None:
    weights, counter = longcat(), CompileCounter()
    torch._dynamo.reset()

    def draw(h: torch.Tensor, number: int) -> Any:
        return depth_decode(h, weights, DepthSampling(top_k=number), step=number, seed=number).codes

    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    for number in range(2, 8):
        assert torch.equal(compiled(hidden(3), number), draw(hidden(3), number))
    assert counter.frame_count == 2  # one for numbers as constants, one for numbers as such


@pytest.mark.parametrize(
    ("code", "level", "message"),
    [
        (-2, 0, r"in \[-1, 8\) at level 0, -1 draws, got -2"),
        (8, 0, r"in \[-1, 8\) at level 0, -1 draws, got 8"),
        (6, 1, r"in \[-1, 6\) at level 1, -1 draws, got 6"),
    ],
)
def test_refuses_forced_codes_that_no_level_has(code: int, level: int, message: str) -> None:
    prefix = torch.zeros(3, 2, dtype=torch.int64)
    prefix[1, level] = code
    with pytest.raises(ValueError, match=f"depth_decode: prefix must be {message}"):
        depth_decode(hidden(3), longcat(), prefix=prefix)


@pytest.mark.parametrize("levels", [1, 2])
def test_levels_that_are_all_given_have_no_logits(backend: str, levels: int) -> None:
    classes, codes = (8, 6)[:levels], torch.tensor([[3, 1], [7, 5]])[:, :levels]
    weights = longcat(classes, given=levels, ends=False)
    decoded = depth_decode(hidden(2), weights, prefix=codes, logits=True, backend=backend)
    summed = sum(table[codes[:, level]] for level, table in enumerate(weights.tables) if table is not None)
    torch.testing.assert_close(decoded.embedding, summed)
    assert decoded.codes.equal(codes) and decoded.logits.shape == (2, 0) and not decoded.logprobs.any()
    assert depth_logits(weights, hidden(2), codes) == []
