"""Every Triton kernel, compiled ahead of time for the GPUs it is meant for: no driver, no GPU, no interpreter.

What it promises: the screen multiplies on tensor cores, nothing spills, float32 keeps its subnormals, and float64 of
`ema_update` is not fused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
from compiled import SHARED_BYTES, TENSOR_CORES, Kernel, check, options


def rows(width: int, **more: Any) -> dict[str, Any]:
    """Constants of a kernel that holds whole rows of `width`."""
    from longcat_kernels.triton._numeric import folds, padded, tile_rows

    wide = padded(width)
    return {"WIDTH": wide, "FOLDS": folds(wide), "ROWS": tile_rows(wide), "G": 2.0**-10, **more}


def screens() -> list[Kernel]:
    types = "*fp16 *fp32 *fp16 *fp64 *fp32 *fp32 *fp32 *i32 *i32 i32 i32*16 i32*16"
    shapes = ((128, 128, 8, 3), (128, 128, 8, 4), (64, 64, 4, 4), (16, 64, 4, 4))
    return [
        Kernel("_screen", "screen_kernel", types, {"GROUP": 16, "ROWS": r, "ENTRIES": e, "DEPTH": 64}, options(w, s))
        for r, e, w, s in shapes
    ]


def of_whole_rows(width: int) -> list[Kernel]:
    from longcat_kernels.triton._numeric import padded, warps

    cast = {"RESIDUAL": tl.bfloat16, "MASKED": True}
    finish = (
        "*fp32 *fp32 *i64 *fp64 *u8 *fp32 *fp64 *i32 *bf16 *fp32 *fp16 *fp32 i32 i32*16 i32*16 i32*16 i32 i32 i32*16"
    )
    finishing = rows(width, **cast, TILE=128, TILES=128, QUANTIZED=tl.bfloat16)
    how = options(warps(padded(width)))
    return [
        Kernel(
            "rvq_encode",
            "start_kernel",
            "*bf16 *u8 *fp32 *fp32 *fp32 *fp16 *fp32 i32 i32*16 i32*16 i32*16 i32",
            rows(width, **cast),
            how,
        ),
        Kernel("rvq_encode", "finish_kernel", finish, {**finishing, "LAST": False}, how),
        Kernel("rvq_encode", "finish_kernel", finish, {**finishing, "LAST": True}, how),
        Kernel(
            "_pack",
            "pack_kernel",
            "*fp32 *fp32 *fp16 *fp64 *fp32 *fp32 *fp32 *fp32 *i32 i32*16 i32*16 i32*16 i32*16",
            rows(width, SPREADS_W=256),
            how,
        ),
    ]


def others() -> list[Kernel]:
    tile = {"ROWS": 1, "WIDTH": 1024}
    books = " ".join(["*fp32"] * 8 + ["i32*16"] * 8)
    exact = {"num_warps": 8, "enable_fp_fusion": False}
    walk = {"LEVELS": 8, "GRAD": True, "FIRST": True, "LAST": True, "RESIDUAL": tl.float32, "OUT": tl.bfloat16, **tile}
    return [
        Kernel(
            "rvq_encode", "losses_kernel", "*fp64 *u8 *fp32 i32 i32*16 i32", {"MASKED": True, "BLOCK": 1024}, options(4)
        ),
        Kernel("_pack", "centre_kernel", "*fp32 *fp32 *fp32 i32*16 i32*16", {"ROWS": 128, "COLUMNS": 32}, options(8)),
        Kernel(
            "rvq_decode",
            "decode_kernel",
            f"*i64 *fp32 {books} i32 i32*16 i32 i32",
            {"LEVELS": 8, "FIRST": True, **tile},
            options(4),
        ),
        Kernel(
            "rvq_decode_backward",
            "decode_backward_kernel",
            "*fp32 *i64 *i64 *fp32 i32*16 i32*16 i32",
            {"WIDTH": 1024},
            options(4),
        ),
        Kernel(
            "rvq_encode_backward",
            "encode_backward_kernel",
            f"*bf16 *bf16 *fp32 *i64 *fp32 *fp32 *bf16 {books} i32 i32*16 i32*16 i32 i32*16 i32 i32 i32",
            walk,
            options(4),
        ),
        Kernel("ema_update", "keys_kernel", "*i64 *i64 i32 i32 i64 i64", {"BLOCK": 1024}, options(4)),
        Kernel(
            "ema_update",
            "plan_kernel",
            "*fp32 *i64 *i64 *fp64 *i64 *fp64 *i64 i32 i32*16 i64 i64 i64 i64 i64",
            {"RESTART": True, "BLOCK": 4096},
            exact,
        ),
        Kernel(
            "ema_update",
            "update_kernel",
            "*fp32 *fp32 *bf16 *i64 *i64 *fp64 *i64 *fp64 i32*16 i32*16 i32 i64",
            {"WIDTH": 1024},
            {**exact, "num_warps": 4},
        ),
    ]


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("number", range(4))
def test_the_screen_runs_on_tensor_cores(number: int, arch: int, tmp_path: Path) -> None:
    kernel = screens()[number]
    built = check(kernel, arch, tmp_path)
    wanted = TENSOR_CORES[arch] if kernel.constants["ROWS"] >= 64 else "HMMA"  # below, no wider instruction fits
    assert wanted in built.sass and "LDGSTS" in built.sass, "loads are not pipelined"
    assert built.shared <= SHARED_BYTES[arch] or kernel.options["num_stages"] > 3


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("number", range(8))
def test_kernels_do_not_spill(number: int, arch: int, tmp_path: Path) -> None:
    built = check(others()[number], arch, tmp_path)
    if "enable_fp_fusion" in others()[number].options:
        assert "fma.rn.f64" not in built.ptx
        assert ("div.rn.f64" in built.ptx) == (others()[number].name == "plan_kernel")


@pytest.mark.parametrize(("width", "arch"), [(64, 90), (256, 90), (3584, 80), (3584, 90), (3584, 100), (5120, 90)])
@pytest.mark.parametrize("number", range(4))
def test_kernels_of_whole_rows_do_not_spill(number: int, width: int, arch: int, tmp_path: Path) -> None:
    check(of_whole_rows(width)[number], arch, tmp_path)


def test_tiles_fill_the_device_and_fit_its_shared_memory() -> None:
    from longcat_kernels.triton._screen import cut

    for rows_, entries in ((4096, 16384), (256, 16384), (375, 1024), (7, 256), (100_000, 256)):
        for processors, shared_bytes in ((132, 232_448), (108, 166_912), (84, 101_376)):
            found = cut(rows_, entries, processors, shared_bytes)
            assert entries % found.entries == 0 and 2 <= found.stages <= 4
            assert found.stages * (found.rows + found.entries) * 2 * found.depth <= shared_bytes
            larger = [(128, 128), (64, 64)]
            for shape in larger[: larger.index((found.rows, found.entries))] if rows_ > 64 else ():
                assert -(-rows_ // shape[0]) * (entries // shape[1]) < processors
