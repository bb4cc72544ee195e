"""Checkpoints that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain data; an interrupted call leaves the file that was there.

    Args:
        path: the checkpoint; its directory is created.
        state: nested dicts and lists of tensors, numbers and strings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, onto the CPU, without executing anything in the file.

    Raises:
        ValueError: the file is missing or is no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint: path must name an existing file, got {path}") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint: path must name a whole checkpoint, got {path}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint: {path} must hold a dict, got {type(state).__name__}")
    return state
