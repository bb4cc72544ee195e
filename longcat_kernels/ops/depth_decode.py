"""Depth decode: all codes of a position, drawn level by level (LongCat-Next report, section 2.5.2).

Dimension key
    T positions    L levels    V classes of a level    H width of the backbone    D width of the depth transformer
    E width of the tables    P forced levels    N codes of history
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels import cuda, native, triton
from longcat_kernels.backends import Impl, choose, reference
from longcat_kernels.library import check, register
from longcat_kernels.ops import _depth_checks as checks
from longcat_kernels.ops import _depth_cpu
from longcat_kernels.prepared import PreparedDepth
from longcat_kernels.reference import depth_decode as spec
from longcat_kernels.reference._depth_checks import check_shapes, check_weights
from longcat_kernels.reference.depth_decode import DepthDecoding
from longcat_kernels.reference.depth_sampling import DepthSampling
from longcat_kernels.reference.depth_weights import DepthConfig, DepthWeights
from longcat_kernels.reference.sampling import row_seeds, row_steps
from longcat_kernels.spec import Op
from longcat_kernels.workspace import New, Workspace, fresh, scratch_of

PAIRS = ("interleaved", "split")


def depth_decode(
    hidden: Tensor,
    weights: DepthWeights | PreparedDepth,
    sampling: DepthSampling | Tensor | None = None,
    *,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    pairs: str | Tensor | None = None,
    start: Tensor | None = None,
    prefix: Tensor | None = None,
    active: Tensor | None = None,
    history: tuple[Tensor, Tensor] | None = None,
    logits: bool = False,
    workspace: Workspace | None = None,
    backend: str = "auto",
) -> DepthDecoding:
    """Draws the L codes of each position; no gradient.

    A code is a pure function of the position's hidden state, the weights, its sampling numbers, its seed and step, the
    level and the id, whatever else is in the batch: see `longcat_kernels.sample` for how. A row with NaN gets code 0
    where a level's logits are lost, and NaN logprobs; other rows do not notice. Nor do a row's bits depend on the
    batch, except with "reference", and on a GPU where few rows become many, more than 8 or, of very wide ones, less:
    `cuda` has another kernel for these in bfloat16, and leaves them to Triton's in other dtypes. Name "triton" where
    that matters, or keep the number of rows by `active`. Between implementations, and between processors, logits differ
    by rounding, and codes where two are nearly as good.

    Args:
        hidden: [T, H] of the weights' dtype: backbone states after the final norm.
        weights: what the transformer is made of, as `longcat_kernels.modules.DepthTransformer.weights` gives it, or its
            prepared form, which spares every call the packing.
        sampling: numbers of the draw, or `DepthSampling.table` of them; None: temperature 1 without truncation.
        seed: int, and row r then uses seed + r, or int64 [T].
        step: position of the draw in its stream, in [0, 2^63), or int64 [T].
        pairs: classifier-free guidance: "interleaved", rows are [conditional, unconditional, conditional, ...];
            "split", the first half are conditional; or int64 [T], the row whose code each row takes: its own if it
            draws, else that of the conditional row to which it lends its logits as the unconditional ones. A pair uses
            the numbers, seed, step, prefix, history and activity of its conditional row.
        start: [T, D], added to the input of level 0 of a "last+hidden" transformer: Moshi's text embedding.
        prefix: int64 [T, P], codes of the first P levels, not drawn but given; -1 draws.
        active: bool [T]: the other rows get code -1 and zeros; their states are not read, but numbers must be in range.
        history: codes [N, L] int64 of earlier positions, of all rows one after the other, and offsets int64 [T + 1]:
            row t owns codes[offsets[t] : offsets[t + 1]], which its repetition penalty is about. Ids that a level does
            not have are ignored.
        logits: also return the logits of all levels that have a head.
        workspace: memory of the results, which the next call with it overwrites while it still reads its arguments
            (an earlier result among them must be a copy), and of all between. A call whose numbers, seed, step and
            pairs are tensors, and all arguments contiguous, then allocates none. On a GPU it only enqueues kernels on
            the current stream, so that after a first call, which loads them, a CUDA graph can capture it: a replay
            draws by what the tensors then hold. Not used inside `torch.compile`, nor for fake tensors or those on meta.
        backend: "auto" or the name of an implementation.

    Returns:
        codes [T, L]; logprobs [T, L] under the untruncated softmax at temperature 1, with guidance applied and "end"
        included; drawn_logprobs [T, L] under the distribution of the draw; embedding [T, E], the sum of the codes'
        embeddings; logits [T, sum of V], side by side.

    Raises:
        ValueError: a shape, dtype, device or number is wrong, or no implementation takes the tensors. Numbers in
            tensors on an accelerator are not read.

    Example:
        >>> from longcat_kernels.modules import DepthTransformer
        >>> head = DepthTransformer(hidden=8, dim=4, heads=2, layers=1, ffn_scale=4, sizes=(5, 3))
        >>> weights = head.prepared([torch.randn(6, 8), torch.randn(4, 8)])
        >>> depth_decode(torch.randn(7, 8), weights, DepthSampling(temperature=0.5, top_k=3), seed=1).codes.shape
        torch.Size([7, 2])
    """
    packed: list[Tensor] = []
    if isinstance(weights, PreparedDepth):
        packed = [] if torch.compiler.is_compiling() else weights.refresh().packed
        config, tensors = weights.weights.config, weights.tensors
        checks.check_like(hidden, weights.like)
    else:
        check_weights(weights)
        config, tensors = weights.config, weights.tensors()
    checks.check_hidden(hidden, config)
    rows, device = hidden.shape[0], hidden.device
    params = sampling if isinstance(sampling, Tensor) else (sampling or DepthSampling()).table(rows, config, device)
    numbers = (row_seeds("depth_decode", seed, rows, device), row_steps("depth_decode", step, rows, device))
    arguments = (
        hidden,
        tensors,
        packed,
        params,
        *numbers,
        start,
        prefix,
        active,
        _leaders(pairs, rows, device),
        *_past(history),
        config.numbers(),
        config.eps,
        logits,
        backend,
    )
    is_real = not torch.compiler.is_compiling() and hidden.untyped_storage().device.type != "meta"
    new = None
    if workspace is not None and is_real:
        given = {"hidden": hidden, "start": start, "prefix": prefix, "active": active}
        _check_apart(
            workspace, given | dict(zip(("history's codes", "history's offsets"), history or (), strict=False))
        )
        new = workspace.new
    with torch.no_grad():
        outputs = _op(*arguments) if new is None else _decode(arguments, new)
    logprobs, drawn_logprobs, embedding, all_logits, codes = outputs
    return DepthDecoding(codes, logprobs, drawn_logprobs, embedding, all_logits)


def _check_apart(workspace: Workspace, given: dict[str, Tensor | None]) -> None:
    for name, tensor in given.items():
        if tensor is not None and workspace.has(tensor):
            raise ValueError(
                f"depth_decode: {name} must not be a result that its workspace holds, which this call overwrites "
                "while it reads; pass a clone"
            )


def _leaders(pairs: str | Tensor | None, rows: int, device: torch.device) -> Tensor | None:
    """The row whose code each row takes."""
    if pairs is None:
        return None
    rule = f"None, interleaved, split or int64 [{rows}]"
    if isinstance(pairs, Tensor):
        found = f"{pairs.dtype} {list(pairs.shape)}"
        fits = pairs.shape == (rows,) and pairs.dtype == torch.int64
        check(fits, lambda: f"depth_decode: pairs must be {rule}, got {found}")
        return pairs
    check(pairs in PAIRS, lambda: f"depth_decode: pairs must be {rule}, got {pairs!r}")
    check(rows % 2 == 0, lambda: f"depth_decode: pairs must have an even number of rows, got {rows}")
    own_T = torch.arange(rows, device=device)
    return own_T // 2 * 2 if pairs == "interleaved" else own_T % max(1, rows // 2)


def _past(history: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Codes and offsets."""
    if history is None:
        return None, None
    found = [type(part).__name__ for part in history] if isinstance(history, (tuple, list)) else type(history).__name__
    fits = isinstance(found, list) and len(found) == 2 and all(isinstance(part, Tensor) for part in history)
    check(fits, lambda: f"depth_decode: history must be a tensor of codes and one of offsets, got {found}")
    codes, offsets = history
    return codes, offsets


