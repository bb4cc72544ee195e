"""Answers to conversations: every task, in any company, as it comes and whole, within its limits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import longcat_model
from longcat_model import presets
from longcat_model.backbone import Cache
from longcat_model.files import png, wav, write
from longcat_model.generation import (
    GREEDY,
    HEAR,
    SEE,
    Answer,
    Event,
    Painted,
    Prefixes,
    Sampling,
    Settings,
    Spoken,
    converse,
    generate_image,
    generate_speech,
    generate_text,
    prefill,
)
from longcat_model.generation.chooser import Chooser
from longcat_model.generation.decode import decode
from longcat_model.generation.machine import stack
from longcat_model.generation.prompts import context
from longcat_model.messages import AUDIO, AUDIO_END, IMAGE, IMAGE_END, SIZE, SIZE_END, SPEECH, SPEECH_END, parse
from longcat_model.model import LongcatNext
from longcat_model.released.differences import unconditional
from longcat_model.sequence import NULL, Document, Inputs, Layout, join
from longcat_model.system import System
from longcat_model.vocabulary import BOS, EOS

FIELDS = ("text", "marker", "visual", "audio", "documents")
WARM = Sampling(temperature=1.0, repetition_penalty=1.2)
SMALL = Settings(
    text=WARM,
    image=WARM,
    speech=WARM,
    transcript=WARM,
    height=2,
    width=3,
    max_tokens=12,
    max_text=5,
    max_frames=6,
)
Messages = list[dict[str, str]]


def user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


CONVERSATIONS = [
    user("hello"),
    user(f"what is {IMAGE}a.png{IMAGE_END}"),
    user(f"paint{IMAGE}"),
    user(f"{AUDIO}a.wav{AUDIO_END}"),
    user(f"say{SPEECH}"),
    user(f"paint{SIZE}3 1{SIZE_END}{IMAGE}"),
    [*user("say"), {"role": "assistant", "content": f"{SPEECH}hi{AUDIO}a.wav{AUDIO_END}{SPEECH_END}"}, *user("more")],
    [*user("paint"), {"role": "assistant", "content": f"{IMAGE}a.png{IMAGE_END}"}, *user(f"now{SPEECH}")],
]
ALL = range(len(CONVERSATIONS))
HOW = [SMALL, replace(SMALL, media=2, max_tokens=8), replace(SMALL, mode="parallel", guidance=None, truncation="joint")]


@pytest.fixture(scope="module")
def system() -> System:
    torch.manual_seed(0)
    system = System.create(presets.tiny())
    for part in system.parts().values():
        part.eval()
    return system


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("media")
    write(directory / "a.png", png(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))))
    write(directory / "a.wav", wav(0.1 * torch.sin(torch.arange(8000) / 20), 16_000))
    return directory


def ask(system: System, media: Path, messages: Messages, how: Settings = SMALL, **options: object) -> Answer:
    answer = longcat_model.generate(messages, system=system, settings=how, directory=media, **options)  # type: ignore[arg-type]
    assert isinstance(answer, Answer)
    return answer


def plain(answer: Answer) -> object:
    """An answer as something that can be compared."""
    parts = []
    for part in answer.parts:
        if isinstance(part, Painted):
            parts.append((part.codes.tolist(), part.image.tolist()))
        elif isinstance(part, Spoken):
            parts.append((part.text, part.codes.tolist(), part.waveform.tolist(), part.rate))
        else:
            parts.append(part)
    return parts, answer.ended


@pytest.fixture(scope="module")
def alone(system: System, media: Path) -> list[list[object]]:
    """The answer to each conversation by itself, in each way."""
    return [[plain(ask(system, media, CONVERSATIONS[i], how, seed=i)) for i in ALL] for how in HOW]


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(list(ALL)), count=st.integers(2, len(CONVERSATIONS)), data=st.data())
def test_an_answer_does_not_depend_on_the_company(
    system: System, media: Path, alone: list[list[object]], order: list[int], count: int, data: st.DataObject
) -> None:
    chosen = order[:count]
    ways = [data.draw(st.integers(0, len(HOW) - 1)) for _ in chosen]
    answers = longcat_model.generate(
        [CONVERSATIONS[i] for i in chosen],
        system=system,
        settings=[HOW[way] for way in ways],
        seed=chosen,
        directory=media,
    )
    assert isinstance(answers, list)
    assert [plain(answer) for answer in answers] == [alone[way][i] for way, i in zip(ways, chosen, strict=True)]


@pytest.mark.parametrize("kind", ["null", "bare"])
def test_images_begun_at_the_same_step_do_not_mix(
    system: System, media: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Their size and start are the same, what stands before is not."""
    start = system.model.ids.image_start
    monkeypatch.setattr(Chooser, "_text", lambda _, asking, *__: [EOS if a.written.text else start for a in asking])
    how = replace(SMALL, media=1, cfg_uncond=kind, guidance=30.0, height=6, width=6)  # type: ignore[arg-type]
    chats = [user("hello"), user("good day"), user("hey")]
    together = longcat_model.generate(chats, system=system, settings=how, seed=[0, 0, 0])
    assert isinstance(together, list)
    assert [plain(answer) for answer in together] == [plain(ask(system, media, chat, how)) for chat in chats]


