"""Where the two official runtimes differ from each other, and what this project does.

The Hugging Face code (HF) and the serving runtime (`LongCat-Next-inference` on SGLang-FluentLLM) define different
distributions for the same settings. Each difference is decided here once; those with a parameter named in the last
column can be chosen. `TRANSFORMERS` and `SERVING` are each runtime's choices together.

    difference             HF                              serving runtime             here
    ---------------------  ------------------------------  --------------------------  ---------------------------------
    unconditional prompt   id 0 at every position, size    size and image start alone  cfg_uncond: the prompt's ids are
                           and image start included                                    0, size and start stay
    guidance scale         3.0                             1.8                         guidance
    truncation             top_k, then top_p of what is    both of one softmax         Sampling.order: as HF
                           left
    temperature 0          (not known)                     becomes 1                   greedy
    image class C_l        may be drawn                    masked                      masked: images end by counting
    audio class C_l, l>0   may be drawn, though the codec  likewise                    masked
                           has no such entry
    repetition penalty     codes written at this level     and code 0, and stale rows  codes written at this level
                                                           of earlier requests
    its history            whole                           last 2048 frames            whole
    end of a transcript    a pad is drawn                  likewise                    a pad or TE, the report's end of
                                                                                       text, which is trained here
    end of an image        counted                         max_new_tokens: the test    counted
                                                           for an end cannot be true
    after an image         forced end of text              nothing                     Settings.media: the answer ends,
                                                                                       or text goes on
    media begun by text    breaks                          not seen                    Settings.media: so many may be
    frame with code 0 at   embedded                        embedded as nothing         embedded: 0 is a code like others
    level 0
    n-grams across EOS     no                              yes, in the prefill         no
    n-gram hash 0          adds nothing                    row 0, in the prefill       adds nothing
    depth placeholders     text row 0                      code 0 of the level         none: no row reads later ones
    several utterances     no                              yes                         Settings.media
    codebooks in search    as loaded: bfloat16 values      bfloat16 values             float32 as stored; `rounded` has
                                                                                       the others'

Known defects that change nothing here, because no code of theirs runs here: in HF the unconditional row is all 0 by a
slip in its tiling (the code means to keep what follows the condition, which is `cfg_uncond="null"`), and an image that
starts in mid-generation meets a cache of another batch size; in the serving runtime every image ends by running out of
tokens. What HF is said to do was read in a copy of its code, not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from longcat_model.sequence import NONE, Document, drop_condition, join

Unconditional = Literal["null", "bare", "all_null"]
PADDING = -1  # the document number of positions that nobody sees


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What decides which image a prompt gives, for the same weights and seed."""

    cfg_uncond: Unconditional
    order: str  # of truncation: see `longcat_model.generation.Sampling`
    guidance: float


HERE = Runtime(cfg_uncond="null", order="sequential", guidance=3.0)
TRANSFORMERS = Runtime(cfg_uncond="all_null", order="sequential", guidance=3.0)
SERVING = Runtime(cfg_uncond="bare", order="joint", guidance=1.8)


def unconditional(prompt: Document, prefix: Document, kind: Unconditional = "null") -> Document:
    """What classifier-free guidance compares `join(prompt, prefix)` with, in as many positions.

    Args:
        prompt: the condition.
        prefix: `Layout.image_prefix`: the image's size and start.
        kind: "null", text id 0 in place of the condition, the form that training drops conditions to; "bare", the
            prefix alone, behind padding that it does not see; "all_null", text id 0 throughout.

    Raises:
        ValueError: `kind` is none of these.
    """
    if kind not in get_args(Unconditional):
        raise ValueError(f"unconditional: kind must be one of {', '.join(get_args(Unconditional))}, got {kind!r}")
    if kind == "all_null":
        return drop_condition(join(prompt, prefix))
    dropped = drop_condition(prompt)
    if kind == "bare":
        dropped.inputs.text.fill_(NONE)
        dropped.inputs.documents.fill_(PADDING)
    return join(dropped, prefix)


def rounded(codebook: Tensor) -> Tensor:
    """A float32 codebook with the values that the official runtimes search: rounded to bfloat16."""
    return codebook.to(torch.bfloat16).float()
