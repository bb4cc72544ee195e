"""The barriers of csrc/cuda/rvq_coarse_wgmma.cuh, as its head describes them: a model of two blocks whose steps come in
every order that chance gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

STAGES, STEPS = 4, 23
CONSUMERS = 2  # a block; stand for its eight warps


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and no bytes are missing."""

    size: int
    left: int = field(init=False)
    bytes: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        self.left = self.size

    def arrive(self, expected: int = 0) -> None:
        self.left -= 1
        assert self.left >= 0, "more arrivals than the phase has"
        self.add(expected)

    def add(self, count: int) -> None:
        self.bytes += count
        if self.left == 0 and self.bytes == 0:
            self.phase, self.left = self.phase + 1, self.size

    def passed(self, parity: int) -> bool:
        """As try_wait.parity: whether the phase of this parity is over."""
        return self.phase % 2 != parity


@dataclass
class Cluster:
    """Two blocks; each stage of each has three pieces: its own rows and both halves of the words."""

    draw: random.Random
    readers: int  # whose arrivals free a stage: those of both blocks, if the protocol is right
    memory: list = field(default_factory=lambda: [[[None] * 3 for _ in range(STAGES)] for _ in range(2)])
    flying: list = field(default_factory=list)  # copies under way: block, stage, piece, step

    def __post_init__(self) -> None:
        self.full = [[Barrier(1) for _ in range(STAGES)] for _ in range(2)]
        self.empty = [[Barrier(self.readers) for _ in range(STAGES)] for _ in range(2)]

    def producer(self, rank: int) -> Iterator[None]:
        for step in range(STEPS):
            stage, parity = step % STAGES, step // STAGES % 2
            while not self.empty[rank][stage].passed(parity ^ 1):
                yield
            self.full[rank][stage].arrive(expected=3)
            yield
            self.flying.append((rank, stage, 0, step))
            yield
            self.flying.extend((block, stage, 1 + rank, step) for block in range(2))
            yield

    def consumer(self, rank: int) -> Iterator[None]:
        for step in range(STEPS):
            stage, parity = step % STAGES, step // STAGES % 2
            while not self.full[rank][stage].passed(parity):
                yield
            for _ in range(self.draw.randint(0, 3)):
                assert self.memory[rank][stage] == [step] * 3, "a stage was overwritten, or read too early"
                yield
            for block in range(2) if self.readers == 2 * CONSUMERS else (rank,):
                self.empty[block][stage].arrive()
                yield

    def copies(self) -> Iterator[None]:
        while True:
            if self.flying:
                block, stage, piece, step = self.flying.pop(self.draw.randrange(len(self.flying)))
                self.memory[block][stage][piece] = step
                self.full[block][stage].add(-1)
            yield

    def run(self) -> None:
        running = [self.producer(0), self.producer(1), *(self.consumer(i % 2) for i in range(2 * CONSUMERS))]
        engine = self.copies()
        for _ in range(100_000):
            turn = self.draw.randrange(len(running) + 1)
            if turn == len(running):
                next(engine)
            elif next(running[turn], "done") == "done":
                del running[turn]
            if not running:
                return
        raise AssertionError("the blocks wait for each other")


def test_the_ring_of_stages_neither_loses_nor_overwrites() -> None:
    for seed in range(60):
        Cluster(random.Random(seed), readers=2 * CONSUMERS).run()


def test_the_model_would_notice_a_stage_freed_too_early() -> None:
    """If a block asked only its own consumers, it would overwrite what the other block still reads."""
    with pytest.raises(AssertionError):
        for seed in range(60):
            Cluster(random.Random(seed), readers=CONSUMERS).run()
