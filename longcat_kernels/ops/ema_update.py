"""EMA codebook update in place, with Laplace smoothing and restart (LongCat-Next report, equation (4)).

Dimension key
    N rows    D width    K entries
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels import cuda, native, triton
from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.library import check, register
from longcat_kernels.ops.rvq_encode import DTYPES
from longcat_kernels.prepared import PreparedCodebook, repack
from longcat_kernels.reference import ema_update as spec
from longcat_kernels.spec import Op


def ema_update(
    embed: Tensor,
    embed_ema: Tensor,
    cluster_size_ema: Tensor,
    vectors: Tensor,
    codes: Tensor,
    *,
    decay: float = 0.99,
    eps: float = 1e-5,
    restart_threshold: float = 1.0,
    restart_fraction: float = 0.0,
    restart_count: float = 1.0,
    seed: int = 0,
    prepared: PreparedCodebook | None = None,
    backend: str = "auto",
) -> Tensor:
    """Moves a codebook towards the rows assigned to its entries, and restarts entries that are hardly used.

    The result is the same bits for any thread count and does not depend on the order of rows with different codes.

    Args:
        embed: [K, D] float32, the codebook.
        embed_ema: [K, D] float32, moving sum of the rows of each entry.
        cluster_size_ema: [K] float32, moving count of the rows of each entry.
        vectors: [N, D] float32, bfloat16 or float16: the residuals that the level was given.
        codes: [N] int64; a negative code leaves its row out.
        decay: share of the old statistics that is kept, in [0, 1].
        eps: Laplace smoothing of the counts, in rows.
        restart_threshold: entries whose moving count falls below it restart from a row of this batch (RQ-VAE's rule,
            with 1); 0 turns it off.
        restart_fraction: so do entries whose moving count falls below this fraction of the mean count (Moshi's rule,
            with 0.1), however many rows a batch has; 0 turns it off.
        restart_count: moving count that a restarted entry gets; 0 stands for the mean count.
        seed: picks the rows; the rule is `reference.ema_update.restart_rows`. Distinct rows while there are enough.
        prepared: the prepared form of `embed`; follows it in the same pass.
        backend: "auto" or the name of an implementation.

    Returns:
        How many entries restarted, int64 []. Without a usable row the statistics only decay and none restarts.

    Mutates: embed, embed_ema, cluster_size_ema, and `prepared`. A restarted entry has its row as codeword, and as its
    moving sum that row times its new count.

    Raises:
        ValueError: a shape, dtype, device or code is wrong, or no implementation takes the tensors. Codes are looked at
            only on the CPU, where that costs no synchronisation.

    Example:
        >>> embed = torch.tensor([[0.0], [9.0]])
        >>> sums, counts = embed.clone(), torch.ones(2)
        >>> rows, codes = torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, 1])
        >>> ema_update(embed, sums, counts, rows, codes, decay=0.5, eps=0.0).item()  # none restarted
        0
        >>> counts.tolist(), sums[:, 0].tolist(), embed[1].item()
        ([1.5, 1.0], [2.0, 9.0], 9.0)
    """
    check(-(2**63) <= seed < 2**63, lambda: f"ema_update: seed must be in [-2^63, 2^63), got {seed}")
    known = prepared is not None and not torch.compiler.is_compiling()  # a trace cannot tell versions
    packed = _packed_of(prepared, embed) if prepared is not None and known else None
    restarted: Tensor = _op(
        embed,
        embed_ema,
        cluster_size_ema,
        packed,
        vectors,
        codes,
        decay,
        eps,
        restart_threshold,
        restart_fraction,
        restart_count,
        seed,
        backend,
    )
    if prepared is not None and packed is not None:
        prepared.mark_current()
    elif prepared is not None and known:
        prepared.mark_stale()  # `embed` may count its writes apart, as `words.data` does
    return restarted


def _packed_of(prepared: PreparedCodebook, embed: Tensor) -> Tensor | None:
    """The bytes to follow `embed`; None where they are to be made at the next use."""
    words = prepared.words
    same = words.data_ptr() == embed.data_ptr() and words.shape == embed.shape and words.stride() == embed.stride()
    check(same, lambda: "ema_update: prepared must be the prepared form of embed, got that of another tensor")
    return prepared.followed()


def _check(
    embed_KD: Tensor, embed_ema_KD: Tensor, cluster_size_ema_K: Tensor, vectors_ND: Tensor, codes_N: Tensor
) -> None:
    shape, rows = embed_KD.shape, vectors_ND.shape
    if len(shape) != 2 or embed_KD.dtype != torch.float32:
        raise ValueError(f"ema_update: embed must be float32 [K, D], got {embed_KD.dtype} {list(shape)}")
    for name, tensor, dtype, want in (
        ("embed_ema", embed_ema_KD, torch.float32, shape),
        ("cluster_size_ema", cluster_size_ema_K, torch.float32, shape[:1]),
        ("codes", codes_N, torch.int64, rows[:1]),
    ):
        if tensor.dtype != dtype or tensor.shape != want:
            rule = f"{str(dtype).removeprefix('torch.')} {list(want)}"
            raise ValueError(f"ema_update: {name} must be {rule}, got {tensor.dtype} {list(tensor.shape)}")
    if len(rows) != 2 or rows[1] != shape[1]:
        raise ValueError(f"ema_update: vectors must be [N, {shape[1]}], got {list(rows)}")
    if vectors_ND.dtype not in DTYPES:
        raise ValueError(f"ema_update: vectors must be float32, bfloat16 or float16, got {vectors_ND.dtype}")
    device = embed_KD.device
    for name, tensor in (
        ("embed_ema", embed_ema_KD),
        ("cluster_size_ema", cluster_size_ema_K),
        ("vectors", vectors_ND),
        ("codes", codes_N),
    ):
        if tensor.device != device:
            raise ValueError(f"ema_update: {name} must be on {device}, got {tensor.device}")


def _allocate(
    embed_KD: Tensor,
    embed_ema_KD: Tensor,
    cluster_size_ema_K: Tensor,
    packed: Tensor | None,
    vectors_ND: Tensor,
    codes_N: Tensor,
    decay: float,
    eps: float,
    restart_threshold: float,
    restart_fraction: float,
    restart_count: float,
    seed: int,
    backend: str,
) -> Tensor:
    _check(embed_KD, embed_ema_KD, cluster_size_ema_K, vectors_ND, codes_N)
    if not 0 <= decay <= 1:
        raise ValueError(f"ema_update: decay must be in [0, 1], got {decay}")
    for name, value in (("eps", eps), ("restart_fraction", restart_fraction), ("restart_count", restart_count)):
        if not value >= 0:
            raise ValueError(f"ema_update: {name} must be at least 0, got {value}")
    if restart_threshold != restart_threshold:
        raise ValueError("ema_update: restart_threshold must be a number, got nan")
    return embed_KD.new_empty((), dtype=torch.int64)


def _run(
    embed_KD: Tensor,
    embed_ema_KD: Tensor,
    cluster_size_ema_K: Tensor,
    packed: Tensor | None,
    vectors_ND: Tensor,
    codes_N: Tensor,
    decay: float,
    eps: float,
    restart_threshold: float,
    restart_fraction: float,
    restart_count: float,
    seed: int,
    backend: str,
) -> Tensor:
    rule = (decay, eps, restart_threshold, restart_fraction, restart_count, seed)
    inputs = (embed_KD, embed_ema_KD, cluster_size_ema_K, packed, vectors_ND, codes_N, *rule)
    restarted = _allocate(*inputs, backend)
    chosen = choose("ema_update", IMPLS, backend, *inputs)
    if codes_N.is_cpu and chosen is not IMPLS["cpu"] and codes_N.numel():  # that one looks itself, before any work
        largest, entries = int(codes_N.amax()), embed_KD.shape[0]
        check(largest < entries, lambda: f"ema_update: codes must be below {entries}, got {largest}")
    chosen.run(*inputs, restarted)
    # A kernel writes behind autograd's back: a backward that saved them must refuse, not err.
    torch.autograd.graph.increment_version(inputs[:3])
    return restarted


_op = register(
    "ema_update(Tensor(a!) embed, Tensor(b!) embed_ema, Tensor(c!) cluster_size_ema, Tensor(d!)? packed, "
    "Tensor vectors, Tensor codes, float decay, float eps, float restart_threshold, float restart_fraction, "
    "float restart_count, SymInt seed, str backend) -> Tensor",
    _run,
    _allocate,
)


def _why_not_cpu(*inputs: Any) -> str | None:
    if not inputs[0].is_cpu:
        return f"takes tensors on the CPU, got {inputs[0].device}"
    return _why_not_strides(*inputs) or native.why_not()


def _why_not_cuda(*inputs: Any) -> str | None:
    return cuda.why_not("ema_update", inputs[0]) or _why_not_strides(*inputs)


def _why_not_strides(*inputs: Any) -> str | None:
    embed_KD, embed_ema_KD, cluster_size_ema_K, _packed, vectors_ND = inputs[:5]
    if not (embed_KD.is_contiguous() and embed_ema_KD.is_contiguous() and cluster_size_ema_K.is_contiguous()):
        return "needs a contiguous codebook and statistics"
    if vectors_ND.stride(1) != 1:
        return "needs vectors whose rows have adjacent elements"
    return None


def _cpu(*arguments: Any) -> None:
    *tensors, codes_N = arguments[:6]
    native.module().ema_update(*tensors, codes_N.contiguous(), *arguments[6:], threads=torch.get_num_threads())


def _cuda(*arguments: Any) -> None:
    *tensors, codes_N = arguments[:6]
    context, allocate = cuda.context("ema_update", codes_N.device), cuda.allocator(codes_N.device)
    native.module().ema_update_cuda(*context, allocate, *tensors, codes_N.contiguous(), *arguments[6:])


def _reference(*arguments: Any) -> None:
    reference(spec.ema_update).run(*arguments)
    embed_KD, packed = arguments[0], arguments[3]
    if packed is not None:
        repack(embed_KD, packed)


IMPLS: dict[str, Impl] = {
    "cuda": Impl(_cuda, _why_not_cuda),
    "triton": triton.implementation("ema_update"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": Impl(_reference, lambda *inputs: None),
}
OP = Op("ema_update", ema_update, IMPLS, spec)
