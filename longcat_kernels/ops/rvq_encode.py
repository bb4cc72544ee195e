"""RVQ encode: exact nearest-codeword quantization over L levels (LongCat-Next report, equation (3)).

Dimension key
    T rows (the leading shape of x, flattened)    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from longcat_kernels import cuda, native, triton
from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.library import check, register, wants_grad
from longcat_kernels.ops._rvq_encode_backward import rvq_encode_backward
from longcat_kernels.prepared import PreparedCodebook
from longcat_kernels.reference import rvq_encode as spec
from longcat_kernels.spec import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Codebook: TypeAlias = Tensor | PreparedCodebook


class RVQEncoding(NamedTuple):
    """What `rvq_encode` gives; shapes are those of x without or with its last axis."""

    codes: Tensor  # [..., L] int64; -1 where masked
    quantized: Tensor  # [..., D] x.dtype: sum of the codewords, added in float32; gradient 1 to x
    residual: Tensor  # [..., D] float32: what is left after the last level; no gradient
    losses: Tensor  # [L] float32: mean over unmasked elements of (x - cumulative quantized)^2; gradient to x


def rvq_encode(
    x: Tensor,
    codebooks: Sequence[Codebook] | Codebook,
    *,
    levels: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    residual_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> RVQEncoding:
    """Quantizes each row of x by one codeword a level, each the nearest to what the levels before left over.

    Codes are exact: of the float32 residual recursion, nearest in float64, ties to the lower index; bit-identical
    for any batch size, row order, thread count and implementation. Gradients reach x only: 1 through `quantized`
    (whatever the number of levels) and 2 (x - cumulative quantized) / count through `losses`.

    Sources: LongCat-Next report, equation (3), and SoundStream, arXiv 2107.03312, for the residual recursion;
    `reference.rvq_encode` defines the scores to the last bit.

    Args:
        x: [..., D], float32, bfloat16 or float16, any strides. A row with NaN or infinity gets code 0 at every level,
            shows in its own residual and in the losses, and changes no other row.
        codebooks: L codebooks [K_l, D] float32, or one that all levels share: tensors, or `PreparedCodebook`s, which
            spare every call the packing. Non-contiguous tensors are taken, more slowly.
        levels: use only the first `levels` codebooks; required with a shared one.
        mask: bool, the leading shape of x; rows where it is False get code -1, zero quantized and residual, no loss.
        lengths: integers [B] in place of a mask, x being [B, S, D]: of sequence b only the first lengths[b] rows count.
        residual_dtype: the residual is rounded to it before and after each level; bfloat16 in the released audio
            tokenizer.
        backend: "auto" or the name of an implementation.

    Raises:
        ValueError: a shape, dtype or device is wrong, or no implementation takes the tensors.

    Example:
        >>> e = rvq_encode(torch.tensor([[0.9], [3.2]]), [torch.tensor([[1.0], [3.0]]), torch.tensor([[-0.1], [0.1]])])
        >>> e.codes.tolist()
        [[0, 0], [1, 1]]
    """
    books = level_codebooks("rvq_encode", codebooks, levels)
    return _encode(_op, x, books, row_mask(x, mask, lengths), residual_dtype, backend)


def rvq_encode_before_update(
    x: Tensor,
    codebooks: Sequence[Codebook],
    *,
    mask: Tensor | None = None,
    residual_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> RVQEncoding:
    """`rvq_encode` for a caller that moves the codebooks before backward, as training by moving averages does.

    Backward reads the codewords that the rows chose: they are copied, or the whole codebooks where that is less.
    """
    books, mask = level_codebooks("rvq_encode", codebooks, None), row_mask(x, mask, None)
    if wants_grad(x):
        return _encode(_EncodeBeforeUpdate.apply, x, books, mask, residual_dtype, backend)
    with torch.no_grad():  # whatever the codebooks want
        return _encode(_op, x, books, mask, residual_dtype, backend)


def _encode(
    run: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    books: list[Codebook],
    mask: Tensor | None,
    residual_dtype: torch.dtype,
    backend: str,
) -> RVQEncoding:
    packed, gram = _prepared(books)
    mask_T = None if mask is None else mask.reshape(-1)
    x_TD = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    quantized, residual, losses, codes = run(x_TD, words_of(books), packed, gram, mask_T, residual_dtype, backend)
    if x_TD is x:
        return RVQEncoding(codes, quantized, residual, losses)
    shape = x.shape[:-1]
    return RVQEncoding(codes.view(*shape, len(books)), quantized.view(x.shape), residual.view(x.shape), losses)


class _EncodeBeforeUpdate(torch.autograd.Function):
    """The op, with a backward of copies."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _op(*inputs)
        x_TD, codebooks, _packed, _gram, _mask, ctx.residual_dtype, ctx.backend = inputs
        _quantized, residual_TD, _losses, codes_TL = outputs
        ctx.mark_non_differentiable(codes_TL, residual_TD)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TD, *_copies(codes_TL, codebooks))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_TD, _residual, grad_L, _codes = grads
        x_TD, codes_TL, *words = ctx.saved_tensors
        grad_x_TD = rvq_encode_backward(grad_TD, grad_L, x_TD, codes_TL, words, ctx.residual_dtype, ctx.backend)
        return grad_x_TD, None, None, None, None, None, None


