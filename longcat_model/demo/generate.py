"""`longcat generate`: the four tasks on files and text of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longcat_model.demo import digits, evaluate
from longcat_model.demo.speech import normalise, trim
from longcat_model.demo.tasks import Tasks
from longcat_model.files import png, read_image, read_speech, wav, write
from longcat_model.generation import Sampling, generate_text
from longcat_model.system import System

PIXEL = 8  # screen pixels of one painted pixel


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate; see the command line's help."""

    task: str
    subject: str
    run: Path
    out: Path | None
    mode: str
    sampling: Sampling
    guidance: float


def generate(request: Request) -> str:
    """Does the task and returns what to print: the text read or heard, or the path written.

    Raises:
        ValueError: no trained system, an unreadable file, or text that is no number of one to three digits.
    """
    system = System.load(request.run)
    tasks = Tasks.of(system.model.ids, system.text)
    if request.task in ("see", "hear"):
        return _read(system, tasks, request)
    number = request.subject
    if not (number.isascii() and number.isdigit() and 1 <= len(number) <= digits.LONGEST):
        raise ValueError(f"generate: text must be a number of 1 to {digits.LONGEST} digits, got {number!r}")
    out = request.out or Path("paint.png" if request.task == "paint" else "say.wav")
    if request.task == "paint":
        write(
            out, png(evaluate.paint(system, [number], sampling=request.sampling, guidance=request.guidance)[0], PIXEL)
        )
    else:
        waveform = evaluate.say(system, [number], mode=request.mode, sampling=request.sampling)[0]
        write(out, wav(waveform, system.sizes.audio.encoder.sample_rate))
    return str(out)


def _read(system: System, tasks: Tasks, request: Request) -> str:
    path = Path(request.subject)
    if request.task == "see":
        image = read_image(path, system.vision.sizes.cell, digits.SIDE)  # as high as what it was trained on
        prompt = tasks.see_prompt(system.vision.encode([image])[0])
    else:
        waveform = read_speech(path, system.sizes.audio.encoder.sample_rate)
        level = waveform.new_tensor(normalise(trim(waveform.numpy())))
        prompt = tasks.hear_prompt(system.audio.encode([level])[0])
    answer = generate_text(system.model, [prompt], max_tokens=evaluate.LONGEST_ANSWER, sampling=request.sampling)
    return system.text.decode(answer[0])
