"""What the tests of deferred weight gradients and of the pipeline count."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts what does the work: products, lookups, kernels of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "longcat" in name or any(mark in name for mark in (".mm.", "addmm", "bmm", "embedding")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
