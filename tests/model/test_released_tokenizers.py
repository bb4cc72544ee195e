"""The released tokenizers' tensors have a place each, and the tokenizers made of them encode and decode."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from longcat_model import presets
from longcat_model.released import checkpoint
from longcat_model.released.audio import ReleasedAudioTokenizer
from longcat_model.released.checkpoint import Released
from longcat_model.released.sizes import Sizes, shrunk
from longcat_model.released.tensors import entries
from longcat_model.released.tokenizers import image_decoders, load_audio, load_vision, names
from longcat_model.released.vocoder import Vocoder
from longcat_model.tokenizers.vision import VisionTokenizer


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    directory = tmp_path_factory.mktemp("released") / "next"
    checkpoint.synthesize(shrunk(), directory, seed=2)
    return checkpoint.load(directory, progress=False)


def places(tokenizer: VisionTokenizer | ReleasedAudioTokenizer) -> dict[str, Tensor]:
    """What a tokenizer holds, by released name; audio codebooks without the row that theirs do not have."""
    state = tokenizer.state_dict()
    return {name: state[own][:-1] if "vq_list" in name and own.endswith(".embed") else state[own]
            for own, name in names(tokenizer).items()}  # fmt: skip


def test_every_released_tensor_of_the_tokenizers_has_a_place() -> None:
    """Of the released sizes, without memory: 425 and 1,740 names, less the five of the language model's pre-buffer."""
    sizes = Sizes(model=presets.longcat_next())
    with torch.device("meta"):
        found = places(VisionTokenizer(sizes.model.vision)) | places(ReleasedAudioTokenizer(sizes))
    wanted = {
        name: entry.shape
        for name, entry in entries(sizes).items()
        if "_tokenizer." in name and "visual_embedding_layer" not in name
    }
    assert len(wanted) == 425 - 5 + 1740
    assert {name: tuple(place.shape) for name, place in found.items()} == wanted


def test_tokenizers_hold_what_the_checkpoint_holds(released: Released) -> None:
    vision, audio = load_vision(released.sizes, released.tokenizers), load_audio(released.sizes, released.tokenizers)
    found = places(vision) | places(audio)
    assert found.keys() == released.tokenizers.keys()
    for name, place in found.items():
        stored = released.tokenizers[name]
        assert place.dtype == stored.dtype and torch.equal(place, stored), name
        is_own = name.endswith("codebook.embed") or re.search(r"codebooks\.[0-6]\.", name)
        assert is_own or place.data_ptr() == stored.data_ptr(), name
    for module in (vision, audio):
        module.to("cpu")  # nothing is left on the meta device
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        assert all(bool(x) for name, x in module.state_dict().items() if name.endswith("initialized"))


def test_the_copies_of_the_shared_codebook_must_agree(released: Released) -> None:
    name = "model.visual_tokenizer.visual_bridge_model.quantizer.quantize.codebooks.3.embed"
    changed = dict(released.tokenizers) | {name: released.tokenizers[name] + 1}
    with pytest.raises(ValueError, match=r"codebooks\.3\.embed must equal .*codebooks\.0\.embed"):
        load_vision(released.sizes, changed)


def test_codebooks_may_be_rounded_as_the_official_runtimes_do(released: Released) -> None:
    sizes, tensors = released.sizes, released.tokenizers
    vision, audio = load_vision(sizes, tensors, round_codebooks=True), load_audio(sizes, tensors, round_codebooks=True)
    for name, place in (places(vision) | places(audio)).items():
        expected = tensors[name].bfloat16().float() if name.endswith(".embed") else tensors[name]
        assert torch.equal(place, expected), name


def test_images_are_encoded_by_the_tower_the_bridge_and_the_quantizer(released: Released) -> None:
    """Codes are the nearest entries to what the parts give, with one codebook for all levels."""
    vision = load_vision(released.sizes, released.tokenizers)
    image = torch.rand(3, 16, 24)
    (codes,) = vision.encode([image])
    with torch.no_grad():
        residual = vision.quantizer.quant_conv(vision.features([image]).bridged).double()
    table = released.tokenizers[f"{_QUANTIZE}.codebooks.0.embed"][:-1].double()
    for level in range(8):
        nearest = torch.cdist(residual, table).argmin(1)
        assert torch.equal(codes.flatten(0, 1)[:, level], nearest)
        residual = residual - table[nearest]


