"""Images and sound files in and out, as tensors."""

from __future__ import annotations

import os
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def read_image(path: Path, cell: int) -> Tensor:
    """RGB [3, H, W] in [0, 1]; sides are resampled (bicubic) to the nearest multiple of `cell` pixels.

    Raises:
        ValueError: the file is missing or no image.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (FileNotFoundError, IsADirectoryError, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image: path must name a readable image, got {path}: {error}") from error
    width, height = (max(cell, round(side / cell) * cell) for side in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def write_image(path: Path, image: Tensor, scale: int = 1) -> None:
    """Writes [3, H, W] in [0, 1] in the format of the name, each pixel `scale` pixels wide."""
    pixels = (image.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    temporary = _temporary(path)
    try:
        picture.save(temporary, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_speech(path: Path, rate: int) -> Tensor:
    """Mono float32 [samples] at `rate` Hz.

    Raises:
        ValueError: the file is missing, no sound, or silent.
    """
    try:
        samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"speech: path must name a readable sound file, got {path}: {error}") from error
    waveform = samples.mean(axis=1)
    if not waveform.size or not np.abs(waveform).max() > 0:
        raise ValueError(f"speech: path must name a file with sound, got silence in {path}")
    if found != rate:
        waveform = librosa.resample(waveform, orig_sr=found, target_sr=rate)
    return torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))


def write_speech(path: Path, waveform: Tensor, rate: int) -> None:
    """Writes [samples] in [-1, 1] as 16-bit WAV."""
    temporary = _temporary(path)
    try:
        soundfile.write(temporary, waveform.clamp(-1, 1).numpy(), rate, subtype="PCM_16", format="WAV")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"output: directory must exist, got {path.parent}")
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
