"""Depth decoding: exact teacher forcing, the drawn distribution, guidance, forced levels, the end class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch._dynamo.testing import CompileCounter

from longcat_kernels import depth_decode
from longcat_kernels.modules import DepthTransformer

SIZES = (7, 5, 4)


def head(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> tuple[DepthTransformer, list[torch.Tensor]]:
    torch.manual_seed(seed)
    module = DepthTransformer(hidden=10, dim=8, heads=2, layers=2, ffn_scale=len(sizes), sizes=sizes)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return module, [torch.randn(size + 1, 10) for size in sizes]


def hidden(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 10, generator=torch.Generator().manual_seed(seed))


def forced_logprobs(module: DepthTransformer, tables: list[torch.Tensor], h: Any, codes: torch.Tensor) -> torch.Tensor:
    logits = module.logits(h, codes, tables)
    return torch.stack([x.log_softmax(1).gather(1, c[:, None])[:, 0] for x, c in zip(logits, codes.T, strict=True)], 1)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple),
    rows=st.integers(0, 4),
    end=st.sampled_from(["mask", "level0", "allow"]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_step_by_step_equals_teacher_forcing(sizes: tuple[int, ...], rows: int, end: str, temperature: float) -> None:
    module, tables = head(sizes)
    decoded = module.decode(hidden(rows), tables, temperature=temperature, end=end, seed=5)
    forced = forced_logprobs(module, tables, hidden(rows), decoded.codes)
    torch.testing.assert_close(decoded.logprobs, forced, rtol=0, atol=2e-5)
    is_end = decoded.codes == torch.tensor(sizes)
    assert not is_end[:, 1 if end == "level0" else len(sizes) if end == "allow" else 0 :].any()
    summed = sum(table[codes] for table, codes in zip(tables, decoded.codes.T, strict=True))
    torch.testing.assert_close(decoded.embedding, summed.masked_fill(is_end.all(1, keepdim=True), 0))


def test_draws_follow_the_joint_distribution() -> None:
    module, tables = head((3, 2))
    rows = 20_000
    decoded = module.decode(hidden(1).expand(rows, -1), tables, end="allow", seed=3)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    p = forced_logprobs(module, tables, hidden(1).expand(len(grid), -1), grid).sum(1).exp().double().detach()
    counts = torch.bincount(decoded.codes[:, 0] * 3 + decoded.codes[:, 1], minlength=12)
    assert chisquare(counts, p / p.sum() * rows).pvalue > 1e-4


def test_greedy_takes_the_best_code_of_each_level() -> None:
    module, tables = head()
    decoded = module.decode(hidden(9), tables, temperature=0.0)
    for level, logits in enumerate(module.logits(hidden(9), decoded.codes, tables)):
        assert torch.equal(logits[:, :-1].argmax(1), decoded.codes[:, level])


def test_guidance_draws_pairs_from_the_mixed_logits() -> None:
    module, tables = head()
    conditional, unconditional = hidden(6, 1), hidden(6, 2)
    pairs = torch.stack([conditional, unconditional], 1).flatten(0, 1)
    decoded = module.decode(pairs, tables, temperature=0.0, guidance=2.5)
    codes = decoded.codes[::2]
    assert torch.equal(codes, decoded.codes[1::2])
    both = zip(module.logits(conditional, codes, tables), module.logits(unconditional, codes, tables), strict=True)
    for level, (c, u) in enumerate(both):
        mixed = 2.5 * (c - u) + u
        assert torch.equal(mixed[:, :-1].argmax(1), codes[:, level])
        want = mixed.log_softmax(1).gather(1, codes[:, level, None])[:, 0]
        torch.testing.assert_close(decoded.logprobs[::2, level], want, rtol=0, atol=2e-5)


def test_guidance_of_one_is_the_conditional_draw() -> None:
    module, tables = head()
    pairs = torch.stack([hidden(6, 1), hidden(6, 2)], 1).flatten(0, 1)
    guided = module.decode(pairs, tables, guidance=1.0, seed=torch.arange(12))
    alone = module.decode(hidden(6, 1), tables, seed=torch.arange(12)[::2])
    assert torch.equal(guided.codes[::2], alone.codes)


def test_forced_levels_are_kept_and_leave_the_other_draws_alone() -> None:
    module, tables = head()
    free = module.decode(hidden(8), tables, seed=2)
    again = module.decode(hidden(8), tables, seed=2, prefix=free.codes[:, :2])
    for a, b in zip(free, again, strict=True):
        assert torch.equal(a, b)
    forced = module.decode(hidden(8), tables, seed=2, prefix=torch.full((8, 3), 2))
    assert (forced.codes == 2).all()


def test_a_row_draws_the_same_whatever_its_batch() -> None:
    module, tables = head()
    options = {"temperature": 0.8, "top_k": 4, "top_p": 0.9, "step": 7}
    together = module.decode(hidden(12), tables, seed=100, **options)
    for row in (0, 5, 11):
        alone = module.decode(hidden(12)[row : row + 1], tables, seed=torch.tensor([100 + row]), **options)
        assert torch.equal(alone.codes[0], together.codes[row])


def test_top_k_of_one_is_greedy() -> None:
    module, tables = head()
    greedy = module.decode(hidden(9), tables, temperature=0.0).codes
    assert torch.equal(module.decode(hidden(9), tables, top_k=1, seed=4).codes, greedy)


def test_nan_in_a_row_stays_in_its_row() -> None:
    module, tables = head()
    h = hidden(4)
    clean = module.decode(h, tables, seed=1)
    h[2] = torch.nan
    dirty = module.decode(h, tables, seed=1)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(dirty.codes[others], clean.codes[others])
    assert torch.equal(dirty.logprobs[others], clean.logprobs[others]) and dirty.logprobs[2].isnan().any()


@pytest.mark.parametrize(("code", "level"), [(-1, 0), (8, 0), (6, 1)])
def test_refuses_forced_codes_that_no_level_has(code: int, level: int) -> None:
    module, tables = head()
    prefix = torch.zeros(3, 2, dtype=torch.int64)
    prefix[1, level] = code
    with pytest.raises(ValueError, match=rf"depth_decode: prefix must be in \[0, .\) at level {level}, got {code}"):
        depth_decode(hidden(3), module.weights(tables), prefix=prefix)


def test_one_compiled_graph_serves_every_step_seed_and_top_k() -> None:
    module, tables = head()
    weights, counter = module.weights([table.detach() for table in tables]), CompileCounter()
    torch._dynamo.reset()

    def draw(h: torch.Tensor, number: int) -> Any:
        return depth_decode(h, weights, step=number, seed=number, top_k=number).codes

    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    for number in range(2, 8):
        assert torch.equal(compiled(hidden(3), number), draw(hidden(3), number))
    assert counter.frame_count == 2  # one for numbers as constants, one for numbers as such
