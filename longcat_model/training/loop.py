"""One training loop for every stage: a stage is data, a step a pure function of the stage's state and the step number.

Batches are functions of the step and the random state is seeded anew each step, so a run that was interrupted and
resumed from its checkpoint has bit for bit the losses of one that was not (same machine, same thread count).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from longcat_model import files
from longcat_model.training import checkpoint
from longcat_model.training.optim import adamw, learning_rate

CLIP_NORM = 1.0
Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage of training does; see `train`."""

    name: str
    module: nn.Module  # everything a checkpoint must hold
    parameters: tuple[nn.Parameter, ...]  # what the optimizer moves; all others stay as they are
    batch: Callable[[int], Any]  # step -> batch, a pure function of the step
    loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]  # batch -> scalar to minimise, scalars to log
    steps: int
    learning_rate: float  # peak of a linear warm-up and a cosine to a tenth
    weight_decay: float = 0.01
    after_step: Callable[[int], None] | None = None  # updates outside the gradient, such as expert biases


def train(stage: Stage, directory: Path, *, seed: int = 0, save_every: int = 200, quiet: bool = False) -> list[Row]:
    """Trains `stage`, or goes on from its checkpoint, and leaves `stage.module` as trained.

    Args:
        stage: what to train.
        directory: holds `<name>.pt` (module, optimizer, step) and `<name>.jsonl` (one row of metrics a step).
        seed: of everything random outside `stage.batch`.
        save_every: steps between checkpoints; the last step is always saved.
        quiet: no progress bar.

    Returns:
        The rows of `<name>.jsonl`, from the first step on.

    Raises:
        ValueError: the checkpoint does not fit the module or is damaged.
        FloatingPointError: the loss is not finite; the last checkpoint is left as it was.
    """
    path = directory / f"{stage.name}.pt"
    optimizer = adamw(stage.parameters, stage.weight_decay)
    start = _resume(path, stage, optimizer) if path.exists() else 0
    rows = _read_rows(path.with_suffix(".jsonl"), start)
    _set_trainable(stage)
    stage.module.train()
    interval = 0.5 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=stage.steps, initial=start, desc=stage.name, unit="step", mininterval=interval, disable=quiet, leave=True
    )
    with bar:
        for step in range(start, stage.steps):
            row = _step(stage, optimizer, step, seed)
            rows.append(row)
            bar.set_postfix({"loss": f"{row['loss']:.3f}"}, refresh=False)
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                _write_rows(path.with_suffix(".jsonl"), rows)
                state = {"module": stage.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                checkpoint.save(path, state)
    stage.module.eval()
    return rows


def _step(stage: Stage, optimizer: torch.optim.Optimizer, step: int, seed: int) -> Row:
    torch.manual_seed((seed << 32) + step)
    rate = learning_rate(step, stage.steps, stage.learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, metrics = stage.loss(stage.batch(step))
    value = loss.item()
    if value != value or abs(value) == float("inf"):
        raise FloatingPointError(f"{stage.name}: loss must be finite, got {value} at step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(stage.parameters, CLIP_NORM)
    optimizer.step()
    if stage.after_step is not None:
        stage.after_step(step)
    scalars = {name: float(metric) for name, metric in metrics.items()}
    return {"step": step, "loss": value, "gradient_norm": float(norm), "learning_rate": rate, **scalars}


def _set_trainable(stage: Stage) -> None:
    chosen = {id(p) for p in stage.parameters}
    for parameter in stage.module.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _resume(path: Path, stage: Stage, optimizer: torch.optim.Optimizer) -> int:
    state = checkpoint.load(path)
    try:
        stage.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{stage.name}: checkpoint {path} must fit the module, got: {error}\n"
            "Start over in another directory, or with --fresh."
        ) from error
    return int(state["step"])


def _read_rows(path: Path, before: int) -> list[Row]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] < before]


def _write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
