"""What a decoding model remembers of the positions it has read.

Attention is kept in its latent form: kv_rank normalised and scaled channels plus rope_dim rotated ones a position and
sub-block (576 numbers in the released model, an eighteenth of the expanded keys and values).

Dimension key
    A attention sub-blocks (two a layer)    B batch    S new positions    T positions held    N n-gram look-back
    R latent channels: kv_rank + rope_dim
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_model import config


@dataclass
class Cache:
    """Latent keys and values, document numbers and text ids of the positions read so far.

    Every row of the batch holds the same number of positions. Writing happens in place and carries no gradient, so a
    cached forward runs under `torch.no_grad()` or `torch.inference_mode()`.

    Example:
        >>> cache = Cache.empty(config.Backbone(layers=2), batch=3, capacity=64)
        >>> cache.latents.shape, cache.capacity, cache.length
        (torch.Size([4, 3, 64, 576]), 64, 0)
        >>> cache.select(torch.tensor([0, 2])).batch
        2
    """

    latents: Tensor  # [A, B, capacity, R]; only the first `length` positions are defined
    documents: Tensor  # [B, capacity] int64
    text: Tensor  # [B, capacity] int64 ids as the model was given them, -1 for none
    look_back: int  # previous text ids an n-gram embedding reads
    length: int = 0  # positions held

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
            latents=torch.empty(2 * sizes.layers, batch, capacity, channels, device=device, dtype=dtype),
            documents=torch.zeros(batch, capacity, device=device, dtype=torch.int64),
            text=torch.full((batch, capacity), -1, device=device, dtype=torch.int64),
            look_back=0 if sizes.ngram is None else sizes.ngram.neighbors - 1,
        )

    @property
    def batch(self) -> int:
        return self.latents.shape[1]

    @property
    def capacity(self) -> int:
        return self.latents.shape[2]

    def select(self, rows: Tensor) -> Cache:
        """A copy that holds the given rows only (int64 [B'], repeats allowed): finished ones drop out."""
        blocks, _, capacity, channels = self.latents.shape
        # Only what is defined is copied: room for positions to come costs nothing until it is written.
        latents = self.latents.new_empty(blocks, rows.shape[0], capacity, channels)
        latents[:, :, : self.length] = self.latents[:, :, : self.length].index_select(1, rows)
        return replace(
            self,
            latents=latents,
            documents=self.documents.index_select(0, rows),
            text=self.text.index_select(0, rows),
        )

    def reserve(self, documents: Tensor) -> Tensor:
        """Checks that S more positions [B, S] fit, notes their documents; returns the documents [B, T] of all."""
        self._check_rows(documents)
        new = documents.shape[1]
        if self.length + new > self.capacity:
            raise ValueError(
                f"Cache: positions must stay within the capacity of {self.capacity}, got {self.length} held + {new} "
                f"new (make the cache with capacity={self.length + new} or more)"
            )
        self.documents[:, self.length : self.length + new] = documents
        return self.documents[:, : self.length + new]

    def write(self, sub_block: int, latents: Tensor) -> Tensor:
        """Puts a sub-block's latents [B, S, R] of the new positions in place; returns those [B, T, R] of all."""
        if torch.is_grad_enabled() and latents.requires_grad:
            raise ValueError("Cache: a cached forward must run under torch.no_grad(), got gradients enabled")
        end = self.length + latents.shape[1]
        self.latents[sub_block, :, self.length : end] = latents
        return self.latents[sub_block, :, :end]

    def history(self, documents: Tensor) -> Tensor:
        """The text ids [B, N] before the next positions, whose documents are [B, S].

        An id of another document than the first new position's counts as 0, which ends an n-gram; so does no id.
        """
        self._check_rows(documents)
        start = max(0, self.length - self.look_back)
        ids = self.text[:, start : self.length].clamp(min=0)
        ids = ids.where(self.documents[:, start : self.length] == documents[:, :1], 0)
        return F.pad(ids, (self.look_back - ids.shape[1], 0))

    def note_text(self, text: Tensor) -> None:
        """Keeps the text ids [B, S] of the positions just read, for the n-grams of later ones."""
        self.text[:, self.length - text.shape[1] : self.length] = text

    def _check_rows(self, documents: Tensor) -> None:
        if documents.shape[0] != self.batch:
            raise ValueError(f"Cache: rows must stay {self.batch}, got {documents.shape[0]} (drop rows with select)")
