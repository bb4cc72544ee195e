"""Every Triton kernel of depth decoding, compiled for LongCat-Next's image head and for a gated one with rotary keys.

What it promises: products are multiplied on tensor cores by the same instruction for any number of rows (which is what
makes a row's bits its own), with pipelined copies; nothing spills, and shared memory suffices. D 2048, F 4096.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton.language as tl
from compiled import DOUBLE, ERF, SHARED_BYTES, TENSOR_CORES, Kernel, check, options

from longcat_kernels.triton._depth_products import cut

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROWS = (1, 32, 256)


def launched(rows: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options of products of 2048 inputs."""
    every = cut(rows, dtype).options(2048, dtype)
    how = {name: every.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in every}
    return every, how


def linear(rows: int, dtype: torch.dtype, norm: bool) -> Kernel:
    """A head, or, without a norm, what is added to the rows: that one's inputs are of the weights' dtype."""
    cut_, how = launched(rows, dtype)
    w = f"*{NAMES[dtype]}"
    types = f"{'*fp32' if norm else w} {w} {w} {w} *fp32 *fp32 i32 i32*16 i32*16 fp32 i32*16 i32*16 i32*16 i32*16"
    return Kernel(
        "_depth_products",
        "linear_kernel",
        types,
        {**cut_, "NORM": norm, "BIAS": True, "RESIDUAL": not norm, "w_column": 1},
        how,
    )


def qkv(rows: int, dtype: torch.dtype, bias: bool) -> Kernel:
    cut_, how = launched(rows, dtype)
    w = f"*{NAMES[dtype]}"
    types = f"*fp32 {w} {w} {w} {w} {w} {w} {w} *fp32 i32 i32*16 i32*16 i32*16 fp32 i32*16 i32*16 i32*16 i32*16"
    biases = dict.fromkeys(("Q_BIAS", "K_BIAS", "V_BIAS"), bias)
    columns = dict.fromkeys(("q_column", "k_column", "v_column"), 1)
    return Kernel("_depth_products", "qkv_kernel", types, {**cut_, **biases, **columns}, how)


def up(rows: int, dtype: torch.dtype, gated: bool) -> Kernel:
    cut_, how = launched(rows, dtype)
    w = f"*{NAMES[dtype]}"
    types = f"*fp32 {w} {w} {w} {w} i32 i32*16 i32*16 fp32 i32*16 i32*16"
    constants = {**cut_, "GATED": gated, "gate_column": 1, "up_column": 1}
    return Kernel("_depth_products", "up_kernel", types, constants, how)


def one_instruction(kernel: Kernel, arch: int, folder: Path) -> None:
    """HMMA, whatever the rows: wider instructions would add up K in their own order."""
    built = check(kernel, arch, folder, ERF if kernel.constants.get("GATED") is False else frozenset())
    assert "HMMA" in built.sass and "HGMMA" not in built.sass and "UTCHMMA" not in built.sass
    assert "LDGSTS" in built.sass and built.shared <= SHARED_BYTES[arch]


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kernel", [linear, qkv, up], ids=lambda kernel: kernel.__name__)
def test_products(kernel: Any, rows: int, arch: int, tmp_path: Path) -> None:
    one_instruction(kernel(rows, torch.bfloat16, kernel is not linear), arch, tmp_path)


@pytest.mark.parametrize("rows", [1, 256])
def test_heads_and_products_without_a_gate(rows: int, tmp_path: Path) -> None:
    for kernel in (linear(rows, torch.bfloat16, True), up(rows, torch.bfloat16, False)):
        one_instruction(kernel, 90, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 256])
