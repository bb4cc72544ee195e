"""Text tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longcat_model.tokenizers.text import ByteTokenizer, PretrainedTokenizer
from longcat_model.vocabulary import BOS, EOS, PAD


@given(st.text())
def test_bytes_come_back_as_they_went_in(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(PAD < i < tokenizer.size == 260 for i in ids)


def test_ids_are_bytes_plus_four() -> None:
    assert ByteTokenizer().encode("A€") == [65 + 4, 0xE2 + 4, 0x82 + 4, 0xAC + 4]


def test_decoding_leaves_out_what_is_no_byte() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([BOS, *tokenizer.encode("7"), PAD, EOS, 0, 260, 999]) == "7"
    assert tokenizer.decode([0xFF + 4]) == "\ufffd"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="directory must hold"):
        PretrainedTokenizer(tmp_path)


def test_a_saved_tokenizer_is_read_from_its_directory(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "3": 1, "12": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = PretrainedTokenizer(tmp_path, size=3)
    assert tokenizer.encode("3 12") == [1, 2]
    assert tokenizer.decode([1, 2]) == "3 12"
