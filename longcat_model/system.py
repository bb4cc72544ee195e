"""A trained system on disk: the config as JSON, each part's weights as safetensors.

Layout of a directory: `config.json`, `model.safetensors`, `vision.safetensors`, `audio.safetensors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from longcat_model import config, files
from longcat_model.model import LongcatNext
from longcat_model.released.checkpoint import INDEX
from longcat_model.released.sizes import Sizes
from longcat_model.tokenizers.audio import AudioTokenizer
from longcat_model.tokenizers.text import ByteTokenizer, TextTokenizer
from longcat_model.tokenizers.vision import VisionTokenizer


@dataclass(frozen=True)
class System:
    """The language model with the tokenizers it was trained on."""

    sizes: config.Model
    model: LongcatNext
    vision: VisionTokenizer
    audio: AudioTokenizer
    text: TextTokenizer
    pixels: tuple[int, int] | None = None  # least and most that an image is scaled to before it is seen; None: any
    lacks: tuple[str, ...] = ()  # files of decoders that a released checkpoint came without
    released: Sizes | None = None  # where images and speech are decoded by the released parts

    @classmethod
    def create(cls, sizes: config.Model) -> System:
        """A new system with random weights (from torch's global generator)."""
        parts = LongcatNext(sizes), VisionTokenizer(sizes.vision), AudioTokenizer(sizes.audio)
        return cls(sizes, *parts, ByteTokenizer())

    def parts(self) -> dict[str, nn.Module]:
        """Name of each weights file, without its suffix, and its module."""
        return {"model": self.model, "vision": self.vision, "audio": self.audio}

    def save(self, directory: Path) -> None:
        """Writes every file whole or not at all; `config.json` comes last and makes the system whole."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, module in self.parts().items():
            with files.replacing(directory / f"{name}.safetensors") as temporary:
                save_model(module, str(temporary))
        files.write_json(directory / "config.json", config.to_dict(self.sizes))

    @classmethod
    def load(cls, directory: Path) -> System:
        """Reads what `save` wrote, ready for inference.

        Raises:
            ValueError: a file is missing, damaged or does not fit the config.
        """
        sizes = read_sizes(directory)
        system = cls.create(sizes)
        for name, module in system.parts().items():
            _load(module, directory, name)
        return system


@dataclass(frozen=True)
class Tokenizers:
    """What turns images, sound and text into ids: a system without its language model."""

    sizes: config.Model
    vision: VisionTokenizer
    audio: AudioTokenizer
    text: ByteTokenizer

    @classmethod
    def load(cls, directory: Path) -> Tokenizers:
        """As `System.load`, but of these parts only."""
        sizes = read_sizes(directory)
        tokenizers = cls(sizes, VisionTokenizer(sizes.vision), AudioTokenizer(sizes.audio), ByteTokenizer())
        _load(tokenizers.vision, directory, "vision")
        _load(tokenizers.audio, directory, "audio")
        return tokenizers


def read_sizes(directory: Path) -> config.Model:
    """The config of a system.

    Raises:
        ValueError: there is none, or it is damaged, or of a released checkpoint.
    """
    path = directory / "config.json"
    if (directory / INDEX).is_file():
        raise ValueError(
            f"system: {directory} is a released checkpoint: generate --messages and inspect alone take one"
        )
    if not path.is_file():
        raise ValueError(f"system: {directory} must hold a trained system, but has no config.json; run `longcat demo`")
    found = files.read_json(path)
    try:
        return config.from_dict(config.Model, found)
    except ValueError as error:
        raise ValueError(f"system: {path}: {error}") from error


def _load(module: nn.Module, directory: Path, name: str) -> None:
    try:
        load_model(module, str(directory / f"{name}.safetensors"))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"system: {directory / name}.safetensors must fit the config, got: {error}") from error
    module.eval()
