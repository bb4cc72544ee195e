"""Contenders of residual vector quantization: each builds what a user would have ready, and gives the call.

A call gives codes [N, L] int64, or None where it only does the matrix products. "Style" means written here after the
method of the named project, as torch code of its own.

Dimension key
    N rows    D width    L levels    K entries of one codebook
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Call, Skip
from longcat_kernels import native, rvq_encode
from longcat_kernels.modules import ResidualVQ
from longcat_kernels.prepared import PreparedCodebook
from peers_ema import DECAY, normalise, one_hot_sums, restart

COMMITMENT = 0.25
CHUNK = 256  # rows whose scores stay in a core's cache


def ours(x_ND: Tensor, books: list[Tensor], dtype: torch.dtype = torch.float32) -> Call:
    """The op with prepared codebooks."""
    prepared = [PreparedCodebook(book_KD).refresh() for book_KD in books]
    return lambda: rvq_encode(x_ND, prepared, residual_dtype=dtype).codes


def ours_unprepared(x_ND: Tensor, books: list[Tensor], dtype: torch.dtype = torch.float32) -> Call:
    """The op with tensors: packs them in every call."""
    return lambda: rvq_encode(x_ND, books, residual_dtype=dtype).codes


def ours_shared(x_ND: Tensor, book_KD: Tensor, levels: int, *, gram: bool) -> Call:
    """The op with one codebook for all levels, with or without the products of its codewords."""
    prepared = PreparedCodebook(book_KD, gram=gram).refresh()
    return lambda: rvq_encode(x_ND, prepared, levels=levels).codes


def ours_by_isa(isa: str, x_ND: Tensor, books: list[Tensor]) -> Call:
    """The compiled op with one instruction set. The only caller of the native signature here."""
    if native.why_not() is not None:
        raise Skip(str(native.why_not()))
    if isa not in native.module().build_info()["isas_available"]:
        raise Skip("not on this CPU")
    module, (rows, width), levels = native.module(), x_ND.shape, len(books)
    packed = [torch.empty(module.packed_bytes(*book_KD.shape, isa=isa), dtype=torch.uint8) for book_KD in books]
    for book_KD, bytes_of_it in zip(books, packed, strict=True):
        module.pack_codebook(book_KD, bytes_of_it, threads=torch.get_num_threads(), isa=isa)

    def call() -> Tensor:
        outputs = (
            torch.empty_like(x_ND),
            torch.empty(rows, width),
            torch.empty(levels),
            torch.empty(rows, levels).long(),
        )
        arguments = (x_ND, books, packed, None, None, torch.float32)
        module.rvq_encode(*arguments, *outputs, threads=torch.get_num_threads(), isa=isa)
        return outputs[3]

    return call


def ours_train(x_ND: Tensor, books: list[Tensor]) -> Call:
    """A training step of the module: encode, EMA update with restart, backward of the losses."""
    module = ResidualVQ([book_KD.shape[0] for book_KD in books], x_ND.shape[1])
    module.load_state_dict(_released(books), strict=False)
    module.to(x_ND.device).train()
    leaf_ND = x_ND.detach().clone().requires_grad_()

    def call() -> Tensor:
        leaf_ND.grad = None
        encoding = module(leaf_ND)
        (COMMITMENT * encoding.losses.mean()).backward()
        codes: Tensor = encoding.codes
        return codes

    return call


def _released(books: list[Tensor]) -> dict[str, Tensor]:
    """State of codebooks by the released checkpoint's names."""
    state = {}
    for level, book_KD in enumerate(books):
        name = f"codebooks.{level}"
        state[f"{name}.embed"] = torch.cat([book_KD, torch.zeros_like(book_KD[:1])])
        state[f"{name}.embed_ema"] = book_KD
        state[f"{name}.cluster_size_ema"] = torch.ones_like(book_KD[:, 0])
    return state


def official_style(x_ND: Tensor, books: list[Tensor], dtype: torch.dtype = torch.float32) -> Call:
    """As the released inference code does: a matrix of norm sums, made in every call, addmm over it, argmin, losses."""

    @torch.no_grad()
    def call() -> Tensor:
        residual_ND = x_ND.to(dtype).float()
        total_ND, codes, losses = torch.zeros_like(residual_ND), [], []
        for book_KD in books:
            codes_N = _nearest_by_norm_sums(residual_ND, book_KD)
            words_ND = F.embedding(codes_N, book_KD)
            residual_ND = (residual_ND - words_ND).to(dtype).float()
            total_ND = total_ND + words_ND
            losses.append((x_ND - total_ND).square().mean())
            codes.append(codes_N)
        return torch.stack(codes, 1)

    return call


def _nearest_by_norm_sums(residual_ND: Tensor, book_KD: Tensor) -> Tensor:
    norms_NK = residual_ND.square().sum(1, keepdim=True) + book_KD.square().sum(1)
    return torch.addmm(norms_NK, residual_ND, book_KD.T, alpha=-2).argmin(1)


