"""One id space for all modalities: text, 53 special tokens, audio levels, visual levels.

Rows of the joint embedding, in order. A level owns `size` rows plus one that it shares with its successor: row `size`
of level l is row 0 of level l + 1, as in the released checkpoint; for audio level 0 that row means end of audio, for
vision it means end of image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from longcat_model import config

SPECIAL_TOKENS = 53
BOS, EOS, PAD = 1, 2, 3


@dataclass(frozen=True)
class Vocabulary:
    """Ids and offsets that follow from a `config.Vocabulary`.

    Example:
        >>> ids = Vocabulary.of(config.Vocabulary(text_size=131_072, audio_sizes=(8192, 4096), visual_sizes=(16,)))
        >>> ids.text_rows, ids.image_start, ids.audio_offsets, ids.visual_offsets
        (131125, 131106, (131125, 139317), (143413,))
    """

    text_size: int
    audio_sizes: tuple[int, ...]
    visual_sizes: tuple[int, ...]
    padding: int = 0

    @classmethod
    def of(cls, sizes: config.Vocabulary) -> Vocabulary:
        return cls(sizes.text_size, sizes.audio_sizes, sizes.visual_sizes, sizes.padding)

    @property
    def text_rows(self) -> int:
        """Classes of the text head: text ids and special tokens."""
        return self.text_size + SPECIAL_TOKENS

    @property
    def audio_offsets(self) -> tuple[int, ...]:
        return tuple(accumulate(self.audio_sizes[:-1], initial=self.text_rows))

    @property
    def visual_offsets(self) -> tuple[int, ...]:
        return tuple(accumulate(self.visual_sizes[:-1], initial=self.text_rows + sum(self.audio_sizes)))

    @property
    def rows(self) -> int:
        """Rows of the joint embedding, the last level's extra row and the unused ones at the end included."""
        return self.text_rows + sum(self.audio_sizes) + sum(self.visual_sizes) + 1 + self.padding

    def _special(self, index: int) -> int:
        return self.text_size + index

    @property
    def image_size_start(self) -> int:
        return self._special(18)

    @property
    def image_size_end(self) -> int:
        return self._special(19)

    @property
    def audio_start(self) -> int:
        return self._special(31)

    @property
    def audio_end(self) -> int:
        return self._special(32)

    @property
    def audio_pad(self) -> int:
        return self._special(33)

    @property
    def image_start(self) -> int:
        return self._special(34)

    @property
    def image_end(self) -> int:
        return self._special(35)

    @property
    def image_pad(self) -> int:
        return self._special(36)

    @property
    def image_newline(self) -> int:
        return self._special(37)

    @property
    def audiotext_start(self) -> int:
        """AS: the next position's code frame is the first of the utterance."""
        return self._special(48)

    @property
    def audiotext_end(self) -> int:
        """TE: the transcript has ended."""
        return self._special(49)

    @property
    def audiotext_pad(self) -> int:
        return self._special(50)

    @property
    def audiogen_start(self) -> int:
        return self._special(51)

    @property
    def audiogen_end(self) -> int:
        return self._special(52)

    @property
    def ignored_by_ngrams(self) -> tuple[int, int]:
        """Half-open range of ids that the n-gram hash reads as 0: the special tokens."""
        return self.text_size, self.text_rows
