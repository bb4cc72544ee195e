"""Qwen3-Omni's code predictor (transformers) as `depth_decode` takes it.

from longcat_kernels import PreparedDepth, depth_decode
from longcat_kernels.integrations import qwen3_omni
weights = PreparedDepth(qwen3_omni.depth_weights(model.talker))
decoding = depth_decode(hidden, weights, prefix=first_codes[:, None])  # embedding: the talker's next input
"""

from __future__ import annotations

from typing import Any

from longcat_kernels.integrations._llama_layers import depth_layer, rope_of, silu_only
from longcat_kernels.reference.depth_weights import DepthConfig, DepthWeights


def depth_weights(talker: Any) -> DepthWeights:
    """The weights of the `code_predictor` of a `Qwen3OmniMoeTalkerForConditionalGeneration` as views.

    `hidden` is the talker's last state; level 0 is given, the talker's own code.

    Raises:
        ValueError: its activation is not SiLU, it attends in windows, or its rotary positions are not fixed.
    """
    predictor = talker.code_predictor
    c, model = predictor.config, predictor.model
    silu_only("qwen3_omni", c)
    if model.has_sliding_layers:
        raise ValueError("qwen3_omni: layers must attend to all codes for depth_decode, got sliding windows")
    first = talker.get_input_embeddings().weight
    return DepthWeights(
        config=DepthConfig(
            classes=(first.shape[0], *(c.vocab_size,) * (c.num_code_groups - 1)),
            hidden=c.hidden_size,
            dim=c.hidden_size,
            layers=c.num_hidden_layers,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            ffn=c.intermediate_size,
            conditioning="last",
            given=1,
            gated=True,
            eps=c.rms_norm_eps,
        ),
        tables=[first, *(embedding.weight for embedding in model.codec_embedding)],
        layers=[depth_layer(layer) for layer in model.layers[: c.num_hidden_layers]],
        head_weights=[None, *(head.weight for head in predictor.lm_head)],
        final_norm=model.norm.weight[None],
        rope=rope_of("qwen3_omni", model.rotary_emb, c.num_code_groups),
    )
