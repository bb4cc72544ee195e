"""One training loop for every stage: a stage is data, a step a pure function of the stage's state and the step number.

Batches are functions of the step and the random state is seeded anew each step, so a run that was interrupted and
resumed from its checkpoint has bit for bit the losses of one that was not (same machine, same thread count).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class Engine(Protocol):
    """How a stage's gradients come about: in this process, or in a pipeline of which it is one rank."""

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        ...

    def restored(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once, when module and optimizer have the state to go on from."""
        ...

    def backward(self, batch: Any) -> Row:
        """Adds gradients to the parameters; gives `loss` and the other metrics."""
        ...

    def clip(self, most: float) -> float:
        """Scales all gradients down to a norm of `most`; gives their norm before, the same on every rank."""
        ...

    def after_step(self, step: int) -> None: ...

    def settled(self, rows: list[Row]) -> list[Row]:
        """The rows as they are once nothing is open: called before they, and the state, are written."""
        ...

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Of module and optimizer, whole where this process `leads`."""
        ...


class InOneProcess:
    """The whole module, one batch at a time."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.leads = stage, True

    def restored(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def backward(self, batch: Any) -> Row:
        loss, metrics = self.stage.loss(batch)
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
        return {"loss": value, **{name: float(metric) for name, metric in metrics.items()}}

    def clip(self, most: float) -> float:
        return float(nn.utils.clip_grad_norm_(self.stage.parameters, most))

    def after_step(self, step: int) -> None:
        if self.stage.after_step is not None:
            self.stage.after_step(step)

    def settled(self, rows: list[Row]) -> list[Row]:
        return rows

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"module": self.stage.module.state_dict(), "optimizer": optimizer.state_dict()}


def train(
    stage: Stage,
    directory: Path,
    *,
    seed: int = 0,
    save_every: int = 200,
    quiet: bool = False,
    engine: Engine | None = None,
) -> list[Row]:
    """Trains `stage`, or goes on from its checkpoint, and leaves `stage.module` as trained.

    Args:
        stage: what to train.
        directory: holds `<name>.pt` (module, optimizer, step) and `<name>.jsonl` (one row of metrics a step).
        seed: of everything random outside `stage.batch`.
        save_every: steps between checkpoints; the last step is always saved.
        quiet: no progress bar.
        engine: None: this process alone. With another one, only its leader's `stage.module` is whole at the end.

    Returns:
        The rows of `<name>.jsonl`, from the first step on.

    Raises:
        ValueError: the checkpoint does not fit the module or is damaged.
        FloatingPointError: the loss is not finite; the last checkpoint is left as it was.
    """
    engine = InOneProcess(stage) if engine is None else engine
    path = directory / f"{stage.name}.pt"
    optimizer = adamw(stage.parameters, stage.weight_decay)
    start = _resume(path, stage, optimizer) if path.exists() else 0
    rows = _read_rows(path.with_suffix(".jsonl"), start)
    _set_trainable(stage)
    engine.restored(optimizer)
    stage.module.train()
    interval, hidden = 0.5 if sys.stderr.isatty() else 10.0, quiet or not engine.leads
    bar = tqdm(
        total=stage.steps, initial=start, desc=stage.name, unit="step", mininterval=interval, disable=hidden, leave=True
    )
    with bar:
        for step in range(start, stage.steps):
            row = _step(stage, engine, optimizer, step, seed)
            rows.append(row)
            bar.set_postfix({"loss": f"{row['loss']:.3f}"}, refresh=False)
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                rows = engine.settled(rows)
                state = engine.state(optimizer) | {"step": step + 1}
                if engine.leads:
                    _write_rows(path.with_suffix(".jsonl"), rows)
                    checkpoint.save(path, state)
    stage.module.eval()
    return rows


def _step(stage: Stage, engine: Engine, optimizer: torch.optim.Optimizer, step: int, seed: int) -> Row:
    torch.manual_seed((seed << 32) + step)
    rate = learning_rate(step, stage.steps, stage.learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    row = engine.backward(stage.batch(step))
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"{stage.name}: loss must be finite, got {row['loss']} at step {step}")
    norm = engine.clip(CLIP_NORM)
    if math.isfinite(norm):  # else the step is skipped, on every rank
        optimizer.step()
        engine.after_step(step)
    return {"step": step, "loss": row.pop("loss"), "gradient_norm": norm, "learning_rate": rate, **row}


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