def test_every_task_answers_in_its_kind(system: System, media: Path) -> None:
    answers = longcat_model.generate(CONVERSATIONS, system=system, settings=SMALL, directory=media)
    assert isinstance(answers, list)
    kinds = [[type(part) for part in answer.parts] for answer in answers]
    assert kinds == [[str], [str], [Painted], [str], [Spoken], [Painted], [str], [Spoken]]
    shapes = [part.codes.shape for answer in answers for part in answer.parts if isinstance(part, Painted)]
    assert shapes == [(2, 3, 3), (3, 1, 3)]
    cell, step = system.vision.sizes.cell, system.audio.samples_per_position
    for part in (part for answer in answers for part in answer.parts):
        if isinstance(part, Painted):
            assert part.image.shape == (3, part.codes.shape[0] * cell, part.codes.shape[1] * cell)
        elif isinstance(part, Spoken):
            assert (len(part.waveform), part.rate) == (len(part.codes) * step, 16_000)


def test_what_comes_is_what_there_is_at_the_end(system: System, media: Path) -> None:
    events: list[Event] = []
    how = replace(SMALL, media=3, text=Sampling(temperature=3.0))
    answers = longcat_model.generate(
        CONVERSATIONS * 2, system=system, settings=how, directory=media, listen=events.append
    )
    assert isinstance(answers, list)
    for number, answer in enumerate(answers):
        mine = [event for event in events if event.conversation == number]
        spoken = [part for part in answer.parts if isinstance(part, Spoken)]
        painted = [part for part in answer.parts if isinstance(part, Painted)]
        assert "".join(event.text for event in mine if event.kind == "text") == answer.text
        assert "".join(event.text for event in mine if event.kind == "transcript") == "".join(s.text for s in spoken)
        cells = [list(event.codes) for event in mine if event.kind == "cell"]
        assert cells == [cell for part in painted for cell in part.codes.flatten(0, 1).tolist()]
        frames = [list(event.codes) for event in mine if event.kind == "frame"]
        assert frames == [frame for part in spoken for frame in part.codes.tolist()]


# What follows which prompt


