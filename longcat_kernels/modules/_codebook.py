"""Codebooks that follow the rows assigned to their entries: what every residual quantizer here is made of.

Dimension key
    N rows    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longcat_kernels.ops.ema_update import ema_update
from longcat_kernels.ops.rvq_encode import RVQEncoding, rvq_encode
from longcat_kernels.prepared import PreparedCodebook

# Rules of `ema_update` that make it k-means: without memory and smoothing an entry becomes the mean of its rows.
_MEANS = {"decay": 0.0, "eps": 0.0, "restart_threshold": 1.0}
_FROM_ROWS = {"decay": 0.0, "eps": 0.0, "restart_threshold": math.inf}


class Codebook(nn.Module, ABC):
    """The state of one codebook; only `ema_update` moves it. Subclasses name its buffers as their checkpoints do.

    It stays float32 where a model is made `bfloat16()` or `double()`: moving sums of 16 bits would stand still.

    Args:
        gram: see `PreparedCodebook`.
    """

    def __init__(self, gram: bool = False) -> None:
        super().__init__()
        self.gram = gram
        self._prepared: PreparedCodebook | None = None

    @property
    @abstractmethod
    def entries(self) -> Tensor:
        """[K, D] float32: the codewords; a view of a buffer, as are the other two."""

    @property
    @abstractmethod
    def sums(self) -> Tensor:
        """[K, D] float32: moving sum of the rows of each entry."""

    @property
    @abstractmethod
    def counts(self) -> Tensor:
        """[K] float32: moving count of the rows of each entry."""

    def prepared(self) -> PreparedCodebook:
        """The prepared form of `entries`: made once, and again where the buffer is another than it was."""
        entries, last = self.entries, self._prepared
        if last is None or not _same_memory(last.words, entries):
            last = self._prepared = PreparedCodebook(entries, gram=self.gram)
        return last

    def move(self, vectors_ND: Tensor, codes_N: Tensor, **rule: Any) -> None:
        """`ema_update` by `rule`."""
        prepared = None if torch.compiler.is_compiling() else self.prepared()
        ema_update(self.entries, self.sums, self.counts, vectors_ND, codes_N, prepared=prepared, **rule)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def moved(tensor: Tensor) -> Tensor:
            there = fn(tensor)
            return there if there.dtype == tensor.dtype else tensor.to(there.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own prepared form."""
        return {**self.__dict__, "_prepared": None}


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.device == b.device


def for_encoding(books: Sequence[Codebook]) -> list[Tensor | PreparedCodebook]:
    """What `rvq_encode` is to be given: prepared forms, or the codewords where their versions cannot be told."""
    if torch.compiler.is_compiling() or books[0].entries.is_inference():
        return [book.entries for book in books]
    return [book.prepared() for book in books]


def finite_rows(x: Tensor, mask: Tensor | None, residual_dtype: torch.dtype) -> Tensor:
    """[N, D]: the rows of x [..., D] that are not masked and have neither NaN nor infinity as residuals."""
    finite = x.to(residual_dtype).isfinite().all(-1)
    return x[finite if mask is None else finite & mask]


def usable_rows(x: Tensor, encoding: RVQEncoding) -> tuple[Tensor, Tensor]:
    """Rows [N, D] and codes [N, L] of x [..., D] but for those that are masked or left NaN or infinity over."""
    extremes = encoding.residual.amax(-1), encoding.residual.amin(-1)  # NaN where one is
    usable = (encoding.codes[..., 0] >= 0) & extremes[0].isfinite() & extremes[1].isfinite()
    if usable.all():
        return x.reshape(-1, x.shape[-1]), encoding.codes.reshape(-1, encoding.codes.shape[-1])
    return x[usable], encoding.codes[usable]


def initialize(
    books: Sequence[Codebook], rows_ND: Tensor, *, steps: int, residual_dtype: torch.dtype, seed: int
) -> None:
    """k-means of finite rows, one at least: level by level, or of a shared codebook at all levels at once.

    A function of its arguments; uses the seeds from `seed` to `seed` + 2^16.
    """
    shared = _is_shared(books)
    together = len(books) if shared else 1
    for first in range(0, len(books), together):
        level_seed = seed + (first << 8)
        everywhere_N = torch.zeros(len(rows_ND), dtype=torch.int64, device=rows_ND.device)
        books[first].move(rows_ND, everywhere_N, seed=level_seed, **_FROM_ROWS)
        level_books = books[first : first + together]
        for number in range(1, steps + 1):
            codes_NL = rvq_encode(rows_ND, for_encoding(level_books), residual_dtype=residual_dtype).codes
            # A shared codebook needs entries for the residuals of the deeper levels too: it starts from them again.
            rule = _FROM_ROWS if number == 1 and shared else _MEANS
            update(level_books, rows_ND, codes_NL, residual_dtype=residual_dtype, seed=level_seed + number, **rule)
        if not shared:
            rows_ND = rvq_encode(rows_ND, for_encoding(level_books), residual_dtype=residual_dtype).residual


def update(
    books: Sequence[Codebook],
    rows_ND: Tensor,
    codes_NL: Tensor,
    *,
    residual_dtype: torch.dtype,
    seed: int,
    **rule: float,
) -> None:
    """Moves each codebook by the residuals that its level was given; a shared one by those of all levels at once."""
    if _is_shared(books):
        given = list(residuals(books, rows_ND, codes_NL, residual_dtype))
        books[0].move(torch.cat(given), codes_NL.T.reshape(-1), seed=seed, **rule)
        return
    for level, vectors_ND in enumerate(residuals(books, rows_ND, codes_NL, residual_dtype)):
        books[level].move(vectors_ND, codes_NL[:, level], seed=seed + (level << 8), **rule)


def residuals(
    books: Sequence[Codebook], rows_ND: Tensor, codes_NL: Tensor, residual_dtype: torch.dtype
) -> Iterator[Tensor]:
    """What each level was given, [N, D] float32; the codebook of a level may move once its residuals are there."""
    given_ND = rows_ND.to(residual_dtype).float()
    for book, codes_N in zip(books[:-1], codes_NL.unbind(1)[:-1], strict=True):
        words_ND = book.entries.index_select(0, codes_N)
        left_ND = torch.sub(given_ND, words_ND, out=words_ND).to(residual_dtype).float()
        yield given_ND
        given_ND = left_ND
    yield given_ND


def _is_shared(books: Sequence[Codebook]) -> bool:
    return len(books) > 1 and books[0] is books[1]
