"""The loop of generation: one position for all rows through the cached backbone, then the heads its state asks for.

Dimension key
    N rows of a group    M rows of the model: N, or 2 N interleaved (conditional, unconditional)    S prompt positions
    D model    L quantizer levels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import PreparedDepth, depth_decode, sample
from longcat_model.backbone import Cache
from longcat_model.generation.machine import Answers, Heads, State
from longcat_model.generation.sampling import Sampling
from longcat_model.model import LongcatNext
from longcat_model.sequence import NONE, Inputs


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """Asks the heads. Row i of a group draws with `seeds[i]` plus the sampling's seed."""

    model: LongcatNext
    visual: PreparedDepth
    audio: PreparedDepth
    text: Sampling
    codes: Sampling
    text_mask: Tensor  # bool [text rows]: ids the text head may choose
    guidance: float | None = None  # scale of classifier-free guidance; hidden states are then interleaved pairs

    def answers(self, hidden_MD: Tensor, heads: Heads, seeds: Tensor, step: int, written: Inputs | None) -> Answers:
        """Answers of the rows that ask; the others' are -1. On the CPU.

        Args:
            written: [N, positions] what each row has written since its prompt, or None.
        """
        ids, size = self.model.ids, seeds.shape[0]
        text_N = torch.full((size,), NONE)
        visual_NL = torch.full((size, len(ids.visual_sizes)), NONE)
        audio_NL = torch.full((size, len(ids.audio_sizes)), NONE)
        for rows, hidden_ND in _asking(heads.text, hidden_MD):
            logits_NV = self.model.text_logits(hidden_ND).masked_fill(~self.text_mask, -torch.inf)
            said = _history(self.text, None if written is None else written.text[rows], logits_NV)
            drawn = sample(logits_NV, **self.text.numbers(), history=said, **self._stream(self.text, seeds[rows], step))
            text_N[rows] = drawn.ids.cpu()
        for rows, hidden_ND in _asking(heads.visual, hidden_MD):
            past = None if written is None else written.visual[rows]
            visual_NL[rows] = self._cells(hidden_ND, seeds[rows], step, past)
        for rows, hidden_ND in _asking(heads.audio, hidden_MD):
            past = None if written is None else written.audio[rows]
            audio_NL[rows] = self._frames(hidden_ND, seeds[rows], step, past, heads.audio_may_end[rows])
        return Answers(text_N, visual_NL, audio_NL)

    def _cells(self, hidden_MD: Tensor, seeds: Tensor, step: int, past: Tensor | None) -> Tensor:
        copies = hidden_MD.shape[0] // seeds.shape[0]
        guided = self.guidance is not None
        decoding = depth_decode(
            hidden_MD,
            self.visual,
            self.codes.of_codes(guidance=1.0 if self.guidance is None else self.guidance),
            pairs="interleaved" if guided else None,
            history=_history(self.codes, past, hidden_MD, copies),
            **self._stream(self.codes, seeds.repeat_interleave(copies), step),
        )
        return decoding.codes[::copies].cpu()

    def _frames(self, hidden_ND: Tensor, seeds: Tensor, step: int, past: Tensor | None, may_end: Tensor) -> Tensor:
        """The end is level 0's to say, in the rows that may."""
        is_first_L = torch.arange(len(self.model.ids.audio_sizes)) == 0
        decoding = depth_decode(
            hidden_ND,
            self.audio,
            self.codes.of_codes(end=(may_end[:, None] & is_first_L).to(hidden_ND.device)),
            history=_history(self.codes, past, hidden_ND),
            **self._stream(self.codes, seeds, step),
        )
        return decoding.codes.cpu()

    def _stream(self, sampling: Sampling, seeds: Tensor, step: int) -> dict[str, Any]:
        return {"seed": (sampling.seed + seeds).to(self.text_mask.device), "step": step}


def _history(sampling: Sampling, past: Tensor | None, like: Tensor, copies: int = 1) -> tuple[Tensor, Tensor] | None:
    """Ids [N, positions, ...] as the sampler's history, `copies` rows each; None where nothing is penalised."""
    if sampling.repetition_penalty == 1 or past is None:
        return None
    offsets = torch.arange(past.shape[0] * copies + 1) * past.shape[1]
    flat = past.repeat_interleave(copies, 0).flatten(0, 1)
    return flat.to(like.device), offsets.to(like.device)


