"""`longcat train`: a trained system's language model, trained further on documents of the user's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longcat_model.files import read_image, read_speech, write
from longcat_model.model import LongcatNext
from longcat_model.pipeline.parts import Saved
from longcat_model.sequence import Batch, Document, Layout, draw_delay, pack
from longcat_model.system import System
from longcat_model.training.loop import Stage, train
from longcat_model.training.mesh import Mesh
from longcat_model.training.model_stages import joint
from longcat_model.training.pipelined import train_pipelined

SAVE_EVERY = 50  # steps


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int
    rows: int
    row_length: int
    learning_rate: float
    seed: int


def run(data: Path, system_directory: Path, out: Path, settings: Settings, mesh: Mesh) -> None:
    """Trains and writes the new system to `out`, with checkpoints and metrics beside it; a rerun goes on.

    Args:
        mesh: processes that train together; a rerun may have more or fewer.

    Raises:
        ValueError: no system, a document that cannot be built (the message names the line), or an `out` that holds
            another training, whose checkpoint would be taken for this one's.
    """
    if min(settings.steps, settings.rows, settings.row_length) < 1 or not settings.learning_rate > 0:
        raise ValueError(f"train: steps, rows, row_length and learning_rate must be positive, got {settings}")
    system = System.load(system_directory, only_tokenizers=mesh.ranks > 1)
    documents = read_documents(data, system, settings)
    _claim(out, asdict(settings) | {"documents": _digest(documents), "system": _digest_file(system_directory)})
    torch.manual_seed(settings.seed)
    make = partial(_stage, batches=batches(documents, settings), settings=settings)
    if mesh.ranks > 1:
        saved = Saved(system.sizes, system_directory / "model.safetensors")
        if not train_pipelined(make, saved, out, mesh, seed=settings.seed, save_every=SAVE_EVERY):
            return
        system = System.load(system_directory)
    rows = train(make(system.model), out, seed=settings.seed, save_every=SAVE_EVERY)
    system.save(out)
    print(f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f} over {len(rows)} steps; system: {out}")


def _stage(model: LongcatNext, batches: Callable[[int], Batch], settings: Settings) -> Stage:
    return joint(model, batches, steps=settings.steps, learning_rate=settings.learning_rate, name="finetune")


def batches(documents: Sequence[Document], settings: Settings) -> Callable[[int], Batch]:
    """Batches of at most `rows` rows drawn from `documents`, as a pure function of the step."""
    return partial(_batch, documents, settings)


def _batch(documents: Sequence[Document], settings: Settings, step: int) -> Batch:
    generator = torch.Generator().manual_seed((settings.seed << 32) + step)
    chosen: list[Document] = []
    room = settings.rows * settings.row_length
    while room > 0:
        document = documents[int(torch.randint(len(documents), (), generator=generator))]
        room -= len(document)
        if room >= 0 or not chosen:
            chosen.append(document)
    return pack(chosen, settings.row_length)


def _claim(out: Path, training: dict[str, Any]) -> None:
    """Notes in `out` what is trained there, or checks that it is this."""
    path = out / "finetune.json"
    if path.exists() or path.with_suffix("").exists():
        found = json.loads(path.read_text()) if path.exists() else {}
        if changed := sorted(name for name, value in training.items() if found.get(name) != value):
            raise ValueError(
                f"train: {out} holds a training with other {', '.join(changed)}; choose another directory with --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write(path, (json.dumps(training, indent=1) + "\n").encode())


def _digest(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.inputs, document.labels):
            for field in fields(part):
                digest.update(getattr(part, field.name).numpy().tobytes())
    return digest.hexdigest()


def _digest_file(system_directory: Path) -> str:
    with (system_directory / "model.safetensors").open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def read_documents(path: Path, system: System, settings: Settings) -> list[Document]:
    """Documents of a JSON lines file; the format is in `longcat train --help`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"train: data must be a readable text file, got {path}: {error}") from error
    reader = _Reader(system, settings.row_length, torch.Generator().manual_seed(settings.seed))
    documents = []
    for number, line in enumerate(tqdm(lines, desc="tokenize documents", unit="line"), 1):
        if not line.strip():
            continue
        try:
            document = reader.document(json.loads(line), path.parent)
        except ValueError as error:
            raise ValueError(f"train: {path}, line {number}: {error}") from error
        documents.append(document)
    if not documents:
        raise ValueError(f"train: data must hold at least one document, got none in {path}")
    return documents


@dataclass(frozen=True)
class _Reader:
    """Builds documents of at most `longest` positions; `generator` draws how far speech lags behind its transcript."""

    system: System
    longest: int
    generator: torch.Generator

    @property
    def layout(self) -> Layout:
        return Layout(self.system.model.ids, self.system.text.encode)

    def document(self, parts: Any, directory: Path) -> Document:
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"a document must be a list of parts, got {parts!r}")
        document = self.layout.document(*(self._part(part, directory) for part in parts))
        self._fits("document", len(document))
        return document

    def _fits(self, what: str, positions: int) -> None:
        if positions > self.longest:
            raise ValueError(
                f"{what} must fit a row of {self.longest} positions, got {positions}; raise --row-length or split it"
            )

    def _part(self, part: dict[str, Any], directory: Path) -> Document:
        kind = next((name for name in ("text", "image", "paint", "hear", "say") if name in part), None)
        allowed = {"text": {"text", "loss"}, "say": {"say", "transcript"}}.get(kind or "", {kind})
        if kind is None or not isinstance(part[kind], str) or part.keys() - allowed:
            raise ValueError(f"a part must be one of text, image, paint, hear, say (see --help), got {part!r}")
        if kind == "text":
            return self.layout.text(self.system.text.encode(part["text"]), loss=bool(part.get("loss", False)))
        file = directory / part[kind]
        if kind in ("image", "paint"):
            codes = self._see(file)
            return self.layout.understand_image(codes) if kind == "image" else self.layout.generate_image(codes)
        codes = self.system.audio.encode([read_speech(file, self.system.sizes.audio.encoder.sample_rate)])[0]
        if kind == "hear":
            return self.layout.hear(codes)
        if not isinstance(part.get("transcript"), str):
            raise ValueError(f"say needs a transcript, got {part!r}")
        transcript = self.system.text.encode(part["transcript"])
        delay = draw_delay(len(transcript), len(codes), generator=self.generator)
        return self.layout.speak(transcript, codes, delay=delay)

    def _see(self, file: Path) -> Tensor:
        cell = self.system.vision.sizes.cell
        image = read_image(file, cell)
        self._fits("image", image.shape[1] // cell * (image.shape[2] // cell))  # a photo would take minutes to encode
        return self.system.vision.encode([image])[0]
