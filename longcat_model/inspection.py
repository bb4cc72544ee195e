"""`longcat inspect`: what a system consists of, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from longcat_model import config, presets
from longcat_model.system import System
from longcat_model.vocabulary import Vocabulary

PRESETS = {"longcat_next": presets.longcat_next, "demo": presets.demo, "tiny": presets.tiny}


def describe(subject: str) -> str:
    """Parameters by part, extents of the id space and codebooks of a trained system or a preset.

    Raises:
        ValueError: `subject` is neither a preset's name nor a directory with a trained system.
    """
    if subject in PRESETS:
        with torch.device("meta"):  # sizes without memory: the released model would need 300 GB
            system = System.create(PRESETS[subject]())
    elif Path(subject).is_dir():
        system = System.load(Path(subject))
    else:
        raise ValueError(f"inspect: subject must be a directory or one of {', '.join(PRESETS)}, got {subject!r}")
    return "\n\n".join((_parameters(system), _ids(system.sizes), _quantizers(system)))


def _parameters(system: System) -> str:
    rows = [("part", "parameters", "buffers")]
    for name, module in system.parts().items():
        rows += [(f"{name}.{child}", *_sizes(part)) for child, part in module.named_children()]
    total = nn.ModuleDict(system.parts())
    return _table([*rows, ("total", *_sizes(total))])


def _sizes(module: nn.Module) -> tuple[str, str]:
    parameters = sum(p.numel() for p in module.parameters())
    return f"{parameters:,}", f"{sum(b.numel() for b in module.buffers()):,}"


def _ids(sizes: config.Model) -> str:
    ids = Vocabulary.of(sizes.vocabulary)
    rows = [("ids", "from", "to"), ("text", "0", f"{ids.text_size - 1}")]
    rows.append(("special tokens", f"{ids.text_size}", f"{ids.text_rows - 1}"))
    for name, offsets, counts in (
        ("audio", ids.audio_offsets, ids.audio_sizes),
        ("visual", ids.visual_offsets, ids.visual_sizes),
    ):
        pairs = zip(offsets, counts, strict=True)
        rows += [(f"{name} level {i}", f"{o}", f"{o + count - 1}") for i, (o, count) in enumerate(pairs)]
    return _table(rows)


def _quantizers(system: System) -> str:
    rows = [("quantizer", "levels", "entries", "width")]
    for name, quantizer in (("vision", system.sizes.vision.quantizer), ("audio", system.sizes.audio.quantizer)):
        sizes = ", ".join(map(str, quantizer.sizes)) + (" (shared)" if quantizer.shared else "")
        rows.append((name, str(len(quantizer.sizes)), sizes, str(quantizer.dim)))
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
