"""The heads: dtype, class counts, and the released parameter counts."""

from __future__ import annotations

import pytest
import torch

from longcat_model import config, presets
from longcat_model.heads import TextHead, depth_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_logits_are_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = TextHead(8, 11).to(dtype)
    hidden = torch.randn(2, 3, 8, dtype=dtype)
    logits = head(hidden)
    assert logits.shape == (2, 3, 11) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, (hidden @ head.weight.T).float())


@pytest.mark.parametrize(
    ("modality", "parameters"), [("visual", 879_039_496), ("audio", 1_428_481_032)], ids=["visual", "audio"]
)
def test_released_depth_heads_have_the_released_parameters(modality: str, parameters: int) -> None:
    """The counts of the released checkpoint, which stores the feed-forward biases that no depth head reads."""
    sizes = presets.longcat_next()
    head_sizes: config.DepthHead = getattr(sizes, f"{modality}_head")
    codebook_sizes: tuple[int, ...] = getattr(sizes.vocabulary, f"{modality}_sizes")
    with torch.device("meta"):
        head = depth_head(sizes.backbone.hidden, head_sizes, codebook_sizes)
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


def test_depth_heads_predict_each_levels_codes_and_the_end() -> None:
    sizes = presets.tiny()
    hidden, codebook_sizes = sizes.backbone.hidden, sizes.vocabulary.audio_sizes
    torch.manual_seed(1)
    head = depth_head(hidden, sizes.audio_head, codebook_sizes)
    tables = [torch.randn(size + 1, hidden) for size in codebook_sizes]
    logits = head.logits(torch.randn(5, hidden), torch.zeros(5, len(codebook_sizes), dtype=torch.int64), tables)
    assert [tuple(level.shape) for level in logits] == [(5, size + 1) for size in codebook_sizes]
