"""Reproducible sampling: counter-based random numbers and a sampler that is a pure function of its arguments.

The noise of a class is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by
the row's seed with the counter (id // 4, level, step), so a draw depends on nothing else in the batch. Choosing the
largest of logit / temperature + Gumbel noise draws from the softmax (Gumbel 1954).

Dimension key
    T rows    V classes    L levels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TEXT_LEVEL = 2**32 - 1  # the level word of draws that belong to no code level
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Sampled(NamedTuple):
    ids: Tensor  # [T] int64
    logprobs: Tensor  # [T] float32: of the chosen id under the untruncated softmax at temperature 1


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor = 0,
    step: int = 0,
    level: int = TEXT_LEVEL,
) -> Sampled:
    """Draws one id a row; the draw depends on the row's logits and seed, on step and level, and on nothing else.

    Args:
        logits: [T, V] floating point; -inf is never drawn.
        temperature: 0 takes the largest logit, the lowest id among equals.
        top_k: keeps the k largest logits, equal ones by lower id; 0 keeps all.
        top_p: of what top_k kept, renormalised, keeps the fewest most probable ids that reach this share.
        seed: int, and row r then uses seed + r, or int64 [T].
        step: position of the draw in its stream, in [0, 2^64).
        level: which of the draws of one step this is, in [0, 2^32).

    Raises:
        ValueError: an argument is out of range or of the wrong shape.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: logits must be [T, V] with V >= 1, got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"sample: logits must be floating point, got {logits.dtype}")
    for name, number, bits in (("step", step, 64), ("level", level, 32)):
        if not 0 <= number < 2**bits:
            raise ValueError(f"sample: {name} must be in [0, 2^{bits}), got {number}")
    check_sampling("sample", temperature, top_k, top_p)
    seeds_T = row_seeds("sample", seed, logits.shape[0], logits.device)
    noise_TV = gumbel(seeds_T, step, [(level, logits.shape[1])])[0] if temperature > 0 else None
    ids_T = choose_ids(logits, noise_TV, temperature, top_k, top_p)
    return Sampled(ids_T, logprobs_of(logits, ids_T))


def check_sampling(op: str, temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be >= 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"{op}: top_k must be >= 0 (0 keeps all), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")


def row_seeds(op: str, seed: int | Tensor, rows: int, device: torch.device) -> Tensor:
    """[T] int64: seed + r, or the given tensor."""
    if not isinstance(seed, Tensor):
        if not isinstance(seed, int) or not -(2**63) <= seed <= 2**63 - max(1, rows):
            raise ValueError(f"{op}: seed must be an int in [-2^63, 2^63 - {max(1, rows)}] or a tensor, got {seed}")
        return torch.arange(rows, device=device) + seed
    if seed.shape != (rows,) or seed.dtype != torch.int64:
        raise ValueError(f"{op}: seed must be an int or int64 [{rows}], got {seed.dtype} {list(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"{op}: seed must be on {device}, got {seed.device}")
    return seed


def choose_ids(logits: Tensor, noise: Tensor | None, temperature: float, top_k: int, top_p: float) -> Tensor:
    """[T] ids: the largest logit where `noise` is None, else a draw from what top_k and then top_p keep."""
    if noise is None:
        return logits.argmax(1)
    scaled_TV = logits.to(noise.dtype) / temperature
    keep = min(top_k or logits.shape[1], logits.shape[1])
    if keep == logits.shape[1] and top_p == 1:
        return (scaled_TV + noise).argmax(1)
    scaled_Tk, order_Tk = (t[:, :keep] for t in scaled_TV.sort(dim=1, descending=True, stable=True))
    if top_p < 1:
        p_Tk = scaled_Tk.softmax(1)
        scaled_Tk = scaled_Tk.masked_fill(p_Tk.cumsum(1) - p_Tk >= top_p, -torch.inf)
    best_T1 = (scaled_Tk + noise.gather(1, order_Tk)).argmax(1, keepdim=True)
    return order_Tk.gather(1, best_T1)[:, 0]


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(1).gather(1, ids[:, None])[:, 0]


def gumbel(seeds: Tensor, step: int, levels: Sequence[tuple[int, int]]) -> list[Tensor]:
    """One [T, size] float64 tensor of Gumbel noise for each (level, size)."""
    blocks = [(size + 3) // 4 for _, size in levels]
    block_N = torch.cat([torch.arange(count, device=seeds.device) for count in blocks])
    level_N = torch.cat(
        [torch.full((n,), level, device=seeds.device) for n, (level, _) in zip(blocks, levels, strict=True)]
    )
    counter = (block_N, level_N, torch.tensor(step & _WORD), torch.tensor(step >> 32 & _WORD))
    words = philox((seeds[:, None] & _WORD, seeds[:, None] >> 32 & _WORD), counter)
    bits_TV = torch.stack(words, dim=2)
    noise = -torch.log(-torch.log1p(-(bits_TV.double() + 0.5) * 2.0**-32))
    return [part.flatten(1)[:, :size] for part, (_, size) in zip(noise.split(blocks, dim=1), levels, strict=True)]


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold 32-bit words; the arguments broadcast."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))
