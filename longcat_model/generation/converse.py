"""Answers to conversations in the official message format: any tasks, any number at once.

job = prepare(conversations, system, settings)      everything is read and checked; nothing is computed
job.memory                                          what the answers will need at most
answers = job.run(listen=print)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from longcat_model import messages as official
from longcat_model.conversation import blank
from longcat_model.generation import memory
from longcat_model.generation.answers import Answer, Event, Listener, Painted, Spoken
from longcat_model.generation.decode import Partner, Request, cache_bytes, decode
from longcat_model.generation.machine import Position
from longcat_model.generation.memory import Memory
from longcat_model.generation.prefill import Prefixes
from longcat_model.generation.prompts import Files, context, encode, read_files
from longcat_model.generation.settings import Settings
from longcat_model.messages import StartImage, StartSpeech
from longcat_model.released import memory as released_memory
from longcat_model.released.differences import unconditional
from longcat_model.released.system import IMAGE_DECODER, VOCODER, open_system
from longcat_model.sequence import NULL, Document, Layout, join
from longcat_model.system import System
from longcat_model.vocabulary import EOS

Messages = Sequence[Mapping[str, str]]
LONGEST = 131_072  # positions that the released model was trained for


def generate(
    messages: Messages | Sequence[Messages],
    *,
    system: System | Path | str,
    settings: Settings | Sequence[Settings] | None = None,
    seed: int | Sequence[int] = 0,
    roles: bool = True,
    directory: Path = Path(),
    listen: Callable[[Event], None] | None = None,
    prefixes: Prefixes | None = None,
    max_memory: int | None = None,
) -> Answer | list[Answer]:
    """Answers one conversation or many; see `longcat_model.messages` for what may stand in them.

    Args:
        messages: a conversation, a list of {"role": ..., "content": ...}, or a list of conversations.
        system: a trained system or a released checkpoint, or the directory of one.
        settings: of every answer, or one each.
        seed: conversation i draws with seed + i, or one each. An answer depends on its conversation, its settings and
            its seed, and not on the others.
        roles: write role markers; False for a system that was trained without, as the demo's is.
        directory: what relative paths in messages start from.
        listen: is told every piece of text and every code as it comes.
        prefixes: of the system's model: prompts that begin alike are read once over all calls that share it.
        max_memory: most bytes that may be needed beside the weights: `Job.memory`.

    Returns:
        An answer, or a list for a list.

    Raises:
        ValueError: messages, a file in them, a length, or the memory needed; before anything is computed.
    """
    conversations, is_one = conversations_of(messages)
    job = prepare(conversations, system, settings, seed=seed, roles=roles, directory=directory)
    job.check_memory(max_memory)
    answers = job.run(listen=listen, prefixes=prefixes)
    return answers[0] if is_one else answers


def conversations_of(messages: Any) -> tuple[Sequence[Messages], bool]:
    """Conversations, and whether there was just the one, not in a list."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"generate: messages must be a list of messages or of such lists, got {messages!r:.80}")
    is_one = bool(messages) and isinstance(messages[0], Mapping)
    return [messages] if is_one else messages, is_one


@dataclass(frozen=True)
class Prompt:
    """One conversation, its files not yet encoded."""

    parts: tuple[official.Part, ...]
    files: Files  # images and waveforms
    settings: Settings
    seed: int


