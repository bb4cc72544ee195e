"""A directory of the released format as a `System`, which is what generation takes.

    config.json, model-*.safetensors and their index     needed
    tokenizer.json and what belongs to it                needed
    image_decoder/image_decoder.safetensors              to paint
    cosy24k_vocoder/hift.pt                              to speak

Tensors of the last two are named as in `tokenizers.image_decoders` and `vocoder.Vocoder`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from longcat_model.released import checkpoint
from longcat_model.released.plan import Placement, plan
from longcat_model.released.quirks import Quirks
from longcat_model.released.sizes import Sizes
from longcat_model.released.tokenizers import image_decoders, load_audio, load_vision
from longcat_model.released.vocoder import Vocoder
from longcat_model.system import System
from longcat_model.tokenizers.text import PretrainedTokenizer

IMAGE_DECODER, VOCODER = "image_decoder/image_decoder.safetensors", "cosy24k_vocoder/hift.pt"
PIXELS = (50_176, 3_211_264)  # least and most of an image that is seen: 64 to 4096 positions of the released size


def open_system(directory: Path) -> System:
    """A trained system or a released checkpoint, by what the directory holds.

    Raises:
        ValueError: see `System.load` and `load_system`.
    """
    return load_system(directory) if (directory / checkpoint.INDEX).is_file() else System.load(directory)


def load_system(
    directory: Path,
    placement: Placement | None = None,
    *,
    quirks: Quirks = "released",
    round_codebooks: bool = False,
    progress: bool = True,
) -> System:
    """Loads all that a released checkpoint's directory has.

    Args:
        placement: where the parts go: as `plan` says for the free memory of this machine's GPUs, by default. The image
            decoders go where the vision tokenizer is, the vocoder where the audio tokenizer is.
        quirks: see `released.quirks`.
        round_codebooks: see `tokenizers.load_vision`.
        progress: see `checkpoint.load`.

    Raises:
        ValueError: see `checkpoint.load`; or there is no text tokenizer, or a decoder's file does not fit.
    """
    sizes, _ = checkpoint.check(directory)
    text = _text(directory, sizes)
    placement = placement or placement_here(sizes)
    decoders = _image_decoders(directory / IMAGE_DECODER, sizes, quirks, placement.vision or placement.main)
    vocoder = _vocoder(directory / VOCODER, sizes, placement.audio or placement.main)
    released = checkpoint.load(directory, placement, progress=progress)
    vision, audio = (
        {name: tensor for name, tensor in released.tokenizers.items() if name.startswith(f"model.{kind}_tokenizer.")}
        for kind in ("visual", "audio")
    )
    return System(
        sizes=sizes.model,
        model=released.model,
        vision=load_vision(sizes, vision, decoders=decoders, round_codebooks=round_codebooks),
        audio=load_audio(sizes, audio, vocoder=vocoder, round_codebooks=round_codebooks, quirks=quirks),
        text=text,
        pixels=PIXELS,
        lacks=tuple(file for file, found in ((IMAGE_DECODER, decoders), (VOCODER, vocoder)) if found is None),
        released=sizes,
    )


def placement_here(sizes: Sizes) -> Placement:
    """By `plan` for what is free on this machine's GPUs; without one, all on the CPU but the mapped tables.

    Tokenizers stay together with their decoders, on the host where no GPU has room for both.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    found = plan(sizes, {f"cuda:{i}": torch.cuda.mem_get_info(i)[0] for i in gpus})
    vision = found.together("vision tokenizer", "pixel decoder", "image refiner")
    return replace(found.placement, vision=vision, audio=found.together("audio tokenizer", "vocoder"))


def _text(directory: Path, sizes: Sizes) -> PretrainedTokenizer:
    try:
        return PretrainedTokenizer(directory, size=sizes.model.vocabulary.text_size)
    except (OSError, ValueError) as error:
        raise ValueError(f"released: {directory} must hold its text tokenizer: {error}") from error


def _image_decoders(file: Path, sizes: Sizes, quirks: Quirks, place: str) -> nn.ModuleDict | None:
    """None where the file is missing."""
    if not file.is_file():
        return None
    with torch.device("meta"):  # they have no buffers; the file's types stay
        decoders = image_decoders(sizes, quirks=quirks)
    _fill(decoders, file, lambda: load_file(file, device=place))
    return decoders


def _vocoder(file: Path, sizes: Sizes, place: str) -> Vocoder | None:
    if not file.is_file():
        return None
    vocoder = Vocoder(sizes.vocoder).to(place)
    _fill(vocoder, file, lambda: torch.load(file, map_location=place, weights_only=True))
    return vocoder


def _fill(module: nn.Module, file: Path, read: Callable[[], Mapping[str, Tensor]]) -> None:
    try:
        module.load_state_dict(read(), assign=True)
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"released: {file} must fit its decoder, got: {error}") from error
    module.eval().requires_grad_(False)
