"""What the CUDA implementations of all ops share: whether they can run, their kernels, stream and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import jit, native
from longcat_kernels.layouts import HalfLayout

LEAST_CAPABILITY = (7, 5)  # what NVRTC 13 compiles for
MOST_LEVELS = 32  # of which the kernels take pointers
MOST_COLUMNS = 65536  # whose exact sums the kernels of rvq_encode hold


def why_not(op: str, tensor: Tensor) -> str | None:
    """None where the CUDA kernels of `op` can run on the device of `tensor`, else the reason."""
    if tensor.device.type != "cuda":
        return f"takes tensors on a CUDA device, got {tensor.device}"
    return _why_not_device(op, tensor.device.index or 0)


@functools.cache
def _why_not_device(op: str, index: int) -> str | None:
    reason: str | None = native.why_not() or native.module().cuda_why_not() or None
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return f"needs compute capability 7.5 or newer, got {capability[0]}.{capability[1]}"
    return jit.why_not(op, jit.arch_of(*capability))


def context(op: str, device: torch.device) -> tuple[Any, int]:
    """The first arguments of a compiled function: the op's kernels on a device, and the device's current stream.

    Raises:
        JitError: the kernels must be compiled and cannot be.
        RuntimeError: the driver refuses them.
    """
    index = device.index or 0
    return _kernels(op, index), torch.cuda.current_stream(index).cuda_stream


@functools.cache
def _kernels(op: str, index: int) -> Any:
    arch = jit.arch_of(*torch.cuda.get_device_capability(index))
    return native.module().CudaModule(op, jit.cubin(op, arch), index)


def allocator(device: torch.device) -> Callable[[int], Tensor]:
    """Gives memory of the device that lives until work queued on the current stream no longer needs it."""
    return lambda size: torch.empty(size, dtype=torch.uint8, device=device)


def why_not_books(codebooks: list[Tensor]) -> str | None:
    """None where the kernels can read the codebooks, [K, D] float32 each, else the reason."""
    if any(codebook_KD.stride(1) != 1 for codebook_KD in codebooks):
        return "needs codebooks whose rows have adjacent elements"
    if len(codebooks) > MOST_LEVELS:
        return f"takes at most {MOST_LEVELS} levels, got {len(codebooks)}"
    return None


def why_not_packed(words_KD: Tensor) -> str | None:
    """None where the kernels can pack a codebook [K, D] float32, else the reason."""
    reason = why_not("rvq_encode", words_KD) or why_not_books([words_KD])
    if reason is None and words_KD.shape[1] > MOST_COLUMNS:
        reason = f"takes at most {MOST_COLUMNS} columns, got {words_KD.shape[1]}"
    return reason


def packed(words_KD: Tensor) -> Tensor:
    """The packed form of a codebook [K, D] float32, whose rows have adjacent elements, as `HalfLayout` has it."""
    out = torch.empty(HalfLayout(*words_KD.shape).bytes, dtype=torch.uint8, device=words_KD.device)
    pack(words_KD, out)
    return out


def pack(words_KD: Tensor, packed: Tensor) -> None:
    """Fills the packed form anew."""
    device = words_KD.device
    native.module().rvq_pack_cuda(*context("rvq_encode", device), allocator(device), words_KD.detach(), packed)
