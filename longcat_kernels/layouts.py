"""Byte layouts that Python and kernels must agree on.

Dimension key
    D width    K entries of one codebook
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256  # of every section, in bytes


@dataclass(frozen=True)
class Section:
    """One array inside a buffer of bytes."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def of(self, packed: Tensor) -> Tensor:
        """The section as a tensor that shares the memory of `packed`, uint8."""
        return packed[self.offset : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class HalfLayout:
    """A codebook as the GPU kernels of `rvq_encode` read it: centred, scaled by a power of two, rounded to float16.

    With m the float32 mean of the usable codewords, d_k = c_k - m and e the exponent, `words` holds
    fp16(d_k 2^e); `centre`, `exponent` and what bounds the rounding stand beside it. Codewords with NaN or infinity,
    and those that fill up K to a multiple of ROWS, are zero with infinite `norm` and `half`: never chosen. Others
    whose squares float32 may not hold have finite `norm` and infinite `half`, `length` and `error`: only exact scores
    tell.
    """

    entries: int
    dim: int

    ROWS = 256
    COLUMNS = 64

    def sections(self) -> dict[str, Section]:
        """By name, in the order of their offsets."""
        rows, columns = _round_up(self.entries, self.ROWS), _round_up(self.dim, self.COLUMNS)
        arrays: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "words": ((rows, columns), torch.float16),  # fp16(d 2^e), zero-padded
            "norm": ((rows,), torch.float64),  # |c|^2 in the order of the definition: what decides
            "half": ((rows,), torch.float32),  # |d|^2 / 2 to nearest
            "length": ((rows,), torch.float32),  # at least |d|
            "error": ((rows,), torch.float32),  # at least |d - words 2^-e|
            "centre": ((self.dim,), torch.float32),  # m
            "exponent": ((1,), torch.int32),  # e
        }
        sections: dict[str, Section] = {}
        offset = 0
        for name, (shape, dtype) in arrays.items():
            sections[name] = Section(offset, shape, dtype)
            offset = _round_up(sections[name].end, ALIGNMENT)
        return sections

    @property
    def bytes(self) -> int:
        """Size of the buffer."""
        return _round_up(list(self.sections().values())[-1].end, ALIGNMENT)


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
