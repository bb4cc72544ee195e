"""What the launchers of the mixture of experts and of the n-gram embedding launch, compiled instead of run.

What it promises for every tile that can be chosen, whether 16 divides the sides or not: products are on tensor cores,
nothing spills, and shared memory suffices. H 3072, F 1024, 12 slots, and sides beside those; rows an expert choose the
tile, so four experts stand for 256.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from compiled import SHARED_BYTES, TENSOR_CORES, Launch, launches, look_at, sound
from torch import Tensor
from triton.runtime.jit import JITFunction

from longcat_kernels.triton import (
    _gemm,
    _moe,
    fused_moe,
    fused_moe_hidden,
    fused_moe_input_grad,
    fused_moe_weight_grad,
    grouped_mm,
    moe_plan,
    moe_route,
    moe_route_backward,
    ngram_embedding,
    ngram_embedding_weight_grad,
)
from longcat_kernels.triton._gemm import Tile, in_vectors, tile_of

MODULES = (_gemm, _moe, fused_moe_input_grad, fused_moe_weight_grad, grouped_mm, moe_plan, moe_route)
MODULES += (moe_route_backward, ngram_embedding, ngram_embedding_weight_grad)

EXPERTS, SLOTS, FORMS = 4, 12, ("2x3", "3x2", "2x2")
TOKENS = {"decode": 8, "mid": 64, "large": 2048}  # as 16, 4096 and 32768 with 256 experts: rows an expert choose tiles
WHOLE, RAGGED, ODD = (3072, 1024), (3088, 1040), (3073, 1025)  # tiles divide the sides, 16 does, nothing does
PRODUCTS = {"up_kernel", "rows_kernel", "act_grad_kernel", "sums_kernel", "project_kernel"}


def empty(*sides: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory that nobody touches."""
    return torch.empty(sides, dtype=dtype)


def mixture(tokens: int, sides: tuple[int, int], dtype: torch.dtype = torch.bfloat16, lie: str = "rows") -> None:
    """The passes of `fused_moe`; `lie` says how matrices lie in memory."""
    (dim, width), slots = sides, tokens * SLOTS
    x, grad, out, grad_x = (empty(tokens, dim, dtype=dtype) for _ in range(4))
    gate_up, down = empty(EXPERTS, 2 * width, dim, dtype=dtype), empty(EXPERTS, dim, width, dtype=dtype)
    if lie in ("columns", "columns of weights"):
        gate_up, down = empty(EXPERTS, dim, 2 * width, dtype=dtype).mT, empty(EXPERTS, width, dim, dtype=dtype).mT
    if lie == "columns":
        x = empty(dim, tokens, dtype=dtype).T
    if lie == "expanded":
        grad = grad[:1, :1].expand(tokens, dim)
    ids, weights = torch.zeros(tokens, SLOTS, dtype=torch.int64), empty(tokens, SLOTS, dtype=torch.float32)
    hidden, grad_hidden = (empty(slots, 2 * width, dtype=dtype) for _ in range(2))
    fused_moe.run(x, gate_up, down, ids, weights, grad, None, None, [], slots, False, out, hidden)
    grads = (grad_x, torch.empty_like(weights), grad_hidden)
    fused_moe_input_grad.run(grad, x, gate_up, down, ids, weights, hidden, *grads)
    weight_grads = (torch.empty_like(gate_up), torch.empty_like(down))
    fused_moe_weight_grad.run(grad, x, ids, weights, hidden, grad_hidden, False, *weight_grads)


def variants(tokens: int, sides: tuple[int, int]) -> None:
    """What else `fused_moe` does: inference, recomputation, and gradients that are added to float32."""
    (dim, width), slots = sides, tokens * SLOTS
    x, out = empty(tokens, dim), empty(tokens, dim)
    gate_up, down = empty(EXPERTS, 2 * width, dim), empty(EXPERTS, dim, width)
    ids, weights = torch.zeros(tokens, SLOTS, dtype=torch.int64), empty(tokens, SLOTS, dtype=torch.float32)
    hidden = empty(slots, 2 * width)
    fused_moe.run(x, gate_up, down, ids, weights, None, None, None, [], 0, False, out, hidden[:0])
    fused_moe_hidden.run(x, gate_up, down, ids, slots, hidden)
    main_grads = (torch.empty_like(t, dtype=torch.float32) for t in (gate_up, down))
    fused_moe_weight_grad.run(out, x, ids, weights, hidden, hidden, True, *main_grads)


def groups(form: str, tokens: int, sides: tuple[int, int], turned: bool) -> None:
    """`grouped_mm` of as many rows as `mixture` has, with a and b by rows or, turned, by columns."""
    (p, q), rows = sides, tokens * SLOTS
    shapes = {
        "2x3": ((rows, p), (EXPERTS, p, q), (rows, q)),
        "3x2": ((EXPERTS, p, q), (q, rows), (p, rows)),
        "2x2": ((p, rows), (rows, q), (EXPERTS, p, q)),
    }
    a, b, out = (empty(*shape) for shape in shapes[form])
    if turned:
        a, b = (empty(*t.mT.shape).mT for t in (a, b))
    grouped_mm.run(a, b, torch.zeros(EXPERTS, dtype=torch.int32), out)


