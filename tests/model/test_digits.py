"""The demo's digit images: the split, pure batches, what pictures show, and the judge."""

from __future__ import annotations

import pytest
import torch

from longcat_model.demo import digits
from longcat_model.demo.digits import LONGEST, QUESTIONS, SIDE, SYMBOLS, Judge, Scans
from longcat_model.tokenizers.vision.answerer import IGNORED


@pytest.fixture(scope="module")
def scans() -> tuple[Scans, Scans]:
    return digits.load_scans()


@pytest.fixture(scope="module")
def judge(scans: tuple[Scans, Scans]) -> Judge:
    return Judge(scans[0], drawings=2)


def test_the_split_is_fixed_stratified_and_disjoint(scans: tuple[Scans, Scans]) -> None:
    train, held_out = scans
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    assert torch.bincount(held_out.labels).min() >= 34
    again = digits.load_scans()[1]
    assert torch.equal(again.pixels, held_out.pixels)
    everything = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)


def test_training_numbers_are_a_pure_function_of_seed_and_step(scans: tuple[Scans, Scans]) -> None:
    first, again, later = (digits.training_numbers(scans[0], count=6, seed=3, step=step) for step in (7, 7, 8))
    assert first.texts == again.texts and first.inks == again.inks
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    assert [x.tolist() for x in first.images] != [x.tolist() for x in later.images]


def test_numbers_have_one_to_three_digits_and_no_leading_zero(scans: tuple[Scans, Scans]) -> None:
    numbers = digits.training_numbers(scans[0], count=300, seed=0, step=0)
    assert {len(text) for text in numbers.texts} == {1, 2, 3}
    assert all(text == str(int(text)) for text in numbers.texts)
    for image, text in zip(numbers.images, numbers.texts, strict=True):
        assert image.shape == (3, SIDE, SIDE * len(text)) and image.min() >= 0 and image.max() <= 1


def test_the_source_keeps_answers_with_their_images(scans: tuple[Scans, Scans]) -> None:
    pictures = digits.training_pictures(scans[0], seed=1)(5, 30, False)
    widths = [image.shape[2] // SIDE for image in pictures.images]
    assert widths == sorted(widths) and [SYMBOLS[i] for i in pictures.answers[:, 1, 0]] == [str(w) for w in widths]
    assert {x.shape[2] for x in digits.training_pictures(scans[0])(5, 30, True).images} == {SIDE}


def test_a_picture_is_made_of_scans_of_its_digits(scans: tuple[Scans, Scans]) -> None:
    held_out = scans[1]
    numbers = digits.plain_numbers(held_out, count=40, seed=2)
    for image, text in zip(numbers.images, numbers.texts, strict=True):
        for digit, scan in zip(text, digits.to_scans(image), strict=True):
            nearest = (held_out.pixels - scan).square().sum((1, 2)).argmin()
            assert int(held_out.labels[nearest]) == int(digit)


def test_single_digits_show_every_scan_in_order(scans: tuple[Scans, Scans]) -> None:
    numbers = digits.single_digits(scans[1])
    assert [int(text) for text in numbers.texts] == scans[1].labels.tolist()


def test_answers_spell_out_and_end() -> None:
    numbers = digits.Numbers([torch.zeros(3, 16, 48), torch.zeros(3, 16, 16)], ["407", "5"], ["red", "blue"])
    out = digits.answers(numbers)
    assert out.shape == (2, len(QUESTIONS), LONGEST + 1)
    spelled = [[[SYMBOLS[i] for i in answer if i != IGNORED] for answer in row] for row in out.tolist()]
    assert spelled[0] == [["4", "0", "7", "end"], ["3", "end"], ["4", "end"], ["7", "end"], ["red", "end"]]
    assert spelled[1] == [["5", "end"], ["1", "end"], ["5", "end"], ["5", "end"], ["blue", "end"]]


def test_the_judge_reads_held_out_scans_and_whole_numbers(scans: tuple[Scans, Scans], judge: Judge) -> None:
    assert judge.score(scans[1]) >= 0.97
    numbers = digits.plain_numbers(scans[1], count=50, seed=1)
    right = [a == b for a, b in zip(judge.read(numbers.images), numbers.texts, strict=True)]
    assert sum(right) >= 45


def test_the_judge_does_not_read_noise_as_the_label(scans: tuple[Scans, Scans], judge: Judge) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(3, 16, 16, generator=generator) for _ in range(100)]
    labels = [str(i % 10) for i in range(100)]
    assert sum(a == b for a, b in zip(judge.read(noise), labels, strict=True)) <= 30


def test_to_scans_does_not_depend_on_the_ink(scans: tuple[Scans, Scans]) -> None:
    stroke = torch.nn.functional.interpolate(scans[1].pixels[:1, None], scale_factor=2)[0]
    pictures = [
        1 - stroke * (1 - torch.tensor(digits.INKS[ink])[:, None, None]) for ink in ("black", "red", "green", "blue")
    ]
    reference = digits.to_scans(pictures[0])
    assert all((digits.to_scans(picture) - reference).abs().max() < 0.05 for picture in pictures)
