"""Depth transformers for the tests of `depth_decode`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from longcat_kernels import DepthConfig, DepthWeights
from longcat_kernels.ops.depth_decode import OP
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference._depth_cases import random_weights
from longcat_kernels.testing import record


def runnable(backend: str) -> str:
    """An implementation's name; skips the test where it does not run."""
    reason = OP.impls[backend].why_not(*record(OP, spec.inputs(spec.EDGE[-1])).arguments[:-1])
    if reason is not None:
        pytest.skip(f"depth_decode, {backend}: {reason}")
    return backend


def longcat(classes: tuple[int, ...] = (8, 6, 5), **changes: Any) -> DepthWeights:
    config = DepthConfig(
        classes=classes,
        hidden=10,
        dim=8,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=4,
        ffn=8,
        ends=True,
        ffn_sets=tuple(range(len(classes))),
    )
    return weights_of(replace(config, **changes), "longcat")


def weights_of(config: DepthConfig, like: str) -> DepthWeights:
    return random_weights(spec.Case(1, config, like), "cpu", torch.Generator().manual_seed(4))


def hidden(rows: int, seed: int = 1, width: int = 10) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
