"""Asks the heads on behalf of rows of different tasks, all rows of a head at once.

Dimension key
    M rows of the cache: a row, or a row and its unconditional partner    n rows that ask    D model
    L quantizer levels    V text rows
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import DepthSampling, PreparedDepth, depth_decode, sample
from longcat_model.generation.machine import Answer, Ask, Codes, Position
from longcat_model.generation.sampling import Sampling
from longcat_model.model import LongcatNext
from longcat_model.sequence import NONE, NULL
from longcat_model.vocabulary import BOS, PAD, SPECIAL_TOKENS, Vocabulary

# Special tokens from here on never had a text loss in the released fine-tuning code (ids 131085 to 131124).
FIRST_UNTRAINED = 13


@dataclass
class Written:
    """Ids that a row has written since its prompt: what its repetition penalties are about."""

    text: array = field(default_factory=lambda: array("q"))
    visual: array = field(default_factory=lambda: array("q"))  # L ids a cell
    audio: array = field(default_factory=lambda: array("q"))

    def note(self, position: Position) -> None:
        if position.text >= 0:
            self.text.append(position.text)
        self.visual.extend(position.visual)
        self.audio.extend(position.audio)


@dataclass(frozen=True)
class Asking:
    """One row that asks."""

    ask: Ask
    row: int  # of the cache
    partner: int | None  # the unconditional row of the cache
    seed: int
    written: Written


@dataclass(frozen=True)
class Chooser:
    """The heads of a model, ready to draw."""

    model: LongcatNext
    visual: PreparedDepth
    audio: PreparedDepth
    masks: dict[str, Tensor]  # bool [V]: ids the text head may choose

    @classmethod
    def of(cls, model: LongcatNext) -> Chooser:
        device = model.embed_tokens.weight.device
        return cls(
            model=model,
            visual=model.visual_head.prepared(model.visual_tables()),
            audio=model.audio_head.prepared(model.audio_tables()),
            masks={name: mask.to(device) for name, mask in text_masks(model.ids).items()},
        )

    def answers(self, asking: Sequence[Asking], hidden_MD: Tensor, step: int) -> list[Answer]:
        """The answers of all rows, on the CPU; a row draws with its own seed, at position `step` of its stream."""
        text = _drawn("text", self._text, asking, hidden_MD, step)
        visual = _drawn("visual", self._cells, asking, hidden_MD, step)
        audio = _drawn("audio", self._frames, asking, hidden_MD, step)
        return [Answer(text.get(i, NONE), visual.get(i, ()), audio.get(i, ())) for i in range(len(asking))]

    def _text(self, asking: list[Asking], samplings: list[Sampling], hidden_MD: Tensor, step: int) -> list[int]:
        masks_nV = torch.stack([self.masks[a.ask.allowed] for a in asking])
        drawn = sample(
            self.model.text_logits(hidden_MD[[a.row for a in asking]]).masked_fill(~masks_nV, -torch.inf),
            **_columns(samplings, hidden_MD.device),
            history=_history(samplings, [a.written.text for a in asking], 1, hidden_MD.device),
            seed=_seeds(asking, samplings, hidden_MD.device),
            step=step,
        )
        return drawn.ids.tolist()

    def _cells(self, asking: list[Asking], samplings: list[Sampling], hidden_MD: Tensor, step: int) -> list[Codes]:
        """A guided row is followed by its partner, whose logits it takes and whose code is its own."""
        copies = [1 if a.partner is None else 2 for a in asking]
        rows = [row for a in asking for row in (a.row, a.partner) if row is not None]
        leaders = [i - i_copy for i, i_copy in enumerate(copy for n in copies for copy in range(n))]
        every = [a for a, n in zip(asking, copies, strict=True) for _ in range(n)]
        drawing = [sampling for sampling, n in zip(samplings, copies, strict=True) for _ in range(n)]
        scales = [[1.0 if a.ask.guidance is None else a.ask.guidance] for a in every]
        decoding = depth_decode(
            hidden_MD[rows],
            self.visual,
            DepthSampling(
                **_columns(drawing, hidden_MD.device, levels=True),
                guidance=torch.tensor(scales, device=hidden_MD.device),
            ),
            pairs=None if len(rows) == len(asking) else torch.tensor(leaders, device=hidden_MD.device),
            history=_history(drawing, [a.written.visual for a in every], self.visual_levels, hidden_MD.device),
            seed=_seeds(every, drawing, hidden_MD.device),
            step=step,
        )
        drawn = decoding.codes.tolist()
        return [tuple(drawn[i]) for i, leader in enumerate(leaders) if i == leader]

    def _frames(self, asking: list[Asking], samplings: list[Sampling], hidden_MD: Tensor, step: int) -> list[Codes]:
        """The end is level 0's to say, in the rows that may."""
        may_end = torch.tensor([[a.ask.audio_may_end] for a in asking])
        end = may_end & (torch.arange(self.audio_levels) == 0)
        decoding = depth_decode(
            hidden_MD[[a.row for a in asking]],
            self.audio,
            DepthSampling(**_columns(samplings, hidden_MD.device, levels=True), end=end.to(hidden_MD.device)),
            history=_history(samplings, [a.written.audio for a in asking], self.audio_levels, hidden_MD.device),
            seed=_seeds(asking, samplings, hidden_MD.device),
            step=step,
        )
        return [tuple(codes) for codes in decoding.codes.tolist()]

    @property
    def visual_levels(self) -> int:
        return len(self.model.ids.visual_sizes)

    @property
    def audio_levels(self) -> int:
        return len(self.model.ids.audio_sizes)


