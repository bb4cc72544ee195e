"""The CUDA kernel of depth_decode, run on the CPU one fiber a thread with its grid barriers, against the definition."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from longcat_kernels.ops import OPS
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.testing import assert_close, record

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="CUDA emulation: no C++ compiler")
(OP,) = (op for op in OPS if op.name == "depth_decode")
MOST_ROWS = 8


def arguments(case: Any, seed: int = 0) -> list[Any]:
    """Of the schema, without the backend."""
    return record(OP, OP.spec.inputs(case, "cpu", seed)).arguments[:-1]


@pytest.mark.parametrize("case", [case for case in spec.EDGE if 0 < case.tokens <= MOST_ROWS])
def test_equals_the_truth(case: Any) -> None:
    call = record(OP, OP.spec.inputs(case, "cpu"))
    got = emulated.depth_decode(*call.arguments[:-1])
    for actual, truth in zip(got, call.truth(OP), strict=True):
        assert_close(actual, truth)
