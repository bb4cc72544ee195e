"""The whole model as plain data: frozen, nested like the model itself.

Every field is a size, a rate or a switch; numbers that follow from others are properties. A run is a function in
`presets.py` that returns a `Model`; `dataclasses.replace` is the override.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Extents of the joint id space: text and special ids, then the audio levels, then the visual levels."""

    text_size: int  # text ids, without the special tokens that follow them
    audio_sizes: tuple[int, ...]  # codebook entries of each audio level
    visual_sizes: tuple[int, ...]  # codebook entries of each visual level
    padding: int = 0  # rows of the joint embedding after the last level, never used


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Residual vector quantizer with EMA codebooks; rates the reports leave open are the public code's defaults."""

    sizes: tuple[int, ...]  # entries of each level's codebook
    dim: int  # width of a codeword
    shared: bool = False  # one codebook for all levels (the released vision tokenizer)
    decay: float = 0.99  # share of the old statistics kept each update
    eps: float = 1e-5  # Laplace smoothing of the cluster sizes
    restart_threshold: float = 1.0  # an entry whose EMA count falls below is replaced by a batch vector


@dataclass(frozen=True, kw_only=True)
class VisionEncoder:
    """Qwen2.5-VL vision tower geometry, then a bridge that merges `merge` x `merge` patches into one position."""

    patch: int = 14  # pixels a side
    merge: int = 2  # patches a side of one position
    temporal_patch: int = 2  # a still image is duplicated this often
    width: int = 1280
    depth: int = 32
    heads: int = 16
    mlp_width: int = 3420
    window: int = 112  # pixels a side of an attention window
    full_attention: tuple[int, ...] = (7, 15, 23, 31)  # blocks that see the whole image
    bridge_width: int = 3584  # of the features after the merge


@dataclass(frozen=True, kw_only=True)
class PixelDecoder:
    """ViT that turns summed codewords back into pixels."""

    width: int = 1024
    depth: int = 32
    heads: int = 16
    mlp_width: int = 2730
    rope_theta: float = 1e4


@dataclass(frozen=True, kw_only=True)
class Refiner:
    """Flow-matching transformer over pixels, conditioned on the decoder's image (channels) and the codewords."""

    width: int
    depth: int
    heads: int
    steps: int = 28  # Euler steps from noise to image
    temperature: float = 1.0  # scale of the noise that sampling starts from; less gives cleaner, less varied images


@dataclass(frozen=True, kw_only=True)
class VisionTokenizer:
    encoder: VisionEncoder
    quantizer: Quantizer
    decoder: PixelDecoder
    refiner: Refiner

    @property
    def cell(self) -> int:
        """Pixels a side of one position."""
        return self.encoder.patch * self.encoder.merge


@dataclass(frozen=True, kw_only=True)
class AudioEncoder:
    """Whisper encoder geometry over a log-mel front end."""

    sample_rate: int = 16_000  # Hz
    mels: int = 128
    fft: int = 400  # samples
    hop: int = 160  # samples
    log_range: float = 8.0  # decades of power kept below a clip's loudest mel
    width: int = 1280
    depth: int = 32
    heads: int = 20
    mlp_width: int = 5120
    max_positions: int = 1500  # after the stride-2 convolution: 30 s


@dataclass(frozen=True, kw_only=True)
class AudioDecoder:
    """Transformer from quantized vectors to a coarse mel spectrogram."""

    width: int = 1280
    depth: int = 8
    heads: int = 20
    mlp_width: int = 5120


@dataclass(frozen=True, kw_only=True)
class MelRefiner:
    """Flow-matching estimator that refines the coarse mel."""

    width: int = 256
    depth: int = 12
    heads: int = 8
    steps: int = 10  # Euler steps on the cosine schedule
    guidance: float = 0.7  # classifier-free guidance rate at inference
    temperature: float = 1.0  # standard deviation of the noise that Euler steps start from


