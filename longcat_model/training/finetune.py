"""`longcat train`: a trained system's language model, trained further on documents of the user's own."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longcat_model import config
from longcat_model.data import rows, tokenize
from longcat_model.data.batches import Ahead, Batches
from longcat_model.data.shards import Shards
from longcat_model.files import locked, read_object, write_json
from longcat_model.model import LongcatNext
from longcat_model.pipeline.launch import check_ranks, is_torchruns
from longcat_model.pipeline.parts import Saved
from longcat_model.sequence import Batch
from longcat_model.system import System, read_sizes
from longcat_model.training.loop import Stage, train
from longcat_model.training.mesh import Mesh
from longcat_model.training.model_stages import joint
from longcat_model.training.pipelined import Pipelined, train_pipelined
from longcat_model.training.plan import Piping
from longcat_model.training.post_validated import PostValidated

SAVE_EVERY = 50  # steps


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one training; `run` refuses what is out of range."""

    steps: int
    rows: int  # packed rows a step
    row_length: int  # positions
    learning_rate: float  # peak: see `loop.Stage`
    seed: int  # of the order of the documents


def run(
    data: Path,
    system_directory: Path,
    out: Path,
    settings: Settings,
    mesh: Mesh,
    piping: Piping | None = None,
    *,
    workers: int = 0,
    post_validation: bool = False,
) -> None:
    """Trains and writes the new system to `out`, with checkpoints and metrics beside it; a rerun goes on.

    Args:
        data: shards that `tokenize` wrote, or JSON lines, which are tokenized into `out/data` first.
        mesh: processes that train together; a rerun may have more or fewer.
        piping: how their pipelines work, which a rerun may change too; one process trains through a pipeline of its own
            where this says anything.
        workers: processes that tokenize, and that prepare batches in every rank; 0: none but those that train.
        post_validation: processes do not wait for the gradient's norm (`PostValidated`): the same weights.

    Raises:
        ValueError: no system, documents that cannot be used (the message names file and line), an `out` that holds
            another training, whose checkpoint would be taken for this one's, or that another process trains in, or
            another number of torchrun's ranks than `mesh` has.
    """
    if min(settings.steps, settings.rows, settings.row_length) < 1 or not settings.learning_rate > 0 or workers < 0:
        raise ValueError(
            f"train: steps, rows, row_length and learning_rate must be positive, got {settings}; workers at least 0, "
            f"got {workers}"
        )
    if post_validation and mesh.ranks == 1:
        raise ValueError("train: post-validation must have several processes (--pipeline), got 1")
    check_ranks(mesh.ranks)
    sizes = read_sizes(system_directory)
    shards = _shards(data, system_directory, out, settings, workers)
    with locked(out / "lock") if _leads() else nullcontext():
        batches = Ahead(_batches(shards, out, sizes, settings), settings.steps, workers)
        torch.manual_seed(settings.seed)
        make = partial(_stage, batches=batches, settings=settings)
        if mesh.ranks > 1 or piping not in (None, Piping()):
            saved = Saved(sizes, system_directory / "model.safetensors")
            engine, said = PostValidated if post_validation else Pipelined, asdict(piping or Piping())
            if not train_pipelined(
                make, saved, out, mesh, **said, seed=settings.seed, save_every=SAVE_EVERY, engine=engine
            ):
                return
        system = System.load(system_directory)
        metrics = train(make(system.model), out, seed=settings.seed, save_every=SAVE_EVERY)
        system.save(out)
        losses = [f"{row['loss']:.3f}" for row in metrics] or ["?"]  # a user may have removed the metrics
        print(f"loss {losses[0]} -> {losses[-1]} over {settings.steps} steps; system: {out}")


def _stage(model: LongcatNext, batches: Callable[[int], Batch], settings: Settings) -> Stage:
    return joint(model, batches, steps=settings.steps, learning_rate=settings.learning_rate, name="finetune")


def _batches(shards: Shards, out: Path, sizes: config.Model, settings: Settings) -> Batches:
    costs = rows.HeadCosts.of(sizes)
    planned = rows.plan(shards, settings.row_length, costs, settings.seed, out)
    return Batches(shards, planned, costs, settings.rows, settings.row_length, settings.seed)


def _shards(data: Path, system_directory: Path, out: Path, settings: Settings, workers: int) -> Shards:
    """The documents to train on; `out` is this training's from then on."""
    training = asdict(settings) | {"system": _digest_file(system_directory)}
    if data.is_dir():
        shards = Shards(data)
        if shards.index.made_from.get("tokenizers") != tokenize.tokenizers_digest(system_directory):
            raise ValueError(
                f"train: {data} must be made by the tokenizers of {system_directory}; run longcat tokenize"
            )
        if shards.longest > settings.row_length:
            raise ValueError(f"train: row_length must be at least {shards.longest}, the longest document of {data}")
        _claim(out, training | tokenize.described(shards.index))
        return shards
    job = tokenize.Job.of([data], system_directory, tokenize.Settings(longest=settings.row_length, seed=settings.seed))
    training["documents"] = job.digest
    _refuse_another(out, training)
    shards = _tokenized(job, out / "data", workers)
    _claim(out, training | tokenize.described(shards.index))
    return shards


def _tokenized(job: tokenize.Job, directory: Path, workers: int) -> Shards:
    """Of the processes that torchrun started, one writes and the others wait for it."""
    if _leads():
        return tokenize.tokenize(job, directory, workers=workers)
    while (index := job.claimed(directory)) is None or index.documents is None:
        time.sleep(0.5)
    return Shards(directory)


def _leads() -> bool:
    return not is_torchruns() or os.environ["RANK"] == "0"


def _claim(out: Path, training: dict[str, Any]) -> None:
    """Notes in `out` what is trained there."""
    _refuse_another(out, training)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "finetune.json", training)


def _refuse_another(out: Path, training: dict[str, Any]) -> None:
    path = out / "finetune.json"
    if path.exists() or path.with_suffix("").exists():
        found = read_object(path) if path.exists() else {}
        if changed := sorted(name for name, value in training.items() if found.get(name) != value):
            raise ValueError(
                f"train: {out} holds a training with other {', '.join(changed)}; choose another directory with --out"
            )


def _digest_file(system_directory: Path) -> str:
    with (system_directory / "model.safetensors").open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
