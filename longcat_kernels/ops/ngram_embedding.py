"""N-gram embedding: word embedding plus hashed n-gram embeddings (the over-embedding of LongCat-Flash-Lite).

Dimension key
    B batch    S sequence    N tables    W width of a table    D model    V rows of the word table
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import native, triton
from longcat_kernels.backends import Impl, choose
from longcat_kernels.deferred import WeightGrads
from longcat_kernels.library import check, once, register
from longcat_kernels.reference import ngram_embedding as spec
from longcat_kernels.spec import Op


def ngram_embedding(
    ids: Tensor,
    word: Tensor,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor],
    *,
    base: int,
    neighbors: int,
    splits: int,
    ignored: tuple[int, int],
    eos: int = 2,
    documents: Tensor | None = None,
    history: Tensor | None = None,
    sparse: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Embeds each id together with the ids before it.

    out = (word[id] + sum_i projections[i] @ tables[i][hash_i]) / (1 + N), where hash_i of table i = (order - 2) *
    splits + j is the id plus the sum over p < order of base^p * (id p places before), modulo the rows of the table,
    exact in int64. An earlier id counts as 0 from behind a segment's end on: an id 0, `eos` or an ignored id ends the
    segment it belongs to, and so does a change of document. A lookup with hash 0 adds nothing.

    Only the rows that are looked up are read: a table may be a memory-mapped file, or stay in host memory while
    everything else is on another device.

    Args:
        ids: int64 [B, S] in [-1, V). Ignored ids hash as 0 and keep word[id], undivided; -1 hashes as 0 and its
            output is zero.
        word: [V, D], floating point.
        tables: N = (neighbors - 1) * splits tensors [rows, W], the rows distinct so that their hashes are; on word's
            device or on the CPU.
        projections: N tensors [D, W].
        base: number of text ids.
        neighbors: the largest order.
        splits: tables of one order.
        ignored: half-open range of ids, the special tokens.
        eos: the id that ends a segment, besides 0.
        documents: int64 [B, S]; n-grams do not reach from one number into another.
        history: int64 [B, neighbors - 1], the ids before ids[:, 0] in cached decoding, of its document; None: -1.
        sparse: how the gradients of the tables come. True: as sparse tensors of the rows that were looked up, each once
            and in their order, for `torch.optim.SparseAdam` and the like. False: whole, as most optimizers and
            `torch.compile` need.
        backend: "auto" or the name of an implementation.

    Returns:
        out: [B, S, D] of word's dtype, summed in at least float32; gradients to word, tables and projections. Those
        of a row that was looked up more than once are summed in the order of the positions.

    Raises:
        ValueError: a shape, dtype, device or number is wrong, an id is out of range, no implementation takes the
            tensors, or sparse gradients are asked for inside `torch.compile`.

    Example:
        >>> word, table, projection = torch.zeros(4, 1), torch.arange(5.0)[:, None], torch.ones(1, 1)
        >>> ids = torch.tensor([[1, 3, 3]])  # hashes 1, 3 + 3 * 1 = 6 = 1 mod 5, 3 + 3 * 3 = 12 = 2 mod 5
        >>> options = {"base": 3, "neighbors": 2, "splits": 1, "ignored": (4, 4)}
        >>> ngram_embedding(ids, word, [table], [projection], **options).flatten().tolist()
        [0.5, 0.5, 1.0]
    """
    if sparse and torch.compiler.is_compiling() and any(t.requires_grad for t in tables) and torch.is_grad_enabled():
        raise ValueError("ngram_embedding: sparse must be False inside torch.compile for tables with gradients")
    rule = spec.Rule(base, neighbors, splits, ignored, eos)
    return _op(ids, word, list(tables), list(projections), documents, history, rule.numbers(), sparse, backend)[0]


