"""`longcat generate --messages`: conversations from a file, answers as lines of JSON, images and speech as files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from longcat_model.files import make_writable, png, wav, write
from longcat_model.generation.answers import Answer, Event, Painted
from longcat_model.generation.converse import conversations_of, prepare
from longcat_model.generation.settings import Settings


def answer(
    messages: Path,
    run: Path,
    out: Path,
    settings: Settings,
    *,
    seed: int,
    roles: bool,
    stream: bool,
    max_memory: int,
) -> None:
    """Answers the conversations of a JSON file and prints a line for each; the command line's help has the rest.

    Raises:
        ValueError: no JSON, what `converse.generate` refuses, or `out` cannot be written to; before anything is
            computed.
    """
    conversations, _ = conversations_of(_read(messages))
    directory = Path() if messages == Path("-") else messages.parent
    job = prepare(conversations, run, settings, seed=seed, roles=roles, directory=directory)
    print(f"memory: {job.memory}; conversations: {len(job.prompts)}", file=sys.stderr)
    job.check_memory(max_memory)
    make_writable(out, "generate")
    for number, answered in enumerate(job.run(listen=_tell if stream else None), 1):
        print(json.dumps(_written(number, answered, out)))


def _read(messages: Path) -> Any:
    try:
        return json.loads(sys.stdin.read() if messages == Path("-") else messages.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"generate: messages must be a readable file, got {messages}: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"generate: messages must be JSON, got {messages}: {error}") from error


def _tell(event: Event) -> None:
    what = {event.kind: event.text or event.codes}
    print(json.dumps({"conversation": event.conversation + 1} | what), flush=True)


def _written(number: int, answered: Answer, out: Path) -> dict[str, Any]:
    """Writes an answer's images and speech; returns the answer with their paths."""
    parts: list[dict[str, str]] = []
    for place, part in enumerate(answered.parts, 1):
        if isinstance(part, str):
            parts.append({"text": part})
            continue
        file = out / f"{number}-{place}.{'png' if isinstance(part, Painted) else 'wav'}"
        write(file, png(part.image) if isinstance(part, Painted) else wav(part.waveform, part.rate))
        parts.append({"image": str(file)} if isinstance(part, Painted) else {"speech": str(file), "text": part.text})
    return {"conversation": number, "ended": answered.ended, "parts": parts}
