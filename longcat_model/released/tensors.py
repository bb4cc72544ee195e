"""Every tensor of the released checkpoint: name, shape and type.

The language model's come from the model itself; the tokenizers' are a table, generated from the sizes. Names of their
parts that are not public are the module paths of the public inference code; counts and sizes close exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from longcat_model.model import LongcatNext
from longcat_model.released.sizes import Flow, Sizes

TABLES = "model.ngram_embeddings.embedders."
_PREFIXES = {
    "ngram.": "model.ngram_embeddings.",
    "pre_buffer.": "model.visual_tokenizer.visual_embedding_layer.pre_buffer.",
    "backbone.": "model.",
    "embed_tokens.": "model.embed_tokens.",
}
_FLOAT32 = (".mlp.router.", ".codebooks.", ".codebook.")
Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Entry:
    """What a checkpoint says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def entries(sizes: Sizes) -> dict[str, Entry]:
    """All tensors of a checkpoint of these sizes, by name; no memory is taken.

    Raises:
        ValueError: no model has these sizes.
    """
    with without_memory():
        model = LongcatNext(sizes.model)
    shapes = {name: tuple(slot.shape) for name, slot in slots(model).items()}
    return {name: Entry(shape, dtype(name)) for name, shape in (shapes | dict(_tokenizers(sizes))).items()}


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made here have shapes alone; raises ValueError where their sizes are none that a module can have."""
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"released: sizes must be those of a model, got: {str(error).splitlines()[0]}") from error


def dtype(name: str) -> torch.dtype:
    """float32 for routers and codebooks, bfloat16 for all else."""
    return torch.float32 if any(part in name for part in _FLOAT32) else torch.bfloat16


def slots(model: LongcatNext) -> Mapping[str, Tensor]:
    """Where each released tensor of the language model lives in it: views, so that copying into one loads it."""
    found: dict[str, Tensor] = {}
    for own, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in _PREFIXES if own.startswith(prefix)), "")
        name = _PREFIXES.get(prefix, "") + own.removeprefix(prefix)
        stem = name.rpartition(".")[0]
        if name.endswith(".mlp.gate_up"):
            for e, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                found |= {f"{stem}.experts.{e}.gate_proj.weight": gate, f"{stem}.experts.{e}.up_proj.weight": up}
        elif name.endswith(".mlp.down"):
            found |= {f"{stem}.experts.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def _tokenizers(sizes: Sizes) -> Shapes:
    yield from _prefixed("model.visual_tokenizer.", _vision(sizes))
    yield from _prefixed("model.audio_tokenizer.", _audio(sizes))


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    for name, shape in shapes:
        yield prefix + name, shape


def _affine(name: str, *weight: int, outputs: int | None = None) -> Shapes:
    """A weight and its bias, as long as the weight's first dimension or `outputs`."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", (weight[0] if outputs is None else outputs,)


def _vision(sizes: Sizes) -> Shapes:
    vision = sizes.model.vision
    encoder, quantizer = vision.encoder, vision.quantizer
    width, merged, out = encoder.width, encoder.width * encoder.merge**2, encoder.bridge_width
    yield "visual_model.patch_embed.proj.weight", (width, 3, encoder.temporal_patch, encoder.patch, encoder.patch)
    for i in range(encoder.depth):
        block = f"visual_model.blocks.{i}."
        yield f"{block}norm1.weight", (width,)
        yield f"{block}norm2.weight", (width,)
        yield from _affine(f"{block}attn.qkv", 3 * width, width)
        yield from _affine(f"{block}attn.proj", width, width)
        yield from _affine(f"{block}mlp.gate_proj", encoder.mlp_width, width)
        yield from _affine(f"{block}mlp.up_proj", encoder.mlp_width, width)
        yield from _affine(f"{block}mlp.down_proj", width, encoder.mlp_width)
    bridge = "visual_bridge_model."
    yield f"{bridge}bridge.ln_q.weight", (width,)
    yield from _affine(f"{bridge}bridge.mlp.0", merged, merged)
    yield from _affine(f"{bridge}bridge.mlp.2", out, merged)
    yield from _affine(f"{bridge}quantizer.quant_conv.0", out)
    yield from _affine(f"{bridge}quantizer.quant_conv.1", quantizer.dim, out)
    yield from _affine(f"{bridge}quantizer.quant_conv.3", quantizer.dim, quantizer.dim)
    for level, size in enumerate(quantizer.sizes):
        book = f"{bridge}quantizer.quantize.codebooks.{level}."
        yield f"{book}embed", (size + 1, quantizer.dim)
        yield f"{book}embed_ema", (size, quantizer.dim)
        yield f"{book}cluster_size_ema", (size,)


