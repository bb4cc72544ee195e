"""The config: round trip through JSON, clear errors, vocabulary arithmetic of the released model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from longcat_model import config, presets
from longcat_model.vocabulary import Vocabulary


@pytest.mark.parametrize("preset", [presets.longcat_next, presets.demo, presets.tiny])
def test_round_trips_through_json(preset: Any) -> None:
    sizes = preset()
    assert config.from_dict(config.Model, json.loads(json.dumps(config.to_dict(sizes)))) == sizes


def test_round_trips_without_ngrams() -> None:
    sizes = dataclasses.replace(presets.tiny().backbone, ngram=None)
    assert config.from_dict(config.Backbone, config.to_dict(sizes)) == sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_buffer_width": "wide"}, r"config\.pre_buffer_width: must be int, got 'wide'"),
        ({"pre_buffer_width": True}, r"config\.pre_buffer_width: must be int, got True"),
        ({"wings": 2}, "config: unknown fields wings"),
        ({"backbone": 3}, r"config\.backbone: must be an object"),
        ({"vocabulary": {"text_size": 260}}, r"config\.vocabulary: .*audio_sizes"),
        ({"vocabulary": {"text_size": 260, "audio_sizes": [8], "visual_sizes": [8]}}, "visual_sizes must equal"),
    ],
)
def test_refuses_what_is_no_config(change: dict[str, Any], message: str) -> None:
    values = config.to_dict(presets.tiny()) | change
    with pytest.raises(ValueError, match=message):
        config.from_dict(config.Model, values)


def test_released_vocabulary() -> None:
    ids = Vocabulary.of(presets.longcat_next().vocabulary)
    assert ids.audio_offsets == (131125, 139317, 143413, 145461, 146485, 147509, 148533, 149557)
    assert ids.visual_offsets == tuple(150581 + 16384 * level for level in range(8))
    assert ids.rows == 281_653 + 1 + 970  # the last level's extra row, padding
    assert ids.rows == 282_624
    special = [ids.image_size_start, ids.image_size_end, ids.audio_start, ids.audio_end, ids.audio_pad]
    assert special == [131090, 131091, 131103, 131104, 131105]
    assert [ids.image_start, ids.image_end, ids.image_pad, ids.image_newline] == [131106, 131107, 131108, 131109]
    assert [ids.audiotext_start, ids.audiotext_end, ids.audiotext_pad] == [131120, 131121, 131122]
    assert [ids.audiogen_start, ids.audiogen_end] == [131123, 131124]
    assert ids.ignored_by_ngrams == (131072, 131125)
