"""`longcat train`: a trained system's language model, trained further on documents of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longcat_model.files import read_image, read_speech
from longcat_model.sequence import Batch, Document, Layout, pack
from longcat_model.system import System
from longcat_model.training.loop import train
from longcat_model.training.model_stages import joint


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int
    rows: int
    row_length: int
    learning_rate: float
    seed: int


def run(data: Path, system_directory: Path, out: Path, settings: Settings) -> None:
    """Trains and writes the new system to `out`, with checkpoints and metrics beside it; a rerun goes on.

    Raises:
        ValueError: no system, or a document that cannot be built; the message names the line.
    """
    if min(settings.steps, settings.rows, settings.row_length) < 1 or not settings.learning_rate > 0:
        raise ValueError(f"train: steps, rows, row_length and learning_rate must be positive, got {settings}")
    system = System.load(system_directory)
    documents = read_documents(data, system, settings.row_length)
    torch.manual_seed(settings.seed)
    stage = joint(
        system.model,
        batches(documents, settings),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        name="finetune",
    )
    rows = train(stage, out, seed=settings.seed)
    system.save(out)
    print(f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f} over {len(rows)} steps; system: {out}")


def batches(documents: Sequence[Document], settings: Settings) -> Callable[[int], Batch]:
    """Batches of at most `rows` rows drawn from `documents`, as a pure function of the step."""

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed((settings.seed << 32) + step)
        chosen: list[Document] = []
        room = settings.rows * settings.row_length
        while room > 0:
            document = documents[int(torch.randint(len(documents), (), generator=generator))]
            room -= len(document)
            if room >= 0 or not chosen:
                chosen.append(document)
        return pack(chosen, settings.row_length)

    return batch


def read_documents(path: Path, system: System, longest: int) -> list[Document]:
    """Documents of a JSON lines file; the format is in `longcat train --help`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"train: data must be a readable text file, got {path}: {error}") from error
    documents = []
    for number, line in enumerate(tqdm(lines, desc="tokenize documents", unit="line"), 1):
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line), path.parent, system)
        except ValueError as error:
            raise ValueError(f"train: {path}, line {number}: {error}") from error
        if len(document) > longest:
            raise ValueError(
                f"train: {path}, line {number}: document must fit a row of {longest} positions, got {len(document)}; "
                "raise --row-length or split it"
            )
        documents.append(document)
    if not documents:
        raise ValueError(f"train: data must hold at least one document, got none in {path}")
    return documents


def _document(parts: Any, directory: Path, system: System) -> Document:
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"a document must be a list of parts, got {parts!r}")
    layout = Layout(system.model.ids, system.text.encode)
    return layout.document(*(_part(part, directory, system, layout) for part in parts))


def _part(part: dict[str, Any], directory: Path, system: System, layout: Layout) -> Document:
    kind = next((name for name in ("text", "image", "paint", "hear", "say") if name in part), None)
    allowed = {"text": {"text", "loss"}, "say": {"say", "transcript"}}.get(kind or "", {kind})
    if kind is None or not isinstance(part[kind], str) or part.keys() - allowed:
        raise ValueError(f"a part must be one of text, image, paint, hear, say (see --help), got {part!r}")
    if kind == "text":
        return layout.text(system.text.encode(part["text"]), loss=bool(part.get("loss", False)))
    file = directory / part[kind]
    if kind in ("image", "paint"):
        codes = system.vision.encode([read_image(file, system.vision.sizes.cell)])[0]
        return layout.understand_image(codes) if kind == "image" else layout.generate_image(codes)
    codes = system.audio.encode([read_speech(file, system.sizes.audio.encoder.sample_rate)])[0]
    if kind == "hear":
        return layout.hear(codes)
    if not isinstance(part.get("transcript"), str):
        raise ValueError(f"say needs a transcript, got {part!r}")
    return layout.speak(system.text.encode(part["transcript"]), codes)
