"""A shuffled order without a table of it: any place of a permutation is computed, by a keyed Feistel network.

The numbers below n are written with an even number of bits; each round mixes one half into the other, which can be
undone, so distinct numbers stay distinct; a number that comes out at n or above goes through again (Black and Rogaway
2002, "Ciphers with arbitrary finite domains", cycle walking).
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def shuffled(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """What stands at the places `numbers` of the seed's permutation of 0 .. count - 1.

    Args:
        numbers: int64 [n] in [0, count).

    Example:
        >>> shuffled(np.arange(5), 5, seed=1).tolist()
        [4, 0, 2, 3, 1]
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) + _mix(np.array([seed], dtype=np.uint64)))
    found = numbers.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        found[outside] = left << half | right
        outside = found >= count
    return found.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
