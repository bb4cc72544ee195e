"""LongCat-Next: one model that reads and predicts text, images and speech as ids of one space.

    inputs ──embed──▶ embeddings [B, S, D] ──backbone──▶ hidden [B, S, D] ──▶ text_logits           next text id
                                                                          ├─▶ visual_head           next image cell
                                                                          └─▶ audio_head            next speech frame

A position's embedding is the sum of what it holds: the n-gram embedding of a text id, the plain row of a marker, the
summed level rows of a speech frame, or the summed level rows of an image cell after the Pre-Buffer. All rows come from
one joint table, which the depth heads also condition on. Tokenizers are separate modules: codes go in, codes come out.

Dimension key
    B batch    S sequence    T = B * S positions    M positions of one modality    D model    L quantizer levels
    V rows of the joint table
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_kernels.modules import NGramEmbedding
from longcat_model import config
from longcat_model.backbone import Backbone, BackboneOutput, Cache
from longcat_model.backbone.feedforward import SwiGLU
from longcat_model.heads import TextHead, depth_head
from longcat_model.sequence import Inputs
from longcat_model.vocabulary import Vocabulary


class PreBuffer(nn.Module):
    """Eases summed code embeddings into the backbone's input space: v + SwiGLU(LayerNorm(v))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.pre_layernorm = nn.LayerNorm(hidden, eps=1e-5)
        self.mlp = SwiGLU(hidden, width)

    def forward(self, v: Tensor) -> Tensor:
        """v: [..., D]; returns the same shape and dtype."""
        out: Tensor = v + self.mlp(self.pre_layernorm(v))
        return out