def test_prompts_are_the_documents_that_training_makes(media: Path) -> None:
    layout = Layout(LongcatNext(presets.tiny()).ids, lambda text: [byte + 4 for byte in text.encode()])
    image = torch.arange(12).view(2, 2, 3) % 8
    sound = torch.tensor([[1, 2, 3, 0], [7, 5, 3, 3]])
    codes = {media / "a.png": image, media / "a.wav": sound}

    def text(words: str) -> Document:
        return layout.text(layout.encode(words))

    def built(messages: Messages, roles: bool = True) -> Document:
        return context(parse(messages, media), codes, layout, roles=roles, mode="serial")

    def equal(found: Document, *pieces: Document) -> None:
        wanted = join(layout.text([BOS]), *pieces).inputs
        for name in ("text", "marker", "visual", "audio", "documents"):
            assert getattr(found.inputs, name).tolist() == getattr(wanted, name).tolist(), name

    asked, answers = text("<longcat_user>"), text("<longcat_assistant>")
    equal(built(user("hi")), asked, text("hi"), answers)
    equal(built(user(f"hi{IMAGE}")), asked, text("hi"), answers)
    equal(built(user("hi"), roles=False), text("hi"))
    equal(
        built(CONVERSATIONS[6]),
        *(asked, text("say"), answers, layout.speak(layout.encode("hi"), sound), layout.text([EOS])),
        *(asked, text("more"), answers),
    )
    equal(
        built([*user(f"{AUDIO}a.wav{AUDIO_END}"), {"role": "assistant", "content": f"ha{IMAGE}a.png{IMAGE_END}"}]),
        *(asked, layout.hear(sound), answers, text("ha"), layout.generate_image(image)),
    )


def test_answers_are_those_of_the_functions_on_documents(system: System, media: Path) -> None:
    layout = Layout(system.model.ids, system.text.encode)

    def prompt(words: str) -> Document:
        return layout.text([BOS, *system.text.encode(f"<longcat_user>{words}<longcat_assistant>")])

    (text,) = generate_text(system.model, [prompt("hello")], max_tokens=12, sampling=WARM)
    assert ask(system, media, user("hello")).parts == (system.text.decode(text),)
    image = generate_image(
        system.model, [prompt("paint")], layout=layout, height=2, width=3, sampling=WARM, guidance=3.0
    )
    (painted,) = ask(system, media, user(f"paint{IMAGE}")).parts
    assert isinstance(painted, Painted) and torch.equal(painted.codes, image[0])
    limits = {"max_text": 5, "max_frames": 6}
    for mode in ("serial", "parallel"):
        (speech,) = generate_speech(
            system.model, [prompt("say")], mode=mode, sampling=WARM, text_sampling=WARM, **limits
        )
        (spoken,) = ask(system, media, user(f"say{SPEECH}"), replace(SMALL, mode=mode)).parts
        assert isinstance(spoken, Spoken) and torch.equal(spoken.codes, speech.codes)


@torch.no_grad()
def best_codes(model: LongcatNext, hidden: Tensor, codes: Tensor, modality: str) -> Tensor:
    """Logits [n, L, most classes] of the codes [n, L] that hidden states [n, D] predict, -inf where there are fewer."""
    head = {"visual": model.visual_head, "audio": model.audio_head}[modality]
    tables = {"visual": model.visual_tables, "audio": model.audio_tables}[modality]()
    logits = [level[:, :-1] for level in head.logits(hidden, codes, tables)]  # without "end"
    widest = max(level.shape[1] for level in logits)
    return torch.stack([F.pad(level, (0, widest - level.shape[1]), value=-torch.inf) for level in logits], 1)


@torch.no_grad()
def hidden_of(model: LongcatNext, inputs: Inputs) -> Tensor:
    hidden: Tensor = model(inputs.map(lambda field: field[None])).hidden[0]
    return hidden


def followed(first: Inputs, second: Inputs) -> Inputs:
    return Inputs(*(torch.cat([getattr(first, name), getattr(second, name)]) for name in FIELDS))


def between(inputs: Inputs, start: int, stop: int) -> Inputs:
    return inputs.map(lambda field: field[start:stop])


