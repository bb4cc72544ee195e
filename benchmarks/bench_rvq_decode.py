"""rvq_decode against torch's embedding functions.

Dimension key
    N rows    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Call, Case, Contender, WrongResult
from longcat_kernels import rvq_decode
from longcat_kernels.reference import rvq_decode as spec

CLOSE = 1e-6  # relative to the largest element: sums of a few codewords in float32


def embeddings(codes_NL: Tensor, books: list[Tensor]) -> Call:
    """An embedding a level, added up."""

    @torch.no_grad()
    def call() -> Tensor:
        total_ND = F.embedding(codes_NL[:, 0], books[0])
        for level, book_KD in enumerate(books[1:], 1):
            total_ND = total_ND + F.embedding(codes_NL[:, level], book_KD)
        return total_ND

    return call


def embedding_bag(codes_NL: Tensor, books: list[Tensor]) -> Call:
    """One bag a row over all codebooks, made one table beforehand."""
    table = torch.cat(books)
    first_L = torch.tensor([0, *(len(book_KD) for book_KD in books[:-1])], device=codes_NL.device).cumsum(0)
    entries_NL = codes_NL + first_L

    @torch.no_grad()
    def call() -> Tensor:
        return F.embedding_bag(entries_NL, table, mode="sum")

    return call


def contenders(case: spec.Case, device: str) -> list[Contender]:
    """All decode the same codes, none of them -1: the peers have no such thing."""
    arguments = spec.inputs(case, device)
    codes_NL = arguments["codes"].clamp(min=0).reshape(-1, len(case.entries))
    books = [book_KD.detach() for book_KD in arguments["codebooks"]]

    def judge(total_ND: Tensor) -> None:
        """Raises WrongResult unless these are the sums."""
        part = slice(0, 256)
        truth_ND = sum(book_KD.double()[codes_NL[part, level]] for level, book_KD in enumerate(books))
        assert isinstance(truth_ND, Tensor)
        error = ((total_ND[part] - truth_ND).abs().max() / truth_ND.abs().max()).item()
        if not error <= CLOSE:
            raise WrongResult(f"sums are off by {error:.1e} of the largest")

    return [
        Contender("ours", lambda: lambda: rvq_decode(codes_NL, books), judge),
        Contender("embedding a level", partial(embeddings, codes_NL, books), judge),
        Contender("embedding_bag", partial(embedding_bag, codes_NL, books), judge),
    ]


def _case(case: spec.Case) -> Case:
    sizes = "/".join(map(str, sorted(set(case.entries), reverse=True)))
    name = f"{math.prod(case.shape)}x{case.dim} K{sizes} L{len(case.entries)}"
    return Case(name, spec.cost(case), partial(contenders, case), memory=True)


CASES = (
    _case(spec.Case((128,), 32, (64,) * 2)),
    _case(spec.Case((4096,), 256, (4096,) * 8)),
    *(_case(case) for case in spec.MODEL),
)