def _check(ids_BS: Tensor, word_VD: Tensor, tables: list[Tensor], projections: list[Tensor], rule: spec.Rule) -> None:
    check(
        ids_BS.ndim == 2 and ids_BS.dtype == torch.int64,
        lambda: f"ngram_embedding: ids must be int64 [B, S], got {ids_BS.dtype} {list(ids_BS.shape)}",
    )
    check(
        word_VD.ndim == 2 and word_VD.dtype.is_floating_point,
        lambda: f"ngram_embedding: word must be [V, D] floating point, got {word_VD.dtype} {list(word_VD.shape)}",
    )
    for name, number, least in (("base", rule.base, 1), ("neighbors", rule.neighbors, 2), ("splits", rule.splits, 1)):
        if number < least:
            raise ValueError(f"ngram_embedding: {name} must be at least {least}, got {number}")
    count = (rule.neighbors - 1) * rule.splits
    got = len(tables)
    check(
        got == count, lambda: f"ngram_embedding: tables must be (neighbors - 1) * splits = {count} tensors, got {got}"
    )
    check(
        len(projections) == count,
        lambda: f"ngram_embedding: projections must be one a table, {count}, got {len(projections)}",
    )
    for table, projection in zip(tables, projections, strict=True):
        _check_table(table, projection, word_VD)


def _check_table(table_RW: Tensor, projection_DW: Tensor, word_VD: Tensor) -> None:
    shape = table_RW.shape
    if len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"ngram_embedding: tables must be [rows, W] with at least one row, got {list(shape)}")
    wanted, found = [word_VD.shape[1], shape[1]], list(projection_DW.shape)
    if found != wanted:
        raise ValueError(f"ngram_embedding: projections must be {wanted} to follow word and its table, got {found}")
    for name, tensor in (("tables", table_RW), ("projections", projection_DW)):
        if tensor.dtype != word_VD.dtype:
            raise ValueError(f"ngram_embedding: {name} must be {word_VD.dtype} as word is, got {tensor.dtype}")
        if name != "tables" or not tensor.is_cpu:
            _check_device(name, tensor, word_VD.device)


def _check_places(name: str, places: Tensor | None, wanted: list[int], device: torch.device) -> None:
    if places is None:
        return
    found = list(places.shape)
    if places.dtype != torch.int64 or found != wanted:
        raise ValueError(f"ngram_embedding: {name} must be int64 {wanted}, got {places.dtype} {found}")
    _check_device(name, places, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"ngram_embedding: {name} must be on {device} as word is, got {tensor.device}")


