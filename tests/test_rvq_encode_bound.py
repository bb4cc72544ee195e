"""rvq_encode on the CPU: data on which the bound of csrc/cpu/rvq_kernels.h has little room, or floats too little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_kernels import PreparedCodebook, native, rvq_encode

ISAS = native.module().build_info()["isas_available"] if native.why_not() is None else []


def codes_by(isa: str, x: Tensor, codebook: Tensor) -> Tensor:
    """The codes [N] of the compiled implementation with one instruction set."""
    outputs = (torch.empty_like(x), torch.empty_like(x), torch.empty(1), torch.empty(len(x), 1).long())
    native.module().rvq_encode(x, [codebook], [], None, None, torch.float32, *outputs, threads=1, isa=isa)
    return outputs[3][:, 0]


def rivals(word: Tensor) -> Tensor:
    """A codebook of a word's negative and the word itself, in a panel that begins with what is never chosen."""
    return torch.cat([-word, torch.full((40, 66), torch.nan), word])


def rounded_rows(sharpness: float) -> tuple[Tensor, Tensor]:
    """A row whose bfloat16 rounding shifts two scores apart by `sharpness` of what the bound allows."""
    lost = 0.95 * 2.0**-8
    word = torch.cat([torch.ones(64), torch.tensor([-1.0, 1.0])])
    row = torch.cat([torch.full((64,), 1 + lost), torch.tensor([64.0, -64 * lost * sharpness])])
    return row[None], rivals(word[None])


def rounded_words(sharpness: float) -> tuple[Tensor, Tensor]:
    """The same of codewords."""
    row, words = rounded_rows(sharpness)
    return words[-1:], rivals(row)


def equal_lengths(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Short rows and codewords as long as each other: the norms decide, to the last bit of a float32 sum."""
    return torch.randn(50, 64, generator=g) * 1e-9, torch.nn.functional.normalize(torch.randn(300, 64, generator=g))


def one_long_word_often(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Near duplicates so wide that the float32 sum of the products decides."""
    word = torch.randn(4096, generator=g).abs()
    near = word * (1 + 2.0**-22 * torch.randn(40, 4096, generator=g))
    return word.repeat(12, 1) * 3, torch.cat([near, -near])


def far_from_zero(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A mean of so many deviations that the definition's own rounding decides."""
    return torch.randn(400, 8, generator=g) * 8 + 3e7, torch.randn(64, 8, generator=g) * 8 + 3e7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("make", [rounded_rows, rounded_words], ids=lambda make: make.__name__)
@pytest.mark.parametrize("sharpness", [0.5, 0.7, 0.9, 0.97])
def test_scores_that_rounding_shifts_as_far_as_the_bound_allows(isa: str, make: Any, sharpness: float) -> None:
    x, book = make(sharpness)
    assert codes_by(isa, x, book).item() == len(book) - 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("make", [equal_lengths, one_long_word_often, far_from_zero], ids=lambda make: make.__name__)
def test_data_on_which_one_part_of_the_bound_decides(isa: str, make: Any) -> None:
    x, book = make(torch.Generator().manual_seed(0))
    assert torch.equal(codes_by(isa, x, book), rvq_encode(x, [book], backend="reference").codes[:, 0])


def one_sided_sums(run: int, runs: int) -> tuple[Tensor, Tensor]:
    """A row and two codewords: float32 additions all lose half a unit of one score, and gain as much of the other.

    `runs` runs of a long product and `run - 1` of half an ulp of it, a little less or a little more; the last product
    makes the first codeword the nearer one after all. All elements are bfloat16, and so short beside the row that
    their norms hardly count.
    """
    length, ulp = 1024.0, 2.0**-13
    row, lose, gain = torch.zeros(3, runs, run)
    row[:, 0], lose[:, 0], gain[:, 0] = length, 1 + 2.0**-7, 1 + 2.0**-7
    row[:, 1:], lose[:, 1:], gain[:, 1:] = length * 2.0**-12, 251 / 256 * 2.0**-12, 65 / 64 * 2.0**-12
    lead = torch.tensor([1.0])
    extra = torch.tensor([0.03 * runs * run * ulp])
    words = torch.stack([torch.cat([lose.flatten(), extra]), torch.cat([gain.flatten(), 0 * extra])])
    return torch.cat([row.flatten(), lead])[None], torch.cat([words[1:], -words, words[:1]])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("run", "runs"), [(127, 1), (128, 8), (256, 1), (4096, 1)])
def test_sums_of_which_every_addition_errs_the_same_way(isa: str, run: int, runs: int) -> None:
    x, book = one_sided_sums(run, runs)
    assert rvq_encode(x, [book], backend="reference").codes.item() == len(book) - 1
    assert codes_by(isa, x, book).item() == len(book) - 1


@pytest.mark.parametrize("isa", ISAS)
def test_equal_codewords_of_two_pieces_go_to_the_lower_even_if_the_later_piece_is_scored_exhaustively(isa: str) -> None:
    book = torch.randn(16411, 300, generator=torch.Generator().manual_seed(0))  # two pieces
    book[16000], book[16001] = book[5], 1e25
    assert codes_by(isa, book[5:6] + 0.001, book).tolist() == [5]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [1e26, 3e38])
def test_codewords_that_are_all_alike_and_too_long_for_float32_are_scored(isa: str, value: float) -> None:
    assert (codes_by(isa, torch.randn(3, 8), torch.full((64, 8), value)) == 0).all()


def test_rows_so_wide_that_float32_sums_say_nothing_are_scored_exhaustively() -> None:
    wide = torch.ones(1, 2**24 + 2**20)
    book = torch.cat([-wide, wide])
    assert [codes_by(isa, wide, book).item() for isa in ISAS] == [1] * len(ISAS)


@pytest.mark.parametrize("levels", [6, 200])
def test_the_gram_form_is_exact_where_products_of_words_near_overflow(levels: int) -> None:
    g = torch.Generator().manual_seed(14)
    around = torch.randn(1, 4, generator=g)
    around = around / around.norm()
    words, x = (around * size + torch.randn(40, 4, generator=g) / 20 for size in (1.2, 0.9))
    words, x = words * 1e18, x[:30] * 1e18
    if levels == 200:  # residuals that grow, level by level, and words of which the sampled half has no centre
        words, x = torch.full((512, 1), torch.nan), torch.zeros(3, 1)
        words[1::2] = torch.linspace(9e17, 8e17, 256)[:, None]
    got = rvq_encode(x, PreparedCodebook(words, gram=True), levels=levels)
    assert torch.equal(got.codes, rvq_encode(x, words, levels=levels, backend="reference").codes)


def test_the_gram_form_allows_for_the_errors_of_every_product_of_words() -> None:
    """Each level takes off the second codeword: half an ulp too much of its own score, too little of the first's."""
    own, other = torch.full((2, 128), 2.0**-12)
    own, other = own * 1.0258, other * 0.97
    own[0] = other[0] = 1
    own[-1], other[-1] = 0, (2.06 * 128 * 2.0**-24) ** 0.5
    far = 10 * torch.eye(128)[64:80]  # their mean, zero, is the centre of all
    x, words, levels = torch.zeros(3, 128), torch.cat([torch.stack([other, own]), far, -far]), 16
    assert (rvq_encode(x, words, levels=levels, backend="reference").codes == 1).all()
    assert (rvq_encode(x, PreparedCodebook(words, gram=True), levels=levels).codes == 1).all()