@dataclass(frozen=True)
class Job:
    system: System
    prompts: tuple[Prompt, ...]
    roles: bool

    @property
    def layout(self) -> Layout:
        return Layout(self.system.model.ids, self.system.text.encode)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, which is allocated at once."""
        return cache_bytes(self.system.model, self._sketches)

    @property
    def memory(self) -> Memory:
        """What the answers need at most beside the weights, on all devices together."""
        model, sketches = self.system.model, self._sketches
        answers = []
        for prompt in self.prompts:
            settings, start = prompt.settings, prompt.parts[-1]
            image, speech = self._image(*settings.size(prompt.parts)), self._speech(settings.max_frames)
            answers += [image] * (settings.media + isinstance(start, StartImage))
            answers += [speech] * (settings.media + isinstance(start, StartSpeech))
        loop = 0
        if sketches:
            rows, longest = sum(s.rooms for s in sketches), max(s.capacity for s in sketches)
            written = sum(s.state.longest for s in sketches)
            loop = memory.steps(self.system.sizes, rows, longest, written, model.embed_tokens.weight.itemsize)
        media = [tensor for prompt in self.prompts for tensor in prompt.files.values()]
        return memory.total(self.system.sizes, media, answers, cache=self.cache_bytes, loop=loop)

    def _image(self, height: int, width: int) -> tuple[int, int]:
        """Bytes of an image, and of its decoding."""
        if self.system.released is None:
            return memory.image(self.system.sizes.vision, height, width)
        return released_memory.image(self.system.released, height, width)

    def _speech(self, frames: int) -> tuple[int, int]:
        if self.system.released is None:
            return memory.speech(self.system.sizes.audio, frames)
        return released_memory.speech(self.system.released, frames)

    def check_memory(self, max_memory: int | None) -> None:
        """Raises ValueError where more may be needed."""
        if max_memory is not None and self.memory.most > max_memory:
            raise ValueError(
                f"generate: memory must fit max_memory = {max_memory} bytes, got {self.memory} for "
                f"conversations: {len(self.prompts)} (fewer at once, or smaller limits of their lengths, need less)"
            )

    def check_decoders(self) -> None:
        """Raises ValueError where an answer may be an image or speech that the system cannot decode."""
        for number, prompt in enumerate(self.prompts, 1):
            for file, start in ((IMAGE_DECODER, StartImage), (VOCODER, StartSpeech)):
                if file in self.system.lacks and (prompt.settings.media or isinstance(prompt.parts[-1], start)):
                    with _named(number, len(self.prompts)):
                        raise ValueError(f"generate: the checkpoint must have {file} for such an answer, got none")

    def check_lengths(self) -> None:
        """Raises ValueError where a prompt and its longest answer have too many positions."""
        for number, sketch in enumerate(self._sketches, 1):
            with _named(number, len(self.prompts)):
                found = sketch.capacity
                if found > LONGEST:
                    raise ValueError(
                        f"generate: a conversation and its longest answer must have at most {LONGEST} positions, got "
                        f"{found}"
                    )

    def run(self, *, listen: Callable[[Event], None] | None = None, prefixes: Prefixes | None = None) -> list[Answer]:
        """Encodes the files, generates, and decodes images and speech."""
        requests, listeners = [], []
        codes: dict[Path, Tensor] = {}
        for number, prompt in enumerate(self.prompts):
            codes |= {path: encode(media, self.system) for path, media in prompt.files.items() if path not in codes}
            requests.append(self.request(prompt, codes))
            listeners.append(
                Listener(
                    number,
                    self.system.model.ids,
                    self.system.text.decode,
                    prompt.settings.stop,
                    listen or (lambda event: None),
                )
            )
        traces = decode(
            self.system.model,
            requests,
            observe=lambda number, mode, position: listeners[number].observe(mode, position),
            prefixes=prefixes,
        )
        for listener in listeners:
            listener.finish()
        return [self._answer(*found) for found in zip(self.prompts, listeners, traces, strict=True)]

    @cached_property
    def _sketches(self) -> list[Request]:
        """Requests of the right lengths, before any file is encoded."""
        sketches = []
        for number, prompt in enumerate(self.prompts, 1):
            with _named(number, len(self.prompts)):
                codes = {path: blank(media, self.system.sizes) for path, media in prompt.files.items()}
                sketches.append(self.request(prompt, codes))
        return sketches

    def request(self, prompt: Prompt, codes: Files) -> Request:
        """What the loop of generation is asked for, with the codes of the prompt's files."""
        settings, start = prompt.settings, prompt.parts[-1]
        before = context(prompt.parts, codes, self.layout, roles=self.roles, mode=settings.mode)
        prefix = self.layout.image_prefix(*settings.size(prompt.parts))
        whole, partner = before, None
        if isinstance(start, StartImage):
            whole = join(before, prefix)
            if settings.guidance is not None:
                partner = unconditional(before, prefix, settings.cfg_uncond).inputs
        elif isinstance(start, StartSpeech):
            whole = join(before, self.layout.text([self.system.model.ids.audiogen_start]))
        opening = [Position(text=i) for i in prefix.inputs.text.tolist()]
        return Request(
            prompt=whole.inputs,
            state=settings.state(self.system.model.ids, prompt.parts, opening),
            seed=prompt.seed,
            partner=partner,
            later_partner=self._later(prefix, settings),
        )

    def _later(self, prefix: Document, settings: Settings) -> Partner | None:
        if not settings.media or settings.guidance is None:
            return None
        return lambda length: unconditional(self.layout.text([NULL] * length), prefix, settings.cfg_uncond).inputs

    def _answer(self, prompt: Prompt, listener: Listener, trace: Sequence[Position]) -> Answer:
        parts: list[str | Painted | Spoken] = []
        for part in listener.parts:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Tensor):
                codes = part.view(*prompt.settings.size(prompt.parts), -1)
                parts.append(Painted(codes, self.system.vision.decode([codes], seed=prompt.seed)[0].cpu()))
            else:
                text, codes = part
                waveform = self.system.audio.decode([codes], seed=prompt.seed)[0].cpu()
                parts.append(Spoken(text, codes, waveform, self.system.audio.output_rate))
        return Answer(tuple(parts), "stop" if listener.stopped else self._end(prompt.settings, trace))

    def _end(self, settings: Settings, trace: Sequence[Position]) -> str:
        ids, last = self.system.model.ids, trace[-1].text
        said = sum(0 <= p.text < ids.text_size for p in trace)
        cut = sum(bool(p.audio) for p in trace) >= settings.max_frames or said >= settings.max_text
        is_end = last in (EOS, ids.image_end) or (last == ids.audiogen_end and not cut)
        return "end" if is_end else "length"


def prepare(
    conversations: Sequence[Messages],
    system: System | Path | str,
    settings: Settings | Sequence[Settings] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    roles: bool = True,
    directory: Path = Path(),
) -> Job:
    """Reads and checks everything: the arguments are `generate`'s.

    Raises:
        ValueError: see `generate`.
    """
    count = len(conversations)
    each = list(settings) if isinstance(settings, Sequence) else [settings or Settings()] * count
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    for name, given in (("settings", each), ("seeds", seeds)):
        if len(given) != count:
            raise ValueError(f"generate: {name} must be one a conversation ({count}), got {len(given)}")
    if not all(0 <= one < 2**62 for one in seeds):
        raise ValueError(f"generate: seeds must be in [0, 2^62), got {seeds}")
    parsed = []
    for number, messages in enumerate(conversations, 1):
        with _named(number, count):
            parsed.append(official.parse(messages, directory))
    loaded = system if isinstance(system, System) else open_system(Path(system))
    files = []
    for number, parts in enumerate(parsed, 1):
        with _named(number, count):
            files.append(read_files(parts, loaded))
    job = Job(loaded, tuple(map(Prompt, parsed, files, each, seeds)), roles)
    job.check_decoders()
    job.check_lengths()
    return job


@contextmanager
def _named(number: int, count: int) -> Iterator[None]:
    """Says which conversation an error is about, where there are several."""
    try:
        yield
    except ValueError as error:
        if count == 1:
            raise
        raise ValueError(f"conversation {number}: {error}") from error
