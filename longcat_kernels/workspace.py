"""Memory that calls of an op use one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

New: TypeAlias = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]


def fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of its own for everything."""
    return torch.empty(shape, dtype=dtype, device=device)


def scratch_of(new: New, device: torch.device) -> Callable[[int], Tensor]:
    """Bytes -> uint8 memory, as compiled functions ask for it."""
    return lambda size: new("scratch", (size,), torch.uint8, device)


class Workspace:
    """Results of calls and what lies between, each made when a call first needs one of its shape, and then kept.

    Calls of the same shapes allocate no tensor, and a CUDA graph may keep the addresses for as long as it keeps the
    workspace. Results are overwritten by the next call of their shapes, so that call must be given copies of those it
    reads, and refuses these themselves. Not for two calls at a time.

    Example:
        >>> from longcat_kernels import depth_decode
        >>> from longcat_kernels.modules import DepthTransformer
        >>> head = DepthTransformer(hidden=8, dim=4, heads=2, layers=1, ffn_scale=4, sizes=(5, 3))
        >>> weights, workspace = head.prepared([torch.randn(6, 8), torch.randn(4, 8)]), Workspace()
        >>> first = depth_decode(torch.randn(7, 8), weights, workspace=workspace).codes
        >>> depth_decode(torch.randn(7, 8), weights, workspace=workspace).codes is first
        True
    """

    def __init__(self) -> None:
        self._tensors: dict[Any, Tensor] = {}
        self._addresses: set[int] = set()

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor of that name and shape; what it holds is what was last written to it."""
        key = (name, shape, dtype, device)
        if key not in self._tensors:
            with torch.inference_mode(False):  # may be written outside of it, too
                self._tensors[key] = torch.empty(shape, dtype=dtype, device=device)
            self._addresses.add(self._tensors[key].untyped_storage().data_ptr())
        return self._tensors[key]

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of the workspace's, or a view of it."""
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._addresses

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())