def text_masks(ids: Vocabulary) -> dict[str, Tensor]:
    """Ids [V] that the text head may choose: in "text", in a "reply" that may begin media, in a "transcript"."""
    text = torch.ones(ids.text_rows, dtype=torch.bool)
    text[[NULL, BOS, PAD]] = False
    text[ids.text_size + FIRST_UNTRAINED : ids.text_size + SPECIAL_TOKENS] = False
    reply = text.clone()
    reply[[ids.image_start, ids.audiogen_start]] = True
    transcript = torch.zeros(ids.text_rows, dtype=torch.bool)
    transcript[PAD + 1 : ids.text_size] = True
    transcript[[ids.audiotext_end, ids.audiotext_pad]] = True
    return {"text": text, "reply": reply, "transcript": transcript}


def _drawn(
    head: str, draw: Callable[..., list[Any]], asking: Sequence[Asking], hidden_MD: Tensor, step: int
) -> dict[int, Any]:
    """What those who ask a head are answered, by their numbers."""
    found = [(i, a, getattr(a.ask, head)) for i, a in enumerate(asking) if getattr(a.ask, head) is not None]
    if not found:
        return {}
    numbers, some, samplings = map(list, zip(*found, strict=True))
    return dict(zip(numbers, draw(some, samplings, hidden_MD, step), strict=True))


def _columns(samplings: Sequence[Sampling], device: torch.device, *, levels: bool = False) -> dict[str, Any]:
    """Settings by row, [n] or, to be spread over levels, [n, 1]."""
    rows = [s.numbers() | {"order": s.order == "joint"} for s in samplings]
    columns = {name: torch.tensor([row[name] for row in rows], device=device) for name in rows[0]}
    return {name: x[:, None] if levels else x for name, x in columns.items()}


def _history(
    samplings: Sequence[Sampling], written: Sequence[array], levels: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Ids [N] or [N, L] that the rows have written, and where each row's begin; None where nobody is penalised."""
    if all(sampling.repetition_penalty == 1 for sampling in samplings):
        return None
    ids = torch.tensor([i for row in written for i in row], dtype=torch.int64)
    ends = torch.tensor([0, *accumulate(len(row) // levels for row in written)])
    return (ids if levels == 1 else ids.view(-1, levels)).to(device), ends.to(device)


def _seeds(asking: Sequence[Asking], samplings: Sequence[Sampling], device: torch.device) -> Tensor:
    return torch.tensor([a.seed + s.seed for a, s in zip(asking, samplings, strict=True)], device=device)
