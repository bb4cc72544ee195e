"""`longcat inspect`: what a system consists of and where a released checkpoint goes, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from longcat_model import config, presets
from longcat_model.backbone import Cache
from longcat_model.released import checkpoint
from longcat_model.released.plan import Part, expert_bytes, plan, table_bytes
from longcat_model.released.sizes import Sizes
from longcat_model.system import System
from longcat_model.vocabulary import Vocabulary

PRESETS = {"longcat_next": presets.longcat_next, "demo": presets.demo, "tiny": presets.tiny}


def describe(subject: str) -> str:
    """Parameters by part, extents of the id space and codebooks of a trained system, a checkpoint or a preset.

    Raises:
        ValueError: `subject` is neither a preset's name nor a directory with a trained system or a whole checkpoint.
    """
    if subject in PRESETS or _is_released(subject):
        sizes = PRESETS[subject]() if subject in PRESETS else checkpoint.check(Path(subject))[0].model
        with torch.device("meta"):  # sizes without memory: the released model would need 300 GB
            system = System.create(sizes)
    elif Path(subject).is_dir():
        system = System.load(Path(subject))
    else:
        raise ValueError(f"inspect: subject must be a directory or one of {', '.join(PRESETS)}, got {subject!r}")
    return "\n\n".join((_parameters(system), _ids(system.sizes), _quantizers(system)))


def describe_plan(subject: str, memory: Sequence[float], *, rows: int, positions: int) -> str:
    """Where the parts of a checkpoint of the released format go, what each device holds, and what does not fit.

    Args:
        subject: directory, or "longcat_next".
        memory: bytes of each GPU; zeros count as no GPU.
        rows, positions: see `released.plan.plan`.

    Raises:
        ValueError: `subject` is neither, the checkpoint has faults, or a number is out of range.
    """
    if subject == "longcat_next":
        sizes = Sizes(model=presets.longcat_next())
    elif _is_released(subject):
        sizes, _ = checkpoint.check(Path(subject))
    else:
        raise ValueError(f"inspect: --plan needs a released checkpoint's directory or longcat_next, got {subject!r}")
    if not all(0 <= size < 2**63 for size in memory):
        raise ValueError(f"inspect: memory must be bytes of each GPU, got {' '.join(map(str, memory))}")
    gpus = {f"cuda:{i}": int(size) for i, size in enumerate(size for size in memory if size)}
    found, backbone = plan(sizes, gpus, rows=rows, positions=positions), sizes.model.backbone
    parts = [("part", "place", "bytes"), *((p.name, p.place, f"{p.bytes:,}") for p in _merged(found.parts))]
    places = [("place", "used", "of")]
    for place in dict.fromkeys(part.place for part in found.parts):
        places.append((place, f"{found.used(place):,}", f"{gpus[place]:,}" if place in gpus else ""))
    notes = [
        f"A position takes {Cache.position_bytes(backbone, torch.bfloat16):,} bytes of cache.",
        f"It reads {table_bytes(backbone):,} bytes of n-gram tables",
        f"and, on average, {expert_bytes(backbone):,} bytes of each layer's experts.",
        "Tables in their file take no memory but the operating system's cache.",
    ]
    for gpu, size in found.lacking().items():
        notes.append(f"DOES NOT FIT: {gpu} lacks {size:,} bytes; fewer rows or positions need less.")
    return "\n\n".join((_table(parts), _table(places), "\n".join(notes)))


def _is_released(subject: str) -> bool:
    return (Path(subject) / checkpoint.INDEX).is_file()


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Experts of successive layers in one place as one part."""
    merged: list[Part] = []
    for _, run in groupby(parts, lambda part: (part.place, part.name.rstrip("0123456789"))):
        several = list(run)
        first, last = several[0].name, several[-1].name.rpartition(" ")[2]
        name = f"{first.replace('layer', 'layers')} to {last}" if len(several) > 1 else first
        merged.append(Part(name, several[0].place, sum(part.bytes for part in several)))
    return merged


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
