"""Run by test_cuda_driver.py, with a libcuda.so.1 that emulates: `_C` as it is, bindings, driver calls and launches."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import native
from longcat_kernels.layouts import HalfLayout
from longcat_kernels.ops.depth_decode import OP as DEPTH
from longcat_kernels.reference import ema_update as ema_spec
from longcat_kernels.reference import rvq_decode as decode_spec
from longcat_kernels.reference import rvq_encode as spec
from longcat_kernels.testing import assert_close, record

STREAM = 4096
compiled = native.module


@functools.cache
def driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_log.restype = library.fake_calls.restype = ctypes.c_char_p
    return library


class OnDevice:
    """A tensor that says it is on a CUDA device."""

    def __init__(self, tensor: Tensor, index: int = 0) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype
        self.device, self.is_cpu = SimpleNamespace(type="cuda", index=index), False

    def data_ptr(self) -> int:
        return self.tensor.data_ptr()

    def stride(self) -> tuple[int, ...]:
        return self.tensor.stride()


def allocate(size: int) -> OnDevice:
    memory = torch.full((size + 256,), 255, dtype=torch.uint8)
    return OnDevice(memory[-memory.data_ptr() % 256 :][:size])


def call(name: str, kernels: Any, *arguments: Any, allocate: Callable[[int], Any] = allocate) -> None:
    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return OnDevice(value)
        return [there(v) for v in value] if isinstance(value, list) else value

    needs_memory = name not in ("rvq_decode_cuda", "rvq_encode_backward_cuda")
    getattr(compiled(), name)(kernels, STREAM, *([allocate] if needs_memory else []), *map(there, arguments))
    gc.collect()
    assert driver().fake_depth() == 0, "a context is left current"


def lines() -> list[str]:
    return driver().fake_log().decode().splitlines()


def encode(kernels: Any, x: Tensor, books: list[Tensor], packed: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    rows, levels = x.shape[0], len(books)
    outputs = [torch.empty_like(x), torch.empty(x.shape), torch.empty(levels), torch.empty(rows, levels).long()]
    call("rvq_encode_cuda", kernels, x, books, packed, mask, torch.float32, *outputs)
    return outputs


def the_ops_are_the_definitions() -> None:
    driver().fake_device(4, 7)
    kernels = {op: compiled().CudaModule(op, b"cubin", 0) for op in ("rvq_encode", "rvq_decode", "ema_update")}
    x, books, mask = torch.randn(40, 24), [torch.randn(50, 24), torch.randn(70, 24)], torch.rand(40) < 0.8
    packed = [allocate(HalfLayout(*book.shape).bytes).tensor for book in books]
    for book, place in zip(books, packed, strict=True):
        call("rvq_pack_cuda", kernels["rvq_encode"], book, place)
    want = spec.rvq_encode(x, books, [], None, mask, torch.float32)
    for some in ([], packed):
        got = encode(kernels["rvq_encode"], x, books, some, mask)
        assert torch.equal(got[3], want[3]) and torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])
        assert_close(got[2], want[2].double())
    assert all(line.endswith(f"stream {STREAM}") for line in lines())

    grad, scales, grad_x = torch.randn(40, 24), torch.randn(2), torch.empty(40, 24)
    call("rvq_encode_backward_cuda", kernels["rvq_encode"], grad, scales, x, want[3], books, torch.float32, grad_x)
    left = [x - books[0][want[3][:, 0].clamp(min=0)]]
    left.append(left[0] - books[1][want[3][:, 1].clamp(min=0)])
    truth = grad.double() + sum(s.double() * r.double() for s, r in zip(scales, left, strict=True))
    assert_close(grad_x, torch.where(mask[:, None], truth, 0))

    out = torch.empty(40, 24)
    call("rvq_decode_cuda", kernels["rvq_decode"], want[3], books, out)
    assert torch.equal(out, decode_spec.rvq_decode(want[3], books)[0])
    grads = [torch.empty_like(book) for book in books]
    call("rvq_decode_backward_cuda", kernels["rvq_decode"], grad, want[3], grads)
    for level, got_KD in enumerate(grads):
        truth = torch.zeros(got_KD.shape, dtype=torch.float64)
        assert_close(got_KD, truth.index_add_(0, want[3][mask, level], grad[mask].double()))

    case = ema_spec.Case(90, 8, 30, torch.bfloat16, used=0.5, seed=5)
    mine, theirs = (list(ema_spec.inputs(case).values()) for _ in range(2))
    rule = (0.99, 1e-5, 1.0, 0.0, 1.0, 5)
    restarted, place = torch.empty((), dtype=torch.int64), allocate(HalfLayout(30, 8).bytes).tensor
    call("ema_update_cuda", kernels["ema_update"], *mine[:3], place, *mine[3:5], *rule, restarted)
    assert torch.equal(restarted, ema_spec.ema_update(*theirs[:3], None, *theirs[3:5], *rule)[0])
    for a, b in zip(mine[:3], theirs[:3], strict=True):
        assert_close(a, b.double())


def one_launch_decodes_all_levels() -> None:
    """The emulated device is of the oldest kind, whose shared memory the launcher takes to be that of the newest."""
    driver().fake_device(3, 7)
    kernels = compiled().CudaModule("depth_decode", b"cubin", 0)
    for case in DEPTH.spec.EDGE:
        if case.tokens <= 8 and case.dtype != torch.float16:
            recorded = record(DEPTH, DEPTH.spec.inputs(case))
            inputs = list(recorded.arguments[:-1])
            outputs = [torch.full(t.shape, 77, dtype=t.dtype) for t in recorded.run("reference")]
            del inputs[2]
            call("depth_decode_cuda", kernels, *inputs, *outputs)
            for actual, truth in zip(outputs, recorded.truth(DEPTH), strict=True):
                assert_close(actual, truth, case.tolerance, case.inner)
    assert all(line.startswith("depth_decode 3x1 of 384, ") for line in lines())
    (eight,) = (case for case in DEPTH.spec.EDGE if case.pairs == "mixed")
    most_rows = compiled().depth_most_rows_cuda
    assert most_rows(9, 0, eight.config.numbers(), torch.float32) == 8
    image, audio = (case.config.numbers() for case in DEPTH.spec.MODEL)
    for capability, rows in (((8, 0), (4, 4)), ((8, 9), (2, 2)), ((9, 0), (8, 4)), ((10, 0), (8, 4))):
        found = tuple(most_rows(*capability, config, torch.float16) for config in (image, audio))
        assert found == rows, (capability, found)
        assert most_rows(*capability, image, torch.bfloat16) == (256 if capability != (8, 9) else 2)


def many_rows_take_tensor_cores_and_one_workspace() -> None:
    """Whose size the shapes give, whichever rows are active."""
    driver().fake_device(4, 7)
    kernels, sizes = compiled().CudaModule("depth_decode", b"cubin", 0), []
    case = replace(DEPTH.spec.EDGE[10], tokens=12, dtype=torch.bfloat16)

    def counted(size: int) -> OnDevice:
        sizes.append(size)
        return allocate(size)

    for active in (None, torch.arange(12) % 3 < 2, torch.zeros(12, dtype=torch.bool)):
        recorded = record(DEPTH, {**DEPTH.spec.inputs(case), "active": active})
        inputs = list(recorded.arguments[:-1])
        outputs = [torch.full(t.shape, 77, dtype=t.dtype) for t in recorded.run("reference")]
        del inputs[2]
        call("depth_decode_cuda", kernels, *inputs, *outputs, allocate=counted)
        for actual, truth in zip(outputs, recorded.truth(DEPTH), strict=True):
            assert_close(actual, truth, case.tolerance, case.inner)
    assert [line.split(",")[0] for line in lines()] == ["depth_decode_mma 4x1 of 384"] * 3
    assert len(sizes) == 3 and len(set(sizes)) == 1


def a_call_only_enqueues() -> None:
    """Once its kernels are loaded: no waiting, no allocation, no copy, nothing on another stream."""
    cases = [replace(DEPTH.spec.EDGE[3], tokens=8), replace(DEPTH.spec.EDGE[10], tokens=12, dtype=torch.bfloat16)]
    for case in cases:
        driver().fake_device(4, 9)
        kernels = compiled().CudaModule("depth_decode", b"cubin", 0)
        recorded = record(DEPTH, DEPTH.spec.inputs(case))
        inputs, outputs = list(recorded.arguments[:-1]), recorded.run("reference")
        del inputs[2]
        for _ in range(2):
            before = driver().fake_calls()
            call("depth_decode_cuda", kernels, *inputs, *outputs)
        assert driver().fake_calls()[len(before) :].decode().splitlines() == [
            "cuCtxPushCurrent_v2",
            f"cuMemsetD8Async on {STREAM}",
            f"cuLaunchKernelEx on {STREAM}",
            "cuCtxPopCurrent_v2",
        ]


def each_device_gets_its_screen() -> None:
    """300 rows are three tiles of 128 or two clusters of 256, 9000 codewords 36 tiles: a tile or two to each block."""
    x, books = torch.randn(300, 100), [torch.randn(9000, 100)]
    screens = {}
    for major, multiprocessors in ((8, 108), (9, 132), (10, 148)):
        driver().fake_device(multiprocessors, major)
        encode(compiled().CudaModule("rvq_encode", b"cubin", 0), x, books, [], None)
        screens[major] = [line for line in lines() if "coarse" in line or "map" in line]
    assert screens[8] == [f"rvq_coarse_mma {3 * 36}x1 of 256, {1024 + 3 * 32768} bytes, stream {STREAM}"], screens[8]
    assert screens[10][0].startswith("rvq_coarse_mma ") and len(screens[10]) == 1, screens[10]
    assert screens[9] == [
        "map 300x128 boxes 128x64",
        "map 9216x128 boxes 128x64",
        f"rvq_coarse_wgmma {2 * 2 * 18}x1 of 384, {1024 + 4 * (49152 + 16)} bytes, stream {STREAM}",
    ], screens[9]


def nothing_is_launched_for_no_rows() -> None:
    driver().fake_device(4, 7)
    outputs = encode(compiled().CudaModule("rvq_encode", b"cubin", 0), torch.empty(0, 8), [torch.randn(4, 8)], [], None)
    assert outputs[2].tolist() == [0.0] and not any("coarse" in line for line in lines())


def errors_become_exceptions() -> None:
    def refused(kind: type[Exception], text: str, run: Any) -> None:
        try:
            run()
        except kind as error:
            assert text in str(error), error
            assert driver().fake_depth() == 0, "a context is left current"
            return
        raise AssertionError(f"not refused: {text}")

    driver().fake_device(4, 7)
    wrong = "rvq_encode: cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE (device kernel image is invalid)"
    refused(RuntimeError, wrong, lambda: compiled().CudaModule("rvq_encode", b"other", 0))
    refused(RuntimeError, "rvq_encode: device 7", lambda: compiled().CudaModule("rvq_encode", b"cubin", 7))
    kernels, x, books = compiled().CudaModule("rvq_encode", b"cubin", 0), torch.randn(3, 8), [torch.randn(4, 8)]
    driver().fake_device(4, 7)
    refused(ValueError, "must be the packed form", lambda: encode(kernels, x, books, [torch.zeros(64).byte()], None))
    refused(ValueError, "codebooks must be as wide as x", lambda: encode(kernels, x, [torch.randn(4, 9)], [], None))
    codes, out = torch.zeros(3, 1).long(), torch.empty(3, 8)
    far = OnDevice(codes, index=1)
    refused(
        ValueError,
        "on the device of the kernels",
        lambda: compiled().rvq_decode_cuda(kernels, 0, far, [], OnDevice(out)),
    )
    refused(ValueError, "must be on the GPU", lambda: compiled().rvq_decode_cuda(kernels, 0, codes, [books[0]], out))
    too_many = [OnDevice(books[0])] * 33
    refused(
        ValueError,
        "at most 32 levels",
        lambda: compiled().rvq_decode_cuda(kernels, 0, OnDevice(codes.expand(3, 33)), too_many, OnDevice(out)),
    )
    short = lambda size: OnDevice(torch.empty(1, dtype=torch.uint8))  # noqa: E731
    outputs = [OnDevice(t) for t in (x.clone(), x.clone(), torch.empty(1), codes)]
    arguments = (OnDevice(x), [OnDevice(books[0])], [], None, torch.float32, *outputs)
    refused(ValueError, "the workspace must be", lambda: compiled().rvq_encode_cuda(kernels, 0, short, *arguments))


if __name__ == "__main__":
    assert compiled().cuda_why_not() == ""
    the_ops_are_the_definitions()
    one_launch_decodes_all_levels()
    many_rows_take_tensor_cores_and_one_workspace()
    a_call_only_enqueues()
    each_device_gets_its_screen()
    nothing_is_launched_for_no_rows()
    errors_become_exceptions()
    print("all as it should be")
