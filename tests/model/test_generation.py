"""Generation against full recomputation, against teacher-forced documents, and in any company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_model import presets
from longcat_model.generation import (
    GREEDY,
    Sampling,
    Speech,
    generate_image,
    generate_speech,
    generate_text,
)
from longcat_model.generation.chooser import text_masks
from longcat_model.generation.machine import (
    Answer,
    ImageState,
    Position,
    ReplyState,
    SpeechState,
    State,
    TextState,
    stack,
)
from longcat_model.model import LongcatNext
from longcat_model.released.differences import Unconditional, unconditional
from longcat_model.sequence import IGNORE, NONE, Document, Inputs, Layout, Targets, join, pack
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.training.loss import loss
from longcat_model.vocabulary import BOS, EOS, PAD, Vocabulary

IDS = Vocabulary.of(presets.tiny().vocabulary)  # levels: visual 8 8 8, audio 8 6 4 4
LAYOUT = Layout(IDS, ByteTokenizer().encode)
WARM = Sampling(temperature=1.0, seed=5)
LIMITED = replace(WARM, top_k=6, top_p=0.95, min_p=0.01, repetition_penalty=1.2, order="joint")
SPEAKING = SpeechState(ids=IDS, sampling=GREEDY, text_sampling=GREEDY, delay=None, max_text=99, max_frames=99)
FIELDS = ("text", "marker", "visual", "audio", "documents")


@pytest.fixture(scope="module")
def model() -> LongcatNext:
    torch.manual_seed(0)
    return LongcatNext(presets.tiny()).eval()


@pytest.fixture(scope="module")
def prompts() -> list[Document]:
    """Of different lengths, two of them equal, with every modality."""
    speech = LAYOUT.hear(torch.tensor([[1, 2, 3, 0], [7, 5, 3, 3]]))
    image = LAYOUT.understand_image(torch.arange(6).view(1, 2, 3))
    texts = [LAYOUT.text([BOS, *ByteTokenizer().encode(words)]) for words in ("say 4", "say 17", "say 9")]
    return [texts[0], join(texts[1], image), texts[2], join(speech, texts[1])]


# The state machine writes what the documents teach


def test_text_states_write_text_documents() -> None:
    written = drive(TextState(limit=9, sampling=GREEDY), text=[10, 11, 12, EOS])
    assert_same(written, LAYOUT.text([10, 11, 12, EOS]))
    assert_same(drive(TextState(limit=2, sampling=GREEDY), text=[10, 11, 12, EOS]), LAYOUT.text([10, 11]))


@given(height=st.integers(1, 4), width=st.integers(1, 4))
@settings(deadline=None)
def test_image_states_write_image_documents(height: int, width: int) -> None:
    codes = torch.randint(0, 8, (height, width, 3), generator=torch.Generator().manual_seed(height * 5 + width))
    answers = iter(codes.flatten(0, 1))
    state = ImageState(ids=IDS, height=height, width=width, sampling=GREEDY)
    written = drive(state, visual=lambda: next(answers))
    document = LAYOUT.generate_image(codes)
    assert_same(written, document, skip=len(LAYOUT.image_prefix(height, width)))
    assert next(answers, None) is None


@given(
    length=st.integers(0, 6),
    frames=st.integers(1, 8),
    delay=st.one_of(st.none(), st.integers(1, 8)),
    given_text=st.booleans(),
)
@settings(deadline=None)
def test_speech_states_write_speech_documents(length: int, frames: int, delay: int | None, given_text: bool) -> None:
    start = length + 1 if delay is None else min(delay, length + 1)
    frames = max(frames, length + 1 - start)
    transcript = list(range(10, 10 + length))
    codes = torch.randint(0, 4, (frames, 4), generator=torch.Generator().manual_seed(frames))
    answers = iter([*codes, torch.tensor([8, 0, 0, 0])])
    state = replace(SPEAKING, delay=delay, transcript=tuple(transcript) if given_text else None)
    written = drive(state, text=[*transcript, IDS.audiotext_end], audio=lambda: next(answers))
    assert_same(written, LAYOUT.speak(transcript, codes, delay=delay), skip=1)


@given(
    media=st.lists(st.sampled_from(["image", "speech"]), max_size=3), forced=st.sampled_from([None, "image", "speech"])
)
@settings(deadline=None)
def test_reply_states_write_text_and_media_in_turn(media: list[str], forced: str | None) -> None:
    image, frames = torch.arange(12).view(2, 2, 3) % 8, torch.tensor([[1, 2, 3, 0], [7, 5, 3, 3]])
    prefix = LAYOUT.image_prefix(2, 2)
    inside = {"image": ImageState(ids=IDS, height=2, width=2, sampling=GREEDY), "speech": SPEAKING}
    state = ReplyState(
        ids=IDS,
        text=TextState(limit=9, sampling=GREEDY),
        **inside,  # type: ignore[arg-type]
        opening=tuple(Position(text=i) for i in prefix.inputs.text.tolist()),
        media=len(media),
        inside=None if forced is None else inside[forced],  # type: ignore[arg-type]
    )
    order = [kind for kind in (forced, *media) if kind is not None]
    documents = {"image": LAYOUT.generate_image(image), "speech": LAYOUT.speak([40], frames)}
    begun = {"image": [IDS.image_start], "speech": [IDS.audiogen_start, 40, IDS.audiotext_end]}
    said, pieces = [], []
    for place, kind in enumerate(order):
        is_forced = place == 0 and forced is not None
        said += [*([] if is_forced else [10 + place]), *begun[kind][int(is_forced) :]]
        pieces += [*([] if is_forced else [LAYOUT.text([10 + place])]), documents[kind]]
    cells = iter(image.flatten(0, 1).repeat(3, 1).repeat(2, 1))
    heard = iter([*frames, torch.tensor([8, 0, 0, 0])] * 4)
    written = drive(state, text=[*said, EOS], visual=lambda: next(cells), audio=lambda: next(heard))
    skipped = {None: 0, "image": len(prefix), "speech": 1}[forced]
    assert_same(written, join(*pieces, LAYOUT.text([EOS])), skip=skipped)


def test_a_reply_begins_no_more_media_than_it_may() -> None:
    text = TextState(limit=9, sampling=GREEDY)
    image = ImageState(ids=IDS, height=1, width=1, sampling=GREEDY)
    state = ReplyState(ids=IDS, text=text, image=image, speech=SPEAKING, opening=(), media=1)
    assert state.ask().allowed == "reply"
    state, _ = state.advance(Answer(text=IDS.image_start))  # type: ignore[assignment]
    assert state.media == 0 and state.ask().visual is not None
    assert replace(state, inside=None).ask().allowed == "text"


def test_limits_end_a_transcript_and_its_audio_as_their_ends_would() -> None:
    state = replace(SPEAKING, max_text=2, max_frames=3)
    written = drive(state, text=[10] * 9, audio=lambda: torch.tensor([1, 2, 3, 0]))
    assert_same(written, LAYOUT.speak([10, 10], torch.tensor([[1, 2, 3, 0]] * 3)), skip=1)


@pytest.mark.parametrize("end", [IDS.audiotext_end, IDS.audiotext_pad])
def test_the_reports_end_and_the_released_pad_end_a_transcript(end: int) -> None:
    state = SpeechState(ids=IDS, sampling=GREEDY, text_sampling=GREEDY, delay=None, max_text=9, max_frames=9)
    assert state.ask().allowed == "transcript" and text_masks(IDS)["transcript"][end]
    ended, (position,) = state.advance(Answer(text=end))
    assert ended is not None and ended.text_ended and ended.started
    assert (position.text, position.marker) == (NONE, IDS.audiotext_start)


def test_audio_may_end_only_after_its_transcript_and_a_frame() -> None:
    state: State | None = replace(SPEAKING, delay=1)
    asked = []
    for text in (10, 11, IDS.audiotext_end, NONE, NONE):
        assert state is not None
        ask = state.ask()
        asked.append((ask.text is not None, ask.audio is not None, ask.audio_may_end))
        state, _ = state.advance(Answer(text=text, audio=(1, 2, 3, 0)))
    assert asked == [
        (True, False, False),
        (True, True, False),
        (True, True, False),
        (False, True, True),
        (False, True, True),
    ]


# Through the model


def test_text_equals_full_recomputation(model: LongcatNext, prompts: list[Document]) -> None:
    texts = generate_text(model, prompts, max_tokens=6)
    allowed = torch.ones(IDS.text_rows, dtype=torch.bool)
    allowed[[0, BOS, PAD]] = False
    allowed[IDS.text_size + 13 :] = False
    for prompt, text in zip(prompts, texts, strict=True):
        document = join(prompt, LAYOUT.text(text))
        logits = model.text_logits(read(model, document)[len(prompt) - 1 :]).masked_fill(~allowed, -torch.inf)
        greedy = logits.argmax(-1).tolist()
        assert greedy[: len(text)] == text
        assert len(text) == 6 or greedy[len(text)] == EOS


def test_text_stops_at_its_end(model: LongcatNext, prompts: list[Document]) -> None:
    """Nearly uniform sampling: 32 rows end at different steps, and leave the batch."""
    texts = generate_text(model, prompts * 8, max_tokens=40, sampling=Sampling(temperature=30.0, seed=3))
    assert all(EOS not in text for text in texts)
    assert min(map(len, texts)) < max(map(len, texts)) <= 40


@pytest.mark.parametrize(
    ("guidance", "penalty", "kind"),
    [
        (None, 1.0, "null"),
        (2.5, 1.0, "null"),
        (None, 3.0, "null"),
        (2.5, 3.0, "bare"),
        (2.5, 1.0, "all_null"),
        (0.0, 1.0, "null"),
    ],
)
def test_images_equal_full_recomputation(
    model: LongcatNext, prompts: list[Document], guidance: float | None, penalty: float, kind: Unconditional
) -> None:
    height, width, sampling = 2, 3, replace(GREEDY, repetition_penalty=penalty)
    how = {"height": height, "width": width, "sampling": sampling, "guidance": guidance, "cfg_uncond": kind}
    images = generate_image(model, prompts, layout=LAYOUT, **how)  # type: ignore[arg-type]
    assert images.shape == (4, height, width, 3)
    for prompt, codes in zip(prompts, images, strict=True):
        body = LAYOUT.generate_image(codes)
        logits = depth_logits(model, join(prompt, body))
        if guidance is not None:
            prefix = LAYOUT.image_prefix(height, width)
            bare = depth_logits(model, join(unconditional(prompt, prefix, kind), without(body, len(prefix))))
            logits = [guidance * (c - u) + u for c, u in zip(logits, bare, strict=True)]
        for level in range(3):
            scores = penalised(logits[level][:-1], codes[..., level].flatten(), penalty)
            greedy = scores[:, :-1].argmax(-1)  # neither the end's position nor the end's class
            assert greedy.tolist() == codes[..., level].flatten().tolist()


@pytest.mark.parametrize("mode", ["serial", "parallel"])
@pytest.mark.parametrize(("given_text", "penalty"), [(False, 1.0), (True, 1.0), (False, 3.0)])
def test_speech_equals_full_recomputation(
    model: LongcatNext, prompts: list[Document], mode: str, given_text: bool, penalty: float
) -> None:
    transcripts = [[70], [71, 72, 73], [], [74, 75]] if given_text else None
    limits = {"max_frames": 7, "max_text": 4}
    sampling = replace(GREEDY, repetition_penalty=penalty)
    speeches = generate_speech(
        model, prompts, mode=mode, transcripts=transcripts, sampling=sampling, text_sampling=sampling, **limits
    )
    assert transcripts is None or [speech.text for speech in speeches] == transcripts
    for prompt, speech in zip(prompts, speeches, strict=True):
        body = LAYOUT.speak(speech.text, speech.codes, delay=1 if mode == "parallel" else None)
        document = join(prompt, body)
        if not given_text:
            labels = document.targets.text
            here = (labels != IGNORE) & (labels != IDS.audiotext_end)
            logits = model.text_logits(read(model, document))[here]
            logits = penalised(logits, torch.tensor(speech.text), penalty)[:, PAD + 1 : IDS.text_size]
            assert (logits.argmax(-1) + PAD + 1).tolist() == speech.text
        for level, logits in enumerate(depth_logits(model, document, "audio")):
            frames = speech.codes[:, level]
            scores = penalised(logits, frames, penalty)
            assert scores[:-1, :-1].argmax(-1).tolist() == frames.tolist()
            if level == 0 and len(speech.codes) < 7:
                assert int(scores[-1].argmax()) == IDS.audio_sizes[0]


@pytest.mark.parametrize("warm", [WARM, LIMITED], ids=["warm", "limited"])
def test_results_do_not_depend_on_the_company(model: LongcatNext, prompts: list[Document], warm: Sampling) -> None:
    """Prompt i alone, with the seed that is its own in the batch."""
    alone = [replace(warm, seed=warm.seed + i) for i in range(len(prompts))]
    texts = generate_text(model, prompts, max_tokens=12, sampling=warm)
    images = generate_image(model, prompts, layout=LAYOUT, height=2, width=2, sampling=warm, guidance=1.5)
    speeches = speak(model, prompts, warm)
    assert len({tuple(text) for text in texts}) == len(prompts)
    for i, (prompt, sampling) in enumerate(zip(prompts, alone, strict=True)):
        assert generate_text(model, [prompt], max_tokens=12, sampling=sampling) == [texts[i]]
        image = generate_image(model, [prompt], layout=LAYOUT, height=2, width=2, sampling=sampling, guidance=1.5)
        assert image.tolist() == [images[i].tolist()]
        (speech,) = speak(model, [prompt], sampling)
        assert (speech.text, speech.codes.tolist()) == (speeches[i].text, speeches[i].codes.tolist())


def test_seeds_and_streams_give_different_results(model: LongcatNext, prompts: list[Document]) -> None:
    other = replace(WARM, seed=999)
    assert generate_text(model, prompts, max_tokens=12, sampling=WARM) != generate_text(
        model, prompts, max_tokens=12, sampling=other
    )
    same = [prompts[0]] * 3
    first, second, third = generate_image(model, same, layout=LAYOUT, height=3, width=3, sampling=WARM)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_a_trained_model_gives_back_what_it_was_taught() -> None:
    """Layouts, loss, backbone, heads and generation in one: two documents of each kind, learnt by heart."""
    torch.manual_seed(0)
    model, tokenizer = LongcatNext(presets.tiny()), ByteTokenizer()
    generator = torch.Generator().manual_seed(1)

    def draw(sizes: Sequence[int], *shape: int) -> Tensor:
        return torch.stack([torch.randint(0, size, shape, generator=generator) for size in sizes], -1)

    images = [draw(IDS.visual_sizes, 2, 3) for _ in range(2)]
    voices = [draw(IDS.audio_sizes, frames) for frames in (5, 7)]
    words = [tokenizer.encode(word) for word in ("4", "17")]
    paint, say = ([LAYOUT.text([BOS, *tokenizer.encode(f"{task} {i}")]) for i in range(2)] for task in ("paint", "say"))
    see, hear = [LAYOUT.understand_image(image) for image in images], [LAYOUT.hear(voice) for voice in voices]
    documents = []
    for i in range(2):
        answer = LAYOUT.text([*words[i], EOS], loss=True)
        documents += [join(see[i], answer), join(hear[i], answer), join(paint[i], LAYOUT.generate_image(images[i]))]
        documents += [join(say[i], LAYOUT.speak(words[i], voices[i], delay=delay)) for delay in (None, 1)]
    batch = pack(documents, 48)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert generate_text(model, see + hear) == words * 2
    painted = generate_image(model, paint, layout=LAYOUT, height=2, width=3, sampling=GREEDY)
    assert painted.tolist() == [image.tolist() for image in images]
    for mode in ("serial", "parallel"):
        spoken = generate_speech(model, say, mode=mode, sampling=GREEDY, text_sampling=GREEDY, max_frames=20)
        assert [speech.text for speech in spoken] == words
        assert [speech.codes.tolist() for speech in spoken] == [voice.tolist() for voice in voices]


def test_nothing_asked_nothing_made(model: LongcatNext) -> None:
    assert generate_text(model, []) == generate_speech(model, []) == []
    assert generate_image(model, [], layout=LAYOUT, height=2, width=3).shape == (0, 2, 3, 3)


def test_refusals(model: LongcatNext, prompts: list[Document]) -> None:
    with pytest.raises(ValueError, match=r'generate_speech: mode must be "serial" or "parallel", got "both"'):
        generate_speech(model, prompts, mode="both")
    with pytest.raises(ValueError, match=r"generate_speech: transcripts must be one a prompt \(4\), got 1"):
        generate_speech(model, prompts, transcripts=[[10]])
    with pytest.raises(ValueError, match=r"transcripts must hold ids in \[0, 260\), got 300"):
        generate_speech(model, prompts[:1], transcripts=[[300]])
    with pytest.raises(ValueError, match="transcripts must have at most max_text = 2 ids, got 3"):
        generate_speech(model, prompts[:1], transcripts=[[10] * 3], max_text=2)
    with pytest.raises(ValueError, match="generate_image: width must be at least 1, got 0"):
        generate_image(model, prompts, layout=LAYOUT, height=1, width=0)
    with pytest.raises(ValueError, match="prompts must not be empty, got prompt 0"):
        generate_text(model, [LAYOUT.text([])])
    wrong = {"temperature": -1.0, "top_k": -1, "top_p": 0.0, "min_p": 1.0, "repetition_penalty": 0.0, "order": "any"}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=f"Sampling: {field} must be"):
            Sampling(**{field: value})


def drive(state: State | None, *, text: Sequence[int] = (), visual: object = None, audio: object = None) -> Inputs:
    """Runs a state on prepared answers, given to the heads that it asks; returns what it wrote."""
    given_text, written = iter(text), list[Position]()
    while state is not None:
        ask, longest = state.ask(), state.longest
        text_id = next(given_text) if ask.text is not None else NONE
        cell = visual().tolist() if callable(visual) and ask.visual is not None else ()
        frame = audio().tolist() if callable(audio) and ask.audio is not None else ()
        state, positions = state.advance(Answer(text_id, tuple(cell), tuple(frame)))
        written += positions
        assert longest >= len(positions) + (0 if state is None else state.longest)
    return stack(IDS, written)


def assert_same(written: Inputs, document: Document, *, skip: int = 0) -> None:
    for field in FIELDS:
        assert getattr(written, field).tolist() == getattr(document.inputs, field)[skip:].tolist(), field


def without(document: Document, positions: int) -> Document:
    """The document after its first positions."""
    labels = (getattr(document.labels, name)[positions:] for name in ("text", "visual", "audio"))
    return Document(document.inputs.map(lambda field: field[positions:]), Targets(*labels))


def penalised(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Logits [n, classes] of n positions, each after the repetition penalty of what was written before it."""
    rows = []
    for position, row in enumerate(logits):
        past = written[:position].unique()
        scores = row[past]
        rows.append(row.index_copy(0, past, torch.where(scores < 0, scores * penalty, scores / penalty)))
    return torch.stack(rows)


@torch.no_grad()
def read(model: LongcatNext, document: Document) -> Tensor:
    """Hidden states [T, D] of a document read at once, without a cache."""
    hidden: Tensor = model(document.inputs.map(lambda field: field[None])).hidden[0]
    return hidden


@torch.no_grad()
def depth_logits(model: LongcatNext, document: Document, modality: str = "visual") -> list[Tensor]:
    """Teacher-forced logits of each level at the positions with a label."""
    labels = getattr(document.targets, modality)
    here = labels[:, 0] != IGNORE
    head, tables = {
        "visual": (model.visual_head, model.visual_tables()),
        "audio": (model.audio_head, model.audio_tables()),
    }[modality]
    logits: list[Tensor] = head.logits(read(model, document)[here], labels[here].clamp(min=NONE), tables)
    return logits


def speak(model: LongcatNext, prompts: list[Document], sampling: Sampling) -> list[Speech]:
    limits = {"max_frames": 6, "max_text": 5}
    return generate_speech(model, prompts, mode="parallel", sampling=sampling, text_sampling=sampling, **limits)
