"""What was measured of a model, as plain data: durations and bytes of its modules, read from and written to JSON.

    {"embedding":       {"forward": 0.2, "input": 0.0, "weight": 0.1, "saved": 1000, "received": 100},
     "layers":          [{"forward": 1.0, "input": 1.1, "weight": 0.9, "saved": 9000, "received": 500}, ...],
     "text_head":       {...},
     "modality_losses": {...},
     "transfer":        0.05,               or, by size, instead:
     "links":           [[[1024, 0.01], [100000, 0.2]], ...],
     "lengths":         [1.0, 0.8, ...],    optional: a factor a microbatch, of all modules but the losses
     "loss_lengths":    [1.0, 0.2, ...]}    optional: the same of the losses

Times are in one unit, whichever, for a microbatch of length 1. A link is what a device and the next one have between
them: bytes and the time that they take, at rising sizes. Devices beyond those that were measured have them in turn.
"""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longcat_model.files import write_json
from longcat_model.pipeline.costs import Costs

MOST = 2.0**48  # of a number in a file, so that sums stay numbers of bytes: 281 TB

Link = tuple[tuple[float, float], ...]  # bytes and the time that they take, at rising sizes


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
    transfer: float = 0.0  # of one microbatch's hidden states from a device to another; without `links`
    lengths: tuple[float, ...] = ()  # [microbatch]; empty: all 1
    loss_lengths: tuple[float, ...] = ()  # [microbatch]; empty: all 1
    links: tuple[Link, ...] = ()  # from device 0 to 1, from 1 to 2, ...


@dataclass(frozen=True)
class Split:
    """Which stage has which modules: stage 0 begins with the embedding, the last ends with the modality losses."""

    layers: tuple[int, ...]  # how many each stage has, in order
    head: int  # the stage that has the text head; no later stage has layers


def load(file: Path) -> Profile:
    """Reads a profile.

    Raises:
        ValueError: the file is not a profile; names the part, the rule and what was found.
    """
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"profile: {file} must be a readable JSON file: {error}") from None
    try:
        optional = {"lengths", "loss_lengths", "transfer", "links"}
        _check_keys("the file", data, {"layers", *_MODULES}, optional)
        if ("transfer" in data) == ("links" in data):
            raise ValueError("the file must have one of transfer and links")
        return Profile(
            layers=tuple(_module(f"layers[{i}]", layer) for i, layer in enumerate(_list("layers", data["layers"]))),
            transfer=_number("transfer", data.get("transfer", 0)),
            links=tuple(_link(f"links[{i}]", link) for i, link in enumerate(_list("links", data.get("links", [])))),
            lengths=_numbers("lengths", data.get("lengths", [])),
            loss_lengths=_numbers("loss_lengths", data.get("loss_lengths", [])),
            **{name: _module(name, data[name]) for name in _MODULES},
        )
    except ValueError as error:
        raise ValueError(f"profile: {file}: {error}; longcat_model/pipeline/profile.py shows one") from None


_MODULES = ("embedding", "text_head", "modality_losses")


def _check_keys(name: str, data: Any, needed: set[str], optional: set[str]) -> None:
    if not isinstance(data, dict) or needed - set(data) or set(data) - needed - optional:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        more = f" and may have {sorted(optional)}" if optional else ""
        raise ValueError(f"{name} must be an object with {sorted(needed)}{more}, got {found}")


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
        raise ValueError(f"{name} must be a number from 0 to 2^48, got {reprlib.repr(value)}")
    return value


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    return tuple(_number(f"{name}[{i}]", value) for i, value in enumerate(_list(name, values)))


def _module(name: str, data: Any) -> Module:
    _check_keys(name, data, {"forward", "input", "weight"}, {"saved", "received"})
    numbers: dict[str, float] = {field: _number(f"{name}.{field}", value) for field, value in data.items()}
    sizes = (round(numbers.get(field, 0)) for field in ("saved", "received"))
    return Module(numbers["forward"], numbers["input"], numbers["weight"], *sizes)


def _link(name: str, data: Any) -> Link:
    points = [_numbers(f"{name}[{i}]", point) for i, point in enumerate(_list(name, data))]
    sizes = [point[0] for point in points if len(point) == 2]
    if not points or len(sizes) < len(points) or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"{name} must be pairs of bytes and time, at rising sizes, got {reprlib.repr(data)}")
    return tuple((size, time) for size, time in points)


def save(profile: Profile, file: Path) -> None:
    """Writes what `load` reads."""
    data = asdict(profile)
    del data["transfer" if profile.links else "links"]
    write_json(file, data)


def time_of(link: Link, size: float) -> float:
    """Of a transfer of so many bytes: on straight lines between what was measured, beyond it on the last of them.

    Less than the least takes as long as that.

        >>> time_of(((100, 1.0), (300, 2.0)), 200), time_of(((100, 1.0), (300, 2.0)), 500)
        (1.5, 3.0)
    """
    if size <= link[0][0] or len(link) == 1:
        return link[0][1]
    (a, start), (b, end) = next((ends for ends in itertools.pairwise(link) if size <= ends[1][0]), link[-2:])
    return max(0.0, start + (end - start) * (size - a) / (b - a))


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

    def received(stage: int) -> Sequence[int]:
        """What the stage, or the next one that has modules, begins with."""
        first = next(itertools.chain(*parts[stage:]), None)
        one, scales = (profile.modality_losses, by_loss) if first is None else (first, by_length)
        return [round(one.received * scale) for scale in scales]

    borders = tuple(tuple(received(stage)) for stage in range(stages))
    kept = zip(table("saved"), borders, strict=True)  # its input, where a stage has no modules
    return Costs(
        forward=table("forward"),
        input=table("input"),
        weight=table("weight"),
        transfer=tuple(
            tuple(_transfer(profile, stage, stages, *one) for one in zip(sizes, by_length, strict=True))
            for stage, sizes in enumerate((*borders[1:], (0,) * microbatches))
        ),
        saved=tuple(tuple(max(round(size), own) for size, own in zip(*rows, strict=True)) for rows in kept),
        received=borders,
    )


def _transfer(profile: Profile, stage: int, stages: int, size: int, length: float) -> float:
    """From a stage to the one after: `size` bytes of a microbatch of this length."""
    if not profile.links:
        return profile.transfer * length
    first = min(stage, stages - 2 - stage)  # of the two devices
    return time_of(profile.links[first % len(profile.links)], size) if first >= 0 else 0.0