_QUANTIZE = "model.visual_tokenizer.visual_bridge_model.quantizer.quantize"


def test_audio_residuals_are_bfloat16_between_levels(released: Released) -> None:
    audio = load_audio(released.sizes, released.tokenizers)
    (codes,) = audio.encode([0.1 * torch.randn(16_000)])
    assert codes.shape == (13, 4)
    x = torch.randn(50, 128).bfloat16()
    residual, expected = x, []
    for level in range(4):
        table = released.tokenizers[f"model.audio_tokenizer.audio_bridge_model.vq_list.{level}.codebook.embed"]
        nearest = torch.cdist(residual.double(), table.double()).argmin(1)
        expected.append(nearest)
        residual = (residual.float() - table[nearest]).bfloat16()
    assert torch.equal(audio.quantizer.encode(x).codes, torch.stack(expected, 1))


@pytest.mark.parametrize(("quirks", "frames"), [("released", 4 * 5 - 1), ("none", 4 * 5)])
def test_speech_is_decoded_through_the_parts(released: Released, quirks: str, frames: int) -> None:
    sizes = released.sizes
    audio = load_audio(sizes, released.tokenizers, vocoder=lambda mel: mel.sum(0), quirks=quirks)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(248)  # summed from the last level to the first, these round differently
    levels = sizes.model.vocabulary.audio_sizes
    codes = torch.stack([torch.randint(0, n, (8,), generator=generator) for n in levels], 1)
    first, second = audio.decode_mel([codes[:5], codes], refine=False)
    assert first.shape == (6, frames) and second.shape[1] > frames
    assert torch.equal(first, second[:, :frames])
    books = [
        released.tokenizers[f"model.audio_tokenizer.audio_bridge_model.vq_list.{level}.codebook.embed"]
        for level in range(4)
    ]
    total = sum(books[level][codes[:5, level]] for level in range(4))
    assert isinstance(total, Tensor)
    with torch.no_grad():
        expected = audio.prenet(audio.decoder(audio.proj_decoder(total.bfloat16()))).T  # type: ignore[call-arg]
    assert torch.equal(first, expected)
    assert torch.equal(audio.decode([codes[:5]], refine=False)[0], first.sum(0))
    refined = audio.decode_mel([codes[:5]], seed=1)[0]
    assert torch.equal(refined, audio.decode_mel([codes[:5]], seed=1)[0])
    assert not torch.equal(refined, audio.decode_mel([codes[:5]], seed=2)[0])


def test_parts_in_files_of_their_own_are_named_when_they_lack(released: Released) -> None:
    vision, audio = load_vision(released.sizes, released.tokenizers), load_audio(released.sizes, released.tokenizers)
    codes = vision.encode([torch.rand(3, 16, 8)])
    with pytest.raises(ValueError, match="decoders must be given to load_vision"):
        vision.decode(codes)
    with pytest.raises(ValueError, match="vocoder must be given"):
        audio.decode([torch.zeros(2, 4, dtype=torch.int64)])


def test_images_and_speech_go_to_codes_and_back_through_all_released_parts(released: Released) -> None:
    sizes = released.sizes
    decoders, vocoder = image_decoders(sizes), Vocoder(sizes.vocoder)
    assert {name.split(".")[0] for name in decoders.state_dict()} == {"image_decoder", "image_refiner"}
    vision = load_vision(sizes, released.tokenizers, decoders=decoders)
    image = vision.decode(vision.encode([torch.rand(3, 16, 8)]))[0]
    assert image.shape == (3, 16, 8) and 0 <= image.min() <= image.max() <= 1
    audio = load_audio(sizes, released.tokenizers, vocoder=vocoder)
    (waveform,) = audio.decode([torch.zeros(2, 4, dtype=torch.int64)])
    assert waveform.shape == ((4 * 2 - 1) * 480,)
