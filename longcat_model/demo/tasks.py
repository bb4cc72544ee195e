"""The four tasks of the demo as documents: one wording for training, evaluation and the command line.

see    text "see"  image            -> text      hear   text "hear" speech         -> text
paint  text "paint 407"             -> image     say    text "say 407"             -> text-guided speech
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longcat_model.sequence import Document, Layout, draw_delay, drop_condition, join
from longcat_model.tokenizers.text import TextTokenizer
from longcat_model.vocabulary import BOS, EOS, Vocabulary

DROPPED = 0.1  # share of paint documents trained without their condition, for classifier-free guidance


@dataclass(frozen=True)
class Tasks:
    """Builds prompts (for generation) and documents (for training) of one vocabulary."""

    layout: Layout
    text: TextTokenizer

    @classmethod
    def of(cls, ids: Vocabulary, text: TextTokenizer) -> Tasks:
        return cls(Layout(ids, text.encode), text)

    def see_prompt(self, codes: Tensor) -> Document:
        """`codes` [H, W, L] of an image."""
        return join(self._words("see"), self.layout.understand_image(codes))

    def hear_prompt(self, codes: Tensor) -> Document:
        """`codes` [n, L] of speech."""
        return join(self._words("hear"), self.layout.hear(codes))

    def paint_prompt(self, number: str) -> Document:
        return self._words(f"paint {number}")

    def say_prompt(self, number: str) -> Document:
        return self._words(f"say {number}")

    def see(self, codes: Tensor, number: str) -> Document:
        return join(self.see_prompt(codes), self._answer(number))

    def hear(self, codes: Tensor, number: str) -> Document:
        return join(self.hear_prompt(codes), self._answer(number))

    def paint(self, codes: Tensor, number: str, generator: torch.Generator) -> Document:
        prompt = self.paint_prompt(number)
        if float(torch.rand((), generator=generator)) < DROPPED:
            prompt = drop_condition(prompt)
        return join(prompt, self.layout.generate_image(codes), self._end())

    def say(self, codes: Tensor, number: str, generator: torch.Generator) -> Document:
        transcript = self.text.encode(number)
        delay = draw_delay(len(transcript), codes.shape[0], generator=generator)
        return join(self.say_prompt(number), self.layout.speak(transcript, codes, delay=delay), self._end())

    def _words(self, words: str) -> Document:
        return self.layout.text([BOS, *self.text.encode(words)])

    def _answer(self, number: str) -> Document:
        return join(self.layout.text(self.text.encode(number), loss=True), self._end())

    def _end(self) -> Document:
        return self.layout.text([EOS], loss=True)
