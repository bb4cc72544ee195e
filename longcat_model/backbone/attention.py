"""Multi-head latent attention with scale corrections (LongCat-Flash, arXiv 2509.01322; DeepSeek-V2, arXiv 2405.04434).

Keys and values come from a latent of kv_rank channels and one rotary key shared by all heads. A full forward expands
the latents to per-head keys and values; decoding reads the cached latents as they are and folds the expansion into
the queries and the output ("absorbed"), whichever costs less.

Dimension key
    B batch    S new positions    T positions read, cached ones included    D model    H heads    P rotary pairs
    N channels of a head without position    V value channels of a head    C = N + 2P query channels of a head
    K latent channels    R = K + 2P cached channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_model import config
from longcat_model.backbone.cache import Cache
from longcat_model.backbone.norm import RMSNorm

LOW_RANK_EPS = 1e-6  # the released low-rank norms keep their class's default instead of the model's 1e-5


@dataclass(frozen=True)
class Context:
    """What every sub-block of one forward shares: made once by `Context.of`."""

    rotary: Tensor  # [B or 1, S, P] complex64 turns of the new positions
    mask: Tensor | None  # [B or 1, 1, S, T] bool, True where a position may read; None: see is_causal
    is_causal: bool  # plain causal attention over the new positions alone
    cache: Cache | None
    places: Tensor  # [B or 1, S] of the new positions in their rows

    @classmethod
    def of(cls, sizes: config.Attention, embeddings: Tensor, documents: Tensor | None, cache: Cache | None) -> Context:
        """For embeddings [B, S, D], documents [B, S] (None: all positions in document 0) after the cache's positions.

        Positions count from the start of the row, not of the document, as in the released training code; rotary
        attention only sees differences.
        """
        batch, new = embeddings.shape[:2]
        places = torch.arange(new, device=embeddings.device)[None]
        if documents is None and cache is None:
            return cls(rotary_table(sizes, places), None, True, None, places)
        if documents is None:
            documents = torch.zeros(batch, new, dtype=torch.int64, device=embeddings.device)
        seen = documents
        if cache is not None:
            places, seen = cache.reserve(documents)
        return cls(rotary_table(sizes, places), block_causal_mask(documents, seen, places), False, cache, places)


def rotary_table(sizes: config.Attention, positions: Tensor) -> Tensor:
    """The turns [..., P] of positions [...] as complex64 numbers of size 1: pair i turns by theta^(-i/P) a position.

    Angles are float32, as in the released code.
    """
    exponents = torch.arange(0, sizes.rope_dim, 2, dtype=torch.float32, device=positions.device) / sizes.rope_dim
    angles = positions[..., None].float() * (1.0 / sizes.rope_theta**exponents)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the interleaved pairs (x0, x1), (x2, x3), ... of x [..., 2P] as complex numbers, at least in float32."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(precise) * turns).flatten(-2).to(x.dtype)


def block_causal_mask(documents: Tensor, seen: Tensor, places: Tensor) -> Tensor:
    """[B, 1, S, T] bool: positions at `places` [B or 1, S] of documents [B, S] read, among those of the documents
    `seen` [B, T], the ones of their own document up to themselves.

    Padding (-1) is a document like any other, so that no row of the softmax is empty.
    """
    causal_BST = torch.arange(seen.shape[1], device=seen.device) <= places[..., None]
    return ((documents[:, :, None] == seen[:, None, :]) & causal_BST)[:, None]


class LatentAttention(nn.Module):
    """One attention sub-block; parameter names are the released ones.

    Raises:
        ValueError: rope_dim, nope_dim or kv_rank is odd, or value_dim exceeds the query channels of a head.
    """

    def __init__(self, hidden: int, sizes: config.Attention, sub_block: int) -> None:
        super().__init__()
        query_dim = sizes.nope_dim + sizes.rope_dim
        for name in ("rope_dim", "nope_dim", "kv_rank"):  # rotary pairs start at even channels
            if getattr(sizes, name) % 2:
                raise ValueError(f"LatentAttention: {name} must be even, got {getattr(sizes, name)}")
        if sizes.value_dim > query_dim:
            raise ValueError(
                f"LatentAttention: value_dim must be at most nope_dim + rope_dim = {query_dim}, got {sizes.value_dim}"
            )
        self.sizes, self.sub_block = sizes, sub_block
        self.q_a_proj = nn.Linear(hidden, sizes.q_rank, bias=False)
        self.q_a_layernorm = RMSNorm(sizes.q_rank, eps=LOW_RANK_EPS)
        self.q_b_proj = nn.Linear(sizes.q_rank, sizes.heads * query_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, sizes.kv_rank + sizes.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(sizes.kv_rank, eps=LOW_RANK_EPS)
        self.kv_b_proj = nn.Linear(sizes.kv_rank, sizes.heads * (sizes.nope_dim + sizes.value_dim), bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.value_dim, hidden, bias=False)
        # The query's correction scales both of its parts, so it moves into the softmax scale.
        self.softmax_scale = (hidden / sizes.q_rank) ** 0.5 * query_dim**-0.5
        self.latent_scale = (hidden / sizes.kv_rank) ** 0.5

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [B, S, D], normalised; returns [B, S, D] before the residual."""
        q_nope, q_rope = self._queries(x, context)
        latents = self._latents(x, context)
        if context.cache is not None:
            latents = context.cache.write(self.sub_block, context.places, latents)
        absorb = not context.is_causal and self._absorbing_is_cheaper(x.shape[1], latents.shape[1])
        attend = self._attend_absorbed if absorb else self._attend_expanded
        out: Tensor = self.o_proj(attend(q_nope, q_rope, latents, context).flatten(2))
        return out

    def _queries(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Returns the parts [B, S, H, N] and [B, S, H, 2P], the second one rotated."""
        q_BSHC = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.sizes.heads, -1))
        q_nope, q_rope = q_BSHC.split([self.sizes.nope_dim, self.sizes.rope_dim], -1)
        return q_nope, rotate(q_rope, context.rotary[:, :, None])

    def _latents(self, x: Tensor, context: Context) -> Tensor:
        """Returns [B, S, R]: the normalised and scaled latent, then the rotated key that all heads share."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.sizes.kv_rank, self.sizes.rope_dim], -1)
        return torch.cat([self.kv_a_layernorm(latent) * self.latent_scale, rotate(k_rope, context.rotary)], -1)

    def _absorbing_is_cheaper(self, new: int, total: int) -> bool:
        """Compares multiplications a head: the expansion's and the attention's, either way."""
        sizes = self.sizes
        expand = sizes.kv_rank * (sizes.nope_dim + sizes.value_dim)
        expanded = total * expand + new * total * (sizes.nope_dim + sizes.rope_dim + sizes.value_dim)
        absorbed = new * expand + new * total * (2 * sizes.kv_rank + sizes.rope_dim)
        return absorbed < expanded

    def _attend_expanded(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, context: Context) -> Tensor:
        """Returns [B, S, H, V] through per-head keys and values."""
        sizes = self.sizes
        latent_BTK, k_rope_BTP = latents.split([sizes.kv_rank, sizes.rope_dim], -1)
        kv_BTHX = self.kv_b_proj(latent_BTK).unflatten(-1, (sizes.heads, -1))
        k_nope, v_BTHV = kv_BTHX.split([sizes.nope_dim, sizes.value_dim], -1)
        q_BSHC = torch.cat([q_nope, q_rope], -1)
        k_BTHC = torch.cat([k_nope, k_rope_BTP[:, :, None].expand(-1, -1, sizes.heads, -1)], -1)
        # Values grow to the keys' width: torch's fused attention takes one width, and is 1.4 to 3 times as fast
        # as its unfused form here (8 x 4 x 256 positions, 48/32 channels, AVX-512, 2026-11).
        v_BTHC = F.pad(v_BTHV, (0, q_BSHC.shape[-1] - sizes.value_dim))
        out_BHSC = F.scaled_dot_product_attention(
            q_BSHC.transpose(1, 2),
            k_BTHC.transpose(1, 2),
            v_BTHC.transpose(1, 2),
            attn_mask=context.mask,
            is_causal=context.is_causal,
            scale=self.softmax_scale,
        )
        return out_BHSC.transpose(1, 2)[..., : sizes.value_dim]

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, context: Context) -> Tensor:
        """Returns [B, S, H, V] with the latents as the one key and value of all heads."""
        sizes = self.sizes
        w_HXK = self.kv_b_proj.weight.unflatten(0, (sizes.heads, -1))
        w_key_HNK, w_value_HVK = w_HXK.split([sizes.nope_dim, sizes.value_dim], 1)
        q_BSHR = torch.cat([torch.einsum("bshn,hnk->bshk", q_nope, w_key_HNK), q_rope], -1)
        # Heads become positions: they share one key, so one matrix product serves them all.
        mask = None if context.mask is None else context.mask.repeat_interleave(sizes.heads, -2)
        keys = latents[:, None]
        out = F.scaled_dot_product_attention(
            q_BSHR.flatten(1, 2)[:, None], keys, keys, attn_mask=mask, scale=self.softmax_scale
        )
        out_BSHK = out[:, 0, :, : sizes.kv_rank].unflatten(1, (-1, sizes.heads))
        return torch.einsum("bshk,hvk->bshv", out_BSHK, w_value_HVK)
