"""Depth decode: all codes of a position, drawn level by level (LongCat-Next report, section 2.5.2).

Dimension key
    T positions    L levels    H width of the backbone    D width of the depth transformer    F hidden units of a level
    C codebook entries of a level; its classes and table rows are C + 1, the last of them "end"    P forced levels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.library import check, register
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference.depth_decode import DepthDecoding, DepthWeights
from longcat_kernels.reference.sampling import check_sampling, row_seeds
from longcat_kernels.spec import Op

MAX_LEVELS = 32
ENDS = ("mask", "level0", "allow")


def depth_decode(
    hidden: Tensor,
    weights: DepthWeights,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor = 0,
    step: int = 0,
    guidance: float | None = None,
    end: str = "mask",
    prefix: Tensor | None = None,
    backend: str = "auto",
) -> DepthDecoding:
    """Draws the L codes of each position; no gradient.

    A code is a pure function of the position's hidden state, the weights, the sampling numbers, its seed, `step`, the
    level and the id, whatever else is in the batch: see `longcat_kernels.sample` for how. Order of the sampler:
    guidance, end, temperature, top-k, then top-p of what top-k kept, renormalised.

    Args:
        hidden: [T, H] of the weights' dtype: backbone states after the final norm.
        weights: as `longcat_kernels.modules.DepthTransformer.weights` gives them.
        temperature: 0 takes the largest logit, the lowest id among equals.
        top_k: keeps the k largest logits, equal ones by lower id; 0 keeps all.
        top_p: keeps the fewest most probable ids that reach this share.
        seed: int, and row r then uses seed + r, or int64 [T].
        step: position of the draw in its stream, in [0, 2^63).
        guidance: scale s of classifier-free guidance, or None. Rows are then pairs [conditional, unconditional]:
            logits = s * (conditional - unconditional) + unconditional, and both get the code drawn with the seed of
            the first.
        end: where class C_l may be drawn: "mask" nowhere, "level0" at level 0 only, "allow" everywhere.
        prefix: int64 [T, P], codes of the first P levels, not drawn but given.
        backend: "auto" or the name of an implementation.

    Returns:
        codes [T, L] int64; logprobs [T, L] float32 of the codes under the untruncated softmax at temperature 1, with
        guidance applied and class C_l included; embedding [T, H], the sum of the codes' embeddings.

    Raises:
        ValueError: a shape, dtype, device or number is wrong, or no implementation takes the tensors.
    """
    check_sampling("depth_decode", temperature, top_k, top_p)
    check(0 <= step < 2**63, lambda: f"depth_decode: step must be in [0, 2^63), got {step}")
    check(end in ENDS, lambda: f"depth_decode: end must be mask, level0 or allow, got {end!r}")
    _check_counts(weights)
    seeds = row_seeds("depth_decode", seed, hidden.shape[0], hidden.device)
    shape = (len(weights.tables), weights.heads, weights.eps)
    numbers = (float(temperature), top_k, float(top_p), step, guidance, end)
    with torch.no_grad():
        logprobs, embedding, codes = _op(hidden, weights.tensors(), seeds, prefix, *shape, *numbers, backend)
    return DepthDecoding(codes, logprobs, embedding)


def _check_counts(weights: DepthWeights) -> None:
    levels = len(weights.tables)
    check(1 <= levels <= MAX_LEVELS, lambda: f"depth_decode: weights must have 1 to {MAX_LEVELS} levels, got {levels}")
    for name in ("head_weights", "head_biases"):
        count = len(getattr(weights, name))
        if count != levels:
            raise ValueError(f"depth_decode: weights.{name} must have {levels} tensors, one a level, got {count}")


def _check_weights(weights: DepthWeights, like: Tensor) -> None:
    """Every tensor against the shape that the width of the projection, the tables and the feed-forwards give it."""
    dim, hidden = weights.hidden_proj.shape
    levels = len(weights.tables)
    shapes = {"hidden_norm": [hidden], "hidden_proj": [dim, hidden], "headnorm": [dim]}
    for name, shape in shapes.items():
        _check_tensor(name, getattr(weights, name), shape, like)
    for layer in weights.layers:
        width = layer.up.shape[1] if layer.up.ndim == 3 else 0
        for name, tensor in layer._asdict().items():
            is_square, is_up = name in ("q_weight", "k_weight", "v_weight", "out_weight"), name == "up"
            shape = [dim, dim] if is_square else [levels, width, dim] if is_up else [dim]
            _check_tensor(f"layers.{name}", tensor, [levels, dim, width] if name == "down" else shape, like)
    for table, head_weight, head_bias in zip(weights.tables, weights.head_weights, weights.head_biases, strict=True):
        classes = table.shape[0] if table.ndim == 2 else 0
        if classes < 2:
            rule = f"[C + 1, {hidden}] with C at least 1"
            raise ValueError(f"depth_decode: weights.tables must be {rule}, got {list(table.shape)}")
        _check_tensor("tables", table, [classes, hidden], like)
        _check_tensor("head_weights", head_weight, [classes, dim], like)
        _check_tensor("head_biases", head_bias, [classes], like)


def _check_tensor(name: str, tensor: Tensor, shape: list[int], like: Tensor) -> None:
    found = list(tensor.shape)
    check(
        found == shape and tensor.dtype == like.dtype,
        lambda: f"depth_decode: weights.{name} must be {like.dtype} {shape}, got {tensor.dtype} {found}",
    )
    check(
        tensor.device == like.device,
        lambda: f"depth_decode: weights.{name} must be on {like.device}, got {tensor.device}",
    )


def _check(
    hidden_TH: Tensor, weights: DepthWeights, seeds_T: Tensor, prefix_TP: Tensor | None, guidance: float | None
) -> None:
    found_proj = list(weights.hidden_proj.shape)
    check(len(found_proj) == 2, lambda: f"depth_decode: weights.hidden_proj must be [D, H], got {found_proj}")
    dim, width = found_proj
    check(
        hidden_TH.ndim == 2 and hidden_TH.shape[1] == width and hidden_TH.dtype.is_floating_point,
        lambda: (
            f"depth_decode: hidden must be [T, {width}] floating point, got {hidden_TH.dtype} {list(hidden_TH.shape)}"
        ),
    )
    rows, levels, heads = hidden_TH.shape[0], len(weights.tables), weights.heads
    check(
        heads >= 1 and dim % heads == 0,
        lambda: f"depth_decode: weights must have heads that divide {dim}, got {heads}",
    )
    _check_weights(weights, hidden_TH)
    if guidance is not None:
        check(rows % 2 == 0, lambda: f"depth_decode: guidance must have rows in pairs, got {rows} rows")
    if prefix_TP is not None:
        found = list(prefix_TP.shape)
        check(
            len(found) == 2 and found[0] == rows and found[1] <= levels and prefix_TP.dtype == torch.int64,
            lambda: f"depth_decode: prefix must be int64 [{rows}, P] with P <= {levels}, got {prefix_TP.dtype} {found}",
        )
        device = prefix_TP.device
        check(device == hidden_TH.device, lambda: f"depth_decode: prefix must be on {hidden_TH.device}, got {device}")


def _allocate(
    hidden: Tensor,
    tensors: list[Tensor],
    seeds: Tensor,
    prefix: Tensor | None,
    levels: int,
    heads: int,
    eps: float,
    temperature: float,
    top_k: int,
    top_p: float,
    step: int,
    guidance: float | None,
    end: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(hidden, DepthWeights.of(tensors, levels, heads, eps), seeds, prefix, guidance)
    rows, device = hidden.shape[0], hidden.device
    return (
        torch.empty(rows, levels, dtype=torch.float32, device=device),
        torch.empty(hidden.shape, dtype=hidden.dtype, device=device),
        torch.empty(rows, levels, dtype=torch.int64, device=device),
    )


def _check_prefix(prefix_TP: Tensor, classes: list[int]) -> None:
    """The given codes against the classes of their levels; on an accelerator reading them would wait for the device."""
    if prefix_TP.device.type != "cpu" or not prefix_TP.numel():
        return
    for level, (low, high) in enumerate(zip(prefix_TP.amin(0).tolist(), prefix_TP.amax(0).tolist(), strict=True)):
        wrong, size = low if low < 0 else high, classes[level]
        if not 0 <= wrong < size:
            raise ValueError(f"depth_decode: prefix must be in [0, {size}) at level {level}, got {wrong}")


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate(*arguments)
    *inputs, backend = arguments
    _hidden, tensors, _seeds, prefix, levels, heads, eps = inputs[:7]
    if prefix is not None:
        _check_prefix(prefix, [len(table) for table in DepthWeights.of(tensors, levels, heads, eps).tables])
    choose("depth_decode", IMPLS, backend, *inputs).run(*inputs, *outputs)
    return outputs


_op = register(
    "depth_decode(Tensor hidden, Tensor[] tensors, Tensor seeds, Tensor? prefix, int levels, int heads, float eps, "
    "float temperature, SymInt top_k, float top_p, SymInt step, float? guidance, str end, str backend) "
    "-> (Tensor logprobs, Tensor embedding, Tensor codes)",
    _run,
    _allocate,
)

IMPLS: dict[str, Impl] = {
    "reference": reference(spec.depth_decode),
}
OP = Op("depth_decode", depth_decode, IMPLS, spec)
