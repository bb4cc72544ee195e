"""Contenders of depth decoding: each builds what a user would have ready, and gives the call.

A call gives codes [T, L], or None where it decodes nothing. "Style" means written here after the method of the named
project, as torch code of its own. All are greedy.

Dimension key
    T positions    L levels    D width    A heads    C channels of a head    V classes
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Call, Skip
from longcat_kernels import DepthSampling, PreparedDepth, Workspace, depth_decode, native
from longcat_kernels.ops import _depth_cpu
from longcat_kernels.prepared import packed_depth
from longcat_kernels.reference.depth_weights import DepthLayer, DepthWeights

GREEDY = DepthSampling(temperature=0.0)


def ours(hidden: Tensor, weights: DepthWeights, precision: str | None = None, **more: Any) -> Call:
    """The op with prepared weights; its memory and what is made of numbers are made once, as a server does."""
    prepared, workspace = PreparedDepth(weights, precision).refresh(), Workspace()
    table = GREEDY.table(len(hidden), weights.config, hidden.device)
    more |= {"seed": torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device), "workspace": workspace}
    more["step"] = more["seed"]
    return lambda: depth_decode(hidden, prepared, table, **more).codes


def ours_unprepared(hidden: Tensor, weights: DepthWeights) -> Call:
    """The op with weights as they are."""
    table = GREEDY.table(len(hidden), weights.config, hidden.device)
    return lambda: depth_decode(hidden, weights, table).codes


def ours_by_isa(isa: str, hidden: Tensor, weights: DepthWeights) -> Call:
    """The compiled op with one instruction set."""
    if native.why_not() is not None:
        raise Skip(str(native.why_not()))
    if isa not in native.module().build_info()["isas_available"]:
        raise Skip("not on this CPU")
    c, rows = weights.config, len(hidden)
    tensors, numbers = weights.tensors(), c.numbers()
    packed = [packed_depth(tensors, numbers, isa=isa)]
    zeros = torch.zeros(rows, dtype=torch.int64)
    optional = (None,) * 6
    arguments = (hidden, tensors, packed, GREEDY.table(rows, c), zeros, zeros, *optional, numbers, c.eps, False)

    def call() -> Tensor:
        outputs = (torch.empty(rows, c.levels), torch.empty(rows, c.levels), torch.empty_like(hidden))
        codes_TL = torch.empty(rows, c.levels, dtype=torch.int64)
        _depth_cpu.decode(*arguments, *outputs, torch.empty(rows, 0), codes_TL, isa=isa)
        return codes_TL

    return call


def floor(weights: DepthWeights) -> Call:
    """Reads as many bytes as the weights have, in the order in which any decoder needs them, and does nothing else.

    What the levels share is read for each of them; where it stays in a cache, so it does here.
    """
    if native.why_not() is not None:
        raise Skip(str(native.why_not()))
    c = weights.config
    places: dict[tuple[str, int, int], tuple[int, int]] = {}
    end, order = 0, []

    def read(name: str, layer: int, number: int, tensor: Tensor | None) -> None:
        nonlocal end
        key = (name, layer, number)
        if tensor is None:
            return
        if key not in places:
            places[key] = (end, tensor[number].numel() * tensor.element_size() // 64 * 64)
            end += places[key][1]
        order.append(places[key])

    for level in range(c.levels):
        read("projection", 0, c.sets("projection_sets")[level], weights.projection)
        for n, layer in enumerate(weights.layers):
            for name in ("q_weight", "k_weight", "v_weight", "out_weight"):
                read(name, n, c.sets("attention_sets")[level], getattr(layer, name))
            for name in ("gate", "up", "down"):
                read(name, n, c.sets("ffn_sets")[level], getattr(layer, name))
        head = weights.head_weights[level]
        read("head", 0, 0 if head is None else level, None if head is None else head.expand(c.levels, *head.shape))
    memory, sections = torch.empty(end, dtype=torch.uint8), torch.tensor(order)
    native.module().prefer_large_pages(memory)  # as packed weights have
    memory.fill_(1)
    read_sections = native.module().read_sections

    def call() -> None:
        read_sections(memory, sections)

    return call


class Cached:
    """Decoding with a key-value cache, one level a step: fused q, k, v and adjacent weights of each level."""

    def __init__(self, weights: DepthWeights) -> None:
        self.weights, self.config = weights, weights.config
        self.qkv = [_fused(layer) for layer in weights.layers]
        self.up = [[m.contiguous() for m in layer.up] for layer in weights.layers]
        self.down = [[m.contiguous() for m in layer.down] for layer in weights.layers]

    def __call__(self, hidden: Tensor) -> Tensor:
        w, c = self.weights, self.config
        shape = (2, len(hidden), c.heads, c.levels, c.head_dim)
        caches = [hidden.new_empty(shape) for _ in w.layers]
        u_TH, codes = hidden, []
        for level in range(c.levels):
            assert w.projection is not None and w.final_norm is not None
            z_TD = F.linear(_norm(u_TH, w.input_norm, c.eps), w.projection[0])
            for n, layer in enumerate(w.layers):
                z_TD = self.layer(z_TD, layer, n, level, caches[n])
            head, bias = w.head_weights[level], w.head_biases[level]
            assert head is not None
            codes.append(F.linear(_norm(z_TD, w.final_norm[0], c.eps), head, bias)[:, :-1].argmax(1))
            table = w.tables[level]
            assert table is not None
            u_TH = table[codes[-1]] if level == 0 else u_TH + table[codes[-1]]
        return torch.stack(codes, 1)

    def layer(self, z_TD: Tensor, layer: DepthLayer, n: int, level: int, cache: Tensor) -> Tensor:
        c, rows = self.config, len(z_TD)
        weight, bias = self.qkv[n]
        q, k, v = F.linear(_norm(z_TD, layer.norm1, c.eps), weight, bias).view(rows, 3, c.heads, c.head_dim).unbind(1)
        cache[0, :, :, level], cache[1, :, :, level] = k, v
        mixed = F.scaled_dot_product_attention(q[:, :, None], cache[0, :, :, : level + 1], cache[1, :, :, : level + 1])
        z_TD = z_TD + F.linear(mixed.reshape(rows, -1), layer.out_weight[0], _first(layer.out_bias))
        act_TF = F.gelu(F.linear(_norm(z_TD, layer.norm2, c.eps), self.up[n][level]))
        return z_TD + F.linear(act_TF, self.down[n][level])


def cached(hidden: Tensor, weights: DepthWeights) -> Call:
    """KV-cached torch code."""
    model = Cached(weights)
    return _inference(lambda: model(hidden))


def compiled(hidden: Tensor, weights: DepthWeights) -> Call:
    """The same under torch.compile, all levels in one graph."""
    torch._dynamo.reset()
    model = torch.compile(Cached(weights), dynamic=False)
    return _inference(lambda: model(hidden))


def official_style(hidden: Tensor, weights: DepthWeights) -> Call:
    """The released code's way: every level runs all slots through all layers, weights strided as they are stored."""
    w, c = weights, weights.config
    assert w.projection is not None and w.final_norm is not None
    projection, final_norm = w.projection[0], w.final_norm[0]

    def layer_of(z_TLD: Tensor, layer: DepthLayer) -> Tensor:
        n_TLD = _norm(z_TLD, layer.norm1, c.eps)
        pairs = ((layer.q_weight, layer.q_bias), (layer.k_weight, layer.k_bias), (layer.v_weight, layer.v_bias))
        q, k, v = (
            F.linear(n_TLD, weight[0], _first(bias)).unflatten(-1, (c.heads, -1)).transpose(1, 2)
            for weight, bias in pairs
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        z_TLD = z_TLD + F.linear(mixed, layer.out_weight[0], _first(layer.out_bias))
        up = torch.einsum("tld,lfd->tlf", _norm(z_TLD, layer.norm2, c.eps), layer.up)
        return z_TLD + torch.einsum("tlf,ldf->tld", F.gelu(up), layer.down)

    def call() -> Tensor:
        codes_TL = torch.zeros(len(hidden), c.levels, dtype=torch.int64)
        for level in range(c.levels):
            rows = [table[codes_TL[:, i]] for i, table in enumerate(w.tables[:-1]) if table is not None]
            z_TLD = torch.cat([hidden[:, None], torch.stack(rows, 1).cumsum(1).to(hidden.dtype)], 1)
            z_TLD = F.linear(_norm(z_TLD, w.input_norm, c.eps), projection)
            for layer in w.layers:
                z_TLD = layer_of(z_TLD, layer)
            head = w.head_weights[level]
            assert head is not None
            logits_TV = F.linear(_norm(z_TLD[:, level], final_norm, c.eps), head, w.head_biases[level])
            codes_TL[:, level] = logits_TV[:, :-1].argmax(1)
        return codes_TL

    return _inference(call)


def moshi() -> tuple[Call, DepthWeights, dict[str, Tensor], Tensor]:
    """Moshi's depformer at its size: its own step, and what `depth_decode` needs for the same."""
    try:
        from moshi.models.lm import LMGen, LMModel
    except ImportError as error:
        raise Skip(f"pip install --no-deps moshi sentencepiece ({error})") from error
    from longcat_kernels.integrations.moshi import depth_weights

    torch.manual_seed(0)
    scale: Any = 4.125  # declared an int there
    model = LMModel(
        dim=4096, text_card=32000, n_q=8, dep_q=8, card=2048, num_heads=32, num_layers=0, hidden_scale=scale,
        causal=True, context=8, max_period=10000, gating="silu", norm="rms_norm_f32", positional_embedding="rope",
        depformer_dim=1024, depformer_dim_feedforward=int(4.125 * 1024), depformer_num_heads=16,
        depformer_num_layers=6, depformer_multi_linear=True, depformer_gating="silu", depformer_pos_emb="none",
        depformer_weights_per_step=True, delays=[0] * 9,
    ).eval()  # fmt: skip
    gen = LMGen(model, use_sampling=False)
    text, state = torch.zeros(1, dtype=torch.int64), torch.randn(1, 1, 4096)
    with torch.no_grad():
        more = {"start": model.depformer_text_emb(text)}
    return _inference(lambda: gen.depformer_step(text, state)), depth_weights(model), more, state[:, 0]


def csm() -> tuple[Call, DepthWeights, dict[str, Tensor], Tensor]:
    """CSM's depth decoder (transformers) at its size."""
    from transformers import CsmDepthDecoderConfig, CsmDepthDecoderForCausalLM

    from longcat_kernels.integrations.csm import depth_weights

    torch.manual_seed(0)
    decoder = CsmDepthDecoderForCausalLM(CsmDepthDecoderConfig()).eval()
    codes = decoder.config.num_codebooks - 1
    decoder.generation_config.update(do_sample=False, min_new_tokens=codes, max_new_tokens=codes)
    hidden, ids = torch.randn(1, decoder.config.backbone_hidden_size), torch.zeros(1, 2, dtype=torch.int64)

    def call() -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):
            return decoder.generate(input_ids=ids, backbone_last_hidden_state=hidden)[:, 1:]

    return _inference(call), depth_weights(decoder), {"prefix": ids[:, 1:]}, hidden


