"""Placement plans: which parts of the released model go where, what that takes, and what does not fit.

One device, the main one, computes each position: attention, dense networks, embeddings and heads live there, with the
cache and the activations. A layer's experts may live on another device; positions then travel there and back. The
n-gram tables stay in their files, of which a position reads a few rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from longcat_model import config
from longcat_model.backbone import Cache
from longcat_model.released.sizes import Sizes
from longcat_model.released.tensors import TABLES, entries, without_memory
from longcat_model.released.tokenizers import image_decoders
from longcat_model.released.vocoder import Vocoder

FILE = "file"  # the place of tensors that are mapped from their file
HOST = "cpu"
H200 = {"cuda:0": 141_000_000_000}  # bytes
RESERVE = 2_000_000_000  # bytes of a GPU for its context, code and what the allocator rounds up
BF16 = 2  # bytes
MASK = 6  # bytes of a pair of positions while a prompt is read: comparisons, and the mask as attention takes it

_TABLES, _EXPERTS, _VISION, _AUDIO = "n-gram tables", "experts of layer {}", "vision tokenizer", "audio tokenizer"
_PARTS = (
    (re.escape(TABLES), _TABLES),
    (r"model\.layers\.(\d+)\.mlp\.", _EXPERTS),
    (r"model\.visual_tokenizer\.visual_embedding_layer\.", "pre-buffer"),
    (r"model\.visual_tokenizer\.", _VISION),
    (r"model\.audio_tokenizer\.", _AUDIO),
    (r"(visual|audio)_head\.", "{} depth head"),
    (r"model\.embed_tokens\.|lm_head\.", "embeddings and text head"),
    (r"model\.", "attention and dense networks"),
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model's parts are: what `checkpoint.load` follows. Places are torch devices; None: main."""

    main: str = HOST
    tables: str | None = None  # the n-gram tables: "file" (mapped), or "cpu"
    experts: tuple[str, ...] = ()  # of each layer, with its router; (): all on main
    vision: str | None = None  # the tokenizers' tensors
    audio: str | None = None


@dataclass(frozen=True)
class Part:
    name: str
    place: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A placement and what it takes."""

    placement: Placement
    parts: tuple[Part, ...]  # weights, cache, activations and reserve
    memory: Mapping[str, int]  # bytes of each GPU

    def used(self, place: str) -> int:
        return sum(part.bytes for part in self.parts if part.place == place)

    def together(self, *names: str) -> str:
        """The place of these parts if it is one, else the host."""
        places = {part.place for part in self.parts if part.name in names}
        return places.pop() if len(places) == 1 else HOST

    def lacking(self) -> dict[str, int]:
        """GPUs that are too small, and by how many bytes."""
        return {gpu: self.used(gpu) - size for gpu, size in self.memory.items() if self.used(gpu) > size}


def plan(sizes: Sizes, memory: Mapping[str, int] = H200, *, rows: int = 2, positions: int = 8192) -> Plan:
    """Places a model: the first GPU is the main one; experts, tokenizers and decoders go where room is left.

    What no GPU has room for goes to the host, whose memory is not limited here. The main parts cannot: `Plan.lacking`
    says by how much they exceed the first GPU.

    Args:
        memory: bytes of each GPU, by device name; empty: everything but the tables is on the host.
        rows: decoded together; classifier-free guidance takes two an image.
        positions: of a row, prompt and answer together; the prompt is counted as if it were all of them.

    Raises:
        ValueError: rows, positions or a GPU's bytes below 1.
    """
    for name, value in {"rows": rows, "positions": positions, **memory}.items():
        if value < 1:
            raise ValueError(f"plan: {name} must be at least 1, got {value}")
    backbone, weights = sizes.model.backbone, _weights(sizes)
    main = next(iter(memory), HOST)
    experts = [_EXPERTS.format(i) for i in range(backbone.layers)]
    movable = {name: weights.pop(name) for name in (*experts, _VISION, _AUDIO)} | decoder_bytes(sizes)
    parts = [Part(_TABLES, FILE, weights.pop(_TABLES))]
    parts += [Part(name, main, size) for name, size in weights.items()]
    cache = rows * positions * Cache.position_bytes(backbone, torch.bfloat16)
    parts.append(Part(f"cache, {rows} x {positions:,} positions", main, cache))
    parts.append(Part("activations", main, rows * activation_bytes(backbone, positions)))
    parts += [Part("reserve", gpu, RESERVE) for gpu in memory]
    places = {}
    for name, size in movable.items():
        places[name] = _with_room(size, parts, memory)
        parts.append(Part(name, places[name], size))
    placement = Placement(
        main=main,
        tables=FILE,
        experts=tuple(places[name] for name in experts),
        vision=places[_VISION],
        audio=places[_AUDIO],
    )
    return Plan(placement=placement, parts=tuple(parts), memory=dict(memory))


def table_bytes(sizes: config.Backbone) -> int:
    """Bytes that one position reads of the n-gram tables: a row of each, which together are as wide as the model."""
    return BF16 * sizes.hidden


def expert_bytes(sizes: config.Backbone) -> int:
    """Bytes that one position reads of one layer's experts, on average."""
    return round(sizes.experts.target_real * 3 * sizes.experts.width * sizes.hidden * BF16)


def activation_bytes(sizes: config.Backbone, positions: int) -> int:
    """About the bytes of intermediate results while one row of so many positions is read at once, in bfloat16.

    The larger of an attention sub-block (queries, keys and values as products and as attention takes them) and of the
    experts beside a dense network, and the states around them. Attention is taken to be fused: of pairs of positions
    only the mask is there.
    """
    a, experts = sizes.attention, sizes.experts
    query = a.nope_dim + a.rope_dim
    attention = 2 * a.q_rank + 3 * a.kv_rank + a.heads * (5 * query + a.nope_dim + 2 * a.value_dim)
    router = 6 * (experts.real + experts.zero)  # float32 logits, probabilities and their order
    networks = experts.top_k * (3 * experts.width + 2 * sizes.hidden) + 3 * sizes.ffn_width + router
    return positions * (max(attention, networks) + 8 * sizes.hidden) * BF16 + positions**2 * MASK


def decoder_bytes(sizes: Sizes) -> dict[str, int]:
    """Bytes of the decoders in files of their own: float32, but bfloat16 for the refiner apart from its autoencoder."""
    with without_memory():
        decoders, vocoder = image_decoders(sizes), Vocoder(sizes.vocoder)
    for name in ("base_transformer", "cond_proj"):
        decoders["image_refiner"].get_submodule(name).bfloat16()
    modules = {
        "pixel decoder": decoders["image_decoder"],
        "image refiner": decoders["image_refiner"],
        "vocoder": vocoder,
    }
    return {name: sum(p.nbytes for p in module.parameters()) for name, module in modules.items()}


def _weights(sizes: Sizes) -> dict[str, int]:
    """Bytes of the tensors of each part."""
    found: dict[str, int] = {}
    for tensor, entry in entries(sizes).items():
        name = _part(tensor)
        found[name] = found.get(name, 0) + entry.bytes
    return found


def _part(tensor: str) -> str:
    return next(name.format(*found.groups()) for pattern, name in _PARTS if (found := re.match(pattern, tensor)))


def _with_room(size: int, parts: Iterable[Part], memory: Mapping[str, int]) -> str:
    """The first GPU that can take so many bytes more, else the host."""
    used = {gpu: sum(part.bytes for part in parts if part.place == gpu) for gpu in memory}
    return next((gpu for gpu, total in memory.items() if used[gpu] + size <= total), HOST)