def _audio(sizes: Sizes) -> Shapes:
    audio, flow = sizes.model.audio, sizes.flow
    encoder, decoder, width, dim = audio.encoder, audio.decoder, audio.encoder.width, audio.quantizer.dim
    yield from _affine("audio_model.conv1", width, encoder.mels, 3)
    yield from _affine("audio_model.conv2", width, width, 3)
    yield "audio_model.positional_embedding", (encoder.max_positions, width)
    yield from _whisper("audio_model", encoder.depth, width, encoder.mlp_width)
    yield from _affine("audio_model.layer_norm", width)
    for name in ("gate_proj", "up_proj"):
        yield f"audio_bridge_model.{name}.weight", (dim, width, audio.pool)
    yield "audio_bridge_model.down_proj.weight", (dim, dim)
    yield from _affine("audio_bridge_model.layer_norm", dim)
    yield from _affine("audio_bridge_model.proj_decoder", width, dim)
    for level, size in enumerate(audio.quantizer.sizes):
        book = f"audio_bridge_model.vq_list.{level}.codebook."
        yield f"{book}embed", (size, dim)
        yield f"{book}embed_avg", (size, dim)
        yield f"{book}cluster_size", (size,)
    yield from _prefixed("audio_decoder.", _codec(width, decoder.depth, decoder.mlp_width, flow))
    yield from _prefixed("audio_flow_matching_decoder.prenet.", _prenet(width, flow))
    yield from _prefixed("audio_flow_matching_decoder.conditional_decoder.", _estimator(flow))


def _whisper(name: str, depth: int, width: int, mlp: int, norm_bias: bool = True) -> Shapes:
    for i in range(depth):
        layer = f"{name}.layers.{i}."
        for projection in ("q_proj", "v_proj", "out_proj"):
            yield from _affine(f"{layer}self_attn.{projection}", width, width)
        yield f"{layer}self_attn.k_proj.weight", (width, width)
        yield from _affine(f"{layer}fc1", mlp, width)
        yield from _affine(f"{layer}fc2", width, mlp)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            yield from _affine(f"{layer}{norm}", width) if norm_bias else [(f"{layer}{norm}.weight", (width,))]


def _codec(width: int, depth: int, mlp: int, flow: Flow) -> Shapes:
    yield from _affine("dconv1.conv", width, width, 3)
    yield from _affine("dconv1.norm", width)
    yield "positional_embedding", (flow.decoder_positions, width)
    for name, shape in _whisper("", depth, width, mlp):
        yield name.removeprefix("."), shape
    yield from _affine("layer_norm", width)
    yield from _affine("dconv2.conv", width, flow.mels, 3, outputs=flow.mels)
    yield from _affine("dconv2.norm", flow.mels)
    for i in range(4):
        yield from _affine(f"post_net.layers.{i}.conv", flow.post_width, flow.post_width if i else flow.mels, 5)
        yield from _affine(f"post_net.layers.{i}.norm", flow.post_width)
    yield from _affine("post_net.layers.4", flow.mels, flow.post_width, 1)


def _prenet(width: int, flow: Flow) -> Shapes:
    yield from _affine("in_mlp.0", flow.prenet_mlp, width)
    yield from _affine("in_mlp.2", flow.prenet_width, flow.prenet_mlp)
    yield "transformer.positional_embedding", (flow.prenet_positions, flow.prenet_width)
    yield from _whisper("transformer", flow.prenet_depth, flow.prenet_width, flow.prenet_mlp, norm_bias=False)
    yield "transformer.layer_norm.weight", (flow.prenet_width,)
    yield "out_proj.weight", (flow.mels, flow.prenet_width)


def _estimator(flow: Flow) -> Shapes:
    """The Matcha U-Net at one resolution: each group is a residual block and transformer blocks."""
    width, inputs, time = flow.channels, 2 * flow.mels, 4 * flow.channels
    yield from _affine("time_mlp.linear_1", time, inputs)
    yield from _affine("time_mlp.linear_2", time, time)
    yield from _group("down_blocks.0", inputs, flow)
    yield from _affine("down_blocks.0.2", width, width, 3)
    for i in range(flow.mid_blocks):
        yield from _group(f"mid_blocks.{i}", width, flow)
    yield from _group("up_blocks.0", 2 * width, flow)
    yield from _affine("up_blocks.0.2", width, width, 3)
    yield from _causal("final_block", width, width)
    yield from _affine("final_proj", flow.mels, width, 1)


def _causal(name: str, width: int, inputs: int) -> Shapes:
    yield from _affine(f"{name}.block.0", width, inputs, 3)
    yield from _affine(f"{name}.block.2", width)


def _group(name: str, inputs: int, flow: Flow) -> Shapes:
    width = flow.channels
    yield from _affine(f"{name}.0.mlp.1", width, 4 * width)
    yield from _causal(f"{name}.0.block1", width, inputs)
    yield from _causal(f"{name}.0.block2", width, width)
    yield from _affine(f"{name}.0.res_conv", width, inputs, 1)
    for i in range(flow.blocks):
        block = f"{name}.1.{i}."
        yield from _affine(f"{block}norm1", width)
        for projection in ("to_q", "to_k", "to_v"):
            yield f"{block}attn1.{projection}.weight", (flow.inner, width)
        yield from _affine(f"{block}attn1.to_out.0", width, flow.inner)
        yield from _affine(f"{block}norm3", width)
        yield from _affine(f"{block}ff.net.0.proj", 4 * width, width)
        yield from _affine(f"{block}ff.net.2", width, 4 * width)
