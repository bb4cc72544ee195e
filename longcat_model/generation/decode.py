"""The loop of generation: one position for all rows through the cached backbone, then the heads their states ask for.

Rows of any tasks and lengths go on together; each has its own place in the cache, and a guided image's row has an
unconditional partner there while the image lasts. Rows that end leave the batch.

Dimension key
    M rows of the cache    D model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longcat_model.backbone import Cache
from longcat_model.generation.chooser import Asking, Chooser, Written
from longcat_model.generation.machine import Answer, Position, State, stack
from longcat_model.generation.prefill import Prefixes, Reader
from longcat_model.model import LongcatNext
from longcat_model.sequence import Inputs

Observer = Callable[[int, str, Position], bool]  # row's number, mode, position -> whether the row shall stop
Partner = Callable[[int], Inputs]  # positions before an image's size and start -> what its partner reads, both included


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row to continue."""

    prompt: Inputs  # without the row dimension, at least one position; an image that follows has begun
    state: State
    seed: int
    partner: Inputs | None = None  # what an image that follows the prompt is guided against
    later_partner: Partner | None = None  # what an image that begins later is guided against; None: the row has none

    @property
    def rooms(self) -> int:
        """Rows of the cache."""
        return 1 if self.partner is None and self.later_partner is None else 2

    @property
    def capacity(self) -> int:
        """Positions that the longer of its rows may come to hold."""
        partner = 0 if self.partner is None else self.partner.text.shape[0]
        return max(self.prompt.text.shape[0], partner) + self.state.longest


def cache_bytes(model: LongcatNext, requests: Sequence[Request]) -> int:
    """Bytes of the cache that `decode` allocates for the requests, all at once and before anything else."""
    if not requests:
        return 0
    position = Cache.position_bytes(model.sizes.backbone, model.embed_tokens.weight.dtype)
    return position * sum(r.rooms for r in requests) * max(r.capacity for r in requests)


@torch.no_grad()
def decode(
    model: LongcatNext,
    requests: Sequence[Request],
    *,
    observe: Observer | None = None,
    prefixes: Prefixes | None = None,
) -> list[list[Position]]:
    """Continues every prompt until its state ends or `observe` stops it.

    Args:
        observe: is told every position as it is written.
        prefixes: prompts read in earlier calls.

    Returns:
        What was written after each prompt, the position that ended it included.

    Raises:
        ValueError: an empty prompt, or prefixes of another model.
    """
    if prefixes is not None and prefixes.model is not model:
        raise ValueError("generate: prefixes must be of the model that generates, got another's")
    for i, request in enumerate(requests):
        if not request.prompt.text.shape[0]:
            raise ValueError(f"generate: prompts must not be empty, got prompt {i} without positions")
    written: list[list[Position]] = [[] for _ in requests]
    if not requests:
        return written

    def note(number: int, mode: str, position: Position) -> bool:
        written[number].append(position)
        return observe is not None and observe(number, mode, position)

    batch = _Batch.of(model, requests, prefixes)
    step = 0
    while batch.rows:
        batch.step(step, note)
        step += 1
    return written


@dataclass
class _Row:
    """One request under way."""

    number: int
    request: Request
    state: State
    row: int  # of the cache
    partner: int | None  # likewise
    written: Written = field(default_factory=Written)

    def asking(self) -> Asking:
        return Asking(self.state.ask(), self.row, self.partner, self.request.seed, self.written)

    def take(self, answer: Answer, note: Observer) -> tuple[State | None, tuple[Position, ...]]:
        """The next state, None if the row has ended, and the positions to feed."""
        state, positions = self.state.advance(answer)
        mode = self.state.mode
        if mode == "text" and state is not None:
            mode = state.mode  # what begins an image or speech is part of it
        stops = False
        for position in positions:
            self.written.note(position)
            stops |= note(self.number, mode, position)
        return None if stops else state, positions


@dataclass
class _Batch:
    chooser: Chooser
    cache: Cache
    rows: list[_Row]
    hidden: Tensor  # [M, D] of the last position of every row of the cache

    @classmethod
    def of(cls, model: LongcatNext, requests: Sequence[Request], prefixes: Prefixes | None) -> _Batch:
        weight = model.embed_tokens.weight
        rooms, capacity = sum(r.rooms for r in requests), max(r.capacity for r in requests)
        cache = Cache.empty(model.sizes.backbone, rooms, capacity, device=weight.device, dtype=weight.dtype)
        cache.keep([])
        reader, rows, hidden = Reader(model, cache, prefixes), [], []
        for number, request in enumerate(requests):
            row, partner = cache.add_row(), None
            hidden.append(reader.read(row, request.prompt))
            if request.partner is not None:
                partner = cache.add_row()
                hidden.append(reader.read(partner, request.partner))
            rows.append(_Row(number, request, request.state, row, partner))
        return cls(Chooser.of(model), cache, rows, torch.stack(hidden))

    def step(self, step: int, note: Observer) -> None:
        """Asks the heads, feeds what they answer, and drops rows that end."""
        answers = self.chooser.answers([row.asking() for row in self.rows], self.hidden, step)
        going, fed = [], []
        for row, answer in zip(self.rows, answers, strict=True):
            state, positions = row.take(answer, note)
            if state is not None:
                row.state = state
                going.append(row)
                fed.append(positions)
        self._keep(going)
        if going:
            self._feed(fed)

    def _keep(self, going: list[_Row]) -> None:
        """Frees the rows of the cache that nobody needs any more: of rows that ended, and of images that did."""
        for row in going:
            if row.state.guidance is None:
                row.partner = None
        kept = sorted(r for row in going for r in (row.row, row.partner) if r is not None)
        self.cache.keep(kept)
        places = {old: new for new, old in enumerate(kept)}
        for row in going:
            row.row = places[row.row]
            row.partner = None if row.partner is None else places[row.partner]
        self.rows = going

    def _feed(self, fed: list[tuple[Position, ...]]) -> None:
        """Reads each row's new positions: the last ones together, those before it, and new partners, by themselves."""
        model = self.chooser.model
        reader = Reader(model, self.cache)
        last: dict[int, Position] = {}
        for row, positions in zip(self.rows, fed, strict=True):
            later = row.request.later_partner
            if row.partner is not None:
                last[row.partner] = positions[-1]
            elif row.state.guidance is not None and later is not None:  # an image has just begun
                partner = later(self.cache.lengths[row.row])
                row.partner = self.cache.add_row()
                reader.read(row.partner, partner.map(lambda field: field[:-1]))
                last[row.partner] = Position(text=int(partner.text[-1]))
            if len(positions) > 1:
                reader.read(row.row, stack(model.ids, positions[:-1]))
            last[row.row] = positions[-1]
        inputs = stack(model.ids, [last[row] for row in range(self.cache.batch)]).map(lambda field: field[:, None])
        self.hidden = model(inputs.to(self.hidden.device), self.cache).hidden[:, -1]
