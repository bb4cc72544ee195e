"""Where the released tokenizers' tensors live in this project's modules.

    released, under model.visual_tokenizer.             module                    names
    --------------------------------------------------  ------------------------  -----------------------------
    visual_model.{patch_embed,blocks}                   encoder                   known, as Qwen2.5-VL's
    visual_bridge_model.bridge.{ln_q,mlp}               encoder, its merger       known
    visual_bridge_model.quantizer.quant_conv            quantizer.quant_conv      known
    visual_bridge_model.quantizer.quantize.codebooks    quantizer.quantize        known; eight copies of a codebook
    visual_embedding_layer.pre_buffer                   the language model's      known
    (image_decoder/image_decoder.safetensors)           decoder, refiner          below the two prefixes not public

    released, under model.audio_tokenizer.              module                    names
    --------------------------------------------------  ------------------------  -----------------------------
    audio_model                                         encoder                   known, as Whisper's
    audio_bridge_model.{gate,up,down}_proj, layer_norm  pool                      known
    audio_bridge_model.vq_list                          quantizer                 known
    audio_bridge_model.proj_decoder                     proj_decoder              known
    audio_decoder                                       decoder                   known
    audio_flow_matching_decoder.prenet                  prenet                    implied below this
    audio_flow_matching_decoder.conditional_decoder     refiner                   implied below its blocks
    (cosy24k_vocoder/hift.pt)                           vocoder                   as CosyVoice's

Known: written down publicly, as quotations of the checkpoint's index or as attributes of the public inference code.
Implied: attributes of classes that the public code derives from. Counts and sizes close exactly over all of them. What
lies in parentheses is in files of its own, not among the 13,450 tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longcat_model.released.audio import ReleasedAudioTokenizer
from longcat_model.released.differences import rounded
from longcat_model.released.pixel_decoder import PixelDecoder
from longcat_model.released.quirks import Quirks
from longcat_model.released.refiner import Refiner
from longcat_model.released.sizes import Sizes
from longcat_model.tokenizers.audio.frontend import LogMel
from longcat_model.tokenizers.audio.vocoder import Vocoder
from longcat_model.tokenizers.vision import VisionTokenizer

_BRIDGE, _QUANTIZER = "visual_bridge_model.bridge", "visual_bridge_model.quantizer"
_VISION = (
    (r"encoder\.visual_model\.merger\.(.*)", rf"{_BRIDGE}.\1"),
    (r"encoder\.visual_model\.(.*)", r"visual_model.\1"),
    (r"quantizer\.quant_conv\.(.*)", rf"{_QUANTIZER}.quant_conv.\1"),
    (r"quantizer\.quantize\.codebooks\.(.*)", rf"{_QUANTIZER}.quantize.codebooks.\1"),
)
_AUDIO = (
    (r"encoder\.whisper\.embed_positions\.weight", "audio_model.positional_embedding"),
    (r"encoder\.whisper\.(.*)", r"audio_model.\1"),
    (r"pool\.(.*)", r"audio_bridge_model.\1"),
    (r"quantizer\.codebooks\.(\d+)\.embed", r"audio_bridge_model.vq_list.\1.codebook.embed"),
    (r"quantizer\.codebooks\.(\d+)\.embed_ema", r"audio_bridge_model.vq_list.\1.codebook.embed_avg"),
    (r"quantizer\.codebooks\.(\d+)\.cluster_size_ema", r"audio_bridge_model.vq_list.\1.codebook.cluster_size"),
    (r"(proj_decoder\..*)", r"audio_bridge_model.\1"),
    (r"decoder\.(.*)", r"audio_decoder.\1"),
    (r"prenet\.(.*)", r"audio_flow_matching_decoder.prenet.\1"),
    (r"refiner\.(.*)", r"audio_flow_matching_decoder.conditional_decoder.\1"),
)


def names(tokenizer: VisionTokenizer | ReleasedAudioTokenizer) -> dict[str, str]:
    """The released name of each entry of a tokenizer's state dict that has one in the checkpoint's shards."""
    is_vision = isinstance(tokenizer, VisionTokenizer)
    prefix, table = ("model.visual_tokenizer.", _VISION) if is_vision else ("model.audio_tokenizer.", _AUDIO)
    found = {}
    for own in tokenizer.state_dict():
        match, name = next(((m, name) for pattern, name in table if (m := re.fullmatch(pattern, own))), (None, ""))
        if match is not None:
            found[own] = prefix + match.expand(name)
    return found


def image_decoders(sizes: Sizes, *, quirks: Quirks = "released") -> nn.ModuleDict:
    """The two modules whose weights are in `image_decoder/image_decoder.safetensors`, by that file's prefixes."""
    encoder, codeword = sizes.model.vision.encoder, sizes.model.vision.quantizer.dim
    patch, merge = encoder.patch, encoder.merge
    decoder = PixelDecoder(sizes.model.vision.decoder, codeword=codeword, patch=patch, merge=merge, quirks=quirks)
    refiner = Refiner(sizes.refiner, sizes.vae, codeword=codeword, patch=patch, merge=merge, quirks=quirks)
    return nn.ModuleDict({"image_decoder": decoder, "image_refiner": refiner})