def qwen3_omni() -> tuple[Call, DepthWeights, dict[str, Tensor], Tensor]:
    """Qwen3-Omni's code predictor (transformers) at its size."""
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
        Qwen3OmniMoeTalkerCodePredictorConfig as Config,
    )

    from longcat_kernels.integrations.qwen3_omni import depth_weights

    torch.manual_seed(0)
    predictor = qwen.Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration(Config(num_code_groups=16)).eval()
    config = predictor.config
    embedding = torch.nn.Embedding(3072, config.hidden_size)
    talker = SimpleNamespace(code_predictor=predictor, get_input_embeddings=lambda: embedding)
    hidden, first = torch.randn(1, config.hidden_size), torch.zeros(1, 1, dtype=torch.int64)
    codes = config.num_code_groups - 1

    def call() -> Tensor:
        inputs = torch.cat([hidden[:, None], embedding(first)], 1)
        new = predictor.generate(inputs_embeds=inputs, max_new_tokens=codes, do_sample=False)
        return torch.cat([first, new], 1)

    return _inference(call), depth_weights(talker), {"prefix": first}, hidden


def draw_ours(logits: Tensor, params: Tensor) -> Call:
    """The compiled sampler alone."""
    if native.why_not() is not None:
        raise Skip(str(native.why_not()))
    rows = len(logits)
    numbers, zeros = params.expand(rows, 8).contiguous(), torch.zeros(rows, dtype=torch.int64)
    outputs = (torch.empty(rows), torch.empty(rows), torch.empty(rows, dtype=torch.int64))

    def call() -> Tensor:
        native.module().draw_codes(logits, numbers, zeros, zeros, 0, *outputs)
        return outputs[2]

    return call


def draw_by_sort(logits: Tensor, params: Tensor) -> Call:
    """The released server's way: softmax, a sort of all classes, cumulative sums, multinomial."""
    temperature, top_k, top_p = params[:3].tolist()

    def call() -> None:
        p_TV = (logits / temperature).softmax(1)
        sorted_TV, order_TV = p_TV.sort(dim=1, descending=True)
        before_TV = sorted_TV.cumsum(1) - sorted_TV
        keep = torch.arange(p_TV.shape[1]) < (int(top_k) or p_TV.shape[1])
        kept_TV = sorted_TV.masked_fill((before_TV > top_p) | ~keep, 0)
        order_TV.gather(1, torch.multinomial(kept_TV, 1))

    return _inference(call)


def _fused(layer: DepthLayer) -> tuple[Tensor, Tensor]:
    weights = [layer.q_weight[0], layer.k_weight[0], layer.v_weight[0]]
    assert layer.q_bias is not None and layer.v_bias is not None
    biases = [layer.q_bias[0], torch.zeros_like(layer.q_bias[0]), layer.v_bias[0]]
    return torch.cat(weights).contiguous(), torch.cat(biases)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _first(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[0]


def _inference(call: Callable[[], Any]) -> Call:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run