def ngrams(positions: int, dim: int, table: int) -> None:
    """Forward and weight pass of `ngram_embedding` with four tables."""
    numbers = [100, 3, 2, 90, 95, 2]
    ids, hashes = torch.zeros(1, positions, dtype=torch.int64), torch.zeros(1, positions, 4, dtype=torch.int64)
    word, tables = empty(100, dim), [empty(200, table) for _ in range(4)]
    projections = [empty(dim, table) for _ in tables]
    out, history = empty(1, positions, dim), torch.zeros(1, 2, dtype=torch.int64)
    ngram_embedding.run(ids, word, tables, projections, ids, history, numbers, False, out, hashes)
    grads = [torch.empty_like(t) for t in (*tables, *projections)]
    ngram_embedding_weight_grad.run(
        *(out, ids, hashes, hashes, [200] * 4, tables, projections, numbers, 100, True, torch.empty_like(word)), *grads
    )


def routes(tokens: int, dtype: torch.dtype) -> None:
    """A router of 256 real and 128 identity experts, and of 125, which nothing divides."""
    weights, ids = empty(tokens, SLOTS, dtype=torch.float32), torch.zeros(tokens, SLOTS, dtype=torch.int64)
    for experts, score, renorm in ((384, "softmax", False), (381, "sigmoid", True)):
        logits, bias = empty(tokens, experts, dtype=dtype), empty(experts, dtype=torch.float32)
        moe_route.run(logits, SLOTS, 256, bias, score, renorm, 6.0, weights, ids)
        moe_route_backward.run(weights, logits, ids, score, renorm, 6.0, torch.empty_like(logits))


CALLS: dict[str, Callable[[], None]] = {
    **{f"{size}, whole": partial(mixture, tokens, WHOLE) for size, tokens in TOKENS.items()},
    "large, ragged": partial(mixture, TOKENS["large"], RAGGED),
    "large, columns of weights": partial(mixture, TOKENS["large"], WHOLE, lie="columns of weights"),
    **{f"{size}, odd": partial(mixture, TOKENS[size], ODD) for size in ("decode", "mid")},
    **{f"mid, {lie}": partial(mixture, TOKENS["mid"], WHOLE, lie=lie) for lie in ("columns", "expanded")},
    "variants": partial(variants, TOKENS["large"], WHOLE),
    "variants, odd": partial(variants, TOKENS["mid"], ODD),
    **{f"{size}, whole, float32": partial(mixture, TOKENS[size], WHOLE, torch.float32) for size in ("decode", "mid")},
    **{f"{size}, odd, float32": partial(mixture, TOKENS[size], ODD, torch.float32) for size in ("decode", "mid")},
    **{f"{form}, whole": partial(groups, form, TOKENS["large"], WHOLE, form == "3x2") for form in FORMS},
    **{f"{form}, odd": partial(groups, form, TOKENS["mid"], ODD, form != "3x2") for form in FORMS},
    "n-grams": partial(ngrams, 4096, 3072, 128),
    "n-grams, odd": partial(ngrams, 4095, 3073, 129),
    "routes": partial(routes, 512, torch.bfloat16),
}

WITH_OTHERS = {"decode, odd", "mid, odd", "large, whole", "3x2, odd", "n-grams", "n-grams, odd", "routes"}
BY_ELEMENTS = {name for name in CALLS if {"odd", "columns", "expanded"} & set(name.split(", "))} | {"2x2, whole"}


def launches_of(call: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Of those that are no products, which other calls share, only those of some calls."""
    found = launches(arch, monkeypatch, CALLS[call])
    return [launch for launch in found if launch.name in PRODUCTS or call in WITH_OTHERS]


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("call", CALLS)
def test_nothing_spills_and_products_are_on_tensor_cores(
    call: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for launch in launches_of(call, arch, monkeypatch):
        is_product = launch.name in PRODUCTS
        built = look_at(launch.compile(monkeypatch), tmp_path, sass=is_product)
        sound(built, f"{launch.name} sm_{arch} {launch.options}")
        assert built.shared <= SHARED_BYTES[arch]
        if is_product:
            wanted = TENSOR_CORES[arch] if launch.options["ROWS"] >= 64 else "HMMA"  # below, no wider instruction fits
            assert wanted in built.sass
            assert ("UTMALDG" in built.sass) == launch.options.get("DESCRIBED", False)
            assert call in BY_ELEMENTS or any(copy in built.sass for copy in ("LDGSTS", "UTMALDG"))


def test_every_kernel_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {launch.name for call in CALLS for launch in launches_of(call, 90, monkeypatch)}
    there = {name for module in MODULES for name, value in vars(module).items() if isinstance(value, JITFunction)}
    assert {name for name in there if name.endswith("_kernel")} == found


@pytest.mark.parametrize("arch", TENSOR_CORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(("wide", "parts"), [(128, 1), (128, 2), (256, 2)])
def test_no_other_tiles_are_chosen(arch: int, dtype: torch.dtype, vectors: bool, wide: int, parts: int) -> None:
    def tile(rows: int) -> Tile:
        return tile_of(rows, EXPERTS, dtype, SHARED_BYTES[arch], vectors=vectors, wide=wide, parts=parts)

    assert {tile(rows) for rows in range(8 * EXPERTS * 256)} == {tile(tokens * SLOTS) for tokens in TOKENS.values()}


def test_copies_are_in_vectors_where_the_compiler_knows_that_16_divides_all() -> None:
    matrix, stack = empty(32, 64), empty(3, 32, 64)
    assert in_vectors(matrix, stack, stack.mT, matrix[:5], matrix[16:, 16:32])
    assert in_vectors(matrix[:5]) and not in_vectors(matrix.T)
    for tensor in (matrix[:, :40], matrix[:, 4:20], matrix[:, ::2], matrix[:1, :1].expand(32, 64), stack[:, :24]):
        assert not in_vectors(matrix, tensor)