def load_vision(
    sizes: Sizes,
    tensors: Mapping[str, Tensor],
    *,
    decoders: nn.ModuleDict | None = None,
    round_codebooks: bool = False,
) -> VisionTokenizer:
    """The vision tokenizer of a checkpoint's tensors (`Released.tokenizers`): their own memory, not a copy.

    Args:
        decoders: `image_decoders` with weights, without which it only encodes.
        round_codebooks: search and sum bfloat16 values, as the official runtimes do; see `differences`.

    Raises:
        ValueError: the copies of the shared codebook differ.
    """
    for name, tensor in tensors.items():
        first = re.sub(r"\.codebooks\.\d+\.", ".codebooks.0.", name)
        if first != name and not torch.equal(tensor, tensors[first]):
            raise ValueError(f"released: {name} must equal {first}, the codebook is shared")
    with torch.device("meta"):
        tokenizer = VisionTokenizer(sizes.model.vision)
    absent = _Absent()
    tokenizer.decoder = absent if decoders is None else decoders["image_decoder"]  # type: ignore[assignment]
    tokenizer.refiner = absent if decoders is None else decoders["image_refiner"]  # type: ignore[assignment]
    tokenizer.quantizer.semantic_decoder = nn.Identity()  # type: ignore[assignment]
    return _filled(tokenizer, tensors, round_codebooks)


def load_audio(
    sizes: Sizes,
    tensors: Mapping[str, Tensor],
    *,
    vocoder: Vocoder | None = None,
    round_codebooks: bool = False,
    quirks: Quirks = "released",
) -> ReleasedAudioTokenizer:
    """The audio tokenizer of a checkpoint's tensors (`Released.tokenizers`): their own memory, but for codebooks.

    Args:
        vocoder: `vocoder.Vocoder` with weights, without which it makes no waveforms.
        round_codebooks: see `load_vision`.
        quirks: see `quirks`.
    """
    with torch.device("meta"):
        tokenizer = ReleasedAudioTokenizer(sizes, vocoder, quirks=quirks)
    _filled(tokenizer, tensors, round_codebooks)
    tokenizer.front_end = LogMel(sizes.model.audio.encoder).to(tokenizer.proj_decoder.weight.device)
    return tokenizer


_Tokenizer = TypeVar("_Tokenizer", VisionTokenizer, ReleasedAudioTokenizer)


def _filled(tokenizer: _Tokenizer, tensors: Mapping[str, Tensor], round_codebooks: bool) -> _Tokenizer:
    """Puts the tensors in the place of those on the meta device."""
    state = {own: tensors[name] for own, name in names(tokenizer).items()}
    for own, tensor in state.items():
        if own.endswith(".embed"):
            state[own] = rounded(tensor) if round_codebooks else tensor
            if len(tensor) == len(state[f"{own}_ema"]):
                state[own] = pad(state[own], (0, 0, 0, 1))  # the row that code -1 reads; audio codebooks have none
    tokenizer.load_state_dict(state, strict=False, assign=True)
    device = next(iter(tensors.values())).device
    for module in tokenizer.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # transformers' tables of angles, which nothing here reads
                module.register_buffer(name, torch.zeros_like(buffer, device=device), persistent=False)
    return tokenizer.eval().requires_grad_(False)


class _Absent(nn.Module):
    """Stands for the decoders where their weights were not given."""

    def forward(self, *_: object) -> Tensor:
        raise ValueError("released: decoders must be given to load_vision to decode: their weights are in another file")
