"""Prepared weights of a depth transformer: always those that there are, or rounded to int8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from depths import hidden, longcat, runnable, weights_of

from longcat_kernels import DepthConfig, DepthWeights, PreparedDepth, depth_decode
from longcat_kernels.modules import depth_logits
from longcat_kernels.ops.depth_decode import OP
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference._depth_cases import random_weights


@pytest.fixture(scope="module", params=list(OP.impls))
def backend(request: pytest.FixtureRequest) -> str:
    return runnable(request.param)


def test_prepared_weights_follow_writes(backend: str) -> None:
    weights, h = longcat(), hidden(6)
    prepared = PreparedDepth(weights)
    for _ in range(2):
        for a, b in zip(
            depth_decode(h, weights, backend=backend), depth_decode(h, prepared, backend=backend), strict=True
        ):
            assert torch.equal(a, b)
        assert prepared.is_current
        weights.layers[0].q_weight.mul_(-3)
        assert not prepared.is_current


def test_prepared_weights_follow_moves(backend: str) -> None:
    """To other memory, as optimizers and sharding make them, which no version counts."""
    weights, h = longcat(), hidden(6)
    prepared = PreparedDepth(weights).refresh()
    weights.layers[0].up.data = weights.layers[0].up * -3
    assert not prepared.is_current
    for a, b in zip(depth_decode(h, prepared, backend=backend), depth_decode(h, weights, backend=backend), strict=True):
        assert torch.equal(a, b)


def test_int8_is_a_rounding_of_each_row_by_itself() -> None:
    weights = longcat()
    prepared = PreparedDepth(weights, "int8")
    layer, rounded = weights.layers[1], prepared.weights.layers[1]
    scale = layer.up.abs().amax(-1, keepdim=True) / 127
    steps = rounded.up / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert ((rounded.up - layer.up).abs() <= scale * 0.5001).all() and (rounded.up != layer.up).any()
    assert prepared.weights.tables[0] is weights.tables[0] and rounded.norm1 is layer.norm1
    again = PreparedDepth(prepared.weights, "int8").weights.layers[1].up
    torch.testing.assert_close(again, rounded.up, rtol=2e-7, atol=0)
    with pytest.raises(ValueError, match="PreparedDepth: weights must be float32 for precision int8"):
        PreparedDepth(
            random_weights(spec.Case(1, weights.config, dtype=torch.bfloat16), "cpu", torch.Generator()), "int8"
        )
    with pytest.raises(ValueError, match="PreparedDepth: precision must be None or int8, got 'int4'"):
        PreparedDepth(weights, "int4")


def test_int8_moves_logits_by_less_than_two_percent() -> None:
    widths = {"hidden": 256, "dim": 256, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 64, "ffn": 512}
    config = replace(longcat((257,) * 4).config, **widths)
    weights, h, codes = weights_of(config, "longcat"), hidden(24, width=256), torch.randint(257, (24, 4))
    rounded = PreparedDepth(weights, "int8").weights
    for got, want in zip(depth_logits(rounded, h, codes), depth_logits(weights, h, codes), strict=True):
        assert 0.005 < ((got - want).square().mean() / want.square().mean()).sqrt() < 0.02


def test_prepared_weights_refuse_states_of_another_dtype() -> None:
    prepared = PreparedDepth(longcat())
    message = r"hidden must be torch.float32 on cpu, as the weights are, got torch.bfloat16 on cpu"
    with pytest.raises(ValueError, match=f"depth_decode: {message}"):
        depth_decode(hidden(3).bfloat16(), prepared)


def test_the_dtype_of_weights_is_not_that_of_their_rope() -> None:
    """Which comes first where there is neither a projection nor a norm around the layers."""
    config = DepthConfig((5, 4), hidden=6, dim=6, layers=1, heads=1, kv_heads=1, head_dim=4, ffn=5, conditioning="last")
    like = random_weights(spec.Case(1, config, "qwen", dtype=torch.bfloat16), "cpu", torch.Generator().manual_seed(1))
    weights = like._replace(input_norm=None, projection=None, projection_bias=None, final_norm=None)
    assert weights.rope is not None and weights.rope.dtype == torch.float32
    h = hidden(3, width=6).bfloat16()
    assert torch.equal(depth_decode(h, PreparedDepth(weights)).codes, depth_decode(h, weights).codes)


def test_weights_without_any_tensor_are_refused() -> None:
    config = DepthConfig((5,), 6, 6, 0, 1, 1, 4, 5, conditioning="last", given=1)
    with pytest.raises(ValueError, match="depth_decode: weights must have a tensor, got none"):
        PreparedDepth(DepthWeights(config, [None], [], [None]))
