"""Image and sound files: round trips, resampling, clear refusals, nothing half-written."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from longcat_model.files import locked, png, read_image, read_speech, replacing, wav, write


def test_image_round_trips(tmp_path: Path) -> None:
    image = torch.rand(3, 8, 16)
    write(tmp_path / "a.png", png(image))
    torch.testing.assert_close(read_image(tmp_path / "a.png", 8), image, rtol=0, atol=0.5 / 255 + 1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("size", "shape"), [((30, 17), (16, 32)), ((3, 2), (8, 8)), ((8, 8), (8, 8))])
def test_image_sides_become_multiples_of_the_cell(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    Image.new("L", size, 128).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 8)
    assert image.shape == (3, *shape)
    torch.testing.assert_close(image, torch.full_like(image, 128 / 255))


def test_image_is_scaled_to_a_height_in_proportion(tmp_path: Path) -> None:
    image = torch.rand(3, 2, 6).repeat_interleave(8, 1).repeat_interleave(8, 2)
    write(tmp_path / "a.png", png(image, scale=8))
    assert read_image(tmp_path / "a.png", 8).shape == (3, 128, 384)
    small = read_image(tmp_path / "a.png", 8, height=16)
    assert small.shape == image.shape and float((small - image).abs().mean()) < 0.05


def test_speech_round_trips_and_resamples(tmp_path: Path) -> None:
    tone = torch.sin(2 * np.pi * 440 * torch.arange(8000) / 16_000)
    write(tmp_path / "a.wav", wav(0.5 * tone, 16_000))
    torch.testing.assert_close(read_speech(tmp_path / "a.wav", 16_000), 0.5 * tone, rtol=0, atol=1 / 32767)
    half = read_speech(tmp_path / "a.wav", 8000)
    assert half.shape == (4000,)
    peak = torch.fft.rfft(half).abs().argmax()
    assert float(peak) * 8000 / 4000 == pytest.approx(440, abs=2)


def test_a_sound_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    whole, path = wav(0.5 * torch.ones(1000), 16_000), tmp_path / "a.wav"
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"speech: path must name a whole sound file, got a truncated one: {path}"):
        read_speech(path, 16_000)
    for unknown in (2**31 - 1, 2**32 - 1):  # as programs write that do not know the length
        path.write_bytes(
            whole[:4] + unknown.to_bytes(4, "little") + whole[8:40] + unknown.to_bytes(4, "little") + whole[44:]
        )
        assert len(read_speech(path, 16_000)) == 1000


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_sixteen_bits_keeps_its_shades(tmp_path: Path, suffix: str) -> None:
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / f"a.{suffix}")
    expected = torch.from_numpy(shades.astype(np.float32) / 65535).expand(3, 8, 8)
    torch.testing.assert_close(read_image(tmp_path / f"a.{suffix}", 8), expected, rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    samples = np.full(100, 0.1)
    samples[3] = bad
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match="speech: path must name a file of finite samples"):
        read_speech(tmp_path / "a.wav", 16_000)


@pytest.mark.parametrize("content", [None, b"", b"neither image nor sound"])
def test_refuses_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image: path must name a readable image, got .*a\.bin"):
        read_image(path, 8)
    with pytest.raises(ValueError, match=r"speech: path must name a readable sound file, got .*a\.bin"):
        read_speech(path, 16_000)


def test_refuses_an_image_broken_inside(tmp_path: Path) -> None:
    """PIL tells of it by a SyntaxError."""
    first, second, *rest = png(torch.rand(3, 200, 200)).split(b"IDAT")
    (tmp_path / "a.png").write_bytes(first + b"IDAT" + second + b"\x1a\xff\xd4\t" + b"IDAT".join(rest))
    with pytest.raises(ValueError, match="must name a readable image"):
        read_image(tmp_path / "a.png", 8)


def test_refuses_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16_000)
    with pytest.raises(ValueError, match="silence"):
        read_speech(tmp_path / "a.wav", 16_000)


def test_an_interrupted_write_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_refuses_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directory must exist"):
        write(tmp_path / "none" / "a.wav", b"")


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a\.bin'"), replacing(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_one_at_a_time(tmp_path: Path) -> None:
    for _ in range(2):  # a lock that was left is free again
        with (
            locked(tmp_path / "lock"),
            pytest.raises(ValueError, match="is in use by another process"),
            locked(tmp_path / "lock"),
        ):
            pass
    lines = "import os, pathlib, sys", "from longcat_model.files import locked", "path = pathlib.Path(sys.argv[1])"
    script = "\n".join([*lines, "with locked(path): os.kill(os.getpid(), 9)"])
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "lock")], check=False).returncode == -9
    with locked(tmp_path / "lock"):
        pass


@pytest.mark.parametrize(
    ("size", "expected"),
    [((30, 20), (280, 196)), ((5000, 2500), (2520, 1260)), ((300, 250), (308, 252)), ((1, 20_000), (28, 19_992))],
)
def test_pictures_are_scaled_into_their_limits(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """As transformers' `smart_resize` of Qwen2-VL, whose processor the released model has."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    _, high, wide = read_image(tmp_path / "a.png", 28, pixels=(50_176, 3_211_264)).shape
    assert (wide, high) == expected