def _copies(codes_TL: Tensor, codebooks: list[Tensor]) -> list[Tensor]:
    """Codes [T, L] and one codebook a level that name the same codewords, and share no memory with `codebooks`."""
    rows = torch.arange(codes_TL.shape[0], device=codes_TL.device)
    shared = all(book_KD is codebooks[0] for book_KD in codebooks)
    if shared and codes_TL.numel() >= codebooks[0].shape[0]:
        return [codes_TL, *[codebooks[0].clone()] * len(codebooks)]
    codes, words = [], []
    for codes_T, book_KD in zip(codes_TL.unbind(1), codebooks, strict=True):
        gathers = shared or codes_TL.shape[0] < book_KD.shape[0]
        codes.append(torch.where(codes_T < 0, -1, rows) if gathers else codes_T)
        words.append(book_KD[codes_T.clamp(min=0)] if gathers else book_KD.clone())
    return [torch.stack(codes, 1), *words]


def row_mask(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Which rows of x [..., D] count, bool, by whichever of the two is given; None: all.

    Raises:
        ValueError: x has no rows of at least one element, or what is given does not fit it.
    """
    check(
        x.ndim >= 1 and x.shape[-1] >= 1, lambda: f"rvq_encode: x must be [..., D], D at least 1, got {list(x.shape)}"
    )
    if lengths is not None:
        check(mask is None, lambda: "rvq_encode: mask and lengths must not both be given")
        return _mask_of(lengths, x)
    if mask is not None:
        _check_mask(mask, x)
    return mask


def words_of(codebooks: Sequence[Codebook]) -> list[Tensor]:
    """The codewords alone."""
    return [book.words if isinstance(book, PreparedCodebook) else book for book in codebooks]


def _prepared(codebooks: list[Codebook]) -> tuple[list[Tensor], Tensor | None]:
    """Packed forms, one a level or none at all, and the products of a shared codebook's words, where all have them."""
    if torch.compiler.is_compiling() or not all(isinstance(book, PreparedCodebook) for book in codebooks):
        return [], None  # a trace cannot tell whether codewords have changed
    prepared = [book.refresh() for book in codebooks if isinstance(book, PreparedCodebook)]
    packed = [book.packed for book in prepared if book.packed is not None]
    shared = all(book is prepared[0] for book in prepared)
    return packed if len(packed) == len(prepared) else [], prepared[0].gram if shared else None


def _mask_of(lengths: Tensor, x: Tensor) -> Tensor:
    fits = x.ndim == 3 and list(lengths.shape) == [x.shape[0]]
    check(
        fits and not lengths.is_floating_point() and lengths.dtype != torch.bool,
        lambda: (
            f"rvq_encode: lengths must be integers [B] with x [B, S, D], got {lengths.dtype} "
            f"{list(lengths.shape)} with x {list(x.shape)}"
        ),
    )
    check(lengths.device == x.device, lambda: f"rvq_encode: lengths must be on {x.device}, got {lengths.device}")
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def level_codebooks(op: str, codebooks: Sequence[Codebook] | Codebook, levels: int | None) -> list[Codebook]:
    """One codebook a level; a shared one stands there `levels` times."""
    if isinstance(codebooks, (Tensor, PreparedCodebook)):
        if isinstance(codebooks, Tensor) and codebooks.ndim > 2:
            rule, shape = "a list of [K, D], or one that levels share", list(codebooks.shape)
            raise ValueError(f"{op}: codebooks must be {rule}, got {shape}: unbind it")
        if levels is None or levels < 1:
            raise ValueError(f"{op}: levels must be at least 1 with one shared codebook, got {levels}")
        return [codebooks] * levels
    count = len(codebooks)
    check(count >= 1, lambda: f"{op}: codebooks must have at least one level, got 0")
    used = count if levels is None else levels
    check(1 <= used <= count, lambda: f"{op}: levels must be between 1 and {count}, got {levels}")
    return list(codebooks[:used])


def _check_mask(mask: Tensor, x: Tensor) -> None:
    shape = list(x.shape[:-1])
    check(
        mask.dtype == torch.bool and list(mask.shape) == shape,
        lambda: f"rvq_encode: mask must be torch.bool {shape}, got {mask.dtype} {list(mask.shape)}",
    )
    check(mask.device == x.device, lambda: f"rvq_encode: mask must be on {x.device}, got {mask.device}")


def check_codebook(op: str, codebook: Tensor, width: int, device: torch.device) -> None:
    """Raises ValueError unless `codebook` is [K, width] float32 on `device`."""
    shape = codebook.shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
        raise ValueError(f"{op}: codebooks must be [K, {width}] with K at least 1, got {list(shape)}")
    if codebook.dtype != torch.float32:
        raise ValueError(f"{op}: codebooks must be float32, got {codebook.dtype}")
    if codebook.device != device:
        raise ValueError(f"{op}: codebooks must be on {device}, got {codebook.device}")


def _check(x_TD: Tensor, codebooks: list[Tensor], residual_dtype: torch.dtype) -> None:
    names = "float32, bfloat16 or float16"
    check(x_TD.dtype in DTYPES, lambda: f"rvq_encode: x must be {names}, got {x_TD.dtype}")
    check(residual_dtype in DTYPES, lambda: f"rvq_encode: residual_dtype must be {names}, got {residual_dtype}")
    for codebook_KD in codebooks:
        check_codebook("rvq_encode", codebook_KD, x_TD.shape[1], x_TD.device)


def _allocate(
    x_TD: Tensor,
    codebooks: list[Tensor],
    packed: list[Tensor],
    gram: Tensor | None,
    mask_T: Tensor | None,
    residual_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x_TD, codebooks, residual_dtype)
    shape, levels = x_TD.shape, len(codebooks)
    return (
        x_TD.new_empty(*shape),
        x_TD.new_empty(*shape, dtype=torch.float32),
        x_TD.new_empty(levels, dtype=torch.float32),
        x_TD.new_empty(shape[0], levels, dtype=torch.int64),
    )


def _run(
    x_TD: Tensor,
    codebooks: list[Tensor],
    packed: list[Tensor],
    gram: Tensor | None,
    mask_T: Tensor | None,
    residual_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x_TD, codebooks, packed, gram, mask_T, residual_dtype)
    outputs = _allocate(*inputs, backend)
    choose("rvq_encode", IMPLS, backend, *inputs).run(*inputs, *outputs)
    return outputs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, codebooks, _packed, _gram, _mask, ctx.residual_dtype, ctx.backend = inputs
    _quantized, residual_TD, _losses, codes_TL = output
    ctx.mark_non_differentiable(codes_TL, residual_TD)
    ctx.packed = len(_packed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, codes_TL, *codebooks)


def _backward(
    ctx: Any, grad_TD: Tensor | None, _residual: None, grad_L: Tensor | None, _codes: None
) -> tuple[Any, ...]:
    x_TD, codes_TL, *codebooks = ctx.saved_tensors
    grad_x_TD = rvq_encode_backward(grad_TD, grad_L, x_TD, codes_TL, codebooks, ctx.residual_dtype, ctx.backend)
    return grad_x_TD, [None] * len(codebooks), [None] * ctx.packed, None, None, None, None


_op = register(
    "rvq_encode(Tensor x, Tensor[] codebooks, Tensor[] packed, Tensor? gram, Tensor? mask, ScalarType residual_dtype, "
    "str backend) -> (Tensor quantized, Tensor residual, Tensor losses, Tensor codes)",
    _run,
    _allocate,
    save=_save,
    backward=_backward,
)


def _why_not_cuda(x_TD: Tensor, codebooks: list[Tensor], *_: Any) -> str | None:
    reason = cuda.why_not("rvq_encode", x_TD) or cuda.why_not_books(codebooks)
    if reason is None and x_TD.shape[1] > cuda.MOST_COLUMNS:
        reason = f"takes at most {cuda.MOST_COLUMNS} columns, got {x_TD.shape[1]}"
    return reason


def _cuda(
    x_TD: Tensor,
    codebooks: list[Tensor],
    packed: list[Tensor],
    gram: Tensor | None,
    mask_T: Tensor | None,
    *rest: Any,
) -> None:
    mask_T = None if mask_T is None else mask_T.contiguous()
    context, allocate = cuda.context("rvq_encode", x_TD.device), cuda.allocator(x_TD.device)
    native.module().rvq_encode_cuda(*context, allocate, x_TD, codebooks, packed, mask_T, *rest)


def _why_not_cpu(x_TD: Tensor, codebooks: list[Tensor], *_: Any) -> str | None:
    if not x_TD.is_cpu:
        return f"takes tensors on the CPU, got {x_TD.device}"
    if any(codebook_KD.stride(1) != 1 for codebook_KD in codebooks):
        return "needs codebooks whose rows have adjacent elements"
    return native.why_not()


def _cpu(
    x_TD: Tensor,
    codebooks: list[Tensor],
    packed: list[Tensor],
    gram: Tensor | None,
    mask_T: Tensor | None,
    *rest: Any,
) -> None:
    mask_T = None if mask_T is None else mask_T.contiguous()
    native.module().rvq_encode(x_TD, codebooks, packed, gram, mask_T, *rest, threads=torch.get_num_threads())


IMPLS: dict[str, Impl] = {
    "cuda": Impl(_cuda, _why_not_cuda),
    "triton": triton.implementation("rvq_encode"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": reference(spec.rvq_encode),
}
OP = Op("rvq_encode", rvq_encode, IMPLS, spec)