@pytest.mark.parametrize("kind", ["null", "bare", "all_null"])
def test_media_in_mid_text_equal_full_recomputation(system: System, media: Path, kind: str) -> None:
    """Replies whose text, drawn at high temperature, begins images and speech; their codes are the most likely ones."""
    greedy = {"image": GREEDY, "speech": GREEDY, "transcript": GREEDY}
    how = replace(SMALL, **greedy, media=4, text=Sampling(temperature=30.0), cfg_uncond=kind, guidance=2.5)  # type: ignore[arg-type]
    model, scale = system.model, 2.5
    job = converse.prepare([user("go")] * 24, system, replace(how, max_tokens=60))
    prefix = job.layout.image_prefix(2, 3)
    images = utterances = 0
    requests = [job.request(prompt, {}) for prompt in job.prompts]
    for request, trace in zip(requests, decode(model, requests), strict=True):
        written = stack(model.ids, trace)
        start = len(request.prompt.text)
        whole = followed(request.prompt, written)
        hidden = hidden_of(model, whole)
        here = (whole.audio[:, 0] >= 0).nonzero()[:, 0]
        assert best_codes(model, hidden[here - 1], whole.audio[here], "audio").argmax(-1).equal(whole.audio[here])
        utterances += int((written.text == model.ids.audiogen_end).sum())
        for end in (whole.text == model.ids.image_end).nonzero()[:, 0].tolist():
            first = end - 2 * 4 + 1  # the first cell: two rows of three cells and a newline or the end
            begin = first - len(prefix)
            assert begin >= start and whole.text[begin:first].tolist() == prefix.inputs.text.tolist()
            blank = unconditional(job.layout.text([NULL] * begin), prefix, kind)  # type: ignore[arg-type]
            partner = hidden_of(model, followed(blank.inputs, between(whole, first, end + 1)))
            cells = [i for i in range(first, end) if whole.visual[i, 0] >= 0]
            codes = whole.visual[cells]
            before = [i - 1 for i in cells]
            with_, without = (best_codes(model, h[before], codes, "visual") for h in (hidden, partner))
            assert (scale * (with_ - without) + without).argmax(-1).equal(codes)
            images += 1
    assert images > 2 and utterances > 2


# Stop conditions


def test_answers_end_for_a_reason(system: System, media: Path) -> None:
    def reasons(content: str, how: Settings) -> set[str]:
        answers = longcat_model.generate([user(content)] * 8, system=system, settings=how)
        assert isinstance(answers, list)
        return {answer.ended for answer in answers}

    hot = Sampling(temperature=30.0)
    assert reasons("go", replace(SMALL, text=hot, max_tokens=90)) == {"end", "length"}
    assert reasons(f"a{IMAGE}", SMALL) == {"end"}
    assert reasons(f"a{SPEECH}", replace(SMALL, max_frames=2)) == {"length"}
    assert "end" in reasons(f"a{SPEECH}", replace(SMALL, speech=hot, transcript=hot, max_text=90, max_frames=30))


@pytest.mark.parametrize("mode", ["serial", "parallel"])
@pytest.mark.parametrize(("frames", "reason"), [(2, "end"), (3, "length"), (9, "length")])
def test_speech_as_long_as_it_may_be_ends_at_its_length(
    system: System, monkeypatch: pytest.MonkeyPatch, mode: str, frames: int, reason: str
) -> None:
    """As text does whose last id is no EOS: the limit is what ends it, also where the model had ended it there."""
    ids = system.model.ids
    end = (ids.audio_sizes[0], *[0] * (len(ids.audio_sizes) - 1))
    heard = iter([(0,) * len(ids.audio_sizes)] * frames + [end])
    monkeypatch.setattr(Chooser, "_text", lambda _, asking, *__: [ids.audiotext_end] * len(asking))
    monkeypatch.setattr(Chooser, "_frames", lambda _, asking, *__: [next(heard) for _ in asking])
    answer = longcat_model.generate(user(f"a{SPEECH}"), system=system, settings=replace(SMALL, max_frames=3, mode=mode))
    assert isinstance(answer, Answer) and isinstance(answer.parts[0], Spoken)
    assert (len(answer.parts[0].codes), answer.ended) == (min(frames, 3), reason)