def test_products_of_other_dtypes(rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    for kernel in (linear(rows, dtype, True), qkv(rows, dtype, True), up(rows, dtype, True)):
        one_instruction(kernel, 90, tmp_path)


def others() -> list[Kernel]:
    sampler = {"PAIRED": True, "ROWS": 1, "WIDTH": 1024}
    blocks = {"BLOCKS": 32}
    turned = {"Q_NORM": True, "K_NORM": True, "ROPE": True, "TYPE": tl.bfloat16}
    attend = "*fp32 *fp32 *fp32 *bf16 *bf16 *fp32 *bf16 i32 i32 i32 i32 i32*16 fp32 fp32"
    code = "*fp32 *fp32 *i32 *fp64 *fp32 *i64 *i64 *u8 *i64 *i64 *fp32 *fp32 i32 i32 i32 i32 i32*16 i32*16 i32"
    flags = {"FORCED": True, "PAIRED": True, "ACTIVE": True, "ROWS": 1, **blocks}
    embed = {"FIRST": False, "TABLE": True, "ENDS": True, "SUM": True, "TYPE": tl.bfloat16, "ROWS": 1, "WIDTH": 1024}
    return [
        Kernel(
            "_depth_attention",
            "attention_kernel",
            attend,
            {**turned, "GROUP": 2, "ROWS": 1, "LEVELS": 8, "HALF": 64},
            options(2),
        ),
        Kernel(
            "_depth_attention",
            "attention_kernel",
            attend,
            {**turned, "GROUP": 4, "ROWS": 1, "LEVELS": 32, "HALF": 64},
            options(2),
        ),
        Kernel(
            "_depth_products",
            "enter_kernel",
            "*fp32 *bf16 *fp32 *fp32 i32 i32*16 fp32 i32*16 i32*16",
            {"NORM": True, "RESIDUAL": True, "ROWS": 1, "WIDTH": 2048, "FOLDS": 11},
            options(4),
        ),
        Kernel("_depth_sampling", "seen_kernel", "*u8 *i64 *i64 i32 i32 i32 i32", {"CHUNK": 128}, options(1)),
        Kernel(
            "_depth_sampling",
            "scores_kernel",
            "*fp32 *fp32 *i64 *i64 *u8 *fp32 *fp64 i32 i32 i32 i32*16 i32*16 i32*16",
            {**sampler, "SEEN": True, "FOLDS": 10},
            {**options(4), "enable_fp_fusion": False},
        ),
        Kernel(
            "_depth_sampling",
            "mass_kernel",
            "*fp32 *fp32 *i64 *fp64 *fp32 i32 i32 i32 i32*16",
            {**sampler, **blocks},
            options(4),
        ),
        Kernel(
            "_depth_sampling",
            "threshold_kernel",
            "*fp32 *fp32 *fp32 *i64 *fp64 *i32 i32 i32 i32 i32*16",
            {**sampler, **blocks, "WIDTH": 2048},
            options(8),
        ),
        Kernel(
            "_depth_sampling",
            "pick_kernel",
            "*fp32 *i32 *fp32 *i64 *i64 *i64 *fp64 i32 i32 i32 i32 i32*16",
            {**sampler, **blocks},
            options(4),
        ),
        Kernel(
            "_depth_codes", "code_kernel", code, {**flags, "GIVEN": False}, {**options(1), "enable_fp_fusion": False}
        ),
        Kernel(
            "_depth_codes", "code_kernel", code, {**flags, "GIVEN": True}, {**options(1), "enable_fp_fusion": False}
        ),
        *(
            Kernel(
                "_depth_codes",
                "embed_kernel",
                "*i64 *bf16 *fp32 *fp32 *u8 *bf16 i32 i32 i32*16 i32 i32*16",
                {**embed, "LAST": last, "table_column": 1},
                options(4),
            )
            for last in (False, True)
        ),
    ]


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("number", range(len(others())))
def test_other_kernels_do_not_spill(number: int, arch: int, tmp_path: Path) -> None:
    kernel = others()[number]
    check(kernel, arch, tmp_path, DOUBLE if kernel.module in ("_depth_sampling", "_depth_codes") else frozenset())
