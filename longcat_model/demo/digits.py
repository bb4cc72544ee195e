"""The demo's images: real handwritten digits composed into coloured numbers, and a judge that reads them.

The 1,797 scans of 8 x 8 pixels are scikit-learn's `load_digits`; a fixed fifth is held out and never trained on by
anything. Numbers of one to three digits are 16 pixels high and 16 wide a digit, ink of one of four colours on paper
near white, so images differ in width and all three channels matter.

Dimension key
    N digits of all numbers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from longcat_model.tokenizers.vision.answerer import IGNORED, Answerer, Pictures

SIDE = 16  # pixels a side of a digit
LONGEST = 3  # digits of a number
HELD_OUT = 0.2  # share of the scans
INKS = {"black": (0.08, 0.08, 0.10), "red": (0.78, 0.10, 0.12), "green": (0.05, 0.48, 0.16), "blue": (0.10, 0.20, 0.78)}
QUESTIONS = ("which number?", "how many digits?", "first digit?", "last digit?", "which ink?")
SYMBOLS = (*"0123456789", *INKS, "end")
LONGEST_ANSWER = LONGEST + 1  # with the end symbol


@dataclass(frozen=True)
class Scans:
    """Real digits: pixels [scans, 8, 8] float32 with ink 1 on paper 0, labels int64 [scans]."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Numbers:
    """Images of written numbers with what they show."""

    images: list[Tensor]  # each [3, 16, 16 * digits] in [0, 1]
    texts: list[str]  # "407"
    inks: list[str]  # keys of INKS


def load_scans() -> tuple[Scans, Scans]:
    """The training scans and the held-out ones: a fixed stratified split of 1,437 and 360."""
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    train, held_out = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=bunch.target)
    return Scans(pixels[train], labels[train]), Scans(pixels[held_out], labels[held_out])


def training_numbers(scans: Scans, *, count: int, seed: int, step: int, longest: int = LONGEST) -> Numbers:
    """Augmented numbers for one training step, a pure function of its arguments.

    Lengths are equally likely; scans are drawn by digit so that no number starts with 0 unless it is 0; each digit is
    shifted, turned, scaled and dimmed a little.
    """
    generator = _generator(seed, step)
    texts = _random_texts(count, longest, generator)
    return _write(texts, _pick(scans, texts, generator), generator, augment=True)


def training_pictures(scans: Scans, *, seed: int = 0) -> Callable[[int, int, bool], Pictures]:
    """The source of the vision stages: (step, images, one size) to augmented numbers with answers to QUESTIONS.

    Images of one size lie together, which spares the tokenizer their sorting.
    """

    def source(step: int, images: int, one_size: bool) -> Pictures:
        numbers = training_numbers(scans, count=images, seed=seed, step=step, longest=1 if one_size else LONGEST)
        order = sorted(range(images), key=lambda i: len(numbers.texts[i]))
        return Pictures([numbers.images[i] for i in order], answers(numbers)[order])

    return source


def answerer(features: int) -> Answerer:
    """An untrained answerer of QUESTIONS in SYMBOLS about features of that width."""
    return Answerer(features=features, questions=len(QUESTIONS), symbols=len(SYMBOLS), longest=LONGEST_ANSWER)


def plain_numbers(scans: Scans, *, count: int, seed: int, longest: int = LONGEST) -> Numbers:
    """Numbers from unaltered scans, drawn by digit; a pure function of its arguments."""
    generator = _generator(seed, 0)
    texts = _random_texts(count, longest, generator)
    return _write(texts, _pick(scans, texts, generator), generator, augment=False)


def single_digits(scans: Scans, *, seed: int = 0) -> Numbers:
    """Every scan once, in order, as a number of one digit."""
    texts = [str(int(label)) for label in scans.labels]
    return _write(texts, scans.pixels, _generator(seed, 0), augment=False)


def answers(numbers: Numbers) -> Tensor:
    """Answers to QUESTIONS as indices into SYMBOLS, int64 [numbers, questions, LONGEST_ANSWER], then IGNORED."""
    out = torch.full((len(numbers.texts), len(QUESTIONS), LONGEST_ANSWER), IGNORED)
    for row, text, ink in zip(out, numbers.texts, numbers.inks, strict=True):
        spoken: tuple[Sequence[str], ...] = (text, str(len(text)), text[0], text[-1], (ink,))
        for answer, symbols in zip(row, spoken, strict=True):
            indices = [SYMBOLS.index(s) for s in (*symbols, "end")]
            answer[: len(indices)] = torch.tensor(indices)
    return out


