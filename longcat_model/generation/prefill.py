"""Reading prompts, and reading what they have in common once.

A prompt is read row by row in blocks that begin at multiples of `BLOCK` positions, each by a forward of its own. What a
block leaves in the cache then depends on the positions up to its end and on nothing else, so a block that was read
before, in another row or an earlier call, is copied and the result is the same bit by bit.

Dimension key
    A attention sub-blocks    S positions of a block    R latent channels    D model
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from longcat_model.backbone import Cache
from longcat_model.model import LongcatNext
from longcat_model.sequence import Inputs

BLOCK = 128  # positions


@dataclass(frozen=True)
class Block:
    """What reading S positions leaves behind."""

    latents: Tensor  # [A, S, R]
    hidden: Tensor  # [D] of its last position

    @property
    def nbytes(self) -> int:
        return self.latents.nbytes + self.hidden.nbytes


@dataclass
class Prefixes:
    """Blocks of prompts of one model, kept over calls: the turns of a chat, or many questions after one introduction.

    Whoever changes the model's weights makes a new one. The blocks used least recently go when there are too many.

    Args:
        model: whose prompts these are.
        max_bytes: most memory that blocks may take.
    """

    model: LongcatNext
    max_bytes: int = 1 << 30
    read: int = 0  # positions read so far
    reused: int = 0  # positions copied instead
    _blocks: OrderedDict[bytes, Block] = field(default_factory=OrderedDict, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def find(self, key: bytes) -> Block | None:
        if key in self._blocks:
            self._blocks.move_to_end(key)
        return self._blocks.get(key)

    def add(self, key: bytes, block: Block) -> None:
        """Keeps a copy."""
        self._blocks[key] = Block(block.latents.clone(), block.hidden.clone())
        while self._blocks and self.nbytes > self.max_bytes:
            self._blocks.popitem(last=False)


@dataclass
class Reader:
    """Reads prompts into one cache; rows that begin alike share the reading while all rows stay where they are."""

    model: LongcatNext
    cache: Cache
    prefixes: Prefixes | None = None
    _here: dict[bytes, Block] = field(default_factory=dict)  # views of rows read before

    def read(self, row: int, inputs: Inputs) -> Tensor:
        """Adds positions [T] to a row of the cache; returns the last one's hidden state [D]."""
        key, hidden = b"", torch.empty(0)
        begins = self.cache.lengths[row] == 0  # otherwise no key names what the row goes on from: nothing is shared
        for chunk in _chunks(inputs):
            key = _digest(key, chunk)
            hidden = self._block(row, key, chunk).hidden if begins else self._forward(row, chunk)
        return hidden

    def _block(self, row: int, key: bytes, inputs: Inputs) -> Block:
        known = self._here.get(key) or (None if self.prefixes is None else self.prefixes.find(key))
        start, new = self.cache.lengths[row], inputs.text.shape[0]
        if known is not None:
            self.cache.copy_in(row, known.latents, inputs.documents, inputs.text)
            hidden = known.hidden
        else:
            hidden = self._forward(row, inputs)
        block = Block(self.cache.latents[:, row, start : start + new], hidden)
        self._here[key] = block
        if self.prefixes is not None:
            self._note(key, block, new, known is not None)
        return block

    def _forward(self, row: int, inputs: Inputs) -> Tensor:
        alone = self.cache.row(row)
        batch = inputs.map(lambda field: field[None]).to(self.cache.text.device)
        hidden = self.model(batch, alone).hidden[0, -1].clone()  # a view would hold the whole block's
        self.cache.lengths[row] = alone.lengths[0]
        return hidden

    def _note(self, key: bytes, block: Block, positions: int, is_known: bool) -> None:
        assert self.prefixes is not None
        if is_known:
            self.prefixes.reused += positions
        else:
            self.prefixes.read += positions
        if self.prefixes.find(key) is None:
            self.prefixes.add(key, block)


def _chunks(inputs: Inputs) -> list[Inputs]:
    parts = (getattr(inputs, f.name).split(BLOCK) for f in fields(Inputs))
    return [Inputs(*chunk) for chunk in zip(*parts, strict=True)]


def _digest(before: bytes, inputs: Inputs) -> bytes:
    """Names a block by its content and by everything before it."""
    digest = hashlib.sha256(before)
    for part in fields(Inputs):
        digest.update(getattr(inputs, part.name).cpu().numpy().tobytes())
    return digest.digest()