def rqvae_style_train(x_ND: Tensor, books: list[Tensor]) -> Call:
    """A training step after RQ-VAE: as above, one-hot EMA and restart after each level, backward of the losses."""
    embeds = [book_KD.clone() for book_KD in books]
    sums = [book_KD.clone() for book_KD in books]
    sizes = [torch.ones_like(book_KD[:, 0]) for book_KD in books]
    leaf_ND = x_ND.detach().clone().requires_grad_()

    @torch.no_grad()
    def level(residual_ND: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        codes_N = _nearest_by_norm_sums(residual_ND, state[0])
        one_hot_sums(*state[1:], residual_ND, codes_N)
        restart(*state[1:], residual_ND)
        words_ND = F.embedding(codes_N, state[0])
        normalise(*state)
        return codes_N, words_ND

    def call() -> Tensor:
        leaf_ND.grad = None
        residual_ND, total_ND = leaf_ND.detach(), torch.zeros_like(x_ND)
        codes, losses = [], []
        for state in zip(embeds, sums, sizes, strict=True):
            codes_N, words_ND = level(residual_ND, state)
            residual_ND, total_ND = residual_ND - words_ND, total_ND + words_ND
            losses.append((leaf_ND - total_ND).square().mean())
            codes.append(codes_N)
        (COMMITMENT * torch.stack(losses).mean()).backward()
        return torch.stack(codes, 1)

    return call


def vqp(x_ND: Tensor, books: list[Tensor], *, train: bool) -> Call:
    """vector-quantize-pytorch's ResidualVQ: evaluation, or a training step with backward of its losses."""
    package = _package("vector_quantize_pytorch")
    sizes = tuple(book_KD.shape[0] for book_KD in books)
    module = package.ResidualVQ(dim=x_ND.shape[1], codebook_size=sizes, num_quantizers=len(books), decay=DECAY)
    state = module.state_dict()
    for level, book_KD in enumerate(books):
        for name in ("embed", "embed_avg"):
            state[f"layers.{level}._codebook.{name}"] = book_KD[None]
    module.load_state_dict(state)
    module.to(x_ND.device).train(train)
    leaf_BND = x_ND.detach().clone()[None].requires_grad_(train)

    def call() -> Tensor:
        leaf_BND.grad = None
        with torch.set_grad_enabled(train):
            _, codes_BNL, losses = module(leaf_BND)
        if train:
            losses.mean().backward()
        codes_NL: Tensor = codes_BNL[0]
        return codes_NL

    return call


def faiss_flat(x_ND: Tensor, books: list[Tensor]) -> Call:
    """faiss IndexFlatL2, one a level, residuals in numpy."""
    faiss = _package("faiss")
    indices, words, rows_ND = [], [book_KD.numpy() for book_KD in books], x_ND.numpy()
    for words_KD in words:
        index = faiss.IndexFlatL2(words_KD.shape[1])
        index.add(words_KD)
        indices.append(index)

    def call() -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        residual_ND, codes = rows_ND, []
        for index, words_KD in zip(indices, words, strict=True):
            codes_N = index.search(residual_ND, 1)[1][:, 0]
            residual_ND = residual_ND - words_KD[codes_N]
            codes.append(torch.from_numpy(codes_N))
        return torch.stack(codes, 1)

    return call


def compiled(x_ND: Tensor, books: list[Tensor]) -> Call:
    """torch.compile over addmm, argmin and residual of all levels; norms ready-made."""
    norms = [book_KD.square().sum(1) for book_KD in books]

    def encode(residual_ND: Tensor, books: list[Tensor], norms: list[Tensor]) -> Tensor:
        codes = []
        for book_KD, norms_K in zip(books, norms, strict=True):
            codes_N = torch.addmm(norms_K, residual_ND, book_KD.T, alpha=-2).argmin(1)
            residual_ND = residual_ND - book_KD[codes_N]
            codes.append(codes_N)
        return torch.stack(codes, 1)

    torch._dynamo.config.recompile_limit = 64  # each case has shapes of its own
    function = torch.compile(encode, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def call() -> Tensor:
        codes_NL: Tensor = function(x_ND, books, norms)
        return codes_NL

    call()  # compiles
    return call


def chunked(x_ND: Tensor, books: list[Tensor]) -> Call:
    """The best that plain torch does: norms ready-made, rows in chunks whose scores stay in the cache."""
    norms = [book_KD.square().sum(1) for book_KD in books]
    chunk = CHUNK if x_ND.device.type == "cpu" else 16 * CHUNK

    @torch.no_grad()
    def call() -> Tensor:
        residual_ND, codes = x_ND, []
        for book_KD, norms_K in zip(books, norms, strict=True):
            parts = [
                torch.addmm(norms_K, rows_nD, book_KD.T, alpha=-2).argmin(1) for rows_nD in residual_ND.split(chunk)
            ]
            codes.append(torch.cat(parts))
            residual_ND = residual_ND - book_KD[codes[-1]]
        return torch.stack(codes, 1)

    return call


def mm_only(x_ND: Tensor, books: list[Tensor], dtype: torch.dtype) -> Call:
    """One matrix product a level and nothing else, operands and output ready-made."""
    rows_ND, words = x_ND.to(dtype), [book_KD.to(dtype) for book_KD in books]
    outs = {K: rows_ND.new_empty(x_ND.shape[0], K) for K in {book_KD.shape[0] for book_KD in books}}

    @torch.no_grad()
    def call() -> None:
        for words_KD in words:
            torch.mm(rows_ND, words_KD.T, out=outs[words_KD.shape[0]])

    return call


def half_mm_argmin(x_ND: Tensor, books: list[Tensor], dtype: torch.dtype) -> Call:
    """Products in half precision, scores and residuals in float32: fast, and not exact."""
    norms, words = [book_KD.square().sum(1) for book_KD in books], [book_KD.to(dtype) for book_KD in books]

    @torch.no_grad()
    def call() -> Tensor:
        residual_ND, codes = x_ND, []
        for book_KD, words_KD, norms_K in zip(books, words, norms, strict=True):
            codes_N = (norms_K - 2 * (residual_ND.to(dtype) @ words_KD.T).float()).argmin(1)
            residual_ND = residual_ND - book_KD[codes_N]
            codes.append(codes_N)
        return torch.stack(codes, 1)

    return call


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"{name} is not installed ({error})") from error
