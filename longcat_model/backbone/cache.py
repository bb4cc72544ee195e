"""What a decoding model remembers of the positions it has read.

Attention is kept in its latent form: kv_rank normalised and scaled channels plus rope_dim rotated ones a position and
sub-block (576 numbers in the released model, an eighteenth of the expanded keys and values).

Dimension key
    A attention sub-blocks (two a layer)    B batch    S new positions    T positions held    N n-gram look-back
    R latent channels: kv_rank + rope_dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longcat_model import config


@dataclass
class Cache:
    """Latent keys and values, document numbers and text ids of the positions that each row has read so far.

    Rows hold as many positions as they have read, from place 0 on. All room is allocated at once, for `rooms` rows of
    `capacity` positions; the first `batch` of them are in use. Writing happens in place and carries no gradient, so a
    cached forward runs under `torch.no_grad()` or `torch.inference_mode()`.

    Example:
        >>> cache = Cache.empty(config.Backbone(layers=2), batch=3, capacity=64)
        >>> cache.latents.shape, cache.capacity, cache.lengths
        (torch.Size([4, 3, 64, 576]), 64, [0, 0, 0])
        >>> cache.keep([0, 2])
        >>> cache.batch, cache.rooms, cache.add_row()
        (2, 3, 2)
    """

    latents: Tensor  # [A, rooms, capacity, R]; finite everywhere, since attention weighs what is not held with 0
    documents: Tensor  # [rooms, capacity] int64
    text: Tensor  # [rooms, capacity] int64 ids as the model was given them, -1 for none
    look_back: int  # previous text ids an n-gram embedding reads
    lengths: list[int]  # positions held by each row in use

    @classmethod
    def empty(
        cls,
        sizes: config.Backbone,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """A cache with room for `capacity` positions of `batch` rows; `dtype` is that of the backbone's weights."""
        if batch < 1 or capacity < 1:
            raise ValueError(f"Cache: batch and capacity must be positive, got {batch} and {capacity}")
        channels = sizes.attention.kv_rank + sizes.attention.rope_dim
        return cls(
            latents=torch.zeros(2 * sizes.layers, batch, capacity, channels, device=device, dtype=dtype),
            documents=torch.zeros(batch, capacity, device=device, dtype=torch.int64),
            text=torch.full((batch, capacity), -1, device=device, dtype=torch.int64),
            look_back=0 if sizes.ngram is None else sizes.ngram.neighbors - 1,
            lengths=[0] * batch,
        )

    @staticmethod
    def position_bytes(sizes: config.Backbone, dtype: torch.dtype) -> int:
        """Bytes a position takes: its latents in every sub-block, its document number, its text id."""
        channels = sizes.attention.kv_rank + sizes.attention.rope_dim
        return 2 * sizes.layers * channels * dtype.itemsize + 2 * torch.int64.itemsize

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def rooms(self) -> int:
        return self.latents.shape[1]

    @property
    def capacity(self) -> int:
        return self.latents.shape[2]

    def add_row(self) -> int:
        """Takes one more row into use, without positions; returns its number."""
        if self.batch == self.rooms:
            raise ValueError(f"Cache: rows must stay within the {self.rooms} there is room for, got one more")
        self.lengths.append(0)
        return self.batch - 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drops the rows that are not in `rows` (ascending); those that stay move up, in place."""
        if list(rows) != sorted({*rows} & {*range(self.batch)}):
            raise ValueError(f"Cache: rows to keep must ascend within [0, {self.batch}), got {list(rows)}")
        for new, old in enumerate(rows):
            if new != old:  # then new < old, and row `new` has moved already or is dropped
                held = self.lengths[old]
                self.latents[:, new, :held] = self.latents[:, old, :held]
                self.documents[new, :held] = self.documents[old, :held]
                self.text[new, :held] = self.text[old, :held]
        self.lengths = [self.lengths[row] for row in rows]

    def row(self, row: int) -> Cache:
        """One row as a cache of its own over the same memory; give its length back with `lengths[row] = ...`."""
        rows = slice(row, row + 1)
        return replace(
            self,
            latents=self.latents[:, rows],
            documents=self.documents[rows],
            text=self.text[rows],
            lengths=self.lengths[rows],
        )

    def copy_in(self, row: int, latents: Tensor, documents: Tensor, text: Tensor) -> None:
        """Adds S positions read elsewhere to a row: latents [A, S, R], documents and text [S]."""
        places = slice(self.lengths[row], self.lengths[row] + latents.shape[1])
        self.latents[:, row, places] = latents
        self.documents[row, places] = documents.to(self.documents.device)
        self.text[row, places] = text.to(self.text.device)
        self.lengths[row] = places.stop

    def reserve(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Checks that S more positions [B, S] fit and notes their documents.

        Returns:
            places: [B, S] of the new positions in their rows.
            documents: [B, T] of all positions up to the longest row's last; places that a row has not reached yet hold
                anything.
        """
        self._check_rows(documents)
        new, longest = documents.shape[1], max(self.lengths)
        if longest + new > self.capacity:
            raise ValueError(
                f"Cache: positions must stay within the capacity of {self.capacity}, got {longest} held + {new} new "
                f"(make the cache with capacity={longest + new} or more)"
            )
        places = self._held(documents.device) + torch.arange(new, device=documents.device)
        self.documents[: self.batch].scatter_(1, places, documents)
        return places, self.documents[: self.batch, : longest + new]

    def write(self, sub_block: int, places: Tensor, latents: Tensor) -> Tensor:
        """Puts a sub-block's latents [B, S, R] at `places` [B, S]; returns those [B, T, R] of all positions."""
        if torch.is_grad_enabled() and latents.requires_grad:
            raise ValueError("Cache: a cached forward must run under torch.no_grad(), got gradients enabled")
        rows = torch.arange(self.batch, device=places.device)[:, None]
        self.latents[sub_block].index_put_((rows, places), latents)
        return self.latents[sub_block, : self.batch, : max(self.lengths) + latents.shape[1]]

    def advance(self, new: int) -> None:
        """Counts `new` positions that every sub-block has written."""
        self.lengths = [length + new for length in self.lengths]

    def history(self, documents: Tensor) -> Tensor:
        """The text ids [B, N] before the next positions, whose documents are [B, S].

        An id of another document than the first new position's counts as 0, which ends an n-gram; so does no id.
        """
        self._check_rows(documents)
        places = self._held(documents.device) + torch.arange(-self.look_back, 0, device=documents.device)
        known = places.clamp(min=0)
        ids = self.text[: self.batch].gather(1, known).clamp(min=0)
        same = self.documents[: self.batch].gather(1, known) == documents[:, :1]
        return ids.where(same & (places >= 0), 0)

    def note_text(self, text: Tensor) -> None:
        """Keeps the text ids [B, S] of the positions just read, for the n-grams of later ones."""
        places = self._held(text.device) - text.shape[1] + torch.arange(text.shape[1], device=text.device)
        self.text[: self.batch].scatter_(1, places, text)

    def _held(self, device: torch.device) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int64, device=device)[:, None]

    def _check_rows(self, documents: Tensor) -> None:
        if documents.shape[0] != self.batch:
            raise ValueError(f"Cache: rows must stay {self.batch}, got {documents.shape[0]} (drop rows with keep)")
