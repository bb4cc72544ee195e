"""Prompts that begin alike are read once, and nothing of the result tells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_model import presets
from longcat_model.backbone import Cache
from longcat_model.generation import prefill
from longcat_model.generation.decode import Request, decode
from longcat_model.generation.machine import TextState
from longcat_model.generation.prefill import Prefixes, Reader
from longcat_model.generation.sampling import GREEDY
from longcat_model.model import LongcatNext
from longcat_model.sequence import Inputs, Layout, join
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.vocabulary import Vocabulary

IDS = Vocabulary.of(presets.tiny().vocabulary)
LAYOUT = Layout(IDS, ByteTokenizer().encode)
BLOCK = 4


@pytest.fixture(scope="module")
def model() -> LongcatNext:
    torch.manual_seed(0)
    return LongcatNext(presets.tiny()).eval()


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "BLOCK", BLOCK)
        yield


def text(*ids: int) -> Inputs:
    return LAYOUT.text(ids).inputs


@torch.no_grad()
def read(model: LongcatNext, prompts: list[Inputs], prefixes: Prefixes | None) -> list[tuple[torch.Tensor, ...]]:
    """Latents, text, documents and last hidden state of each prompt, all in one cache."""
    cache = Cache.empty(model.sizes.backbone, len(prompts), 40)
    cache.keep([])
    reader = Reader(model, cache, prefixes)
    found = []
    for prompt in prompts:
        row = cache.add_row()
        hidden = reader.read(row, prompt)
        held = slice(0, cache.lengths[row])
        found.append((cache.latents[:, row, held], cache.text[row, held], cache.documents[row, held], hidden))
        assert cache.lengths[row] == prompt.text.shape[0]
    return found


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.sampled_from([20, 21]), min_size=1, max_size=14), min_size=1, max_size=4),
    calls=st.integers(1, 2),
)
def test_reuse_changes_no_bit(model: LongcatNext, prompts: list[list[int]], calls: int) -> None:
    """Two ids: prompts often begin alike. Each alone and without help is the truth."""
    rows = [text(*ids) for ids in prompts]
    prefixes = Prefixes(model)
    for _ in range(calls):
        together = read(model, rows, prefixes)
    for row, found in zip(rows, together, strict=True):
        (alone,) = read(model, [row], None)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_what_was_read_in_blocks_equals_the_full_forward(model: LongcatNext) -> None:
    image = LAYOUT.understand_image(torch.arange(18).view(2, 3, 3) % 8)
    prompt = join(LAYOUT.text([1, 30, 31]), image, LAYOUT.hear(torch.tensor([[1, 2, 3, 0]] * 3))).inputs
    ((_, _, _, hidden),) = read(model, [prompt], None)
    with torch.no_grad():
        whole = model(prompt.map(lambda field: field[None])).hidden[0, -1]
    torch.testing.assert_close(hidden, whole, rtol=1e-5, atol=1e-5)


def test_chat_turns_read_what_is_new(model: LongcatNext) -> None:
    prefixes = Prefixes(model)
    turn = list(range(20, 30))  # two blocks and two positions
    read(model, [text(*turn)], prefixes)
    assert (prefixes.read, prefixes.reused) == (10, 0)
    read(model, [text(*turn, 40, 41, 42)], prefixes)
    assert (prefixes.read, prefixes.reused) == (15, 8)


def test_rows_that_begin_alike_are_read_once(model: LongcatNext, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda inputs, cache: shapes.append(inputs.text.shape) or forward(inputs, cache)
    )
    rows = [text(*range(20, 29), last) for last in (40, 41, 40)]
    read(model, rows, None)
    assert [tuple(shape) for shape in shapes] == [(1, 4), (1, 4), (1, 2), (1, 2)]


@torch.no_grad()
def test_rows_that_go_on_alike_after_other_beginnings_share_nothing(model: LongcatNext) -> None:
    """As where two answers begin an image at the same step: its size and start are the same, what is before is not."""
    cache = Cache.empty(model.sizes.backbone, 2, 8)
    cache.keep([])
    begin = Reader(model, cache)
    for ids in [(20, 21), (30, 31, 32)]:
        begin.read(cache.add_row(), text(*ids))
    go_on = Reader(model, cache)
    for row, before in enumerate([(20, 21), (30, 31, 32)]):
        found = go_on.read(row, text(40, 41, 42))
        alone = Cache.empty(model.sizes.backbone, 1, 8)
        Reader(model, alone).read(0, text(*before))
        assert torch.equal(found, Reader(model, alone).read(0, text(40, 41, 42)))
        held = alone.lengths[0]
        assert torch.equal(cache.latents[:, row, :held], alone.latents[:, 0, :held])


def test_other_content_is_another_block(model: LongcatNext) -> None:
    """Every field counts, and so does everything before a block."""
    base = LAYOUT.hear(torch.tensor([[1, 2, 3, 0]] * 6)).inputs
    for name in ("text", "marker", "visual", "audio", "documents"):
        changed = base.map(torch.clone)
        field = getattr(changed, name)
        field[:1] = 0 if name != "documents" else 1
        prefixes = Prefixes(model)
        read(model, [base], prefixes)
        read(model, [changed], prefixes)
        assert prefixes.reused == 0, name


def test_blocks_stay_within_their_memory(model: LongcatNext) -> None:
    probe = Prefixes(model)
    read(model, [text(20, 21, 22, 23)], probe)
    prefixes = Prefixes(model, max_bytes=2 * probe.nbytes)
    for first in (20, 30, 40, 50):
        read(model, [text(*range(first, first + 4))], prefixes)
        assert prefixes.nbytes <= prefixes.max_bytes
    before = prefixes.read
    read(model, [text(*range(50, 54))], prefixes)
    read(model, [text(*range(40, 44))], prefixes)
    assert (prefixes.read, prefixes.reused) == (before, 8), "the ones used last must stay"
    read(model, [text(*range(20, 24))], prefixes)
    assert prefixes.read == before + 4


def test_blocks_of_another_model_are_refused(model: LongcatNext) -> None:
    request = Request(prompt=text(20), state=TextState(limit=1, sampling=GREEDY), seed=0)
    with pytest.raises(ValueError, match="prefixes must be of the model that generates"):
        decode(model, [request], prefixes=Prefixes(LongcatNext(presets.tiny())))
