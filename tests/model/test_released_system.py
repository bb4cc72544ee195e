"""A released checkpoint's directory answers messages: all its parts joined, at a shrunk size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import longcat_model
from longcat_model import presets
from longcat_model.cli import main
from longcat_model.generation import Painted, Settings, Spoken
from longcat_model.model import LongcatNext
from longcat_model.released import checkpoint, system
from longcat_model.released.plan import H200, plan
from longcat_model.released.sizes import Sizes, shrunk
from longcat_model.released.tokenizers import image_decoders
from longcat_model.released.vocoder import Vocoder

SETTINGS = Settings(height=2, width=1, max_tokens=3, max_text=2, max_frames=2, guidance=None)
IMAGE, SPEECH = "<longcat_img_start>", "<longcat_audiogen_start>"


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer of bytes, and decoders of random weights."""
    torch.manual_seed(0)
    directory, sizes = tmp_path_factory.mktemp("released") / "next", shrunk()
    checkpoint.synthesize(sizes, directory, seed=3)
    letters = {letter: 4 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=letters, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    (directory / system.IMAGE_DECODER).parent.mkdir()
    save_file(image_decoders(sizes).state_dict(), directory / system.IMAGE_DECODER)
    (directory / system.VOCODER).parent.mkdir()
    torch.save(Vocoder(sizes.vocoder).state_dict(), directory / system.VOCODER)
    return directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_it_answers_with_text_images_and_speech(whole: Path) -> None:
    painted, spoken, text = longcat_model.generate(
        [user(f"a{IMAGE}"), user(f"b{SPEECH}"), user("c")], system=whole, settings=SETTINGS
    )
    loaded = system.load_system(whole, progress=False)
    assert loaded.released == shrunk()
    (image,), (speech,) = painted.parts, spoken.parts
    assert isinstance(image, Painted) and torch.equal(image.image, loaded.vision.decode([image.codes], seed=0)[0])
    assert isinstance(speech, Spoken) and speech.rate == shrunk().vocoder.sample_rate == 24_000
    assert torch.equal(speech.waveform, loaded.audio.decode([speech.codes], seed=1)[0])
    assert text.text and loaded.text.decode(loaded.text.encode("<longcat_user>x")) == "<longcat_user>x"


def test_the_command_takes_its_directory(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    conversations = [user(f"b{SPEECH}"), user(f"c{IMAGE}a.png<longcat_img_end>")]
    (tmp_path / "m.json").write_text(json.dumps(conversations))
    limits = ["--max-tokens", "2", "--max-text", "2", "--max-frames", "2", "--out", str(tmp_path / "out")]
    assert main(["generate", "--messages", str(tmp_path / "m.json"), "--run", str(whole), *limits]) == 0
    assert [json.loads(line)["conversation"] for line in capsys.readouterr().out.splitlines()] == [1, 2]
    assert soundfile.info(tmp_path / "out" / "1-1.wav").samplerate == 24_000


def test_other_commands_say_that_they_do_not_take_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "see", "a.png", "--run", str(whole)]) == 2
    assert "is a released checkpoint: generate --messages and inspect alone take one" in capsys.readouterr().err


def test_without_a_decoder_its_answers_are_refused_before_any_work(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / system.IMAGE_DECODER).unlink(), (copy / system.VOCODER).unlink()
    loaded = system.load_system(copy, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(LongcatNext, "forward", lambda *_: pytest.fail("work was done"))
        for conversation, settings, file in (
            (user(f"a{IMAGE}"), SETTINGS, system.IMAGE_DECODER),
            (user(f"a{SPEECH}"), SETTINGS, system.VOCODER),
            (user("a"), Settings(media=1), system.IMAGE_DECODER),
        ):
            with pytest.raises(ValueError, match=f"conversation 2: generate: the checkpoint must have {file}"):
                longcat_model.generate([user("a"), conversation], system=loaded, settings=[SETTINGS, settings])
    assert longcat_model.generate(user("a"), system=loaded, settings=SETTINGS).ended  # type: ignore[union-attr]


def test_files_that_do_not_fit_are_named(copy: Path) -> None:
    save_file({"image_decoder.other": torch.zeros(1)}, copy / system.IMAGE_DECODER)
    with pytest.raises(
        ValueError, match=r"image_decoder.safetensors must fit its decoder, got: (?s:.)*image_decoder\.other"
    ):
        system.load_system(copy)
    (copy / system.IMAGE_DECODER).unlink()
    (copy / system.VOCODER).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"hift.pt must fit its decoder"):
        system.load_system(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="must hold its text tokenizer"):
        system.load_system(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match=r"must hold its text tokenizer: .* must hold tokenizer.json"):
        system.load_system(copy)


def test_parts_go_where_the_plan_says_for_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.placement_here(shrunk()) == plan(shrunk(), {}).placement
    released = Sizes(model=presets.longcat_next())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for free, vision, experts in ((H200["cuda:0"], "cuda:0", {"cuda:0"}), (95_000_000_000, "cpu", {"cuda:0"})):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 0))
        placement = system.placement_here(released)
        assert (placement.main, placement.tables, placement.vision) == ("cuda:0", "file", vision)
        assert set(placement.experts) == experts
    assert plan(released, {"cuda:0": free}).placement.vision == "cuda:0"  # with a decoder on the host


def test_a_directory_without_an_index_is_a_trained_system(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a trained system"):
        system.open_system(tmp_path)
