"""Every Triton kernel of the mixture of experts and of the n-gram embedding, compiled for LongCat-Flash-Lite's shape.

What it promises: each tile that a launcher can choose multiplies on tensor cores, nothing spills, and shared memory
suffices. H 3072, F 1024, 256 experts, 12 slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton.language as tl
from compiled import SHARED_BYTES, TENSOR_CORES, Kernel, check, options

from longcat_kernels.triton._gemm import Tile, tile_of

ROWS = {"decode": 16 * 12, "mid": 4096 * 12, "large": 32768 * 12}
EXPERTS = 256
OUT = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def tile_for(size: str, arch: int, dtype: torch.dtype, **how: int) -> Tile:
    return tile_of(ROWS[size], EXPERTS, dtype, SHARED_BYTES[arch], **how)


def weights(tile: Tile, arch: int, dtype: torch.dtype, inner: bool) -> tuple[str, dict[str, Any]]:
    """The type of the weights' argument, and constants, as `weights_of` has them there."""
    name, described = NAMES[dtype], arch >= 90
    block = f"{tile.columns},{tile.depth}" if inner else f"{tile.depth},{tile.columns}"
    constants = {"DESCRIBED": described, "K_INNER": described and inner, "EVEN": True, "b_k" if inner else "b_n": 1}
    return f"tensordesc<{name}[1,{block}]>" if described else f"*{name}", constants


def launched(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}, options(tile.warps, tile.stages)


def up(size: str, arch: int, dtype: torch.dtype) -> Kernel:
    tile = tile_for(size, arch, dtype, wide=256 if arch >= 90 else 128, parts=2)
    cut, how = launched(tile)
    kind, constants = weights(tile, arch, dtype, inner=True)
    constants = {k.replace("b_", "w_"): v for k, v in constants.items()}
    types = f"*x {kind} *x *x *i32 *i32 *i32 i32*16 i32*16 i32*16 i32*16 i32*16".replace("*x", f"*{NAMES[dtype]}")
    flags = {"SAVE": True, "ACT": True, "OUT": OUT[dtype], "x_column": 1}
    return Kernel("_moe", "up_kernel", types, {**cut, **constants, **flags}, how)


def rows(size: str, arch: int, dtype: torch.dtype, inner: bool = True) -> Kernel:
    tile = tile_for(size, arch, dtype)
    cut, how = launched(tile)
    kind, constants = weights(tile, arch, dtype, inner)
    a = f"tensordesc<{NAMES[dtype]}[{tile.rows},{tile.depth}]>" if arch >= 90 else f"*{NAMES[dtype]}"
    types = f"{a} {kind} *{NAMES[dtype]} *i32 *i32 i32 i32*16 i32*16 i32*16 i32*16 i32*16 i32*16"
    flags = {"A_DESCRIBED": arch >= 90, "OUT": OUT[dtype], "a_column": 1, "out_column": 1}
    return Kernel("grouped_mm", "rows_kernel", types, {**cut, **constants, **flags}, how)


def act_grad(size: str, arch: int, dtype: torch.dtype) -> Kernel:
    tile = tile_for(size, arch, dtype)
    cut, how = launched(tile)
    kind, constants = weights(tile, arch, dtype, inner=False)
    constants = {k.replace("b_", "w_"): v for k, v in constants.items()}
    x = f"*{NAMES[dtype]}"
    types = f"{x} {kind} {x} *fp32 {x} *fp32 *i32 *i32 *i32 *i32 i32*16 i32*16 i32*16 i32*16 i32*16"
    flags = {"OUT": OUT[dtype], "grad_column": 1}
    return Kernel("fused_moe_input_grad", "act_grad_kernel", types, {**cut, **constants, **flags}, how)


def sums(arch: int, dtype: torch.dtype, gathered: str, add: bool) -> Kernel:
    from longcat_kernels.triton.grouped_mm import sums_tile

    cut, how = launched(sums_tile(dtype, gathered != ""))
    x = f"*{NAMES[dtype]}"
    types = f"{x} {x} {'*fp32' if add else x} *i32 *i32 *i32 i32 i32*16 i32*16 i32*16 i32*16 i32*16 i32*16"
    indirect = {"A_INDIRECT": gathered == "a", "B_INDIRECT": gathered == "b"}
    ones = {"a_column": 1, "b_column": 1, "out_column": 1}
    flags = {"EVEN": True, "ADD": add, "OUT": tl.float32 if add else OUT[dtype], **indirect, **ones}
    return Kernel("grouped_mm", "sums_kernel", types, {**cut, **flags}, how)


def products(kernel: Kernel, arch: int, folder: Path) -> None:
    """Tensor cores, pipelined copies, and what shared memory there is."""
    built = check(kernel, arch, folder)
    wanted = TENSOR_CORES[arch] if kernel.constants["ROWS"] >= 64 else "HMMA"  # below, no wider instruction fits
    assert wanted in built.sass and ("LDGSTS" in built.sass or "UTMALDG" in built.sass)
    assert ("UTMALDG" in built.sass) == kernel.constants.get("DESCRIBED", False)
    assert built.shared <= SHARED_BYTES[arch]


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("kernel", [up, rows, act_grad], ids=lambda kernel: kernel.__name__)
def test_products_of_rows(kernel: Any, size: str, arch: int, tmp_path: Path) -> None:
    products(kernel(size, arch, torch.bfloat16), arch, tmp_path)


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize(("gathered", "add"), [("a", False), ("b", True)])
def test_sums_over_rows(gathered: str, add: bool, arch: int, tmp_path: Path) -> None:
    products(sums(arch, torch.bfloat16, gathered, add), arch, tmp_path)


@pytest.mark.parametrize("size", ["decode", "large"])
@pytest.mark.parametrize("arch", [80, 90])
def test_float32_is_multiplied_in_three_parts(size: str, arch: int, tmp_path: Path) -> None:
    for kernel in (up(size, arch, torch.float32), act_grad(size, arch, torch.float32)):
        products(kernel, arch, tmp_path)
