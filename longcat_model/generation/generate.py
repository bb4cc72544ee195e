"""Text, images and speech from prompts: what to feed after a prompt, when to stop, and what the positions say.

Prompts are `sequence.Document`s of any lengths; their labels are not read. Prompt i of a call draws with seed + i, so
its result depends neither on the other prompts' content nor on when they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longcat_model.generation.decode import Request, decode
from longcat_model.generation.machine import ImageState, Position, SpeechState, State, TextState
from longcat_model.generation.sampling import GREEDY, IMAGE, SPEECH, TRANSCRIPT, Sampling
from longcat_model.model import LongcatNext
from longcat_model.released.differences import Unconditional, unconditional
from longcat_model.sequence import Document, Layout, join
from longcat_model.vocabulary import EOS, Vocabulary


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
    state = TextState(limit=max_tokens, sampling=sampling)
    return [[p.text for p in trace if p.text != EOS] for trace in decode(model, _requests(prompts, [state]))]


def generate_image(
    model: LongcatNext,
    prompts: Sequence[Document],
    *,
    layout: Layout,
    height: int,
    width: int,
    sampling: Sampling = IMAGE,
    guidance: float | None = None,
    cfg_uncond: Unconditional = "null",
) -> Tensor:
    """An image of height x width cells for each prompt; its size and start are appended here.

    Args:
        guidance: scale s of classifier-free guidance, logits = s * (conditional - unconditional) + unconditional at
            every level; None runs the conditional model alone.
        cfg_uncond: what stands in for the prompt then: see `released.differences.unconditional`.

    Returns:
        codes: int64 [prompts, height, width, L].

    Raises:
        ValueError: height or width below 1, or an unknown `cfg_uncond`.
    """
    _at_least_one("generate_image", height=height, width=width)
    prefix = layout.image_prefix(height, width)
    state = ImageState(ids=model.ids, height=height, width=width, sampling=sampling, guidance=guidance)
    requests = [
        Request(
            prompt=join(prompt, prefix).inputs,
            state=state,
            seed=i,
            partner=None if guidance is None else unconditional(prompt, prefix, cfg_uncond).inputs,
        )
        for i, prompt in enumerate(prompts)
    ]
    cells = [[p.visual for p in trace if p.visual] for trace in decode(model, requests)]
    return torch.tensor(cells, dtype=torch.int64).view(len(prompts), height, width, len(model.ids.visual_sizes))


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
    if transcripts is not None:
        _check_transcripts(transcripts, len(prompts), max_text, model.ids)
    given: Sequence[Sequence[int] | None] = [None] * len(prompts) if transcripts is None else transcripts
    states = [
        SpeechState(
            ids=model.ids,
            sampling=sampling,
            text_sampling=text_sampling,
            delay=1 if mode == "parallel" else None,
            max_text=max_text,
            max_frames=max_frames,
            transcript=None if transcript is None else tuple(transcript),
        )
        for transcript in given
    ]
    opening = Layout(model.ids, encode=lambda size: []).text([model.ids.audiogen_start])
    traces = decode(model, _requests([join(prompt, opening) for prompt in prompts], states))
    return [speech_of(trace, model.ids) for trace in traces]


def speech_of(trace: Sequence[Position], ids: Vocabulary) -> Speech:
    """The utterance that positions hold."""
    text = [p.text for p in trace if 0 <= p.text < ids.text_size]
    codes = [p.audio for p in trace if p.audio]
    return Speech(text, torch.tensor(codes, dtype=torch.int64).view(-1, len(ids.audio_sizes)))


def _requests(prompts: Sequence[Document], states: Sequence[State]) -> list[Request]:
    """One a prompt, with a state each or the same for all."""
    each = states if len(states) == len(prompts) else [states[0]] * len(prompts)
    return [Request(prompt=p.inputs, state=s, seed=i) for i, (p, s) in enumerate(zip(prompts, each, strict=True))]


def _check_transcripts(transcripts: Sequence[Sequence[int]], prompts: int, max_text: int, ids: Vocabulary) -> None:
    if len(transcripts) != prompts:
        raise ValueError(f"generate_speech: transcripts must be one a prompt ({prompts}), got {len(transcripts)}")
    longest = max(map(len, transcripts), default=0)
    if longest > max_text:
        raise ValueError(f"generate_speech: transcripts must have at most max_text = {max_text} ids, got {longest}")
    outside = [i for transcript in transcripts for i in transcript if not 0 <= i < ids.text_size]
    if outside:
        raise ValueError(f"generate_speech: transcripts must hold ids in [0, {ids.text_size}), got {outside[0]}")


def _at_least_one(name: str, **limits: int) -> None:
    for limit, value in limits.items():
        if value < 1:
            raise ValueError(f"{name}: {limit} must be at least 1, got {value}")
