"""RVQ decode: the sum of the codewords that each row's codes name (SoundStream, arXiv 2107.03312, section III-C).

Dimension key
    T rows (the leading shape of codes, flattened)    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import cuda, native, triton
from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.deferred import WeightGrads
from longcat_kernels.library import check, once, register
from longcat_kernels.ops.rvq_encode import Codebook, check_codebook, level_codebooks, words_of
from longcat_kernels.prepared import PreparedCodebook
from longcat_kernels.reference import rvq_decode as spec
from longcat_kernels.spec import Op


def rvq_decode(
    codes: Tensor, codebooks: Sequence[Codebook] | Codebook, *, levels: int | None = None, backend: str = "auto"
) -> Tensor:
    """Sums the codewords that each row's codes name, in float32, from the first level to the last.

    The gradient to the codebooks adds up in row order, so it is the same bits every time.

    Args:
        codes: [..., L] int64; a negative code adds nothing.
        codebooks: L codebooks [K_l, D] float32, or one that all levels share: tensors or `PreparedCodebook`s.
        levels: use only the first `levels` codes of each row.
        backend: "auto" or the name of an implementation.

    Returns:
        [..., D] float32.

    Raises:
        ValueError: a shape, dtype, device or code is wrong, or no implementation takes the tensors. Codes are looked at
            only on the CPU, where that costs no synchronisation.

    Example:
        >>> rvq_decode(torch.tensor([[1, 0], [0, -1]]), [torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5]])]).tolist()
        [[3.5], [1.0]]
    """
    check(codes.dtype == torch.int64, lambda: f"rvq_decode: codes must be int64, got {codes.dtype}")
    found = codes.shape[-1] if codes.ndim else 0
    if levels is None and isinstance(codebooks, (Tensor, PreparedCodebook)):
        check(found >= 1, lambda: f"rvq_decode: codes must be [..., L] with L at least 1, got {list(codes.shape)}")
        levels = found
    books = words_of(level_codebooks("rvq_decode", codebooks, levels))
    fits = found == len(books) if levels is None else found >= len(books)
    check(fits, lambda: f"rvq_decode: codes must be [..., {len(books)}], got {list(codes.shape)}")
    used = codes if found == len(books) else codes[..., : len(books)]
    rows_TL = used if used.ndim == 2 else used.reshape(-1, len(books))
    out_TD: Tensor = _op(rows_TL, books, backend)
    return out_TD if used is rows_TL else out_TD.view(*codes.shape[:-1], out_TD.shape[1])


def _allocate(codes_TL: Tensor, codebooks: list[Tensor], backend: str) -> Tensor:
    width = codebooks[0].shape[-1] if codebooks[0].ndim else 0
    for codebook_KD in codebooks:
        check_codebook("rvq_decode", codebook_KD, width, codes_TL.device)
    return codes_TL.new_empty(codes_TL.shape[0], width, dtype=torch.float32)


def _run(codes_TL: Tensor, codebooks: list[Tensor], backend: str) -> Tensor:
    out_TD = _allocate(codes_TL, codebooks, backend)
    implementation = choose("rvq_decode", IMPLS, backend, codes_TL, codebooks)
    # The compiled one looks at the codes itself. On a device that would cost a synchronisation.
    if codes_TL.is_cpu and codes_TL.numel() and implementation is not IMPLS["cpu"]:
        _check_codes(codes_TL, codebooks)
    implementation.run(codes_TL, codebooks, out_TD)
    return out_TD


def _check_codes(codes_TL: Tensor, codebooks: list[Tensor]) -> None:
    for level, (largest, codebook_KD) in enumerate(zip(codes_TL.amax(0).tolist(), codebooks, strict=True)):
        entries = codebook_KD.shape[0]
        if largest >= entries:
            raise ValueError(f"rvq_decode: codes must be below {entries} at level {level}, got {largest}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes_TL, codebooks, ctx.backend = inputs
    ctx.entries, ctx.pending = [codebook_KD.shape[0] for codebook_KD in codebooks], WeightGrads.current()
    ctx.save_for_backward(codes_TL, *(codebooks if ctx.pending is not None else ()))


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
    codes_TL, *codebooks = ctx.saved_tensors
    entries, backend = ctx.entries, ctx.backend
    if ctx.pending is None:
        return None, list(_op_backward(grad_TD, codes_TL, entries, backend)), None
    ctx.pending.add(codebooks, lambda *saved: _op_backward(*saved, entries, backend), (grad_TD, codes_TL))
    return None, [None] * len(codebooks), None


def _allocate_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int], backend: str) -> list[Tensor]:
    return [torch.empty(k, grad_TD.shape[1], dtype=grad_TD.dtype, device=grad_TD.device) for k in entries]


def _run_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int], backend: str) -> list[Tensor]:
    grads = _allocate_backward(grad_TD, codes_TL, entries, backend)
    inputs = (grad_TD, codes_TL, entries)
    wanted = backend if backend in BACKWARD_IMPLS else "auto"
    choose("rvq_decode_backward", BACKWARD_IMPLS, wanted, *inputs).run(*inputs, *grads)
    return grads


_op_backward = register(
    "rvq_decode_backward(Tensor grad, Tensor codes, SymInt[] entries, str backend) -> Tensor[]",
    _run_backward,
    _allocate_backward,
    backward=once("rvq_decode"),
)
_op = register(
    "rvq_decode(Tensor codes, Tensor[] codebooks, str backend) -> Tensor",
    _run,
    _allocate,
    save=_save,
    backward=_backward,
)


def _why_not_cuda(codes_TL: Tensor, codebooks: list[Tensor]) -> str | None:
    return cuda.why_not("rvq_decode", codes_TL) or cuda.why_not_books(codebooks)


def _cuda(codes_TL: Tensor, codebooks: list[Tensor], out_TD: Tensor) -> None:
    native.module().rvq_decode_cuda(*cuda.context("rvq_decode", codes_TL.device), codes_TL, codebooks, out_TD)


def _why_not_cuda_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int]) -> str | None:
    return cuda.why_not("rvq_decode", grad_TD)


def _cuda_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int], *grads: Tensor) -> None:
    grad_TD = grad_TD if grad_TD.stride(1) == 1 else grad_TD.contiguous()
    context, allocate = cuda.context("rvq_decode", grad_TD.device), cuda.allocator(grad_TD.device)
    native.module().rvq_decode_backward_cuda(*context, allocate, grad_TD, codes_TL, list(grads))


def _why_not_cpu(codes_TL: Tensor, codebooks: list[Tensor]) -> str | None:
    if not codes_TL.is_cpu:
        return f"takes tensors on the CPU, got {codes_TL.device}"
    if any(codebook_KD.stride(1) != 1 for codebook_KD in codebooks):
        return "needs codebooks whose rows have adjacent elements"
    return native.why_not()


def _cpu(codes_TL: Tensor, codebooks: list[Tensor], out_TD: Tensor) -> None:
    native.module().rvq_decode(codes_TL, codebooks, out_TD, threads=torch.get_num_threads())


def _why_not_cpu_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int]) -> str | None:
    return native.why_not() if grad_TD.is_cpu else f"takes tensors on the CPU, got {grad_TD.device}"


def _cpu_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int], *grads: Tensor) -> None:
    grad_TD = grad_TD if grad_TD.stride(1) == 1 else grad_TD.contiguous()
    for grad_KD in grads:
        grad_KD.zero_()
    native.module().rvq_decode_backward(grad_TD, codes_TL, list(grads), threads=torch.get_num_threads())


def _reference_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int], *grads: Tensor) -> None:
    for codes_T, grad_KD in zip(codes_TL.unbind(1), grads, strict=True):
        kept_T = codes_T >= 0
        grad_KD.zero_().index_put_((codes_T[kept_T],), grad_TD[kept_T], accumulate=True)


IMPLS: dict[str, Impl] = {
    "cuda": Impl(_cuda, _why_not_cuda),
    "triton": triton.implementation("rvq_decode"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": reference(spec.rvq_decode),
}
BACKWARD_IMPLS: dict[str, Impl] = {
    "cuda": Impl(_cuda_backward, _why_not_cuda_backward),
    "triton": triton.implementation("rvq_decode_backward"),
    "cpu": Impl(_cpu_backward, _why_not_cpu_backward),
    "reference": Impl(_reference_backward, lambda *inputs: None),
}
OP = Op("rvq_decode", rvq_decode, IMPLS, spec)
