"""The gradient of `rvq_encode` to x: walks the residuals again, so that forward keeps nothing of size T x L x D.

Dimension key
    T rows    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels import cuda, native, triton
from longcat_kernels.backends import Impl, choose
from longcat_kernels.library import once, register


def _allocate(
    grad_TD: Tensor | None,
    grad_L: Tensor | None,
    x_TD: Tensor,
    codes_TL: Tensor,
    codebooks: list[Tensor],
    residual_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)


def _run(
    grad_TD: Tensor | None,
    grad_L: Tensor | None,
    x_TD: Tensor,
    codes_TL: Tensor,
    codebooks: list[Tensor],
    residual_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    out_TD = _allocate(grad_TD, grad_L, x_TD, codes_TL, codebooks, residual_dtype, backend)
    scale_L = None
    if grad_L is not None:
        scale_L = 2 * grad_L / ((codes_TL[:, 0] >= 0).sum() * x_TD.shape[1]).clamp(min=1)
    inputs = (grad_TD, scale_L, x_TD, codes_TL, codebooks, residual_dtype)
    wanted = backend if backend in IMPLS else "auto"
    choose("rvq_encode_backward", IMPLS, wanted, *inputs).run(*inputs, out_TD)
    return out_TD


rvq_encode_backward = register(
    "rvq_encode_backward(Tensor? grad_quantized, Tensor? grad_losses, Tensor x, Tensor codes, Tensor[] codebooks, "
    "ScalarType residual_dtype, str backend) -> Tensor",
    _run,
    _allocate,
    backward=once("rvq_encode"),
)


def _why_not_cuda(
    grad_TD: Tensor | None, scale_L: Tensor | None, x_TD: Tensor, codes_TL: Tensor, codebooks: list[Tensor], *_: Any
) -> str | None:
    return cuda.why_not("rvq_encode", x_TD) or cuda.why_not_books(codebooks)


def _cuda(grad_TD: Tensor | None, scale_L: Tensor | None, x_TD: Tensor, codes_TL: Tensor, *rest: Any) -> None:
    context = cuda.context("rvq_encode", x_TD.device)
    native.module().rvq_encode_backward_cuda(*context, grad_TD, scale_L, x_TD, codes_TL.contiguous(), *rest)


def _why_not_cpu(
    grad_TD: Tensor | None, scale_L: Tensor | None, x_TD: Tensor, codes_TL: Tensor, codebooks: list[Tensor], *_: Any
) -> str | None:
    if not x_TD.is_cpu:
        return f"takes tensors on the CPU, got {x_TD.device}"
    if any(book_KD.stride(1) != 1 for book_KD in codebooks):
        return "needs codebooks whose rows have adjacent elements"
    return native.why_not()


def _cpu(grad_TD: Tensor | None, scale_L: Tensor | None, x_TD: Tensor, codes_TL: Tensor, *rest: Any) -> None:
    native.module().rvq_encode_backward(
        grad_TD, scale_L, x_TD, codes_TL.contiguous(), *rest, threads=torch.get_num_threads()
    )


def _reference(
    grad_TD: Tensor | None,
    scale_L: Tensor | None,
    x_TD: Tensor,
    codes_TL: Tensor,
    codebooks: list[Tensor],
    residual_dtype: torch.dtype,
    out_TD: Tensor,
) -> None:
    total_TD = torch.zeros_like(x_TD, dtype=torch.float32) if grad_TD is None else grad_TD.float()
    if scale_L is not None:
        residual_TD = x_TD.to(residual_dtype).float()
        for level, book_KD in enumerate(codebooks):
            residual_TD = (residual_TD - book_KD[codes_TL[:, level].clamp(min=0)]).to(residual_dtype).float()
            total_TD = total_TD + scale_L[level] * residual_TD
    out_TD.copy_(torch.where(codes_TL[:, :1] >= 0, total_TD, 0))


IMPLS: dict[str, Impl] = {
    "cuda": Impl(_cuda, _why_not_cuda),
    "triton": triton.implementation("rvq_encode_backward"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": Impl(_reference, lambda *inputs: None),
}
