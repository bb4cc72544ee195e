"""`depth_decode` inside transformers' CSM: the 31 codes that follow a frame's first one, by one call.

    from longcat_kernels.integrations import csm
    model = CsmForConditionalGeneration.from_pretrained(...)
    csm.patch(model)

Dimension key
    B rows    L codebooks    V classes    H width of the backbone    D width of the depth decoder
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels.integrations._followed import FollowedWeights
from longcat_kernels.integrations._llama_layers import depth_layer, rope_of, silu_only
from longcat_kernels.ops.depth_decode import depth_decode
from longcat_kernels.reference.depth_sampling import DepthSampling
from longcat_kernels.reference.depth_weights import DepthConfig, DepthWeights


def patch(model: Any, *, seed: int = 0) -> None:
    """Makes a `CsmForConditionalGeneration` draw the codes of its frames by `depth_decode`.

    Its depth decoder's generation config still says how: do_sample, temperature, top_k, top_p, min_p. Greedy codes are
    those that it draws itself; samples are of the same distribution, from `seed`, row and frame instead of torch's
    generator. Weights may change later.

    Raises:
        ValueError: the depth decoder has a part that `depth_decode` has not.
    """
    model.depth_decoder.generate = _Generate(model.depth_decoder, seed)


def unpatch(model: Any) -> None:
    """Undoes `patch`."""
    vars(model.depth_decoder).pop("generate", None)


def depth_weights(decoder: Any) -> DepthWeights:
    """The weights of a `CsmDepthDecoderForCausalLM` as views: `hidden` is the backbone's state, level 0 is given.

    Raises:
        ValueError: its activation is not SiLU, its feed-forward has biases, or its rotary positions are not fixed.
    """
    c, model = decoder.config, decoder.model
    silu_only("csm", c)
    levels, classes = c.num_codebooks, c.vocab_size
    return DepthWeights(
        config=DepthConfig(
            classes=(classes,) * levels,
            hidden=c.backbone_hidden_size,
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
        tables=model.embed_tokens.weight.split(classes),
        layers=[depth_layer(layer) for layer in model.layers[: c.num_hidden_layers]],
        head_weights=[None, *decoder.codebooks_head.weight.mT.unbind()],
        projection=model.inputs_embeds_projector.weight[None],
        final_norm=model.norm.weight[None],
        rope=rope_of("csm", model.rotary_emb, levels),
    )


class _Generate:
    """What a patched decoder has instead of its method: an object and no closure, so that a copy has its own."""

    def __init__(self, decoder: Any, seed: int) -> None:
        self.decoder, self.seed, self.frames = decoder, seed, 0
        self.weights = FollowedWeights(decoder, [decoder], depth_weights)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, backbone_last_hidden_state: Tensor, **_: Any) -> Tensor:
        """input_ids [B, 2]: a placeholder and the first code; gives [B, 1 + L]."""
        codes_BL = depth_decode(
            backbone_last_hidden_state,
            self.weights.prepared(),
            _sampling(self.decoder.generation_config),
            seed=self.seed,
            step=self.frames,
            prefix=input_ids[:, 1:],
        ).codes
        self.frames += 1
        return torch.cat([input_ids[:, :1], codes_BL], dim=1)


def _sampling(config: Any) -> DepthSampling:
    if not config.do_sample:
        return DepthSampling(temperature=0.0)
    return DepthSampling(
        temperature=config.temperature if config.temperature is not None else 1.0,
        top_k=config.top_k or 0,
        top_p=config.top_p if config.top_p is not None else 1.0,
        min_p=config.min_p or 0.0,
    )
