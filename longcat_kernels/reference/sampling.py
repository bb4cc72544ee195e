"""Reproducible sampling: counter-based random numbers and a sampler that is a pure function of its arguments.

The noise of a class is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by
the row's seed with the counter (id // 4, level, step), so a draw depends on nothing else in the batch. Choosing the
largest of logit / temperature + Gumbel noise draws from the softmax (Gumbel 1954).

Dimension key
    T rows    V classes    L levels    N codes of history
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TEXT_LEVEL = 2**32 - 1  # the level word of draws that belong to no code level
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# The numbers of one draw, float32, by column; and in which range each must be, as (rule, lowest, highest).
COLUMNS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "excluded", "guidance", "order")
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, EXCLUDED, GUIDANCE, ORDER = range(8)
ORDERS = ("sequential", "joint")
_TINY, _LARGE = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
RANGES = (
    (">= 0 and finite", 0.0, _LARGE),
    (">= 0 (0 keeps all)", 0.0, 2.0**24),
    ("in (0, 1]", _TINY, 1.0),
    ("in [0, 1)", 0.0, 1 - 2.0**-24),
    ("> 0 and finite", _TINY, _LARGE),
    (">= 0", 0.0, 2.0**24),
    ("finite", -_LARGE, _LARGE),
    ("sequential or joint", 0.0, 1.0),
)
WHOLE = (TOP_K, EXCLUDED, ORDER)


class Sampled(NamedTuple):
    ids: Tensor  # [T] int64
    logprobs: Tensor  # [T] float32: of the chosen id under the untruncated softmax at temperature 1
    drawn_logprobs: Tensor  # [T] float32: under the distribution that the id was drawn from


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    order: str | Tensor = "sequential",
    history: tuple[Tensor, Tensor] | None = None,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    level: int = TEXT_LEVEL,
) -> Sampled:
    """Draws one id a row; the draw depends on the row's logits and numbers, on step and level, and on nothing else.

    The numbers of the draw may also be tensors [T], one a row.

    Args:
        logits: [T, V] floating point; -inf is never drawn. A row with NaN or inf gets id 0 and NaN logprobs.
        temperature: 0 takes the largest logit, the lowest id among equals.
        top_k: keeps the k largest logits, equal ones by lower id; 0 keeps all.
        top_p: keeps the fewest most probable ids that reach this share.
        min_p: keeps ids at least this share as probable as the most probable one.
        repetition_penalty: divides positive logits of ids in `history` by this, and multiplies negative ones.
        order: "sequential", top_p is a share of what top_k kept, renormalised (transformers); "joint", of the whole
            softmax (the released LongCat-Next server); or bool [T], True where it is "joint".
        history: ids [N] int64 of all rows one after the other, and offsets [T + 1]: row t owns ids[offsets[t] :
            offsets[t + 1]]. Ids outside [0, V) are ignored.
        seed: int, and row r then uses seed + r, or int64 [T].
        step: position of the draw in its stream, in [0, 2^63), or int64 [T].
        level: which of the draws of one step this is, in [0, 2^32).

    Raises:
        ValueError: an argument is out of range or of the wrong shape.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: logits must be [T, V] with V >= 1, got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"sample: logits must be floating point, got {logits.dtype}")
    if not 0 <= level < 2**32:
        raise ValueError(f"sample: level must be in [0, 2^32), got {level}")
    rows, device = logits.shape[0], logits.device
    values = (temperature, top_k, top_p, min_p, repetition_penalty, 0, 1.0, order_column("sample", order))
    params_T8 = table("sample", values, (rows,), device)
    check_values("sample", params_T8)
    seeds_T, steps_T = row_seeds("sample", seed, rows, device), row_steps("sample", step, rows, device)
    check_steps("sample", steps_T)
    seen_TV = None
    if history is not None:
        check_history("sample", history, rows, None, device)
        check_offsets("sample", len(history[0]), history[1])
        seen_TV = seen(history[0], history[1], logits.shape[1])
    noise_TV = gumbel(seeds_T, steps_T, [(level, logits.shape[1])])[0] if draws(params_T8) else None
    return draw(logits.to(wide(logits.dtype)), params_T8, noise_TV, seen_TV, None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of that dtype are kept in."""
    return torch.promote_types(dtype, torch.float32)


def draws(params: Tensor) -> bool:
    """Whether any row draws at random."""
    return bool((params[..., TEMPERATURE] > 0).any())


def draw(
    logits_TV: Tensor, params_T8: Tensor, noise_TV: Tensor | None, seen_TV: Tensor | None, forced_T: Tensor | None
) -> Sampled:
    """One id a row, a draw or `forced_T` where that is not negative, and its logprobs.

    With c the logits, y = c after the repetition penalty r of seen ids (y / r, or y * r where negative; float32) and
    -inf for the last `excluded` ids, t the temperature and m = max y:

        t = 0:  the id of m, the lowest among equals
        else, in float64, e_i = exp((y_i - m) / t), ids ordered by falling y, equal ones by rising id:
            A = the first top_k;  M = sum of e over A ("sequential") or over all ids ("joint")
            kept: those of A with less than top_p * M before them (all if top_p = 1) and e_i >= min_p
            g_i = -log(-log1p(-(word_i + 0.5) / 2^32)) of the id's Philox word
            the id of the largest y_i / t + g_i among those kept, the lowest among equals
        logprob = c_id - log sum exp c;  drawn_logprob = log(e_id / sum of e over those kept), or of a point mass

    A kernel that follows this draws the same id from the same logits. It may screen in float32 if it proves which ids
    can still win and compares those in float64, and may sum e with a relative error of 2^-20: then only an id so near
    to top_p's threshold can differ. Where log sum exp c is not finite (NaN or infinity among them), the row is lost:
    id 0 unless forced, NaN logprobs. Where c is finite for excluded ids alone, all y are -inf and no id is kept: id 0
    unless forced, drawn_logprob -inf.

    Args:
        logits_TV: float32 or float64.
        params_T8: float32, `COLUMNS`.
        noise_TV: g in float64; None: every temperature is 0.
        seen_TV: bool: ids in the row's history.
    """
    logits_TV = logits_TV + 0.0  # -0 and 0 are equal, and of equals the lower id comes first
    sum_T1 = logits_TV.double().logsumexp(1, keepdim=True)
    scores_TV = _penalised(logits_TV, params_T8, seen_TV)
    temperature_T1 = params_T8[:, TEMPERATURE, None].double()
    greedy_T = scores_TV.argmax(1)
    is_greedy_T1 = temperature_T1 <= 0
    relative_TV = (scores_TV.double() - scores_TV.amax(1, keepdim=True)) / temperature_T1.masked_fill(is_greedy_T1, 1)
    mass_TV = relative_TV.exp()
    kept_TV = (mass_TV >= params_T8[:, MIN_P, None]) & _truncated(scores_TV, mass_TV, params_T8)
    ids_T = greedy_T
    if noise_TV is not None:
        perturbed_TV = scores_TV.double() / temperature_T1.masked_fill(is_greedy_T1, 1) + noise_TV
        drawn_T = perturbed_TV.masked_fill(~kept_TV, -torch.inf).argmax(1)
        ids_T = torch.where(is_greedy_T1[:, 0], greedy_T, drawn_T)
    lost_T = ~sum_T1[:, 0].isfinite()
    ids_T = ids_T.masked_fill(lost_T, 0)
    if forced_T is not None:
        ids_T = torch.where(forced_T >= 0, forced_T, ids_T)

    def chosen(values_TV: Tensor) -> Tensor:
        return values_TV.gather(1, ids_T[:, None])[:, 0]

    logprobs_T = chosen(logits_TV.double()) - sum_T1[:, 0]
    drawn_T = chosen(relative_TV) - (mass_TV * kept_TV).sum(1).log()
    point_T = torch.where(ids_T == greedy_T, 0.0, -torch.inf).to(drawn_T.dtype)
    drawn_T = torch.where(is_greedy_T1[:, 0], point_T, drawn_T.masked_fill(~chosen(kept_TV), -torch.inf))
    results = (x.masked_fill(lost_T, torch.nan).to(logits_TV.dtype) for x in (logprobs_T, drawn_T))
    return Sampled(ids_T, *results)


def _penalised(logits_TV: Tensor, params_T8: Tensor, seen_TV: Tensor | None) -> Tensor:
    """Logits after the repetition penalty, -inf for ids that may not be drawn."""
    if seen_TV is not None:
        penalty_T1 = params_T8[:, PENALTY, None].to(logits_TV.dtype)
        penalised_TV = torch.where(logits_TV < 0, logits_TV * penalty_T1, logits_TV / penalty_T1)
        logits_TV = torch.where(seen_TV, penalised_TV, logits_TV)
    classes = logits_TV.shape[1]
    ids_V = torch.arange(classes, device=logits_TV.device)
    return logits_TV.masked_fill(ids_V >= classes - params_T8[:, EXCLUDED, None], -torch.inf)


def _truncated(scores_TV: Tensor, mass_TV: Tensor, params_T8: Tensor) -> Tensor:
    """Which ids top_k and top_p keep."""
    top_k_T1, top_p_T1 = params_T8[:, TOP_K, None], params_T8[:, TOP_P, None].double()
    if not bool(((top_k_T1 > 0) | (top_p_T1 < 1)).any()):
        return torch.ones_like(mass_TV, dtype=torch.bool)
    order_TV = scores_TV.sort(dim=1, descending=True, stable=True).indices
    sorted_TV = mass_TV.gather(1, order_TV)
    rank_V = torch.arange(mass_TV.shape[1], device=mass_TV.device)
    first_TV = (rank_V < top_k_T1) | (top_k_T1 == 0)
    joint_T1 = params_T8[:, ORDER, None] > 0
    total_T1 = (sorted_TV * (first_TV | joint_T1)).sum(1, keepdim=True)
    before_TV = sorted_TV.cumsum(1) - sorted_TV
    kept_TV = first_TV & ((top_p_T1 >= 1) | (before_TV < top_p_T1 * total_T1))
    return torch.empty_like(kept_TV).scatter_(1, order_TV, kept_TV)


def seen(history_N: Tensor, offsets_T1: Tensor, classes: int) -> Tensor:
    """[T, V] bool: which ids stand in each row's part of the history."""
    rows = len(offsets_T1) - 1
    counts_T = offsets_T1.diff()
    row_N = torch.repeat_interleave(torch.arange(rows, device=offsets_T1.device), counts_T)
    history_N = history_N[offsets_T1[0] : offsets_T1[-1]]
    is_id_N = (history_N >= 0) & (history_N < classes)
    seen_TV = torch.zeros(rows, classes, dtype=torch.bool, device=history_N.device)
    seen_TV[row_N[is_id_N], history_N[is_id_N]] = True
    return seen_TV


def order_column(op: str, order: str | Tensor) -> int | Tensor:
    """The column of a table: 0 sequential, 1 or True joint."""
    if isinstance(order, Tensor) and order.dtype == torch.bool:
        return order
    if isinstance(order, Tensor) or order not in ORDERS:
        found = order.dtype if isinstance(order, Tensor) else repr(order)
        raise ValueError(f"{op}: order must be sequential, joint or a bool tensor, got {found}")
    return ORDERS.index(order)


def table(op: str, values: Sequence[float | Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[*shape, 8] float32 from a number or a tensor that broadcasts to `shape` for each column, numbers checked."""
    for column, value in enumerate(values):
        if not isinstance(value, Tensor):
            check_column(op, column, [value])
        else:
            check_broadcast(op, COLUMNS[column], value, shape, device)
    columns = [
        value.float() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=device)
        for value in values
    ]
    return torch.stack(torch.broadcast_tensors(*columns), -1).expand(*shape, len(COLUMNS))


def check_broadcast(op: str, name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.ndim > len(shape) or any(a not in (1, b) for a, b in pairs) or value.device != device:
        raise ValueError(
            f"{op}: {name} must be a number or broadcast to {list(shape)} on {device}, got {list(value.shape)} on "
            f"{value.device}"
        )


def check_column(op: str, column: int, numbers: Sequence[float]) -> None:
    rule, low, high = RANGES[column]
    total = sum(numbers)  # NaN if there is one
    for value in (min(numbers), max(numbers)) if total == total else (total,):
        if not low <= value <= high:
            raise ValueError(f"{op}: {COLUMNS[column]} must be {rule}, got {value}")
    for value in numbers if column in WHOLE else ():
        if value != int(value):
            raise ValueError(f"{op}: {COLUMNS[column]} must be a whole number, got {value}")


def check_values(op: str, params: Tensor) -> None:
    """The numbers of a table; on an accelerator reading them would wait for the device."""
    if params.device.type != "cpu" or not params.numel():
        return
    for column, numbers in enumerate(zip(*distinct(params).flatten(0, -2).tolist(), strict=True)):
        check_column(op, column, numbers)


def distinct(params: Tensor) -> Tensor:
    """A table without the repetitions that it was expanded by."""
    for axis in range(params.ndim - 1):
        params = params.narrow(axis, 0, 1) if params.stride(axis) == 0 else params
    return params


def row_seeds(op: str, seed: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """[T] int64: seed + r, or the given tensor."""
    if not isinstance(seed, Tensor):
        if not isinstance(seed, int) or not -(2**63) <= seed <= 2**63 - max(1, rows):
            raise ValueError(f"{op}: seed must be an int in [-2^63, 2^63 - {max(1, rows)}] or a tensor, got {seed}")
        return torch.arange(rows, device=device) + seed
    _check_row_numbers(op, "seed", seed, rows, device)
    return seed


def row_steps(op: str, step: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """[T] int64: the step of each row."""
    if not isinstance(step, Tensor):
        if not isinstance(step, int) or not 0 <= step < 2**63:
            raise ValueError(f"{op}: step must be an int in [0, 2^63) or a tensor, got {step}")
        return torch.full((1,), step, device=device).expand(rows)
    _check_row_numbers(op, "step", step, rows, device)
    return step


def _check_row_numbers(op: str, name: str, tensor: Tensor, rows: int, device: torch.device) -> None:
    if tensor.shape != (rows,) or tensor.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be an int or int64 [{rows}], got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_steps(op: str, steps: Tensor) -> None:
    """No step below zero; on an accelerator reading them would wait for the device."""
    if steps.device.type == "cpu" and min(steps.tolist(), default=0) < 0:
        raise ValueError(f"{op}: step must be in [0, 2^63), got {min(steps.tolist())}")


def check_history(op: str, history: tuple[Tensor, Tensor], rows: int, levels: int | None, device: torch.device) -> None:
    """Shapes of (ids, offsets)."""
    ids, offsets = history
    wanted = "[N]" if levels is None else f"[N, {levels}]"
    trailing = [] if levels is None else [levels]
    if ids.ndim != 1 + len(trailing) or list(ids.shape[1:]) != trailing or ids.dtype != torch.int64:
        raise ValueError(f"{op}: history ids must be int64 {wanted}, got {ids.dtype} {list(ids.shape)}")
    if offsets.shape != (rows + 1,) or offsets.dtype != torch.int64:
        found = f"{offsets.dtype} {list(offsets.shape)}"
        raise ValueError(f"{op}: history offsets must be int64 [{rows + 1}], got {found}")
    for name, tensor in (("ids", ids), ("offsets", offsets)):
        if tensor.device != device:
            raise ValueError(f"{op}: history {name} must be on {device}, got {tensor.device}")


def check_offsets(op: str, ids: int, offsets: Tensor) -> None:
    """Offsets in order and within the ids; on an accelerator reading them would wait for the device."""
    if offsets.device.type != "cpu":
        return
    values: list[int] = offsets.tolist()
    if values[0] < 0 or values[-1] > ids or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"{op}: history offsets must rise from 0 or more to at most {ids}, got {values}")


def gumbel(seeds: Tensor, steps: Tensor, levels: Sequence[tuple[int, int]]) -> list[Tensor]:
    """One [T, size] float64 tensor of Gumbel noise for each (level, size); seeds and steps are int64 [T]."""
    blocks = [math.ceil(size / 4) for _, size in levels]
    block_N = torch.cat([torch.arange(count, device=seeds.device) for count in blocks])
    level_N = torch.cat(
        [torch.full((n,), level, device=seeds.device) for n, (level, _) in zip(blocks, levels, strict=True)]
    )
    words = philox(_words(seeds), (block_N, level_N, *_words(steps)))
    bits_TV = torch.stack(words, dim=2)
    noise = -torch.log(-torch.log1p(-(bits_TV.double() + 0.5) * 2.0**-32))
    return [part.flatten(1)[:, :size] for part, (_, size) in zip(noise.split(blocks, dim=1), levels, strict=True)]


def _words(numbers_T: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits, [T, 1] each."""
    return numbers_T[:, None] & _WORD, numbers_T[:, None] >> 32 & _WORD


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold 32-bit words; the arguments broadcast."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))
