"""The n-gram embedding with its tables (the over-embedding of LongCat-Flash-Lite).

Dimension key
    B batch    S sequence    N tables    W width of a table    D model    V rows of the word table
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from longcat_kernels.ops.ngram_embedding import ngram_embedding


class HostTables(nn.ModuleList):
    """Modules that stay where they are when the module around them moves."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return self


class NGramEmbedding(nn.Module):
    """Tables and projections of `ngram_embedding`, with the released state dict names; the word table is the caller's.

    Args:
        hidden: width D; N must divide it.
        rows: table i has rows + 2 i + 1 rows.
        base: number of text ids.
        neighbors: largest order n; tables are for orders 2..n.
        splits: tables of one order, so that N = (neighbors - 1) * splits.
        ignored: half-open range of ids that hash as 0 and keep their plain embedding.
        eos: the id that ends a segment, besides 0.
        sparse: the tables' gradients are sparse tensors of the rows that were looked up; see `ngram_embedding`.
        tables_on_host: the tables stay where and of the dtype they are when the module moves (`to`, `cuda`, `half`): in
            host memory, or mapped from a file. On the meta device a module takes no memory before
            `load_state_dict(mapped, assign=True)`.

    Raises:
        ValueError: N does not divide `hidden`.

    Example:
        >>> import torch
        >>> embed = NGramEmbedding(8, rows=101, base=10, neighbors=3, splits=2, ignored=(10, 12))
        >>> embed(torch.tensor([[4, 5, 11, -1]]), torch.randn(12, 8)).shape
        torch.Size([1, 4, 8])
    """

    def __init__(
        self,
        hidden: int,
        *,
        rows: int,
        base: int,
        neighbors: int,
        splits: int,
        ignored: tuple[int, int],
        eos: int = 2,
        sparse: bool = True,
        tables_on_host: bool = False,
    ) -> None:
        super().__init__()
        count = (neighbors - 1) * splits
        if count < 1 or hidden % count:
            raise ValueError(f"NGramEmbedding: (neighbors - 1) * splits must divide hidden {hidden}, got {count}")
        self.base, self.neighbors, self.splits, self.ignored, self.eos = base, neighbors, splits, ignored, eos
        self.sparse = sparse
        tables = (nn.Embedding(rows + 2 * i + 1, hidden // count, sparse=sparse) for i in range(count))
        self.embedders = HostTables(tables) if tables_on_host else nn.ModuleList(tables)
        self.post_projs = nn.ModuleList(nn.Linear(hidden // count, hidden, bias=False) for _ in range(count))

    def forward(
        self, ids: Tensor, word: Tensor, documents: Tensor | None = None, history: Tensor | None = None
    ) -> Tensor:
        """ids [B, S], word [V, D], documents [B, S], history [B, neighbors - 1] -> [B, S, D]: see `ngram_embedding`."""
        return ngram_embedding(
            ids,
            word,
            [table.get_parameter("weight") for table in self.embedders],
            [projection.get_parameter("weight") for projection in self.post_projs],
            base=self.base,
            neighbors=self.neighbors,
            splits=self.splits,
            ignored=self.ignored,
            eos=self.eos,
            documents=documents,
            history=history,
            sparse=self.sparse,
        )