def _allocate(
    ids_BS: Tensor,
    word_VD: Tensor,
    tables: list[Tensor],
    projections: list[Tensor],
    documents_BS: Tensor | None,
    history_BP: Tensor | None,
    numbers: list[int],
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rule = spec.Rule.of(numbers)
    _check(ids_BS, word_VD, tables, projections, rule)
    _check_places("ids", ids_BS, list(ids_BS.shape), word_VD.device)
    _check_places("documents", documents_BS, list(ids_BS.shape), word_VD.device)
    _check_places("history", history_BP, [ids_BS.shape[0], rule.neighbors - 1], word_VD.device)
    out_BSD = word_VD.new_empty(*ids_BS.shape, word_VD.shape[1])
    return out_BSD, word_VD.new_empty(*ids_BS.shape, len(tables), dtype=torch.int64)


def _run(
    ids_BS: Tensor,
    word_VD: Tensor,
    tables: list[Tensor],
    projections: list[Tensor],
    documents_BS: Tensor | None,
    history_BP: Tensor | None,
    numbers: list[int],
    sparse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (ids_BS, word_VD, tables, projections, documents_BS, history_BP, numbers, sparse)
    outputs = _allocate(*inputs, backend)
    if ids_BS.numel() and ids_BS.is_cpu:
        low, high = (int(bound) for bound in ids_BS.aminmax())
        wrong, rows = low if low < -1 else high, len(word_VD)
        check(-1 <= wrong < rows, lambda: f"ngram_embedding: ids must be in [-1, {rows}), got {wrong}")
    choose("ngram_embedding", IMPLS, backend, *inputs).run(*inputs, *outputs)
    return outputs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ids_BS, word_VD, tables, projections, _documents, _history, ctx.numbers, ctx.sparse, ctx.backend = inputs
    ctx.tables, ctx.words, ctx.pending = len(tables), word_VD.shape[0], WeightGrads.current()
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(ids_BS, output[1], *tables, *projections, *(() if ctx.pending is None else (word_VD,)))


def _backward(ctx: Any, grad_BSD: Tensor, _hashes: None) -> tuple[Any, ...]:
    ids_BS, hashes_BSN, *rest = ctx.saved_tensors
    tables, projections, word = rest[: ctx.tables], rest[ctx.tables : 2 * ctx.tables], rest[2 * ctx.tables :]
    wants, words = ctx.needs_input_grad[1:4], ctx.words
    saved = (grad_BSD, ids_BS, hashes_BSN)
    rule: Any = (tables, projections, wants, words, ctx.numbers, ctx.sparse, ctx.backend)
    grads: list[Tensor | None] = [None] * (1 + len(rest))
    if ctx.pending is None:
        grads = _weight_grads(*saved, *rule)
    else:
        ctx.pending.add([*word, *tables, *projections], lambda *saved: _weight_grads(*saved, *rule), saved)
    grad_word, *grads = grads
    return None, grad_word, grads[: ctx.tables], grads[ctx.tables : 2 * ctx.tables], None, None, None, None, None


def _weight_grads(
    grad_BSD: Tensor,
    ids_BS: Tensor,
    hashes_BSN: Tensor,
    tables: list[Tensor],
    projections: list[Tensor],
    wants: tuple[Any, ...],
    words: int,
    numbers: list[int],
    sparse: bool,
    backend: str,
) -> list[Tensor | None]:
    """Gradients of word, tables and projections, where `wants` says so."""
    wants_word, wants_tables, wants_projections = wants
    whole = not sparse and all(table.device == grad_BSD.device for table in tables)
    slots_BSN, keys = (hashes_BSN, tables) if whole else _number_rows(hashes_BSN)
    sizes = [key.shape[0] if wanted else 0 for key, wanted in zip(keys, wants_tables, strict=True)]
    grads = _op_weight_grad(
        grad_BSD,
        ids_BS,
        hashes_BSN,
        slots_BSN,
        sizes,
        tables,
        projections,
        numbers,
        words if wants_word else 0,
        any(wants_projections),
        backend,
    )
    if not whole:
        for i, wanted in enumerate(wants_tables):
            grads[1 + i] = _row_gradient(tables[i], keys[i], grads[1 + i], sparse) if wanted else None
    return grads


def _number_rows(hashes_BSN: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The rows of each table that were looked up, ascending; for each lookup, [B, S, N], its place among them."""
    keys, slots = [], []
    for hashes_BS in hashes_BSN.unbind(2):
        keys_U, slots_BS = hashes_BS.unique(return_inverse=True)
        has_none = keys_U[:1].eq(0).sum()  # hash 0 is no row, and the lowest
        keys.append(keys_U[keys_U != 0])
        slots.append(slots_BS - has_none)
    return torch.stack(slots, 2), keys


def _row_gradient(table_RW: Tensor, keys_U: Tensor, grad_UW: Tensor, sparse: bool) -> Tensor:
    keys_U, grad_UW = keys_U.to(table_RW.device), grad_UW.to(table_RW.device)
    if not sparse:
        return torch.zeros_like(table_RW).index_copy_(0, keys_U, grad_UW)
    return torch.sparse_coo_tensor(keys_U[None], grad_UW, table_RW.shape, check_invariants=False, is_coalesced=True)


def _allocate_weight_grad(
    grad_BSD: Tensor,
    ids_BS: Tensor,
    hashes_BSN: Tensor,
    slots_BSN: Tensor,
    sizes: list[int],
    tables: list[Tensor],
    projections: list[Tensor],
    numbers: list[int],
    words: int,
    projected: bool,
    backend: str,
) -> list[Tensor]:
    dim = grad_BSD.shape[2]
    shapes = [(words, dim), *((size, p.shape[1]) for size, p in zip(sizes, projections, strict=True))]
    shapes += [(dim if projected else 0, p.shape[1]) for p in projections]
    return [torch.empty(shape, dtype=grad_BSD.dtype, device=grad_BSD.device) for shape in shapes]


def _run_weight_grad(*arguments: Any) -> list[Tensor]:
    outputs = _allocate_weight_grad(*arguments)
    *inputs, backend = arguments
    choose("ngram_embedding_weight_grad", IMPLS_WEIGHT_GRAD, backend, *inputs).run(*inputs, *outputs)
    return outputs


_op_weight_grad = register(
    "ngram_embedding_weight_grad(Tensor grad, Tensor ids, Tensor hashes, Tensor slots, SymInt[] sizes, "
    "Tensor[] tables, Tensor[] projections, int[] rule, SymInt words, bool projected, str backend) -> Tensor[]",
    _run_weight_grad,
    _allocate_weight_grad,
    backward=once("ngram_embedding"),
)
_op = register(
    "ngram_embedding(Tensor ids, Tensor word, Tensor[] tables, Tensor[] projections, Tensor? documents, "
    "Tensor? history, int[] rule, bool sparse, str backend) -> (Tensor out, Tensor hashes)",
    _run,
    _allocate,
    save=_save,
    backward=_backward,
)


def _why_not_cpu(
    ids_BS: Tensor, word_VD: Tensor, tables: list[Tensor], projections: list[Tensor], *_: Any
) -> str | None:
    if not word_VD.is_cpu:
        return f"takes tensors on the CPU, got {word_VD.device}"
    if word_VD.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {word_VD.dtype}"
    if any(tensor.shape[1] > 1 and tensor.stride(1) != 1 for tensor in (word_VD, *tables, *projections)):
        return "needs word, tables and projections whose rows have adjacent elements"
    return native.why_not()


def _cpu(*arguments: Any) -> None:
    *inputs, _sparse, out_BSD, hashes_BSN = arguments
    native.module().ngram_embedding(*inputs, out_BSD, hashes_BSN, threads=torch.get_num_threads())


def _why_not_cpu_weight_grad(
    grad_BSD: Tensor, _ids: Tensor, _hashes: Tensor, _slots: Tensor, _sizes: list[int], tables: list[Tensor], *rest: Any
) -> str | None:
    return _why_not_cpu(grad_BSD, grad_BSD.new_empty(0, 0), tables, rest[0])


def _cpu_weight_grad(*arguments: Any) -> None:
    grad_BSD, ids_BS, hashes_BSN, slots_BSN, _sizes, tables, projections, numbers, _words, _projected = arguments[:10]
    grad_word, *grads = arguments[10:]
    native.module().ngram_embedding_weight_grad(
        grad_BSD.contiguous().flatten(0, 1),
        ids_BS,
        hashes_BSN,
        slots_BSN.contiguous(),
        tables,
        projections,
        numbers,
        grad_word,
        grads[: len(tables)],
        grads[len(tables) :],
        threads=torch.get_num_threads(),
    )


IMPLS: dict[str, Impl] = {
    "triton": triton.implementation("ngram_embedding"),
    "cpu": Impl(_cpu, _why_not_cpu),
    "reference": Impl(spec.forward, lambda *inputs: None),
}
IMPLS_WEIGHT_GRAD: dict[str, Impl] = {
    "triton": triton.implementation("ngram_embedding_weight_grad"),
    "cpu": Impl(_cpu_weight_grad, _why_not_cpu_weight_grad),
    "reference": Impl(spec.weight_grad, lambda *inputs: None),
}
OP = Op("ngram_embedding", ngram_embedding, IMPLS, spec)
