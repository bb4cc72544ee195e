"""Text to ids and back: bytes for small models, the released tokenizer's files for the released model.

Both are a `TextTokenizer`, which is all that the rest of the package asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from longcat_model.vocabulary import PAD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_BYTE = PAD + 1  # ids 0..3 are null, begin, end, padding


class TextTokenizer(Protocol):
    @property
    def size(self) -> int:
        """Ids that are text."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes: id = byte + 4; ids 0 null, 1 begin, 2 end and 3 padding are never written by `encode`.

    Example:
        >>> ByteTokenizer().encode("4 2"), ByteTokenizer().decode([2, 56, 36, 54])
        ([56, 36, 54], '4 2')
    """

    size: int = FIRST_BYTE + 256

    def encode(self, text: str) -> list[int]:
        return [byte + FIRST_BYTE for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids that stand for bytes; others are left out, bytes that are no UTF-8 become U+FFFD."""
        return bytes(i - FIRST_BYTE for i in ids if FIRST_BYTE <= i < self.size).decode(errors="replace")


class PretrainedTokenizer:
    """A tokenizer of the transformers library, from a local directory; nothing is downloaded.

    Args:
        directory: what `save_pretrained` wrote, or the released checkpoint's folder.
        size: ids that are text; special tokens follow them (`Vocabulary.text_size`).

    Raises:
        FileNotFoundError: the directory has no tokenizer files.
    """

    def __init__(self, directory: str | Path, *, size: int = 131_072) -> None:
        directory = Path(directory)
        if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise FileNotFoundError(
                f"PretrainedTokenizer: directory must hold tokenizer.json or tokenizer_config.json, got {directory}"
            )
        self.size = size
        self._tokenizer = _load(directory)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without begin or end."""
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _load(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # here, because it costs seconds that byte-level models need not spend

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
