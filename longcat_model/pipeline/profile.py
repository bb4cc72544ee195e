"""What was measured of a model, as plain data: durations and bytes of its modules, read from and written to JSON.

    {"embedding":       {"forward": 0.2, "input": 0.0, "weight": 0.1, "saved": 1000, "received": 100},
     "layers":          [{"forward": 1.0, "input": 1.1, "weight": 0.9, "saved": 9000, "received": 500}, ...],
     "text_head":       {...},
     "modality_losses": {...},
     "transfer":        0.05,
     "lengths":         [1.0, 0.8, ...],    optional: a factor a microbatch, of all modules but the losses
     "loss_lengths":    [1.0, 0.2, ...]}    optional: the same of the losses

Times are in one unit, whichever, for a microbatch of length 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longcat_model.pipeline.costs import Costs


@dataclass(frozen=True)
class Module:
    """One module and one microbatch of length 1."""

    forward: float
    input: float  # gradient of the input
    weight: float  # gradient of the weights
    saved: int = 0  # bytes that the forward keeps for the backward
    received: int = 0  # of those, its input

    @property
    def work(self) -> float:
        return self.forward + self.input + self.weight


@dataclass(frozen=True)
class Profile:
    """A model: an embedding, layers, a text head and the losses of the other modalities."""

    embedding: Module
    layers: tuple[Module, ...]
    text_head: Module
    modality_losses: Module
    transfer: float  # of one microbatch's hidden states from a device to another
    lengths: tuple[float, ...] = ()  # [microbatch]; empty: all 1
    loss_lengths: tuple[float, ...] = ()  # [microbatch]; empty: all 1


@dataclass(frozen=True)
class Split:
    """Which stage has which modules: stage 0 begins with the embedding, the last ends with the modality losses."""

    layers: tuple[int, ...]  # how many each stage has, in order
    head: int  # the stage that has the text head; no later stage has layers


def load(file: Path) -> Profile:
    """Reads a profile.

    Raises:
        ValueError: the file is not a profile; says which part.
    """
    try:
        data = json.loads(file.read_text())
        return Profile(
            layers=tuple(Module(**layer) for layer in data["layers"]),
            transfer=float(data["transfer"]),
            lengths=tuple(data.get("lengths", ())),
            loss_lengths=tuple(data.get("loss_lengths", ())),
            **{name: Module(**data[name]) for name in ("embedding", "text_head", "modality_losses")},
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"profile: {file} must be a profile as longcat_model/pipeline/profile.py shows: {error}"
        ) from None


def save(profile: Profile, file: Path) -> None:
    """Writes what `load` reads."""
    file.write_text(json.dumps(asdict(profile), indent=1))


def lengths(profile: Profile, microbatches: int) -> tuple[Sequence[float], Sequence[float]]:
    """Factors of modules and of losses for so many microbatches; those of the profile are taken in turn."""

    def cycle(factors: Sequence[float]) -> Sequence[float]:
        return [factors[k % len(factors)] if factors else 1.0 for k in range(microbatches)]

    return cycle(profile.lengths), cycle(profile.loss_lengths)


def stage_costs(profile: Profile, split: Split, microbatches: int) -> Costs:
    """Costs of the stages that a split makes."""
    stages = len(split.layers)
    by_length, by_loss = lengths(profile, microbatches)
    first = [sum(split.layers[:stage]) for stage in range(stages)]
    parts: list[list[Module]] = [
        [
            *([profile.embedding] if stage == 0 else []),
            *profile.layers[first[stage] : first[stage] + split.layers[stage]],
            *([profile.text_head] if stage == split.head else []),
        ]
        for stage in range(stages)
    ]

    def table(field: str) -> Any:
        losses = [0.0] * (stages - 1) + [getattr(profile.modality_losses, field)]
        sums = [sum(getattr(module, field) for module in part) for part in parts]
        return tuple(
            tuple(plain * a + loss * b for a, b in zip(by_length, by_loss, strict=True))
            for plain, loss in zip(sums, losses, strict=True)
        )

    borders = tuple(
        tuple(round((part[0] if part else profile.modality_losses).received * length) for length in by_length)
        for part in parts
    )
    return Costs(
        forward=table("forward"),
        input=table("input"),
        weight=table("weight"),
        transfer=tuple(tuple(profile.transfer * length for length in by_length) for _ in range(stages)),
        saved=tuple(tuple(map(round, row)) for row in table("saved")),
        received=borders,
    )
