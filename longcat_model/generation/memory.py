"""Most memory that answers take beside the weights, by arithmetic alone: from sizes and requests, before any work.

Files are held from beginning to end; encoders, the loop of generation and decoders follow one another. Each is counted
where most of its tensors live at once, as float32, with fused attention; tests hold the sums against measured peaks.
Not counted: what `Prefixes` keep, which has a limit of its own, and the few megabytes that a kernel works in.
`released.memory` counts the released decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longcat_model import config
from longcat_model.generation.prefill import BLOCK
from longcat_model.tokenizers.audio.tokenizer import BATCH
from longcat_model.vocabulary import Vocabulary

FLOAT = 4  # bytes
NOTED = 1024  # bytes that the loop remembers of a position it has written


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes."""

    files: int  # images and waveforms of the conversations
    encoders: int
    cache: int  # of latents, allocated at once
    steps: int  # of reading prompts and asking the heads
    answers: int  # images and waveforms
    decoders: int

    @property
    def most(self) -> int:
        """At any time."""
        return self.files + max(self.encoders, self.cache + self.steps, self.answers + self.decoders)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:,}" for name, value in vars(self).items())
        return f"at most {self.most:,} bytes beside the weights ({parts})"


def encoding(media: Tensor, sizes: config.Model) -> int:
    """Bytes that the codes of an image [3, H, W] or of a waveform [samples] take to make."""
    if media.ndim == 3:
        return _packed(sizes.vision.quantizer) + _seeing(
            sizes.vision, media[0].numel() // sizes.vision.encoder.patch**2
        )
    positions = -(-len(media) // sizes.audio.samples_per_position)
    return _packed(sizes.audio.quantizer) + FLOAT * _at_once(sizes.audio, positions) * _hearing(sizes.audio)


def image(sizes: config.VisionTokenizer, height: int, width: int) -> tuple[int, int]:
    """Bytes of an image of so many cells, and of its decoding beside that."""
    pixels, patches = 3 * sizes.encoder.patch**2, height * width * sizes.encoder.merge**2
    decoder = _block(sizes.decoder.width, sizes.decoder.mlp_width)
    refiner = 6 * sizes.refiner.width + _block(sizes.refiner.width, 4 * sizes.refiner.width)
    codewords = 4 * sizes.quantizer.dim // sizes.encoder.merge**2 + 1
    return FLOAT * patches * pixels, FLOAT * patches * (8 * pixels + codewords + max(decoder, refiner))


def speech(sizes: config.AudioTokenizer, frames: int) -> tuple[int, int]:
    """Bytes of a waveform of so many frames, and of its decoding beside that."""
    rate, mels = 2 * sizes.pool, sizes.encoder.mels
    decoder = 4 * sizes.quantizer.dim + sizes.pool * _block(sizes.decoder.width, sizes.decoder.mlp_width)
    refiner = 2 * rate * (_block(sizes.refiner.width, 4 * sizes.refiner.width) + 6 * mels)  # guided: twice each
    network = _at_once(sizes, frames) * max(decoder, refiner)
    bins = sizes.encoder.fft // 2 + 1
    vocoder = frames * rate * (24 * bins + 4 * sizes.encoder.fft)  # Griffin-Lim's spectra, of the whole clip
    return FLOAT * frames * sizes.samples_per_position, FLOAT * (2 * frames * rate * mels + max(network, vocoder))


def steps(sizes: config.Model, rows: int, positions: int, written: int, itemsize: int) -> int:
    """Bytes of the loop beside its cache.

    Args:
        rows: of the cache, each of so many `positions` at most.
        written: positions of all answers together.
        itemsize: bytes of a weight of the backbone.
    """
    backbone, a, experts = sizes.backbone, sizes.backbone.attention, sizes.backbone.experts
    query, read = a.nope_dim + a.rope_dim, max(rows, BLOCK)
    expanded = positions * a.heads * (3 * query + a.nope_dim + a.value_dim) * itemsize
    scores = max(rows, BLOCK) * positions * a.heads * (1 + itemsize) + read * positions * 8
    latents = rows * positions * (a.kv_rank + a.rope_dim) * itemsize
    networks = experts.top_k * (3 * experts.width + 2 * backbone.hidden) + 3 * backbone.ffn_width
    attention = 2 * a.q_rank + 3 * a.kv_rank + a.heads * 8 * (query + a.value_dim)
    states = 2 * FLOAT * read * (max(networks, attention) + 8 * backbone.hidden + 3 * sizes.pre_buffer_width)
    ids = Vocabulary.of(sizes.vocabulary)
    levels = sum(ids.visual_sizes) + sum(ids.audio_sizes)
    drawing = 10 * FLOAT * rows * (ids.text_rows + levels)
    return expanded + scores + latents + states + drawing + _heads(sizes) + written * NOTED


def _heads(sizes: config.Model) -> int:
    """Bytes of the depth heads' weights as a kernel packs them."""
    total = 0
    for head, classes in (
        (sizes.visual_head, sizes.vocabulary.visual_sizes),
        (sizes.audio_head, sizes.vocabulary.audio_sizes),
    ):
        layer = 4 * head.dim**2 + 2 * head.ffn_scale * head.dim**2
        tables = sum(classes) * (sizes.backbone.hidden + head.dim)
        total += head.layers * layer + tables + len(classes) * sizes.backbone.hidden * head.dim
    return FLOAT * total


def _packed(sizes: config.Quantizer) -> int:
    """Bytes of codebooks as a kernel packs them."""
    return 2 * FLOAT * sum(sizes.sizes) * sizes.dim


def _seeing(sizes: config.VisionTokenizer, patches: int) -> int:
    encoder = sizes.encoder
    pixels = (5 + encoder.temporal_patch) * 3 * encoder.patch**2
    positions = (4 * encoder.bridge_width + 4 * sizes.quantizer.dim) // encoder.merge**2 + 1
    states = encoder.depth * encoder.width  # of every block
    return FLOAT * patches * (pixels + states + max(_block(encoder.width, encoder.mlp_width), positions))


def _hearing(sizes: config.AudioTokenizer) -> int:
    """Numbers of a position."""
    encoder, rate = sizes.encoder, 2 * sizes.pool
    front_end = rate * (4 * encoder.hop + 4 * encoder.fft + 4 * encoder.mels)
    layers = rate * 4 * encoder.width + sizes.pool * _block(encoder.width, encoder.mlp_width)
    pooled = 5 * encoder.width * sizes.pool + 4 * sizes.quantizer.dim
    return rate * encoder.mels + max(front_end, layers, pooled)


def _block(width: int, mlp_width: int) -> int:
    """Numbers of a position in a transformer block: the attention's, or the MLP's."""
    return max(16 * width, 6 * width + 5 * mlp_width)


def _at_once(sizes: config.AudioTokenizer, positions: int) -> int:
    """Positions, silence included, that the audio tokenizer takes at once of one clip."""
    chunk = sizes.encoder.max_positions // sizes.pool
    return min(BATCH, -(-positions // chunk)) * min(positions, chunk)


def total(
    sizes: config.Model, media: Sequence[Tensor], answers: Sequence[tuple[int, int]], *, cache: int, loop: int
) -> Memory:
    """Of one call: its files, what it may paint and speak as `image` and `speech` count it, its loop of generation."""
    return Memory(
        files=sum(m.nbytes for m in media),
        encoders=max((encoding(m, sizes) for m in media), default=0),
        cache=cache,
        steps=loop,
        answers=sum(held for held, _ in answers),
        decoders=max((beside for _, beside in answers), default=0),
    )
