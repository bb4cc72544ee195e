"""Every Triton kernel of the mixture of experts and of the n-gram embedding, compiled for LongCat-Flash-Lite's shape.

What it promises: each tile that a launcher can choose multiplies on tensor cores, nothing spills, and shared memory
suffices. H 3072, F 1024, 256 experts, 12 slots; and sides that tiles do not divide, if 16 does. Where it does not,
copies are element by element, and products may spill.
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


def weights(tile: Tile, arch: int, dtype: torch.dtype, inner: bool, even: bool = True) -> tuple[str, dict[str, Any]]:
    """The type of the weights' argument, and constants, as `weights_of` has them there."""
    name, described = NAMES[dtype], arch >= 90
    block = f"{tile.columns},{tile.depth}" if inner else f"{tile.depth},{tile.columns}"
    constants = {"DESCRIBED": described, "K_INNER": described and inner, "EVEN": even, "b_k" if inner else "b_n": 1}
    return f"tensordesc<{name}[1,{block}]>" if described else f"*{name}", constants


def launched(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}, options(tile.warps, tile.stages)


def up(size: str, arch: int, dtype: torch.dtype, even: bool = True) -> Kernel:
    tile = tile_for(size, arch, dtype, wide=256 if arch >= 90 else 128, parts=2)
    cut, how = launched(tile)
    kind, constants = weights(tile, arch, dtype, True, even)
    constants = {k.replace("b_", "w_"): v for k, v in constants.items()}
    types = f"*x {kind} *x *x *i32 *i32 *i32 i32*16 i32*16 i32*16 i32*16 i32*16".replace("*x", f"*{NAMES[dtype]}")
    flags = {"SAVE": True, "ACT": True, "OUT": OUT[dtype], "x_column": 1}
    return Kernel("_moe", "up_kernel", types, {**cut, **constants, **flags}, how)


def rows(size: str, arch: int, dtype: torch.dtype, even: bool = True, inner: bool = True) -> Kernel:
    tile = tile_for(size, arch, dtype)
    cut, how = launched(tile)
    kind, constants = weights(tile, arch, dtype, inner, even)
    a = f"tensordesc<{NAMES[dtype]}[{tile.rows},{tile.depth}]>" if arch >= 90 else f"*{NAMES[dtype]}"
    types = f"{a} {kind} *{NAMES[dtype]} *i32 *i32 i32 i32*16 i32*16 i32*16 i32*16 i32*16 i32*16"
    flags = {"A_DESCRIBED": arch >= 90, "OUT": OUT[dtype], "a_column": 1, "out_column": 1}
    return Kernel("grouped_mm", "rows_kernel", types, {**cut, **constants, **flags}, how)


def x_grad(size: str, arch: int, dtype: torch.dtype, even: bool = True) -> Kernel:
    return rows(size, arch, dtype, even, inner=False)


def act_grad(size: str, arch: int, dtype: torch.dtype, even: bool = True) -> Kernel:
    tile = tile_for(size, arch, dtype)
    cut, how = launched(tile)
    kind, constants = weights(tile, arch, dtype, False, even)
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
@pytest.mark.parametrize("kernel", [up, rows, act_grad, x_grad], ids=lambda kernel: kernel.__name__)
def test_products_of_rows(kernel: Any, size: str, arch: int, tmp_path: Path) -> None:
    products(kernel(size, arch, torch.bfloat16), arch, tmp_path)


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("kernel", [up, rows, act_grad], ids=lambda kernel: kernel.__name__)
def test_products_of_sides_that_tiles_do_not_divide(kernel: Any, arch: int, tmp_path: Path) -> None:
    products(kernel("large", arch, torch.bfloat16, even=False), arch, tmp_path)


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize(("gathered", "add"), [("a", False), ("b", True)])
def test_sums_over_rows(gathered: str, add: bool, arch: int, tmp_path: Path) -> None:
    products(sums(arch, torch.bfloat16, gathered, add), arch, tmp_path)


@pytest.mark.parametrize("size", ["decode", "large"])
@pytest.mark.parametrize("arch", [80, 90])
def test_float32_is_multiplied_in_three_parts(size: str, arch: int, tmp_path: Path) -> None:
    for kernel in (up(size, arch, torch.float32), act_grad(size, arch, torch.float32)):
        products(kernel, arch, tmp_path)


