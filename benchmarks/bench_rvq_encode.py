"""rvq_encode against its peers: encoding, a training step, a shared codebook, two threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import peers_rvq as peers
from harness import Call, Case, Contender, WrongResult
from longcat_kernels import rvq_encode
from longcat_kernels.reference import rvq_encode as spec

SHAPES = ((1024, 64, 1024, 8), (4096, 256, 4096, 8), (1024, 1024, 16384, 4), (256, 3584, 16384, 2))  # N D K L
TINY = (64, 32, 64, 2)
TORCH = ("highest", "medium")  # precisions: torch's default, and its fastest float32 products
# Settings that hold torch and its libraries to the instructions of a slower processor; "default", COMPATIBLE: SSE2.
# MKL obeys MKL_ENABLE_INSTRUCTIONS on Intel's processors only.
HELD = {
    "avx2": (("ATEN_CPU_CAPABILITY", "avx2"), ("MKL_CBWR", "AVX2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")),
    "portable": (("ATEN_CPU_CAPABILITY", "default"), ("MKL_CBWR", "COMPATIBLE"), ("ONEDNN_MAX_CPU_ISA", "SSE41")),
}
TRUSTED_WRONG = 0.5  # a contender with more wrong codes than this does not do the same work


def data(case: spec.Case, device: str, mixture: bool) -> tuple[Tensor, list[Tensor]]:
    """x [N, D] and codebooks [K, D].

    The mixture: each row is the sum of a codeword of every level and a little noise; else all are independent normal
    numbers, where a residual is about as far from many codewords. A shared codebook has codewords of every length.
    """
    arguments = spec.inputs(case, device)
    x_ND, levels = arguments["x"].detach(), len(case.entries)
    books = arguments["codebooks"]
    if case.shared:
        books = [books * 2.0 ** -(torch.arange(len(books), device=device) % levels)[:, None]] * levels
    if mixture:
        g = torch.Generator().manual_seed(1)
        x_ND = torch.randn(x_ND.shape, generator=g).to(device) * 2.0**-levels
        for level, book_KD in enumerate(books):
            pick_N = torch.randint(len(book_KD), (len(x_ND),), generator=g).to(device)
            if case.shared:
                pick_N = pick_N // levels * levels + level
            x_ND = x_ND + book_KD[pick_N]
    return x_ND.to(case.dtype), books


class Judge:
    """Share of codes that are not the exact ones; the truth is made when first asked for."""

    def __init__(self, x_ND: Tensor, books: list[Tensor], residual_dtype: torch.dtype) -> None:
        self.arguments = (x_ND, books, residual_dtype)
        self.truth_NL: Tensor | None = None

    def share(self, codes_NL: Tensor | None) -> float | None:
        """Of any contender; raises WrongResult where it cannot be doing the work of this case."""
        if codes_NL is None:
            return None
        if self.truth_NL is None:
            x_ND, books, dtype = self.arguments
            self.truth_NL = rvq_encode(x_ND, books, residual_dtype=dtype, backend="reference").codes
        share = (codes_NL != self.truth_NL).float().mean().item()
        if share > TRUSTED_WRONG:
            raise WrongResult(f"{share:.1%} of the codes are wrong")
        return share

    def exact(self, codes_NL: Tensor | None) -> float | None:
        """Of a contender that promises exact codes; raises WrongResult where one is not."""
        share = self.share(codes_NL)
        if share:
            raise WrongResult(f"{share:.4%} of the codes are wrong, none may be")
        return share


def encode_contenders(case: spec.Case, mixture: bool, extended: bool, device: str) -> list[Contender]:
    """All contenders; without `extended` only those that the data could slow down or that others are measured by.

    faiss runs as installed, and again with the kernels for AVX-512 of its OpenBLAS, which does not know every processor
    that has it and may choose much slower ones. Ours of one instruction set meet torch that is held to it.
    """
    x_ND, books = data(case, device, mixture)
    dtype = case.residual_dtype
    wide_ND = x_ND.float()  # peers take float32
    judge = Judge(x_ND, books, dtype)
    half = torch.bfloat16 if device == "cpu" else torch.float16
    half_name = str(half).removeprefix("torch.")

    def ours(name: str, make: Callable[[], Call], **more: Any) -> Contender:
        return Contender(name, make, judge.exact, **more)

    def peer(name: str, make: Callable[[], Call], **more: Any) -> Contender:
        return Contender(name, make, judge.share, **more)

    found = [
        ours("ours", lambda: peers.ours(x_ND, books, dtype)),
        ours("ours, unprepared", lambda: peers.ours_unprepared(x_ND, books, dtype)),
        peer("official-style eval", lambda: peers.official_style(wide_ND, books, dtype), precisions=TORCH),
        peer("torch mm only", lambda: peers.mm_only(wide_ND, books, torch.float32), precisions=TORCH),
        peer(f"{half_name} mm only", lambda: peers.mm_only(wide_ND, books, half)),
    ]
    if dtype == torch.float32:
        found += [
            peer("faiss IndexFlatL2", lambda: peers.faiss_flat(wide_ND, books), only_cpu=True),
            peer(
                "faiss IndexFlatL2, SkylakeX",
                lambda: peers.faiss_flat(wide_ND, books),
                only_cpu=True,
                slow=True,
                environment=(("OPENBLAS_CORETYPE", "SkylakeX"),),
            ),
            peer(f"{half_name} mm + argmin", lambda: peers.half_mm_argmin(wide_ND, books, half)),
        ]
    if extended:
        found += [
            ours("ours, avx2", lambda: peers.ours_by_isa("avx2", x_ND, books), ceiling="fma_avx2", only_cpu=True),
            ours("ours, portable", lambda: peers.ours_by_isa("portable", x_ND, books), only_cpu=True, slow=True),
            peer("vector-quantize-pytorch eval", lambda: peers.vqp(wide_ND, books, train=False), precisions=TORCH),
            peer("torch, chunked", lambda: peers.chunked(wide_ND, books), precisions=TORCH),
            *(
                peer(
                    f"torch, chunked, {isa}",
                    lambda: peers.chunked(wide_ND, books),
                    only_cpu=True,
                    slow=True,
                    environment=settings,
                )
                for isa, settings in HELD.items()
            ),
            peer("torch.compile", lambda: peers.compiled(wide_ND, books), precisions=TORCH, slow=True),
        ]
    return found


def train_contenders(case: spec.Case, device: str) -> list[Contender]:
    """A whole training step: encode, losses, EMA, restart, and the backward of the losses."""
    x_ND, books = data(case, device, True)
    judge = Judge(x_ND, books, case.residual_dtype)
    return [
        Contender("ours", lambda: peers.ours_train(x_ND, books), judge.exact),
        Contender("RQ-VAE-style", lambda: peers.rqvae_style_train(x_ND, books), judge.share, precisions=TORCH),
        Contender("vector-quantize-pytorch", lambda: peers.vqp(x_ND, books, train=True), judge.share, precisions=TORCH),
    ]


def shared_contenders(case: spec.Case, device: str) -> list[Contender]:
    """One codebook for all levels: by products of codewords, and as if each level had its own."""
    x_ND, books = data(case, device, True)
    judge, levels = Judge(x_ND, books, case.residual_dtype), len(books)
    return [
        Contender("ours", lambda: peers.ours_shared(x_ND, books[0], levels, gram=True), judge.exact),
        Contender("ours, without gram", lambda: peers.ours_shared(x_ND, books[0], levels, gram=False), judge.exact),
    ]


def thread_contenders(case: spec.Case, device: str) -> list[Contender]:
    """The same with one thread and with two, by the clock on the wall."""
    x_ND, books = data(case, device, True)
    judge = Judge(x_ND, books, case.residual_dtype)
    return [
        Contender("ours", lambda: peers.ours(x_ND, books), judge.exact, threads=1, only_cpu=True),
        Contender("ours, 2 threads", lambda: peers.ours(x_ND, books), judge.exact, threads=2, only_cpu=True),
    ]


def name(case: spec.Case) -> str:
    """Such as "4096x256 K4096 L8"."""
    sizes = sorted(set(case.entries), reverse=True)
    half = "" if case.dtype == torch.float32 else f" {str(case.dtype).removeprefix('torch.')}"
    return f"{math.prod(case.shape)}x{case.dim} K{'/'.join(map(str, sizes))} L{len(case.entries)}{half}"


def _case(title: str, case: spec.Case, contenders: Callable[[str], list[Contender]], **more: Any) -> Case:
    product = (math.prod(case.shape), case.dim, case.entries[0])
    return Case(f"{title} {name(case)}", spec.cost(case), contenders, product, **more)


def _encode(case: spec.Case, mixture: bool, extended: bool) -> Case:
    title = "encode" if mixture else "encode iid"
    return _case(title, case, partial(encode_contenders, case, mixture, extended), memory=mixture and extended)


def _shape(rows: int, dim: int, entries: int, levels: int, shared: bool = False) -> spec.Case:
    return spec.Case((rows,), dim, (entries,) * levels, shared=shared)


_SIZES = [_shape(*shape) for shape in SHAPES]
_SHARED = [_shape(1024, 1024, 4096, 8, shared=True), _shape(512, 3584, 4096, 8, shared=True)]
CASES = (
    _encode(_shape(*TINY), True, True),
    *(_encode(case, True, True) for case in _SIZES),
    *(_case("train", case, partial(train_contenders, case)) for case in _SIZES[:3]),
    *(_case("shared", case, partial(shared_contenders, case)) for case in _SHARED),
    *(_case("threads", case, partial(thread_contenders, case), wall=True) for case in _SIZES),
    *(_encode(case, False, False) for case in _SIZES),
    *(_encode(case, False, False) for case in spec.MODEL if case.dtype != torch.float32),
)
