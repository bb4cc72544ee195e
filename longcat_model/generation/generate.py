"""Text, images and speech from prompts: what to feed after a prompt, when to stop, and what the positions say.

Prompts are `sequence.Document`s of any lengths; their labels are not read. Prompt i of a call draws with seed + i, so
its result depends neither on the other prompts' content nor on when they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longcat_model.generation.decode import Chooser, decode
from longcat_model.generation.machine import ImageState, SpeechState, State, TextState, position
from longcat_model.generation.sampling import GREEDY, IMAGE, SPEECH, TRANSCRIPT, Sampling
from longcat_model.model import LongcatNext
from longcat_model.sequence import NULL, Document, Inputs, Layout, drop_condition, join
from longcat_model.vocabulary import BOS, EOS, PAD, SPECIAL_TOKENS, Vocabulary

# Special tokens from here on never had a text loss in the released fine-tuning code (ids 131085 to 131124).
FIRST_UNTRAINED = 13


@dataclass(frozen=True)
class Speech:
    """One utterance."""

    text: list[int]  # the transcript
    codes: Tensor  # int64 [n, L]


def generate_text(
    model: LongcatNext, prompts: Sequence[Document], *, max_tokens: int = 256, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """Text that follows each prompt, up to and without EOS, at most `max_tokens` ids.

    Raises:
        ValueError: an empty prompt or `max_tokens` below 1.
    """
    _at_least_one("generate_text", max_tokens=max_tokens)
    allowed = torch.ones(model.ids.text_rows, dtype=torch.bool)
    allowed[[NULL, BOS, PAD]] = False
    allowed[model.ids.text_size + FIRST_UNTRAINED : model.ids.text_size + SPECIAL_TOKENS] = False

    def start(group: list[int]) -> State:
        return TextState(model.ids, len(group), max_tokens)

    traces = decode(_chooser(model, allowed, text=sampling), [p.inputs for p in prompts], start, positions=max_tokens)
    return [[i for i in trace.text.tolist() if i != EOS] for trace in traces]


def generate_image(
    model: LongcatNext,
    prompts: Sequence[Document],
    *,
    layout: Layout,
    height: int,
    width: int,
    sampling: Sampling = IMAGE,
    guidance: float | None = None,
) -> Tensor:
    """An image of height x width cells for each prompt; its size and start are appended here.

    Args:
        guidance: scale s of classifier-free guidance, logits = s * (conditional - unconditional) + unconditional at
            every level; None runs the conditional model alone. The unconditional prompt is `drop_condition(prompt)`:
            as long, text id 0 everywhere, then the same size and start.

    Returns:
        codes: int64 [prompts, height, width, L].

    Raises:
        ValueError: height or width below 1.
    """
    _at_least_one("generate_image", height=height, width=width)
    levels = len(model.ids.visual_sizes)
    if not prompts:
        return torch.empty(0, height, width, levels, dtype=torch.int64)
    prefix = layout.image_prefix(height, width)

    def start(group: list[int]) -> State:
        return ImageState(model.ids, len(group), height, width)

    traces = decode(
        _chooser(model, None, codes=sampling, guidance=guidance),
        [join(p, prefix).inputs for p in prompts],
        start,
        positions=height * (width + 1),
        unconditional=None if guidance is None else [join(drop_condition(p), prefix).inputs for p in prompts],
    )
    cells = [trace.visual[trace.visual[:, 0] >= 0] for trace in traces]
    return torch.stack(cells).view(len(prompts), height, width, levels)


def generate_speech(
    model: LongcatNext,
    prompts: Sequence[Document],
    *,
    mode: str = "serial",
    transcripts: Sequence[Sequence[int]] | None = None,
    sampling: Sampling = SPEECH,
    text_sampling: Sampling = TRANSCRIPT,
    max_frames: int = 1000,
    max_text: int = 512,
) -> list[Speech]:
    """A transcript and its speech for each prompt; the start of speech is appended here.

    Args:
        mode: "serial", the whole transcript before the first frame; "parallel", both at once from the second position
            on (report 2.5.3; `sequence.Layout.speak` shows both).
        transcripts: what to say, text ids for each prompt; None lets the text head write it.
        sampling: of the codes.
        text_sampling: of the transcript.
        max_frames: frames after which speech is cut off (the released runtime's 1000: 80 s).
        max_text: ids after which a transcript is cut off.

    Returns:
        One `Speech` a prompt. Unless cut off, its audio has at least one frame and ends after its transcript has.

    Raises:
        ValueError: an unknown mode, not one transcript a prompt, one longer than `max_text`, or a limit below 1.
    """
    _at_least_one("generate_speech", max_frames=max_frames, max_text=max_text)
    if mode not in ("serial", "parallel"):
        raise ValueError(f'generate_speech: mode must be "serial" or "parallel", got "{mode}"')
    forced = None if transcripts is None else _transcripts(transcripts, len(prompts), max_text, model.ids)

    def start(group: list[int]) -> State:
        return SpeechState.start(
            model.ids,
            len(group),
            delay=1 if mode == "parallel" else None,
            max_text=max_text,
            max_frames=max_frames,
            transcript=None if forced is None else forced[group],
        )

    allowed = torch.zeros(model.ids.text_rows, dtype=torch.bool)
    allowed[PAD + 1 : model.ids.text_size] = True
    allowed[model.ids.audiotext_end] = True
    opening = position(model.ids, torch.tensor([model.ids.audiogen_start]))
    traces = decode(
        _chooser(model, allowed, text=text_sampling, codes=sampling),
        [_append(prompt.inputs, opening) for prompt in prompts],
        start,
        positions=max_text + max_frames + 2,
    )
    return [_speech(trace, model.ids) for trace in traces]


def _speech(trace: Inputs, ids: Vocabulary) -> Speech:
    text_T = trace.text[(trace.text >= 0) & (trace.text < ids.text_size)]
    return Speech(text_T.tolist(), trace.audio[trace.audio[:, 0] >= 0])


def _transcripts(transcripts: Sequence[Sequence[int]], prompts: int, max_text: int, ids: Vocabulary) -> Tensor:
    """int64 [prompts, longest + 1], filled up with the end of text."""
    if len(transcripts) != prompts:
        raise ValueError(f"generate_speech: transcripts must be one a prompt ({prompts}), got {len(transcripts)}")
    longest = max(map(len, transcripts), default=0)
    if longest > max_text:
        raise ValueError(f"generate_speech: transcripts must have at most max_text = {max_text} ids, got {longest}")
    outside = [i for transcript in transcripts for i in transcript if not 0 <= i < ids.text_size]
    if outside:
        raise ValueError(f"generate_speech: transcripts must hold ids in [0, {ids.text_size}), got {outside[0]}")
    return torch.tensor([[*t, *[ids.audiotext_end] * (longest + 1 - len(t))] for t in transcripts])


def _append(inputs: Inputs, one: Inputs) -> Inputs:
    return Inputs(
        torch.cat([inputs.text, one.text[0]]),
        torch.cat([inputs.marker, one.marker[0]]),
        torch.cat([inputs.visual, one.visual[0]]),
        torch.cat([inputs.audio, one.audio[0]]),
        torch.cat([inputs.documents, one.documents[0]]),
    )


def _chooser(
    model: LongcatNext,
    allowed: Tensor | None,
    *,
    text: Sampling = GREEDY,
    codes: Sampling = GREEDY,
    guidance: float | None = None,
) -> Chooser:
    mask = torch.ones(model.ids.text_rows, dtype=torch.bool) if allowed is None else allowed
    device = model.embed_tokens.weight.device
    return Chooser(
        model=model,
        visual=model.visual_head.prepared(model.visual_tables()),
        audio=model.audio_head.prepared(model.audio_tables()),
        text=text,
        codes=codes,
        text_mask=mask.to(device),
        guidance=guidance,
    )


def _at_least_one(name: str, **limits: int) -> None:
    for limit, value in limits.items():
        if value < 1:
            raise ValueError(f"{name}: {limit} must be at least 1, got {value}")