def others() -> list[Kernel]:
    plan = {"BINS": 512, "BLOCK": 512}
    place = {**plan, "TILE": 128, "STEP": 32, "LANES": 64}
    pointers = "*i64 *i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 i32*16 i32*16 i32 i32 i32"
    whole = {"ROWS": 2, "WIDTH": 1024}
    route = {"ROWS": 4, "WIDTH": 512, "SOFTMAX": True, "RENORM": True, "column_stride": 1}
    combine = {**whole, "WEIGHTED": True, "RESIDUAL": True, "OUT": tl.bfloat16, "x_column": 1, "residual_column": 1}
    lookup = "*i64 *i64 *i64 *bf16 *i64 *bf16 i32*16 i32 i32 i32*16 i32*16 i64 i32 i32 i32 i32 i32 i32*16"
    looking = {"ORDER": 4, "DOCUMENTS": True, "HISTORY": True, "LOOK_UP": True, "ROWS": 4, "WIDTH": 256}
    return [
        Kernel("moe_plan", "count_kernel", "*i64 *i32 i32*16 i32*16", plan, options(4)),
        Kernel("moe_plan", "scan_kernel", "*i32 *i32 i32", {"BINS": 512, "HEIGHT": 64, "WIDTH": 16}, options(4)),
        Kernel("moe_plan", "place_kernel", pointers, {**place, "ALONE": False}, options(8)),
        Kernel("moe_plan", "place_kernel", pointers, {**place, "ALONE": True}, options(8)),
        Kernel("moe_plan", "cut_kernel", "*i32 *i32 i32*16 i32*16 i32", {k: place[k] for k in place}, options(4)),
        Kernel(
            "_gemm",
            "zero_kernel",
            "*bf16 *i32 i32 i32*16 i32*16",
            {"ROWS": 64, "COLUMNS": 128, "column_stride": 1},
            options(4),
        ),
        Kernel(
            "_moe",
            "combine_kernel",
            "*bf16 *bf16 *bf16 *i64 *i32 *fp32 *bf16 i32 i32*16 i32 i32*16 i32*16 i32*16",
            combine,
            options(4),
        ),
        Kernel(
            "fused_moe_input_grad",
            "weights_grad_kernel",
            "*bf16 *bf16 *fp32 *i64 *i32 *fp32 i32 i32*16 i32 i32 i32*16 i32*16 i32*16",
            {**whole, "PARTS": 8, "OUT": tl.float32, "grad_column": 1, "x_column": 1},
            options(4),
        ),
        Kernel(
            "fused_moe_weight_grad",
            "act_kernel",
            "*bf16 *fp32 *i32 *i32 *bf16 i32*16",
            {**whole, "OUT": tl.bfloat16},
            options(4),
        ),
        Kernel(
            "moe_route",
            "route_kernel",
            "*fp32 *fp32 *fp32 *i64 i32 i32*16 i32 i32*16 fp32",
            {**route, "BIASED": True},
            options(4),
        ),
        Kernel(
            "moe_route_backward",
            "route_backward_kernel",
            "*fp32 *fp32 *i64 *fp32 i32 i32*16 i32 i32*16 fp32",
            {**route, "OUT": tl.float32},
            options(4),
        ),
        Kernel("ngram_embedding", "lookup_kernel", lookup, {**looking, "table_column": 1}, options(4)),
        Kernel(
            "ngram_embedding_weight_grad",
            "rows_grad_kernel",
            "*fp32 *i64 *i64 *bf16 i32 i32*16 i32*16 fp32 i32 i32",
            {"ROWS": 1, "WIDTH": 256, "OUT": tl.bfloat16, "column_stride": 1},
            options(4),
        ),
    ]


def project(rows_: int, arch: int) -> Kernel:
    tile = tile_of(rows_, 1, torch.bfloat16, SHARED_BYTES[arch])
    cut, how = launched(tile)
    kind, constants = weights(tile, arch, torch.bfloat16, inner=True)
    a = f"tensordesc<bf16[{tile.rows},{tile.depth}]>" if arch >= 90 else "*bf16"
    types = f"{a} {kind} *bf16 *i64 *bf16 i32 i32 i32*16 i32*16 fp32 i32 i32 i32*16 i32*16 i32*16"
    flags = {"A_DESCRIBED": arch >= 90, "OUT": tl.bfloat16, "word_column": 1}
    return Kernel("ngram_embedding", "project_kernel", types, {**cut, **constants, **flags}, how)


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("positions", [16, 4096])
def test_projections_of_looked_up_rows(positions: int, arch: int, tmp_path: Path) -> None:
    products(project(positions, arch), arch, tmp_path)


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("number", range(13))
def test_other_kernels_do_not_spill(number: int, arch: int, tmp_path: Path) -> None:
    check(others()[number], arch, tmp_path)