def test_an_answer_stops_before_the_first_stop_string(system: System, media: Path) -> None:
    whole = ask(system, media, user("hello"), replace(SMALL, max_tokens=30)).text
    stop = next(whole[i : i + 2] for i in range(3, len(whole)) if "\ufffd" not in whole[i : i + 2])
    events: list[Event] = []
    how = replace(SMALL, max_tokens=30, stop=("never to be seen", stop))
    answer = ask(system, media, user("hello"), how, listen=events.append)
    assert (answer.text, answer.ended) == (whole[: whole.index(stop)], "stop")
    assert "".join(event.text for event in events) == answer.text


def test_a_row_that_stops_leaves_the_others_alone(system: System, media: Path) -> None:
    stopping = replace(SMALL, stop=(ask(system, media, user("hello")).text[1],))
    both = longcat_model.generate(
        [user("hello"), user("hello")], system=system, settings=[stopping, SMALL], seed=[0, 0]
    )
    assert isinstance(both, list)
    assert both[0].ended == "stop" and plain(both[1]) == plain(ask(system, media, user("hello")))


# Settings


def test_defaults_are_the_recommendations(media: Path) -> None:
    ids = LongcatNext(presets.tiny()).ids

    def of(messages: Messages, **settings: object) -> object:
        return Settings(**settings).state(ids, parse(messages, media), ()).ask()  # type: ignore[arg-type]

    assert of(CONVERSATIONS[0]).text == GREEDY
    assert of(CONVERSATIONS[1]).text == SEE == Sampling(temperature=0.4, top_k=40, top_p=0.85, repetition_penalty=1.1)
    assert of(CONVERSATIONS[3]).text == HEAR == Sampling(temperature=0.2, top_k=20, top_p=0.85, repetition_penalty=1.1)
    image = of(CONVERSATIONS[2])
    assert (image.visual, image.guidance) == (Sampling(temperature=0.5, top_k=1024, top_p=0.75), 3.0)
    speaking = Settings().state(ids, parse(CONVERSATIONS[4], media), ())
    assert speaking.sampling == Sampling(temperature=0.5, top_k=5, top_p=0.85, repetition_penalty=1.3)
    assert speaking.ask().text == Sampling(temperature=0.2, top_k=20, top_p=0.85, repetition_penalty=1.1)
    assert (Settings().height, Settings().width, Settings().mode) == (37, 37, "serial")
    assert of(CONVERSATIONS[2], truncation="joint").visual.order == "joint"


def test_runtime_differences_can_be_chosen(system: System, media: Path) -> None:
    """At the same seed each gives other images."""
    image = Sampling(temperature=1.0, top_k=5, top_p=0.6)
    found = set()
    for choice in ({}, {"truncation": "joint"}, {"cfg_uncond": "bare"}, {"cfg_uncond": "all_null"}, {"guidance": None}):
        how = replace(SMALL, image=image, height=6, width=6, **choice)
        (painted,) = ask(system, media, user(f"paint a lot{IMAGE}"), how).parts
        assert isinstance(painted, Painted)
        found.add(tuple(painted.codes.flatten().tolist()))
    assert len(found) == 5


# Memory and prefixes


