"""Files in and out: images and sounds as tensors, JSON, directories; every file is written whole or not at all."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import reprlib
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def read_image(path: Path, cell: int, height: int | None = None, *, pixels: tuple[int, int] | None = None) -> Tensor:
    """RGB [3, H, W] in [0, 1], transparent parts white, sides resampled (bicubic) to the nearest multiple of `cell`.

    Args:
        height: pixels that the picture is scaled to first, in proportion; None: it keeps its size.
        pixels: least and most of the result; a smaller or larger picture is scaled in proportion.

    Raises:
        ValueError: the file is missing or no image.
    """
    try:
        with Image.open(path) as file:
            opaque = Image.new("RGBA", file.size, "white")
            opaque.alpha_composite(_eight_bits(file).convert("RGBA"))
            picture = opaque.convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: path must name a readable image, got {path}: {error}") from error
    scale = 1 if height is None else height / picture.height
    wide, high = (max(cell, round(side * scale / cell) * cell) for side in picture.size)
    if pixels is not None:
        wide, high = _within(pixels, cell, picture.size, (wide, high))
    if picture.size != (wide, high):
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _within(pixels: tuple[int, int], cell: int, size: tuple[int, int], rounded: tuple[int, int]) -> tuple[int, int]:
    """The sides `rounded`, or those that the picture of `size` gets to have so many pixels: Qwen2-VL's rule."""
    least, most = pixels
    if least <= rounded[0] * rounded[1] <= most:
        return rounded
    too_many = rounded[0] * rounded[1] > most
    scale = math.sqrt((most if too_many else least) / (size[0] * size[1])) / cell
    wide, high = (max(cell, (math.floor if too_many else math.ceil)(side * scale) * cell) for side in size)
    return wide, high


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A 16-bit grey picture, whose values above 255 Pillow would make white, scaled down; others as they are."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))


def png(image: Tensor, scale: int = 1) -> bytes:
    """[3, H, W] in [0, 1] as a PNG file, each pixel `scale` pixels wide."""
    pixels = (image.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def read_speech(path: Path, rate: int) -> Tensor:
    """Mono float32 [samples] at `rate` Hz.

    Raises:
        ValueError: the file is missing, no sound, truncated, or silent, or holds samples that are not finite.
    """
    import soundfile  # here, because images and checkpoints do without it

    try:
        samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"speech: path must name a readable sound file, got {path}: {error}") from error
    if _is_cut_off(path):  # libsndfile reads what there is
        raise ValueError(f"speech: path must name a whole sound file, got a truncated one: {path}")
    waveform = samples.mean(axis=1)
    if not np.isfinite(waveform).all():
        raise ValueError(f"speech: path must name a file of finite samples, got others in {path}")
    if not waveform.size or not np.abs(waveform).max() > 0:
        raise ValueError(f"speech: path must name a file with sound, got silence in {path}")
    if found != rate:
        import librosa

        waveform = librosa.resample(waveform, orig_sr=found, target_sr=rate)
    return torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))


def _is_cut_off(path: Path) -> bool:
    """Whether a WAV file is shorter than its header says. Programs that write to a pipe say about 2^31 or 2^32."""
    with path.open("rb") as file:
        kind, size = file.read(4), int.from_bytes(file.read(4), "little")
    return kind == b"RIFF" and path.stat().st_size < 8 + size < 2**31 - 2**16


def wav(waveform: Tensor, rate: int) -> bytes:
    """[samples] in [-1, 1] as a 16-bit WAV file."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.clamp(-1, 1).numpy(), rate, subtype="PCM_16", format="WAV")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        ValueError: the directory does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(f"output: directory must exist, got {path.parent}")
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all; raises what `write` does."""
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises ValueError, which names the file, where it holds no JSON."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON, got: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, where the JSON must be an object."""
    found = read_json(path)
    require(path, "it", isinstance(found, dict), "an object", found)
    return dict(found)


def require(path: Path, key: str, holds: bool, rule: str, found: object) -> None:
    """Raises ValueError, in one line that names file and key, unless the rule `holds` for what was found."""
    if not holds:
        raise ValueError(f"{path}: {key} must be {rule}, got {reprlib.repr(found)}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under, renamed to `path` when that has succeeded: a reader sees the old file or the new one.

    An OSError without a name, as on a full disk, gets that of `path`.
    """
    unique = secrets.token_hex(4)  # a process's number may be that of one on another machine
    temporary = path.with_name(f".{path.name}.{unique}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def make_writable(out: Path, command: str) -> None:
    """Makes the directory where it is not there, before work whose results go into it.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{command}: out must be a directory that can be written to, got {out}: {error}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process is inside for the same file, which stays, empty. However a process ends, its lock ends with it.

    Raises:
        ValueError: another process is inside.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path.parent} is in use by another process: wait for it, or end it") from error
        except OSError:
            pass  # a file system without locks
        yield
