"""The command line: what it prints, what it writes, and errors without tracebacks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longcat_model import __main__ as entry
from longcat_model import cli, presets
from longcat_model.cli import main
from longcat_model.files import png, read_image, wav, write
from longcat_model.generation import converse
from longcat_model.system import System
from longcat_model.tokenizers.vision import VisionTokenizer


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("system")
    System.create(presets.tiny()).save(directory)
    return directory


@pytest.fixture
def media(tmp_path: Path) -> Path:
    write(tmp_path / "a.png", png(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))))
    write(tmp_path / "a.wav", wav(0.1 * torch.sin(torch.arange(8000) / 20), 16_000))
    return tmp_path


def test_a_saved_system_is_the_same_system(system: Path, tmp_path: Path) -> None:
    first = System.load(system)
    first.save(tmp_path)
    second = System.load(tmp_path)
    assert second.sizes == first.sizes == presets.tiny()
    for (name, a), b in zip(first.parts().items(), second.parts().values(), strict=True):
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key]), f"{name}.{key}"


def test_inspect_counts_parameters(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(system)]) == 0
    printed = capsys.readouterr().out
    model = System.load(system).model
    assert f"{sum(p.numel() for p in model.backbone.parameters()):,}" in printed
    assert main(["inspect", "tiny"]) == 0
    assert capsys.readouterr().out == printed


def test_inspect_knows_the_released_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "longcat_next"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    # The released checkpoint counts as many in these parts.
    assert lines["model.lm_head"] == ["402,816,000", "0"]
    assert lines["model.visual_head"][0] == "879,039,496"
    assert lines["model.audio_head"][0] == "1,428,481,032"
    assert lines["model.pre_buffer"][0] == "75,503,616"


def test_generate_writes_what_it_says(system: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, name in (("paint", "out.png"), ("say", "out.wav")):
        out = media / name
        assert main(["generate", task, "47", "--run", str(system), "--out", str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        first = out.read_bytes()
        assert main(["generate", task, "47", "--run", str(system), "--out", str(out)]) == 0
        assert out.read_bytes() == first
        capsys.readouterr()
    for task, name in (("see", "a.png"), ("hear", "a.wav")):
        assert main(["generate", task, str(media / name), "--run", str(system)]) == 0


def test_a_picture_is_read_at_the_height_of_the_demos(
    system: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `generate paint` writes, `generate see` reads: painted pixels are 8 screen pixels wide."""
    shapes = []
    encode = VisionTokenizer.encode
    monkeypatch.setattr(VisionTokenizer, "encode", lambda self, x: shapes.append(x[0].shape) or encode(self, x))
    assert main(["generate", "paint", "407", "--run", str(system), "--out", str(media / "b.png")]) == 0
    assert main(["generate", "see", str(media / "b.png"), "--run", str(system)]) == 0
    assert shapes == [(3, 16, 48)]


def ask(system: Path, media: Path, conversations: object, *options: str) -> list[str]:
    """Arguments that answer conversations; small limits."""
    (media / "chat.json").write_text(json.dumps(conversations))
    small = {"height": 2, "width": 3, "max-tokens": 6, "max-text": 4, "max-frames": 3}
    limits = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    out = ["--run", str(system), "--out", str(media / "answers")]
    return ["generate", "--messages", str(media / "chat.json"), *out, *limits, *options]


CONVERSATIONS = [
    [{"role": "user", "content": content}]
    for content in (
        "what is <longcat_img_start>a.png<longcat_img_end>",
        "paint<longcat_img_start>",
        'hear <longcat_audio_start>{"path": "a.wav"}<longcat_audio_end>',
        "say<longcat_audiogen_start>",
    )
]


def test_generate_answers_conversations(system: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ask(system, media, CONVERSATIONS, "--temperature", "1")
    assert main(arguments) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["conversation"] for line in lines] == [1, 2, 3, 4]
    assert [sorted(part) for line in lines for part in line["parts"]] == [
        ["text"],
        ["image"],
        ["text"],
        ["speech", "text"],
    ]
    answers = media / "answers"
    assert sorted(path.name for path in answers.iterdir()) == ["2-1.png", "4-1.wav"]
    assert read_image(answers / "2-1.png", 1).shape == (3, 16, 24)
    assert captured.err.startswith("memory: at most ") and captured.err.endswith("; conversations: 4\n")
    first = [path.read_bytes() for path in sorted(answers.iterdir())]
    assert main(arguments) == 0
    assert capsys.readouterr().out == captured.out
    assert [path.read_bytes() for path in sorted(answers.iterdir())] == first