def _allocate(
    hidden: Tensor,
    weights: list[Tensor],
    packed: list[Tensor],
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    start: Tensor | None,
    prefix: Tensor | None,
    active: Tensor | None,
    leaders: Tensor | None,
    history: Tensor | None,
    offsets: Tensor | None,
    config: list[int],
    eps: float,
    wants_logits: bool,
    backend: str,
    new: New = fresh,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = DepthConfig.of(config, eps)
    checks.check_hidden(hidden, sizes)
    if not packed:
        check_shapes(DepthWeights.of(weights, sizes), hidden)
    past = None if history is None or offsets is None else (history, offsets)
    checks.check_rows(hidden, sizes, params, start, prefix, active, leaders, past)
    rows, device = hidden.shape[0], hidden.device
    classes = sum(sizes.classes[sizes.given :]) if wants_logits else 0
    return (
        new("logprobs", (rows, sizes.levels), torch.float32, device),
        new("drawn_logprobs", (rows, sizes.levels), torch.float32, device),
        new("embedding", (rows, sizes.width), hidden.dtype, device),
        new("logits", (rows, classes), torch.float32, device),
        new("codes", (rows, sizes.levels), torch.int64, device),
    )


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    return _decode(arguments, fresh)


def _decode(arguments: tuple[Any, ...], new: New) -> tuple[Tensor, ...]:
    outputs = _allocate(*(*arguments, new))
    *inputs, backend = arguments
    config, *contents = (inputs[i] for i in (12, 3, 5, 7, 9, 10, 11))
    checks.check_contents(DepthConfig.of(config, inputs[13]), *contents)
    choose("depth_decode", IMPLS, backend, *inputs).run(*inputs, *outputs, new=new)
    return outputs


_op = register(
    "depth_decode(Tensor hidden, Tensor[] weights, Tensor[] packed, Tensor params, Tensor seeds, Tensor steps, "
    "Tensor? start, Tensor? prefix, Tensor? active, Tensor? leaders, Tensor? history, Tensor? offsets, int[] config, "
    "float eps, bool wants_logits, str backend) "
    "-> (Tensor logprobs, Tensor drawn_logprobs, Tensor embedding, Tensor logits, Tensor codes)",
    _run,
    _allocate,
)


def _why_not_cuda(hidden: Tensor, weights: list[Tensor], *rest: Any) -> str | None:
    reason = cuda.why_not("depth_decode", hidden)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(hidden.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, got {hidden.dtype}"
    if any(tensor.numel() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 for tensor in weights):
        return "needs weights whose rows have adjacent elements"
    most: int = native.module().depth_most_rows_cuda(*capability, rest[10], hidden.dtype)
    if hidden.shape[0] > most:
        return f"takes at most {most} rows of these sizes, got {hidden.shape[0]}"
    return None


def _cuda(
    hidden: Tensor,
    weights: list[Tensor],
    packed: list[Tensor],
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *rest: Any,
    new: New,
) -> None:
    """Reads the weights as they are: nothing is packed."""
    params = params if params.stride(-1) == 1 else params.contiguous()
    optional = (tensor if tensor is None else tensor.contiguous() for tensor in rest[:6])
    context = cuda.context("depth_decode", hidden.device)
    rows = (hidden.contiguous(), weights, params, seeds.contiguous(), steps)
    native.module().depth_decode_cuda(*context, scratch_of(new, hidden.device), *rows, *optional, *rest[6:])


IMPLS: dict[str, Impl] = {
    "cuda": Impl(_cuda, _why_not_cuda),
    "triton": triton.implementation("depth_decode"),
    "cpu": Impl(_depth_cpu.decode, _depth_cpu.why_not),
    "reference": reference(spec.depth_decode),
}
OP = Op("depth_decode", depth_decode, IMPLS, spec)
