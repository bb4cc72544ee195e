"""The released config.json and the config it stands for.

A key that is absent has its released value. Key names are those of the released configuration class and of the excerpts
of config.json that are public, but those of the visual head, which are this project's, for they are not; and every
tensor's shape is checked in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

from longcat_model import config, presets
from longcat_model.vocabulary import SPECIAL_TOKENS, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Sizes of the released audio detokenizer beyond `config.AudioDecoder`: codec tail, prenet, flow-matching U-Net."""

    mels: int = 80
    post_width: int = 256  # of the four convolutions after the codec's mel
    decoder_positions: int = 3000
    prenet_mlp: int = 2048
    prenet_width: int = 512
    prenet_heads: int = 8
    prenet_depth: int = 12
    prenet_positions: int = 5000  # fitted to the released total, not stated anywhere
    channels: int = 256
    mid_blocks: int = 12
    blocks: int = 4  # transformer blocks of a group
    heads: int = 8  # of such a block
    inner: int = 512  # all its heads together


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """The transformer of the image refiner."""

    width: int = 2520
    layers: int = 32
    refiners: int = 2  # layers each kind of token has for itself before
    heads: int = 21
    kv_heads: int = 7
    axes: tuple[int, int, int] = (40, 40, 40)  # channels of a head that turn with sequence, row and column
    rope_theta: float = 1e4
    mlp_multiple: int = 256  # the MLP's width is 4 times the model's, rounded up to a multiple of this
    time_width: int = 1024
    condition: int = 2048
    latent: int = 16
    patch: int = 2

    @property
    def mlp_width(self) -> int:
        return -(-4 * self.width // self.mlp_multiple) * self.mlp_multiple


@dataclass(frozen=True, kw_only=True)
class VAESizes:
    """The autoencoder that the image refiner works in."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # of each resolution, the finest first
    latent: int = 16
    groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159

    @property
    def factor(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True, kw_only=True)
class VocoderSizes:
    """Mels at 50 Hz to 24 kHz."""

    mels: int = 80
    width: int = 512  # halved by each upsampling
    rates: tuple[int, ...] = (8, 5, 3)  # of the upsamplings
    kernels: tuple[int, ...] = (16, 11, 7)
    fft: int = 16
    hop: int = 4
    block_kernels: tuple[int, ...] = (3, 7, 11)
    source_kernels: tuple[int, ...] = (7, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    pitch_width: int = 512
    harmonics: int = 8  # besides the fundamental
    sample_rate: int = 24_000  # Hz
    amplitude: float = 0.1  # of a harmonic
    noise: float = 0.003  # deviation where voiced; elsewhere a third of the amplitude
    voiced: float = 10.0  # Hz, the least pitch of a voiced frame

    @property
    def samples(self) -> int:
        """Of a frame."""
        return prod(self.rates) * self.hop


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that decides the tensors of the checkpoint, and of the decoders in files of their own.

    The refiners of `model` are this project's own and do not count.
    """

    model: config.Model
    flow: Flow = Flow()
    refiner: TransformerSizes = TransformerSizes()
    vae: VAESizes = VAESizes()
    vocoder: VocoderSizes = VocoderSizes()


def shrunk() -> Sizes:
    """A checkpoint of a few megabytes that has every kind of tensor: for tests, and to try code without the weights."""
    released = presets.longcat_next()
    attention = config.Attention(heads=2, q_rank=16, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8)
    experts = config.Experts(real=4, zero=2, top_k=2, width=16)
    visual, audio = (8,) * 8, (8, 6, 4, 4)
    encoder = config.VisionEncoder(
        width=32, depth=2, heads=2, mlp_width=48, patch=4, window=16, full_attention=(1,), bridge_width=24
    )
    whisper = config.AudioEncoder(mels=16, width=32, depth=1, heads=2, mlp_width=48, max_positions=100)
    model = config.Model(
        vocabulary=config.Vocabulary(text_size=260, audio_sizes=audio, visual_sizes=visual, padding=5),
        backbone=config.Backbone(
            hidden=48, layers=2, ffn_width=64, attention=attention, experts=experts, ngram=config.NGram(rows=3 * 260)
        ),
        pre_buffer_width=40,
        visual_head=config.DepthHead(dim=32, heads=1, layers=2),
        audio_head=config.DepthHead(dim=48, heads=1, layers=2),
        vision=config.VisionTokenizer(
            encoder=encoder,
            quantizer=config.Quantizer(sizes=visual, dim=24, shared=True),
            decoder=config.PixelDecoder(width=32, depth=1, heads=2, mlp_width=40),
            refiner=released.vision.refiner,
        ),
        audio=config.AudioTokenizer(
            encoder=whisper,
            quantizer=config.Quantizer(sizes=audio, dim=4 * 32),
            decoder=config.AudioDecoder(width=32, depth=1, heads=2, mlp_width=48),
            refiner=released.audio.refiner,
        ),
    )
    flow = Flow(
        mels=6, post_width=8, decoder_positions=20, prenet_mlp=24, prenet_width=16, prenet_depth=1,
        prenet_positions=30, channels=8, mid_blocks=2, blocks=1, inner=16,
    )  # fmt: skip
    refiner = TransformerSizes(
        width=36, layers=1, refiners=1, heads=4, kv_heads=2, axes=(4, 2, 2), mlp_multiple=8, time_width=16,
        condition=20, latent=4,
    )  # fmt: skip
    return Sizes(
        model=model,
        flow=flow,
        refiner=refiner,
        vae=VAESizes(widths=(4, 4, 8, 8), groups=2, latent=4),
        vocoder=VocoderSizes(mels=6, width=16, pitch_width=8, harmonics=2),
    )


_PLAIN = {
    "hidden_size": "backbone.hidden",
    "num_layers": "backbone.layers",
    "ffn_hidden_size": "backbone.ffn_width",
    "rms_norm_eps": "backbone.norm_eps",
    "num_attention_heads": "backbone.attention.heads",
    "q_lora_rank": "backbone.attention.q_rank",
    "kv_lora_rank": "backbone.attention.kv_rank",
    "qk_nope_head_dim": "backbone.attention.nope_dim",
    "qk_rope_head_dim": "backbone.attention.rope_dim",
    "v_head_dim": "backbone.attention.value_dim",
    "rope_theta": "backbone.attention.rope_theta",
    "n_routed_experts": "backbone.experts.real",
    "zero_expert_num": "backbone.experts.zero",
    "moe_topk": "backbone.experts.top_k",
    "expert_ffn_hidden_size": "backbone.experts.width",
    "routed_scaling_factor": "backbone.experts.scale",
    "emb_neighbor_num": "backbone.ngram.neighbors",
    "emb_split_num": "backbone.ngram.splits",
    "eos_token_id": "backbone.ngram.eos_id",
    "text_vocab_size": "vocabulary.text_size",
    "visual_embedding_layer_intermediate_size": "pre_buffer_width",
    "visual_config.image_head_transformer_dims": "visual_head.dim",
    "visual_config.image_head_transformer_layers": "visual_head.layers",
    "visual_config.image_head_transformer_ffn_scale": "visual_head.ffn_scale",
    "visual_config.patch_size": "vision.encoder.patch",
    "visual_config.spatial_merge_size": "vision.encoder.merge",
    "visual_config.temporal_patch_size": "vision.encoder.temporal_patch",
    "visual_config.hidden_size": "vision.encoder.width",
    "visual_config.depth": "vision.encoder.depth",
    "visual_config.num_heads": "vision.encoder.heads",
    "visual_config.intermediate_size": "vision.encoder.mlp_width",
    "visual_config.window_size": "vision.encoder.window",
    "visual_config.fullatt_block_indexes": "vision.encoder.full_attention",
    "visual_config.out_hidden_size": "vision.encoder.bridge_width",
    "visual_config.vq_config.codebook_dim": "vision.quantizer.dim",
    "audio_config.audio_head_transformer_dims": "audio_head.dim",
    "audio_config.audio_head_transformer_layers": "audio_head.layers",
    "audio_config.audio_head_transformer_ffn_scale": "audio_head.ffn_scale",
    "audio_config.d_model": "audio.encoder.width",
    "audio_config.encoder_layers": "audio.encoder.depth",
    "audio_config.encoder_attention_heads": "audio.encoder.heads",
    "audio_config.encoder_ffn_dim": "audio.encoder.mlp_width",
    "audio_config.num_mel_bins": "audio.encoder.mels",
    "audio_config.sampling_rate": "audio.encoder.sample_rate",
    "audio_config.n_fft": "audio.encoder.fft",
    "audio_config.hop_length": "audio.encoder.hop",
    "audio_config.max_source_positions": "audio.encoder.max_positions",
    "audio_config.decoder_layers": "audio.decoder.depth",
    "audio_config.decoder_attention_heads": "audio.decoder.heads",
    "audio_config.decoder_ffn_dim": "audio.decoder.mlp_width",
    "audio_config.avg_pooler": "audio.pool",
    "audio_config.vq_config.codebook_sizes": "audio.quantizer.sizes",
}
# Keys of how often something is there, and the most of it, all keys of a line together: far more than the released
# model has, and few enough to list all tensors.
_MOST = {
    ("num_layers",): 1024,
    ("num_layers", "n_routed_experts"): 1 << 18,
    ("emb_neighbor_num", "emb_split_num"): 1024,
    ("visual_config.vq_config.depth",): 1024,
    ("visual_config.depth",): 1024,
    ("visual_config.image_head_transformer_layers",): 1024,
    ("audio_config.audio_head_transformer_layers",): 1024,
    ("audio_config.encoder_layers",): 1024,
    ("audio_config.decoder_layers",): 1024,
    ("longcat_kernels.flow.prenet_depth",): 1024,
    ("longcat_kernels.flow.mid_blocks", "longcat_kernels.flow.blocks"): 1024,
    ("longcat_kernels.refiner.layers",): 1024,
    ("longcat_kernels.refiner.refiners",): 1024,
    ("longcat_kernels.pixel_decoder.depth",): 1024,
}
_OWN = "longcat_kernels"  # a key that no released config has: sizes whose names there are not public
_HEAD_DIM = 128  # of both depth heads


def to_json(sizes: Sizes) -> dict[str, Any]:
    """The released config.json of these sizes."""
    model = sizes.model
    source, ids = config.to_dict(model), Vocabulary.of(model.vocabulary)
    assert model.backbone.ngram is not None
    found: dict[str, Any] = {"architectures": ["LongcatNextForCausalLM"], "model_type": "longcat_next"}
    for key, path in _PLAIN.items():
        _put(found, key, _get(source, path))
    found |= {
        "vocab_size": ids.rows,
        "text_vocab_plus_multimodal_special_token_size": ids.text_rows,
        "visual_offset": ids.visual_offsets[0],
        "audio_offset": ids.audio_offsets[0],
        "ngram_vocab_size_ratio": model.backbone.ngram.rows // ids.text_size,
        "zero_expert_type": "identity",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    found["visual_config"]["vq_config"] |= {"depth": len(ids.visual_sizes), "n_embed": ids.visual_sizes[0]}
    found[_OWN] = {name: value for name, value in config.to_dict(sizes).items() if name != "model"}
    found[_OWN]["pixel_decoder"] = source["vision"]["decoder"]
    return found


def from_json(values: Any) -> Sizes:
    """The inverse of `to_json`.

    Raises:
        ValueError: this is no config of a LongCat-Next, a value has another type than its key needs, or a model has
            more layers or the like than any could have.
    """
    if not isinstance(values, dict) or values.get("model_type") != "longcat_next":
        found = values.get("model_type") if isinstance(values, dict) else values
        raise ValueError(f"released: config.json must have model_type 'longcat_next', got {found!r}")
    default = to_json(Sizes(model=presets.longcat_next()))

    def given(key: str) -> Any:
        return _get(values, key, _get(default, key))

    _check_values(values, default)
    _check_counts(given)
    target = config.to_dict(presets.longcat_next())
    for key, path in _PLAIN.items():
        _put(target, path, given(key))
    visual = (given("visual_config.vq_config.n_embed"),) * given("visual_config.vq_config.depth")
    target["vision"]["quantizer"]["sizes"] = visual
    target["vocabulary"] |= {"visual_sizes": visual, "audio_sizes": target["audio"]["quantizer"]["sizes"]}
    target["backbone"]["ngram"]["rows"] = given("ngram_vocab_size_ratio") * given("text_vocab_size")
    used = given("text_vocab_size") + SPECIAL_TOKENS + sum(target["vocabulary"]["audio_sizes"]) + sum(visual) + 1
    target["vocabulary"]["padding"] = given("vocab_size") - used
    if target["vocabulary"]["padding"] < 0:
        raise ValueError(f"released: vocab_size must be at least {used}, got {given('vocab_size')}")
    target["audio"]["decoder"]["width"] = target["audio"]["encoder"]["width"]
    target["audio"]["quantizer"]["dim"] = target["audio"]["encoder"]["width"] * target["audio"]["pool"]
    for head in ("visual_head", "audio_head"):
        target[head]["heads"] = max(1, target[head]["dim"] // _HEAD_DIM)
    own = dict(given(_OWN))
    target["vision"]["decoder"] = own.pop("pixel_decoder", target["vision"]["decoder"])
    model = config.from_dict(config.Model, target, "released: config.json")
    return config.from_dict(Sizes, {"model": config.to_dict(model), **own}, "released: config.json")


def _check_values(values: dict[str, Any], default: dict[str, Any], where: str = "") -> None:
    """Refuses what stands where a size, a rate or a list of sizes belongs."""
    for key, usual in default.items():
        value = values.get(key)
        if value is None:
            continue
        rule = _broken_rule(value, usual)
        if rule is not None:
            raise ValueError(f"released: config.json's {where}{key} must be {rule}, got {value!r:.80}")
        if isinstance(usual, dict):
            _check_values(value, usual, f"{where}{key}.")


def _broken_rule(value: Any, usual: Any) -> str | None:
    """What a value that is used like `usual` should be, if it is not; words are not used."""
    if isinstance(usual, dict):
        return None if isinstance(value, dict) else "an object"
    if isinstance(usual, float):
        return None if type(value) in (int, float) and isfinite(value) else "a finite number"
    if type(usual) is int:
        return None if _is_size(value) else "an integer in [0, 2^31)"
    if isinstance(usual, list | tuple) and not isinstance(usual[0], str):
        is_right = isinstance(value, list | tuple) and all(map(_is_size, value))
        return None if is_right else "a list of integers in [0, 2^31)"
    return None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _check_counts(given: Callable[[str], Any]) -> None:
    for keys, most in _MOST.items():
        count = prod(map(given, keys))
        if count > most:
            raise ValueError(f"released: config.json's {' * '.join(keys)} must be at most {most}, got {count}")


def _get(values: dict[str, Any], path: str, default: Any = None) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return default if found is None else found


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        values = values.setdefault(name, {})
    values[last] = value
