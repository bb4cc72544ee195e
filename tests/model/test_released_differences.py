"""The official runtimes' differences: each form of the unconditional prompt does what its name says in the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longcat_model import presets
from longcat_model.backbone import Cache
from longcat_model.generation import GREEDY, Sampling
from longcat_model.model import LongcatNext
from longcat_model.released.differences import HERE, SERVING, TRANSFORMERS, rounded, unconditional
from longcat_model.sequence import NONE, NULL, Document, Inputs, Layout, drop_condition, join
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import Vocabulary

IDS = Vocabulary.of(presets.tiny().vocabulary)
LAYOUT = Layout(IDS, ByteTokenizer().encode)
PREFIX = LAYOUT.image_prefix(2, 2)


@pytest.fixture(scope="module")
def model() -> LongcatNext:
    torch.manual_seed(0)
    return LongcatNext(presets.tiny()).eval()


@pytest.fixture(scope="module")
def prompt() -> Document:
    cells = LAYOUT.understand_image(torch.arange(6).view(1, 2, 3))
    return join(LAYOUT.text([1, 40, 41]), cells, LAYOUT.hear(torch.tensor([[1, 2, 3, 0]])))


def _one_row(inputs: Inputs) -> Inputs:
    fields = ("text", "marker", "visual", "audio", "documents")
    return Inputs(*(getattr(inputs, name)[None] for name in fields))


@torch.no_grad()
def _continue(model: LongcatNext, prompt: Document) -> Tensor:
    """Hidden states of the prompt's last position and of a cell and a newline fed after it."""
    row, size = _one_row(prompt.inputs), len(prompt)
    cache = Cache.empty(model.sizes.backbone, 1, size + 2)
    hidden = [model(row, cache).hidden[:, -1]]
    cell = LAYOUT.generate_image(torch.tensor([[[1, 2, 3]], [[4, 5, 6]]])).inputs
    for at in (-4, -3):  # the first cell and its newline
        hidden.append(model(_one_row(Inputs(*(x[at : at + 1] for x in vars(cell).values()))), cache).hidden[0])
    return torch.cat(hidden)


@pytest.mark.parametrize("kind", ["null", "bare", "all_null"])
def test_partners_are_as_long_as_the_prompt_and_predict_nothing(prompt: Document, kind: str) -> None:
    partner = unconditional(prompt, PREFIX, kind)  # type: ignore[arg-type]
    assert len(partner) == len(prompt) + len(PREFIX)
    assert all(bool((labels < 0).all()) for labels in vars(partner.targets).values())
    assert bool((partner.inputs.visual == NONE).all()) and bool((partner.inputs.audio == NONE).all())
    kept = partner.inputs.text[len(prompt) :]
    assert torch.equal(kept, torch.full_like(kept, NULL) if kind == "all_null" else PREFIX.inputs.text)


def test_the_default_is_what_training_drops_conditions_to(prompt: Document) -> None:
    expected = join(drop_condition(prompt), PREFIX)
    for got, wanted in zip(
        vars(unconditional(prompt, PREFIX).inputs).values(), vars(expected.inputs).values(), strict=True
    ):
        assert torch.equal(got, wanted)


def test_the_bare_partner_is_the_prefix_alone(model: LongcatNext, prompt: Document) -> None:
    """Padding in front changes nothing that the positions see, but their rotary angles, of which only differences."""
    alone, padded = _continue(model, PREFIX), _continue(model, unconditional(prompt, PREFIX, "bare"))
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-6)
    assert not torch.allclose(_continue(model, unconditional(prompt, PREFIX)), alone, atol=1e-3)


def test_all_null_embeds_id_0_of_the_word_table(model: LongcatNext, prompt: Document) -> None:
    """E[0] over one more than the tables: the hash of nothing but zeros is 0, which adds nothing."""
    embedded = model.embed(_one_row(unconditional(prompt, PREFIX, "all_null").inputs))[0]
    expected = model.embed_tokens.weight[0] / (1 + presets.tiny().backbone.ngram.tables)  # type: ignore[union-attr]
    torch.testing.assert_close(embedded, expected.expand_as(embedded))


def test_the_partners_condition_nothing(model: LongcatNext, prompt: Document) -> None:
    other = LAYOUT.text(list(range(50, 50 + len(prompt))))
    for kind in ("null", "bare", "all_null"):
        first, second = (_continue(model, unconditional(p, PREFIX, kind)) for p in (prompt, other))  # type: ignore[arg-type]
        assert torch.equal(first, second), kind


def test_refuses_an_unknown_kind(prompt: Document) -> None:
    with pytest.raises(ValueError, match="kind must be one of null, bare, all_null, got 'none'"):
        unconditional(prompt, PREFIX, "none")  # type: ignore[arg-type]


def test_a_runtimes_choices_are_settings_of_generation() -> None:
    for runtime in (HERE, TRANSFORMERS, SERVING):
        assert replace(GREEDY, order=runtime.order).order == runtime.order
    assert Sampling().order == HERE.order


def test_rounded_codebooks_are_bfloat16s(model: LongcatNext) -> None:
    codebook = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert rounded(codebook).dtype is torch.float32
    assert torch.equal(rounded(codebook), codebook.bfloat16().float())
    assert not torch.equal(rounded(codebook), codebook)