class LongcatNext(nn.Module):
    """The language model of all modalities; most of its parts have the released parameter names within.

    Args:
        tables_on_host: the n-gram tables stay where they are when the model moves; see `NGramEmbedding`.
    """

    def __init__(self, sizes: config.Model, *, tables_on_host: bool = False) -> None:
        super().__init__()
        hidden = sizes.backbone.hidden
        self.sizes = sizes
        self.ids = Vocabulary.of(sizes.vocabulary)
        self.embed_tokens = nn.Embedding(self.ids.rows, hidden)
        self.ngram = _ngram_embedding(hidden, sizes.backbone.ngram, self.ids, tables_on_host)
        self.pre_buffer = PreBuffer(hidden, sizes.pre_buffer_width)
        self.backbone = Backbone(sizes.backbone)
        self.lm_head = TextHead(hidden, self.ids.text_rows)
        self.visual_head = depth_head(hidden, sizes.visual_head, sizes.vocabulary.visual_sizes)
        self.audio_head = depth_head(hidden, sizes.audio_head, sizes.vocabulary.audio_sizes)
        self._initialize_embeddings()

    def _initialize_embeddings(self) -> None:
        """Small normal rows, of words and n-grams alike; the other modules initialize themselves.

        Against deviation hidden^-0.5 at hidden 128: text loss after 240 steps on synthetic digits 0.58 instead of 0.75,
        loss on predicted codes 2 % (visual) and 5 % (audio) higher; means of three seeds, the sign alike in each.
        """
        for parameter in (*self.embed_tokens.parameters(), *(() if self.ngram is None else self.ngram.parameters())):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Inputs, cache: Cache | None = None) -> BackboneOutput:
        """Reads rows of positions, after those in the cache if one is given (then under `torch.no_grad()`)."""
        if cache is None:
            output: BackboneOutput = self.backbone(self.embed(inputs), inputs.documents)
            return output
        output = self.backbone(self.embed(inputs, cache.history(inputs.documents)), inputs.documents, cache)
        cache.note_text(inputs.text)
        return output

    def embed(self, inputs: Inputs, history: Tensor | None = None) -> Tensor:
        """Returns [B, S, D]; history: [B, neighbors - 1] int64 text ids before the first position (`Cache.history`).

        Positions with visual or audio codes are picked out first, so each bridge costs what it is used.

        Raises:
            ValueError: shapes disagree with each other or with the vocabulary, or an id or a code lies outside it.
        """
        self._check(inputs)
        embeddings_TD = self._embed_text(inputs, history).flatten(0, 1)
        marker_T, visual_TL, audio_TL = inputs.marker.flatten(), inputs.visual.flatten(0, 1), inputs.audio.flatten(0, 1)
        markers_M = (marker_T >= 0).nonzero().squeeze(1)
        cells_M = (visual_TL[:, 0] >= 0).nonzero().squeeze(1)
        frames_M = (audio_TL[:, 0] >= 0).nonzero().squeeze(1)
        parts_MD = [
            self.embed_tokens(marker_T[markers_M]),
            self.pre_buffer(self._sum_levels("visual", visual_TL[cells_M])),
            self._sum_levels("audio", audio_TL[frames_M]),
        ]
        embeddings_TD = embeddings_TD.index_add(0, torch.cat([markers_M, cells_M, frames_M]), torch.cat(parts_MD))
        return embeddings_TD.unflatten(0, inputs.text.shape)

    def _check(self, inputs: Inputs) -> None:
        rows = list(inputs.text.shape)
        if len(rows) != 2:
            raise ValueError(f"LongcatNext: inputs.text must be [B, S], got {rows}")
        shapes = {
            "marker": rows,
            "visual": [*rows, len(self.ids.visual_sizes)],
            "audio": [*rows, len(self.ids.audio_sizes)],
            "documents": rows,
        }
        for name, shape in shapes.items():
            found = list(getattr(inputs, name).shape)
            if found != shape:
                raise ValueError(f"LongcatNext: inputs.{name} must be {shape}, got {found}")
        for name in ("text", "marker"):
            ids: Tensor = getattr(inputs, name)
            if ids.numel() and int(ids.max()) >= self.ids.text_rows:
                raise ValueError(f"LongcatNext: inputs.{name} must be below {self.ids.text_rows}, got {int(ids.max())}")

    def _embed_text(self, inputs: Inputs, history: Tensor | None) -> Tensor:
        if self.ngram is not None:
            embeddings: Tensor = self.ngram(inputs.text, self.embed_tokens.weight, inputs.documents, history)
            return embeddings
        return self.embed_tokens(inputs.text.clamp(min=0)) * (inputs.text >= 0)[..., None]

    def _sum_levels(self, modality: str, codes: Tensor) -> Tensor:
        """Sums the joint table's rows of local codes [M, L] over the levels."""
        sizes: tuple[int, ...] = getattr(self.ids, f"{modality}_sizes")
        offsets: tuple[int, ...] = getattr(self.ids, f"{modality}_offsets")
        # A code too large would name a row of the next level, and nothing would fail.
        if bool(((codes < 0) | (codes >= torch.tensor(sizes, device=codes.device))).any()):
            found = [codes.amin(0).tolist(), codes.amax(0).tolist()]
            raise ValueError(f"LongcatNext: inputs.{modality} must be in [0, {list(sizes)}) by level, got {found}")
        return F.embedding(codes + torch.tensor(offsets, device=codes.device), self.embed_tokens.weight).sum(1)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [..., D] after the final norm; returns [..., text_rows] float32."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def visual_tables(self) -> list[Tensor]:
        """Each visual level's rows [C_l + 1, D] of the joint table, as views: what its depth head conditions on."""
        return self._tables(self.ids.visual_offsets, self.ids.visual_sizes)

    def audio_tables(self) -> list[Tensor]:
        """Each audio level's rows [C_l + 1, D] of the joint table, as views: what its depth head conditions on."""
        return self._tables(self.ids.audio_offsets, self.ids.audio_sizes)

    def _tables(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        table_VD = self.embed_tokens.weight
        return [table_VD[first : first + size + 1] for first, size in zip(offsets, sizes, strict=True)]


def _ngram_embedding(
    hidden: int, sizes: config.NGram | None, ids: Vocabulary, tables_on_host: bool
) -> NGramEmbedding | None:
    if sizes is None:
        return None
    return NGramEmbedding(
        hidden,
        rows=sizes.rows,
        base=ids.text_size,
        neighbors=sizes.neighbors,
        splits=sizes.splits,
        ignored=ids.ignored_by_ngrams,
        eos=sizes.eos_id,
        sparse=False,  # the optimizer is AdamW over all parameters
        tables_on_host=tables_on_host,
    )