@dataclass(frozen=True, kw_only=True)
class AudioTokenizer:
    encoder: AudioEncoder
    quantizer: Quantizer
    decoder: AudioDecoder
    refiner: MelRefiner
    pool: int = 4  # encoder frames to one position: 50 Hz to 12.5 Hz

    @property
    def samples_per_position(self) -> int:
        return self.encoder.hop * 2 * self.pool

    @property
    def frame_hz(self) -> float:
        """Positions a second."""
        return self.encoder.sample_rate / self.samples_per_position


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head latent attention."""

    heads: int = 32
    q_rank: int = 1536
    kv_rank: int = 512
    nope_dim: int = 128  # channels of a head without position
    rope_dim: int = 64  # channels of a head with rotary position
    value_dim: int = 128
    rope_theta: float = 1e7


@dataclass(frozen=True, kw_only=True)
class Experts:
    real: int = 256
    zero: int = 128  # identity experts
    top_k: int = 12
    width: int = 1024
    scale: float = 6.0  # multiplies every routing weight, identity experts included
    target_real: float = 8.0  # real experts a token should use on average, of top_k


@dataclass(frozen=True, kw_only=True)
class NGram:
    neighbors: int = 4  # orders 2..neighbors
    splits: int = 4  # tables an order
    rows: int = 78 * 131_072  # m: table i has m + 2 i + 1 rows
    eos_id: int = 2  # ends a segment, as id 0 does

    @property
    def tables(self) -> int:
        return (self.neighbors - 1) * self.splits


@dataclass(frozen=True, kw_only=True)
class Backbone:
    hidden: int = 3072
    layers: int = 14  # shortcut layers: two attention and two dense sub-blocks each, one mixture of experts
    ffn_width: int = 6144
    norm_eps: float = 1e-5
    attention: Attention = Attention()
    experts: Experts = Experts()
    ngram: NGram | None = NGram()  # None: plain word embeddings


@dataclass(frozen=True, kw_only=True)
class DepthHead:
    dim: int
    heads: int
    layers: int = 4
    ffn_scale: int = 16  # all levels' hidden units are ffn_scale * dim


@dataclass(frozen=True, kw_only=True)
class Model:
    """A whole LongCat-Next: backbone, heads and both tokenizers."""

    vocabulary: Vocabulary
    backbone: Backbone
    pre_buffer_width: int
    visual_head: DepthHead
    audio_head: DepthHead
    vision: VisionTokenizer
    audio: AudioTokenizer

    def __post_init__(self) -> None:
        for name, ids, quantizer in (
            ("visual_sizes", self.vocabulary.visual_sizes, self.vision.quantizer),
            ("audio_sizes", self.vocabulary.audio_sizes, self.audio.quantizer),
        ):
            if ids != quantizer.sizes:
                raise ValueError(f"config: vocabulary.{name} must equal the quantizer's {quantizer.sizes}, got {ids}")


def to_dict(value: Any) -> dict[str, Any]:
    """The config as nested dicts and lists, ready for JSON."""
    return dataclasses.asdict(value)


def from_dict(kind: type[T], values: Any, where: str = "config") -> T:
    """The inverse of `to_dict`.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message says where.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be an object with the fields of {kind.__name__}, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"{where}: unknown fields {', '.join(unknown)}; {kind.__name__} has {', '.join(fields)}")
    hints = get_type_hints(kind)
    given = {name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    options = [hint] if not isinstance(hint, UnionType) else list(get_args(hint))
    if value is None and type(None) in options:
        return None
    chosen = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(chosen):
        return from_dict(chosen, value, where)  # type: ignore[arg-type]
    if get_origin(chosen) is tuple and isinstance(value, list | tuple):
        return tuple(_value(get_args(chosen)[0], item, where) for item in value)
    if chosen is float and type(value) is int:
        return float(value)
    if not isinstance(chosen, type) or type(value) is not chosen:
        raise ValueError(f"{where}: must be {getattr(chosen, '__name__', chosen)}, got {value!r}")
    return value
