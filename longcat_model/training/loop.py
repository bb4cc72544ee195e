"""One training loop for every stage: a stage is data, a step a pure function of the stage's state and the step number.

Batches are functions of the step and the random state is seeded anew each step, so a run that was interrupted and
resumed from its checkpoint has bit for bit the losses of one that was not (same machine, same thread count).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from longcat_model import files
from longcat_model.training.balance import Balancer
from longcat_model.training.checkpoint import Checkpoints, Reader
from longcat_model.training.optim import adamw, learning_rate
from longcat_model.training.rates import memory_bytes, shown, tokens_per_s

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
    balancer: Balancer | None = None  # of the module's experts, if it has any


class Engine(Protocol):
    """How a stage's gradients come about: in this process, or on several ranks of which it is one."""

    @property
    def leads(self) -> bool:
        """Whether this process writes metrics and shows progress."""
        ...

    def checkpoints(self, directory: Path) -> Checkpoints: ...

    def tensors(self) -> dict[str, Tensor]:
        """What this process has of the module's state dict, as `module.<name>`, and of the stage's balancer."""
        ...

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What this process has of the module's parameters, by name."""
        ...

    def backward(self, batch: Any) -> Row:
        """Adds gradients to the parameters; gives `loss` and the other metrics."""
        ...

    def clip(self, most: float, optimizer: torch.optim.Optimizer) -> float:
        """Scales all gradients down to a norm of `most`; gives their norm before, the same on every rank.

        Where that is finite, `optimizer` makes its step next.
        """
        ...

    def after_step(self, step: int) -> None: ...

    def settled(self, rows: list[Row]) -> list[Row]:
        """The rows as they are once no step is open any longer: called before they, and the state, are written."""
        ...

    def written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this process writes of a checkpoint, given what it has."""
        ...


class InOneProcess:
    """The whole module, one batch at a time."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.leads = stage, True

    def checkpoints(self, directory: Path) -> Checkpoints:
        return Checkpoints(directory)

    def tensors(self) -> dict[str, Tensor]:
        balancer = self.stage.balancer
        return prefixed("module", self.stage.module.state_dict()) | prefixed(
            "balancer", {} if balancer is None else balancer.tensors()
        )

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.stage.module.named_parameters())

    def backward(self, batch: Any) -> Row:
        loss, metrics = self.stage.loss(batch)
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
        found = {name: float(metric) for name, metric in metrics.items()}
        return {"loss": value, **found, "memory_bytes": memory_bytes(loss.device)}

    def clip(self, most: float, optimizer: torch.optim.Optimizer) -> float:
        return float(nn.utils.clip_grad_norm_(self.stage.parameters, most))

    def after_step(self, step: int) -> None:
        if self.stage.after_step is not None:
            self.stage.after_step(step)

    def settled(self, rows: list[Row]) -> list[Row]:
        return rows

    def written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


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
        directory: holds `<name>/` (the last checkpoint) and `<name>.jsonl` (one row of metrics a step).
        seed: of everything random outside `stage.batch`.
        save_every: steps between checkpoints, which are written while training goes on; the last step is always saved,
            and whole when this returns.
        quiet: no progress bar.
        engine: None: this process alone. With another one, only its leader's `stage.module` is whole at the end.

    Returns:
        The rows of `<name>.jsonl`, from the first step on.

    Raises:
        ValueError: the checkpoint does not fit the module, is damaged or cannot be written, which the next step tells.
        FloatingPointError: the loss is not finite; the last checkpoint is left as it was.
    """
    engine = InOneProcess(stage) if engine is None else engine
    optimizer = adamw(stage.parameters, stage.weight_decay)
    metrics = directory / f"{stage.name}.jsonl"
    with engine.checkpoints(directory / stage.name) as checkpoints:
        start = _resume(checkpoints, stage, engine, optimizer)
        rows = _read_rows(metrics, start)
        _set_trainable(stage)
        stage.module.train()
        interval, hidden = 0.5 if sys.stderr.isatty() else 10.0, quiet or not engine.leads
        bar = tqdm(total=stage.steps, initial=start, desc=stage.name, unit="step", mininterval=interval, disable=hidden)
        with bar:
            for step in range(start, stage.steps):
                checkpoints.check()
                row = _step(stage, engine, optimizer, step, seed)
                rows.append(row)
                bar.set_postfix(shown(row), refresh=False)
                bar.update()
                if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                    rows = engine.settled(rows)
                    if engine.leads:
                        _write_rows(metrics, rows)
                    checkpoints.save(step + 1, engine.written(_tensors(engine, optimizer)))
    stage.module.eval()
    return rows


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _step(stage: Stage, engine: Engine, optimizer: torch.optim.Optimizer, step: int, seed: int) -> Row:
    began = time.perf_counter()
    torch.manual_seed((seed << 32) + step)
    rate = learning_rate(step, stage.steps, stage.learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    batch = stage.batch(step)
    row = engine.backward(batch)
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"{stage.name}: loss must be finite, got {row['loss']} at step {step}")
    norm = engine.clip(CLIP_NORM, optimizer)
    if math.isfinite(norm):  # else the step is skipped, on every rank
        optimizer.step()
        engine.after_step(step)
    row = {"step": step, "loss": row.pop("loss"), "gradient_norm": norm, "learning_rate": rate, **row}
    return row | tokens_per_s(batch, time.perf_counter() - began)


def _set_trainable(stage: Stage) -> None:
    chosen = {id(p) for p in stage.parameters}
    for parameter in stage.module.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def _tensors(engine: Engine, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that this process needs to go on, by the names that it has in a checkpoint."""
    found = engine.tensors()
    for name, parameter in engine.parameters().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return found


def _resume(checkpoints: Checkpoints, stage: Stage, engine: Engine, optimizer: torch.optim.Optimizer) -> int:
    step = checkpoints.latest()
    if step is None:
        return 0
    reader = checkpoints.reader(step)
    module = checkpoints.spread(prefixed("module", stage.module.state_dict()))
    wanted = {(name, tuple(tensor.shape)) for name, tensor in module.items()}
    if differing := wanted ^ {entry for entry in reader.shapes.items() if entry[0].startswith("module.")}:
        names = sorted({name.removeprefix("module.") for name, _ in differing})
        raise ValueError(
            f"{stage.name}: checkpoint {reader.path} must fit the module, got others of {', '.join(names[:5])}\n"
            "Start over in another directory, or with --fresh."
        )
    if step < stage.steps:
        _allocate(optimizer, engine.parameters(), reader)
    reader.read(_tensors(engine, optimizer))
    return step


def _allocate(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], reader: Reader) -> None:
    """Makes room for what a checkpoint has of the optimizer's state."""
    for place, shape in reader.shapes.items():
        kind, _, rest = place.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "optimizer" and name in parameters:
            like = parameters[name].detach() if shape else parameters[name].new_empty(())  # moments, or their number
            optimizer.state[parameters[name]][key] = torch.empty_like(like, dtype=reader.dtype(place))


def _read_rows(path: Path, before: int) -> list[Row]:
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metrics: {path} must be lines of JSON, got: {error}; remove it to go on") from error
    for number, row in enumerate(rows, 1):
        files.require(path, f"line {number}", _is_row(row), "an object of numbers with step and loss", row)
    return [row for row in rows if row["step"] < before]


def _is_row(row: object) -> bool:
    numbers = isinstance(row, dict) and all(type(value) in (int, float) for value in row.values())
    return numbers and {"step", "loss"} <= row.keys()  # type: ignore[attr-defined]


def _write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