def test_the_cache_takes_what_was_said(system: System, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    empty = Cache.empty

    def record(*args: object, **how: object) -> Cache:
        made.append(empty(*args, **how))  # type: ignore[arg-type]
        return made[-1]

    for how in HOW:
        job = converse.prepare(CONVERSATIONS, system, how, directory=media)
        with monkeypatch.context() as patch:
            patch.setattr(Cache, "empty", record)
            job.run()
        cache = made.pop()
        assert not made
        assert job.cache_bytes == cache.latents.nbytes + cache.documents.nbytes + cache.text.nbytes


def test_too_much_memory_is_refused_before_any_work(
    system: System, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = converse.prepare(CONVERSATIONS, system, SMALL, directory=media).memory.most

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work")

    for part in (system.model, system.vision, system.audio):
        monkeypatch.setattr(part, "forward", work)
        monkeypatch.setattr(part, "encode", work, raising=False)
    refusal = rf"must fit max_memory = {needed - 1} bytes, got at most {needed:,} bytes beside .* conversations: 8"
    with pytest.raises(ValueError, match=refusal):
        longcat_model.generate(CONVERSATIONS, system=system, settings=SMALL, directory=media, max_memory=needed - 1)


def test_chat_turns_share_what_was_read(system: System, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "BLOCK", 8)
    chat = user(f"hello {IMAGE}a.png{IMAGE_END}")
    prefixes, whole_blocks = Prefixes(system.model), 0
    for turn in range(3):
        reused = prefixes.reused
        answer = ask(system, media, chat, seed=turn, prefixes=prefixes)
        assert prefixes.reused - reused == whole_blocks, "all of the last prompt's blocks, but not of its answer's"
        assert plain(answer) == plain(ask(system, media, chat, seed=turn))
        job = converse.prepare([chat], system, SMALL, directory=media)
        length = len(
            job.request(job.prompts[0], {media / "a.png": torch.zeros(2, 2, 3, dtype=torch.int64)}).prompt.text
        )
        whole_blocks = length // 8 * 8
        chat += [{"role": "assistant", "content": answer.text}, *user("and then?")]


# Refusals


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([user("a"), user("<longcat_b>")], {}, "conversation 2: messages: message 1: unknown tag <longcat_b>"),
        ([user("a"), user(f"{IMAGE}b.png{IMAGE_END}")], {}, "conversation 2: messages: message 1: <longcat_img_start>"),
        (
            [{"role": "system", "content": "a"}, *user(f"{IMAGE}a.wav{IMAGE_END}")],
            {},
            "messages: message 2: image: path must name a readable image, got",
        ),
        (
            user(f"{AUDIO}a.png{AUDIO_END}{IMAGE}"),
            {},
            "messages: message 1: speech: path must name a readable sound file, got",
        ),
        (
            [user("a"), [*user(f"{IMAGE}a.png{IMAGE_END}"), *user(f"{AUDIO}a.png{AUDIO_END}")]],
            {},
            "conversation 2: messages: message 2: a file must be an image or sound, got both of",
        ),
        (
            [*user("a"), *user("b\ud800")],
            {},
            r"message 2: content must be Unicode text, got the lone surrogate '\ud800'",
        ),
        ("hello", {}, "messages must be a list of messages or of such lists, got 'hello'"),
        ([user("a")], {"settings": [SMALL] * 2}, r"settings must be one a conversation (1), got 2"),
        ([user("a")], {"seed": [1, 2]}, r"seeds must be one a conversation (1), got 2"),
        (user("a"), {"seed": -1}, r"seeds must be in [0, 2^62), got [-1]"),
        (user("a" * 200), {}, "a conversation and its longest answer must have at most 150 positions, got"),
        (user("a"), {"settings": replace(SMALL, max_tokens=150)}, "must have at most 150 positions"),
        (user("a"), {"system": "nowhere"}, "nowhere must hold a trained system"),
    ],
)
def test_refusals(
    system: System,
    media: Path,
    monkeypatch: pytest.MonkeyPatch,
    messages: Messages,
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(converse, "LONGEST", 150)
    with pytest.raises(ValueError) as refusal:
        longcat_model.generate(messages, **{"system": system, "settings": SMALL, "directory": media, **options})  # type: ignore[arg-type]
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("height", "width", "max_tokens", "max_text", "max_frames")),
        ("media", -1),
        ("numbers", {"order": "joint"}),
        ("guidance", -1.0),
        ("guidance", float("nan")),
        ("truncation", "both"),
        ("cfg_uncond", "none"),
        ("mode", "both"),
        ("stop", "word"),
        ("stop", ("",)),
    ],
)
def test_bad_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"generate: {name} must be"):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_nothing_asked_nothing_answered(system: System) -> None:
    assert longcat_model.generate([], system=system) == []


def test_generate_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, longcat_model; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(longcat_model, "nothing")