def test_generate_streams_what_it_answers(
    system: Path, media: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From standard input, one conversation, with paths relative to here."""
    arguments = ask(system, media, [], "--stream", "--no-roles", "--media", "1", "--temperature", "1")
    arguments[2] = "-"
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([{"role": "user", "content": "paint<longcat_img_start>"}])))
    assert main(arguments) == 0
    *pieces, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(piece["cell"]) for piece in pieces if "cell" in piece] == [3] * 6
    assert "".join(piece.get("text", "") for piece in pieces) == last["parts"][1]["text"]


def test_bad_conversations_write_nothing(system: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [{"role": "user", "content": "<longcat_img_start>a.wav<longcat_img_end>"}]
    for conversations, options, message in (
        ([*CONVERSATIONS, bad], [], "conversation 5: messages: message 1: image: path must name a readable image"),
        (CONVERSATIONS, ["--max-memory", "1000"], "memory must fit max_memory = 1000 bytes, got at most"),
        (CONVERSATIONS, ["--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (CONVERSATIONS, ["--stop", ""], "stop must be a tuple of strings that are not empty"),
        ({"role": "user"}, [], "messages must be a list of messages or of such lists"),
    ):
        assert main(ask(system, media, conversations, *options)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith("longcat: ")
        assert not (media / "answers").exists()


def test_messages_nested_too_deep_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chat.json").write_text("[" * 100_000)
    assert main(["generate", "--messages", str(tmp_path / "chat.json")]) == 2
    assert "messages must be JSON, got" in capsys.readouterr().err


def test_where_answers_go_is_tried_before_they_are_made(
    system: Path, media: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converse.Job, "run", lambda *_, **__: pytest.fail("computed"))
    arguments = ask(system, media, CONVERSATIONS)
    for out in (media / "a.png", Path("/proc")):
        assert main([*arguments, "--out", str(out)]) == 2
        assert f"out must be a directory that can be written to, got {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "a task and its subject, or --messages, must be given, and not both"),
        (["generate", "see"], "a task and its subject, or --messages, must be given, and not both"),
        (["generate", "see", "a.png", "--messages", "-"], "must be given, and not both"),
        (["generate", "--messages", "none.json"], "messages must be a readable file, got none.json"),
        (["generate", "--messages", "MEDIA/a.png"], "messages must be a readable file"),
        (["inspect", "nowhere"], "subject must be a directory or one of longcat_next, demo, tiny"),
        (["generate", "paint", "4", "--run", "nowhere"], "must hold a trained system"),
        (["generate", "paint", "four", "--run", "SYSTEM"], "must be a number of 1 to 3 digits, got 'four'"),
        (["generate", "say", "1234", "--run", "SYSTEM"], "must be a number of 1 to 3 digits"),
        (["generate", "see", "none.png", "--run", "SYSTEM"], "readable image, got none.png"),
        (["generate", "hear", "MEDIA/a.png", "--run", "SYSTEM"], "readable sound file"),
        (["generate", "paint", "4", "--run", "SYSTEM", "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "paint", "4", "--run", "SYSTEM", "--out", "none/a.png"], "directory must exist"),
        (["train", "none.jsonl", "--run", "SYSTEM"], "data must be a readable text file"),
        (["train", "none.jsonl", "--run", "SYSTEM", "--pipeline", "0"], "pipeline must be at least 1, got 0"),
        (["train", "none.jsonl", "--run", "SYSTEM", "--data-parallel", "0"], "data-parallel must be at least 1, got 0"),
        (
            ["train", "none.jsonl", "--run", "SYSTEM", "--expert-parallel", "2"],
            "expert-parallel must divide data-parallel (1), got 2",
        ),
        (
            ["train", "none.jsonl", "--run", "SYSTEM", "--microbatches", "0"],
            "microbatches must be from 1 to",
        ),
        (["train", "none.jsonl", "--run", "SYSTEM", "--memory", "-1"], "memory must be from 1 to"),
        (["train", "none.jsonl", "--run", "SYSTEM", "--timeout-s", "inf"], "timeout_s must be from 0.001 to"),
        (["demo", "--out", "MEDIA", "--fresh"], "holds other files"),
        (["demo", "--out", "MEDIA/run", "--seed", "4294967296"], "seed must be in [0, 2^31), got 4294967296"),
        (["demo", "--smoke", "--out", "MEDIA/run", "--speech-dir", "MEDIA/none"], "directory must exist"),
    ],
)
def test_errors_are_one_line(
    system: Path, media: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [a.replace("SYSTEM", str(system)).replace("MEDIA", str(media)) for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("longcat: ") and "Traceback" not in error


def test_a_damaged_system_is_refused(system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    System.load(system).save(tmp_path)
    (tmp_path / "vision.safetensors").write_bytes(b"damaged")
    assert main(["generate", "paint", "4", "--run", str(tmp_path)]) == 2
    assert "vision.safetensors must fit the config" in capsys.readouterr().err


class Deaf:
    """What it raises when it ends is dropped."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_is_heard_wherever_it_meets_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: list[str] | None) -> int:
        raise KeyboardInterrupt

    def dropped(arguments: list[str] | None) -> int:
        Deaf()
        time.sleep(10)
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins deaf to it
    try:
        for run in (interrupted, dropped):
            monkeypatch.setattr(cli, "main", run)
            assert entry.main([]) == 130
            assert capsys.readouterr().err == "\nlongcat: interrupted\n"
    finally:
        signal.signal(signal.SIGINT, before)


def train_arguments(system: Path, media: Path, lines: list[str]) -> list[str]:
    (media / "data.jsonl").write_text("\n".join(lines))
    options = [
        "--rows",
        "2",
        "--row-length",
        "96",
        "--learning-rate",
        "0.01",
        "--out",
        str(media / "out"),
        "--workers",
        "0",
    ]
    return ["train", str(media / "data.jsonl"), "--run", str(system), *options]


def test_train_learns_its_documents(system: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [
        [{"text": "say hello:"}, {"text": "hello", "loss": True}],
        [{"image": "a.png"}, {"text": "noise", "loss": True}],
        [{"text": "paint"}, {"paint": "a.png"}],
        [{"hear": "a.wav"}, {"say": "a.wav", "transcript": "tone"}],
    ]
    arguments = train_arguments(system, media, [json.dumps(document) for document in documents])
    assert main([*arguments, "--steps", "30"]) == 0
    first, last = capsys.readouterr().out.split("loss ")[1].split(" over")[0].split(" -> ")
    assert float(last) < 0.5 * float(first)
    assert System.load(media / "out").sizes == presets.tiny()


def test_train_in_a_pipeline_is_train(system: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*train_arguments(system, media, ['[{"text": "good", "loss": true}]']), "--steps", "3"]
    assert main([*arguments, "--pipeline", "2"]) == 0
    piped = capsys.readouterr().out
    assert piped.endswith(f"over 3 steps; system: {media / 'out'}\n")
    trained = System.load(media / "out").model.state_dict()
    (media / "out").rename(media / "piped")
    assert main(arguments) == 0
    assert capsys.readouterr().out == piped
    for name, tensor in System.load(media / "out").model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-4)  # a hundredth of an update


def test_train_goes_on_with_the_same_training_only(
    system: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments(system, media, ['[{"text": "good", "loss": true}]'])
    assert main([*arguments, "--steps", "2"]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--steps", "2"]) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--steps", "3"]) == 2
    assert "holds a training with other steps; choose another directory" in capsys.readouterr().err
    train_arguments(system, media, ['[{"text": "food", "loss": true}]'])
    assert main([*arguments, "--steps", "2"]) == 2
    assert "holds a training with other documents" in capsys.readouterr().err


def test_a_training_that_diverges_ends_in_one_line(
    system: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments(system, media, ['[{"text": "good", "loss": true}]'])
    assert main([*arguments, "--steps", "20", "--learning-rate", "1e30"]) == 2
    assert "loss must be finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ('[{"image": "none.png"}]', "line 2: image: path must name a readable image"),
        ('[{"image": "large.png"}]', "line 2: image must be at most 96 positions long, got 256"),
        (json.dumps([{"text": "a" * 200}]), "line 2: document must be at most 96 positions long, got 202"),
    ],
)
def test_train_names_the_bad_line(
    system: Path, media: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    write(media / "large.png", png(torch.zeros(3, 128, 128)))
    arguments = train_arguments(system, media, ['[{"text": "good", "loss": true}]', line])
    assert main([*arguments, "--steps", "1"]) == 2
    assert message in capsys.readouterr().err
    assert not (media / "out").exists()


def test_a_reader_who_has_seen_enough_ends_it_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "longcat_model", "inspect", "longcat_next"]
    with os.fdopen(writing, "w") as unread:
        ended = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (141, "")