@torch.no_grad()
def decode(
    chooser: Chooser,
    prompts: Sequence[Inputs],
    start: Callable[[list[int]], State],
    *,
    positions: int,
    unconditional: Sequence[Inputs] | None = None,
) -> list[Inputs]:
    """Continues every prompt until its state says it is finished.

    Prompts of equal length run as one batch; finished rows leave it.

    Args:
        prompts: one a row, without the batch dimension, each at least one position long.
        start: the state of a group, from the numbers of its prompts.
        positions: most positions a row may write.
        unconditional: each prompt's partner for classifier-free guidance, as long as the prompt.

    Returns:
        What was written after each prompt, the position that finished it included.
    """
    written: list[Inputs | None] = [None] * len(prompts)
    for group in _equal_lengths(prompts):
        rows = [prompts[i] for i in group]
        if unconditional is not None:
            rows = [prompt for i in group for prompt in (prompts[i], unconditional[i])]
        prompt = Inputs(*(torch.stack(parts) for parts in zip(*map(_tensors, rows), strict=True)))
        traces = _decode_group(chooser, prompt, start(group), torch.tensor(group), positions)
        for i, trace in zip(group, traces, strict=True):
            written[i] = trace
    return [trace for trace in written if trace is not None]


def _decode_group(chooser: Chooser, prompt: Inputs, state: State, seeds: Tensor, positions: int) -> list[Inputs]:
    model = chooser.model
    weight, size = model.embed_tokens.weight, seeds.shape[0]
    copies = prompt.text.shape[0] // size
    cache = Cache.empty(
        model.sizes.backbone,
        prompt.text.shape[0],
        prompt.text.shape[1] + positions,
        device=weight.device,
        dtype=weight.dtype,
    )
    alive, lengths = torch.arange(size), torch.zeros(size, dtype=torch.int64)
    steps: list[Inputs] = []
    inputs = prompt
    while True:
        hidden_MD = model(inputs.to(weight.device), cache).hidden[:, -1]
        answers = chooser.answers(hidden_MD, state.heads(), seeds[alive], len(steps), _written(chooser, steps, alive))
        state, fed, done = state.advance(answers)
        steps.append(Inputs(*(_scatter(x, alive, size) for x in _tensors(fed))))
        lengths[alive] += 1
        if bool(done.all()):
            break
        if bool(done.any()):
            keep = (~done).nonzero().squeeze(1)
            state, fed, alive = state.select(keep), Inputs(*(x[keep] for x in _tensors(fed))), alive[keep]
            cache = cache.select(_copied(keep, copies).to(weight.device))
        inputs = Inputs(*(x.repeat_interleave(copies, 0) for x in _tensors(fed)))
    whole = [torch.cat(parts, 1) for parts in zip(*map(_tensors, steps), strict=True)]
    return [Inputs(*(x[row, :length] for x in whole)) for row, length in enumerate(lengths.tolist())]


def _written(chooser: Chooser, steps: list[Inputs], rows: Tensor) -> Inputs | None:
    """What the rows have written so far, where somebody is penalised for it."""
    if not steps or (chooser.text.repetition_penalty == 1 and chooser.codes.repetition_penalty == 1):
        return None
    return Inputs(*(torch.cat(parts, 1)[rows] for parts in zip(*map(_tensors, steps), strict=True)))


def _asking(asks: Tensor, hidden_MD: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The rows that ask and their hidden states, as a list of one; an empty list if nobody does."""
    rows = asks.nonzero().squeeze(1)
    if not rows.numel():
        return []
    if rows.numel() == asks.numel():
        return [(rows, hidden_MD)]
    copies = hidden_MD.shape[0] // asks.shape[0]
    return [(rows, hidden_MD[_copied(rows, copies).to(hidden_MD.device)])]


def _copied(rows: Tensor, copies: int) -> Tensor:
    """Rows of the model that belong to rows of the group."""
    return (rows[:, None] * copies + torch.arange(copies)).flatten()


def _scatter(part: Tensor, rows: Tensor, size: int) -> Tensor:
    return part.new_full((size, *part.shape[1:]), NONE).index_copy_(0, rows, part)


def _equal_lengths(prompts: Sequence[Inputs]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if not prompt.text.shape[0]:
            raise ValueError(f"generate: prompts must not be empty, got prompt {i} without positions")
        groups.setdefault(prompt.text.shape[0], []).append(i)
    return list(groups.values())


def _tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.text, inputs.marker, inputs.visual, inputs.audio, inputs.documents