def to_scans(image: Tensor) -> Tensor:
    """Takes a picture of a number back to scans: [3, 16, 16 * digits] in [0, 1] to [digits, 8, 8], ink 1 on paper 0.

    Ink is the distance from the paper, the image's lightest tenth, as a share of the darkest twentieth's distance.
    """
    paper = image.flatten(1).quantile(0.9, dim=1)
    distance = (image - paper[:, None, None]).norm(dim=0)
    full = distance.flatten().quantile(0.95).clamp_min(0.1)
    ink = (distance / full).clamp(0, 1)
    small = ink.unflatten(0, (8, SIDE // 8)).unflatten(2, (-1, SIDE // 8)).mean(dim=(1, 3))
    return small.unflatten(1, (-1, 8)).transpose(0, 1)


class Judge:
    """Reads digits in pictures: an RBF support vector machine trained on real training scans only.

    It sees each scan as drawn and in a few augmented drawings, never a picture that a model made.
    """

    def __init__(self, train: Scans, *, drawings: int = 4, seed: int = 0) -> None:
        texts = [str(int(label)) for label in train.labels]
        views = [_write(texts, train.pixels, _generator(seed, i), augment=i > 0).images for i in range(drawings)]
        pixels = torch.cat([to_scans(image) for view in views for image in view]).flatten(1)
        self._machine = SVC(gamma=0.05, C=10.0).fit(pixels.numpy(), train.labels.repeat(drawings).numpy())

    def read(self, images: Sequence[Tensor]) -> list[str]:
        """The number in each picture [3, 16, 16 * digits], one digit for every 16 columns."""
        scans = [to_scans(image).flatten(1) for image in images]
        digits = self._machine.predict(torch.cat(scans).numpy()).tolist()
        texts, start = [], 0
        for run in scans:
            texts.append("".join(map(str, digits[start : start + len(run)])))
            start += len(run)
        return texts

    def score(self, scans: Scans) -> float:
        """Share of `scans` read right when drawn as single digits: the judge's own accuracy on held-out ones."""
        numbers = single_digits(scans)
        pairs = zip(self.read(numbers.images), numbers.texts, strict=True)
        return sum(a == b for a, b in pairs) / len(numbers.texts)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 32) + step)


def _random_texts(count: int, longest: int, generator: torch.Generator) -> list[str]:
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    texts = []
    for length, draw in zip(lengths, draws, strict=True):
        low, high = (10 ** (length - 1) if length > 1 else 0), 10**length
        texts.append(str(low + math.floor(draw * (high - low))))
    return texts


def _pick(scans: Scans, texts: list[str], generator: torch.Generator) -> Tensor:
    """A scan for every digit of every text, [N, 8, 8]."""
    digits_N = torch.tensor([int(digit) for text in texts for digit in text])
    order = torch.argsort(scans.labels, stable=True)
    counts = torch.bincount(scans.labels, minlength=10)
    starts = counts.cumsum(0) - counts
    draws_N = torch.rand(len(digits_N), generator=generator, dtype=torch.float64)
    return scans.pixels[order[starts[digits_N] + (draws_N * counts[digits_N]).long()]]


def _write(texts: list[str], scans_N: Tensor, generator: torch.Generator, *, augment: bool) -> Numbers:
    """Enlarges the scans and inks them on paper, one ink a number."""
    ink_N = _enlarge(scans_N, generator, augment=augment)
    inks = torch.randint(len(INKS), (len(texts),), generator=generator)
    tints = 1 - 0.05 * torch.rand(len(texts), 3, generator=generator)
    palette = torch.tensor(list(INKS.values()))
    images = []
    for ink, colour, tint in zip(ink_N.split([len(t) for t in texts]), palette[inks], tints, strict=True):
        stroke = ink.transpose(0, 1).flatten(1)[None]
        images.append(tint[:, None, None] * (1 - stroke) + colour[:, None, None] * stroke)
    names = list(INKS)
    return Numbers(images, texts, [names[i] for i in inks.tolist()])


def _enlarge(scans_N: Tensor, generator: torch.Generator, *, augment: bool) -> Tensor:
    """Scans [N, 8, 8] at 16 x 16, bilinear; augmented by up to 8 degrees, 10 % of size, a pixel, 15 % of intensity."""
    count = len(scans_N)
    angle, scale, right, down, dim = torch.rand(5, count, generator=generator) * 2 - 1
    if not augment:
        angle, scale, right, down, dim = torch.zeros(5, count)
    angle, scale = angle * math.radians(8), 1 + 0.1 * scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, right / 8], 1), torch.stack([sin, cos, down / 8], 1)], dim=1)
    grid = affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    enlarged = grid_sample(scans_N[:, None], grid, align_corners=False)[:, 0]
    return (enlarged * (1 + 0.15 * dim[:, None, None])).clamp(0, 1)
