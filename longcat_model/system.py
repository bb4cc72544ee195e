"""A trained system on disk: the config as JSON, each part's weights as safetensors.

Layout of a directory: `config.json`, `model.safetensors`, `vision.safetensors`, `audio.safetensors`.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from longcat_model import config, files
from longcat_model.model import LongcatNext
from longcat_model.tokenizers.audio import AudioTokenizer
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.tokenizers.vision import VisionTokenizer


@dataclass(frozen=True)
class System:
    """The language model with the tokenizers it was trained on."""

    sizes: config.Model
    model: LongcatNext
    vision: VisionTokenizer
    audio: AudioTokenizer
    text: ByteTokenizer

    @classmethod
    def create(cls, sizes: config.Model) -> System:
        """A new system with random weights (from torch's global generator)."""
        parts = LongcatNext(sizes), VisionTokenizer(sizes.vision), AudioTokenizer(sizes.audio)
        return cls(sizes, *parts, ByteTokenizer())

    def parts(self) -> dict[str, nn.Module]:
        """Name of each weights file, without its suffix, and its module."""
        return {"model": self.model, "vision": self.vision, "audio": self.audio}

    def save(self, directory: Path) -> None:
        """Writes every file under a temporary name first; `config.json` comes last and makes the system whole."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, module in self.parts().items():
            temporary = directory / f"{name}.safetensors.partial"
            save_model(module, str(temporary))
            os.replace(temporary, directory / f"{name}.safetensors")
        files.write(directory / "config.json", (json.dumps(config.to_dict(self.sizes), indent=1) + "\n").encode())

    @classmethod
    def load(cls, directory: Path, *, only_tokenizers: bool = False) -> System:
        """Reads what `save` wrote, ready for inference.

        Args:
            only_tokenizers: the language model stays on the meta device, without weights.

        Raises:
            ValueError: a file is missing, damaged or does not fit the config.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise ValueError(
                f"system: {directory} must hold a trained system, but has no config.json; run `longcat demo`"
            )
        try:
            sizes = config.from_dict(config.Model, json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"system: {path} must be JSON, got: {error}") from error
        with torch.device("meta") if only_tokenizers else nullcontext():
            model = LongcatNext(sizes)
        system = cls(sizes, model, VisionTokenizer(sizes.vision), AudioTokenizer(sizes.audio), ByteTokenizer())
        for name, module in system.parts().items():
            if module is model and only_tokenizers:
                continue
            try:
                load_model(module, str(directory / f"{name}.safetensors"))
            except (FileNotFoundError, SafetensorError, RuntimeError) as error:
                raise ValueError(f"system: {directory / name}.safetensors must fit the config, got: {error}") from error
            module.eval()
        return system
