"""How fast a step was and what memory it took: what differs from run to run."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from longcat_model.sequence import Batch

MEASURED = ("tokens_per_s", "bubble", "memory_bytes")  # of a row of metrics


def tokens_per_s(batch: Any, seconds: float) -> dict[str, float]:
    """Of a batch of positions, padding not counted; nothing for a batch of another kind."""
    return {"tokens_per_s": int((batch.inputs.documents >= 0).sum()) / seconds} if isinstance(batch, Batch) else {}


def memory_bytes(device: torch.device) -> int:
    """The most that this process has had: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes(resource.RUSAGE_SELF)


def resident_bytes(who: int) -> int:
    """High-water mark of resident memory of this process (RUSAGE_SELF) or of its largest child (RUSAGE_CHILDREN)."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shown(row: dict[str, float]) -> dict[str, str]:
    """A row of metrics for a progress bar."""
    forms = {"loss": "{:.3f}", "tokens_per_s": "{:.0f}", "bubble": "{:.0%}"}
    found = {name: form.format(row[name]) for name, form in forms.items() if name in row}
    return found | ({"memory": f"{row['memory_bytes'] / 1e9:.1f} GB"} if "memory_bytes" in row else {})
