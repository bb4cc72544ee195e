"""The command line: `longcat demo | tokenize | train | generate | schedule | inspect`."""

from __future__ import annotations

import os
import select
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

RUN = Path("runs/demo")
DESCRIPTION = "LongCat-Next, one model that sees, paints, hears and talks: train it, use it, look inside."


@dataclass(frozen=True)
class Demo:
    """Train a small LongCat-Next that sees, paints, hears and talks, evaluate it on held-out data, write a report.

    An interrupted run goes on where it stopped when the same command is given again.
    """

    out: Path = RUN
    """Directory of the run; the report is OUT/report.html."""
    speech_dir: Path | None = None
    """Real recordings named {digit}_{speaker}_{take}.wav instead of synthesized speech; takes 0 to 4 are held out."""
    smoke: bool = False
    """A few steps a stage: tests the whole path in under two minutes; the scores mean nothing."""
    fresh: bool = False
    """Delete the earlier run in OUT and start over."""
    seed: int = 0
    """Of the weights, the data and the sampling."""
    pipeline: int = 1
    """Processes that train the language model together, each with a part of it."""

    def __call__(self) -> None:
        from longcat_model.demo import run

        run.demo(
            self.out,
            speech_dir=self.speech_dir,
            smoke=self.smoke,
            fresh=self.fresh,
            seed=self.seed,
            ranks=self.pipeline,
        )


@dataclass(frozen=True)
class Tokenize:
    """Turn documents into ids, once, for any number of trainings.

    DATA is JSON lines; a line is one document; paths are relative to its file. The same command given again goes on
    after the last whole shard.

    A document may be a conversation in the official format, {"messages": [{"role": "user", "content": "..."}, ...]},
    of which what the assistant says, paints and speaks is learnt. In a content,
    <longcat_img_start>FILE<longcat_img_end> is an image, <longcat_audio_start>FILE<longcat_audio_end> sound, and
    <longcat_audiogen_start>TEXT<longcat_audio_start>FILE<longcat_audio_end><longcat_audiogen_end> speech to be learnt.

    Or it is a list of parts in order: {"text": "...", "loss": true}, {"image": "FILE"}, {"paint": "FILE"},
    {"hear": "FILE"}, {"say": "FILE", "transcript": "..."}.
    """

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Files of documents."""
    out: Path
    """Directory for the shards."""
    run: Path = RUN
    """Directory of the trained system whose tokenizers are used."""
    workers: int = 0
    """Processes; 0: this one alone, with all its threads."""
    longest: int = 32_768
    """Positions that a document may have."""
    shard_documents: int = 1024
    """Documents of a shard."""
    seed: int = 0
    """Of how far speech lags behind its transcript."""

    def __call__(self) -> None:
        from longcat_model.data.tokenize import Job, Settings, tokenize

        settings = Settings(longest=self.longest, seed=self.seed, shard_documents=self.shard_documents)
        shards = tokenize(Job.of(self.data, self.run, settings), self.out, workers=self.workers)
        positions = int(shards.counts[:, 0].sum(dtype="int64"))
        print(f"{len(shards)} documents, {positions} positions, the longest {shards.longest}: {self.out}")


@dataclass(frozen=True)
class Train:
    """Train a system's language model further on your own documents: text, images and speech.

    The same command given again goes on from the last checkpoint.
    """

    data: tyro.conf.Positional[Path]
    """What `longcat tokenize` made, or its JSON lines, which are tokenized to OUT/data first."""
    run: Path = RUN
    """Directory of the trained system to start from."""
    out: Path = Path("runs/train")
    """Directory for the new system, its checkpoints and its metrics."""
    steps: int = 200
    """Optimizer steps."""
    rows: int = 8
    """Packed rows a step."""
    row_length: int = 256
    """Positions a row."""
    learning_rate: float = 3e-4
    """Peak of a linear warm-up and a cosine to a tenth."""
    seed: int = 0
    """Of the order of the documents."""
    workers: int = 1
    """Processes that tokenize, and that prepare the next batches of every rank; 0: none of their own."""
    pipeline: int = 1
    """Processes that train the model together, each with a part of it; torchrun may start them, on many machines."""
    data_parallel: int = 1
    """How many such pipelines train together, each on a part of every batch."""
    expert_parallel: int = 1
    """How many of those share their experts out, each having a part of them."""
    post_validation: bool = False
    """Processes do not wait for the gradient's norm at the end of a step; one that had to be clipped is taken back and
    done again, to the same bits. Pays where waiting is long and few steps are clipped, and takes more memory."""
    microbatches: int | None = None
    """Into which a pipeline cuts its part of a batch, at most: four a process of it by default, and never more than
    there are rows. Losses do not depend on it."""
    memory: int | None = None
    """Bytes that a process of a pipeline may hold for the backward, by the longest microbatches of the first steps; by
    default as many as V-Half does."""
    recompute: bool = False
    """Keep the input of each stage alone and do its forward again before the backward: less memory, more time."""
    any_order: bool = False
    """Let microbatches of different lengths run in the order that is quickest; losses change by rounding only."""
    timeout_s: float = 600.0
    """Seconds that a process waits for another one; then the run ends, naming what it waited for."""

    def __call__(self) -> None:
        from longcat_model.training import finetune
        from longcat_model.training.mesh import Mesh
        from longcat_model.training.plan import Piping

        finetune.run(
            self.data,
            self.run,
            self.out,
            finetune.Settings(
                steps=self.steps,
                rows=self.rows,
                row_length=self.row_length,
                learning_rate=self.learning_rate,
                seed=self.seed,
            ),
            Mesh(pipeline=self.pipeline, data=self.data_parallel, experts=self.expert_parallel),
            Piping(
                microbatches=self.microbatches,
                memory=self.memory,
                recompute=self.recompute,
                any_order=self.any_order,
                timeout_s=self.timeout_s,
            ),
            workers=self.workers,
            post_validation=self.post_validation,
        )


@dataclass(frozen=True)
class Generate:
    """Use a trained system: read an image, paint a number, transcribe speech, speak; or answer conversations.

    see and hear take a file and print text; paint and say take text and write a file. --messages takes conversations in
    the official format, any tasks at once, prints a line of JSON for each, and writes images and speech to --out.
    """

    task: tyro.conf.Positional[Literal["see", "paint", "hear", "say"] | None] = None
    """What to do."""
    subject: tyro.conf.Positional[str | None] = None
    """An image or sound file (see, hear), or the text to paint or say."""
    messages: Path | None = None
    """A JSON file, - for standard input: a list of {"role": ..., "content": ...}, or a list of such lists. Content may
    hold <longcat_img_start>file.png<longcat_img_end>, <longcat_audio_start>file.wav<longcat_audio_end>, and at the end
    <longcat_img_start> or <longcat_audiogen_start>, to be answered with an image or with speech."""
    run: Path = RUN
    """Directory of the trained system; with --messages of a released checkpoint, too."""
    out: Path | None = None
    """File to write: paint.png or say.wav by default. With --messages a directory: runs/answers by default."""
    roles: bool = True
    """--messages: write role markers; --no-roles for a system trained without, like the demo's."""
    stream: bool = False
    """--messages: print text and codes as they come, too."""
    mode: Literal["serial", "parallel"] = "serial"
    """say: the whole transcript before the speech, or both together."""
    temperature: float | None = None
    """0 takes the most likely one. By default 0 to see and hear, 0.5 for the codes of paint and say; with --messages
    this, top-k, top-p and the penalty are the released model's recommendations for each task."""
    top_k: int | None = None
    """Sample among the K most likely; 0: all, the default."""
    top_p: float | None = None
    """Sample among the most likely that together have this probability: 0.9 by default."""
    repetition_penalty: float | None = None
    """Makes what was written before less likely; 1: no penalty, the default."""
    truncation: Literal["sequential", "joint"] = "sequential"
    """top-p of what top-k kept, as the released transformers code does, or of everything, as the released server."""
    guidance: float | None = None
    """Images: classifier-free guidance scale; 1: none. 1.5 by default, 3 with --messages."""
    cfg_uncond: Literal["null", "bare", "all_null"] = "null"
    """--messages: what guidance compares with: the prompt blanked, its size alone, or all of it blanked."""
    height: int = 37
    """--messages: cells of an image whose size the message does not say."""
    width: int = 37
    """Likewise."""
    max_tokens: int = 1024
    """--messages: most ids of text."""
    max_text: int = 512
    """--messages: most ids of a transcript."""
    max_frames: int = 1000
    """--messages: most frames of speech, 80 ms each."""
    stop: tuple[str, ...] = ()
    """--messages: text ends before any of these."""
    media: int = 0
    """--messages: images and utterances that a text may begin by itself."""
    max_memory: int = 1 << 33
    """--messages: most bytes that may be needed beside the weights; more is refused before any work."""
    seed: int = 0
    """Same seed, same result; conversation number i draws with seed + i."""

    def __call__(self) -> None:
        if (self.messages is None) == (self.task is None or self.subject is None):
            raise ValueError("generate: a task and its subject, or --messages, must be given, and not both")
        if self.messages is None:
            print(self._task())
        else:
            self._answer(self.messages)

    def _task(self) -> str:
        from longcat_model.demo.generate import Request, generate
        from longcat_model.generation import Sampling

        temperature = self.temperature
        if temperature is None:
            temperature = 0.5 if self.task in ("paint", "say") else 0.0
        sampling = Sampling(
            temperature=temperature,
            top_k=self.top_k or 0,
            top_p=0.9 if self.top_p is None else self.top_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            order=self.truncation,
            seed=self.seed,
        )
        request = Request(
            task=self.task or "",
            subject=self.subject or "",
            run=self.run,
            out=self.out,
            mode=self.mode,
            sampling=sampling,
            guidance=1.5 if self.guidance is None else self.guidance,
        )
        return generate(request)

    def _answer(self, messages: Path) -> None:
        from longcat_model.generation import Settings, command

        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
        same = ("truncation", "cfg_uncond", "height", "width", "mode", "max_tokens", "max_text", "max_frames")
        settings = Settings(
            **{name: getattr(self, name) for name in (*same, "stop", "media")},
            numbers={name: value for name, value in given.items() if value is not None},
            guidance=Settings.guidance if self.guidance is None else self.guidance,
        )
        command.answer(
            messages,
            self.run,
            self.out or Path("runs/answers"),
            settings,
            seed=self.seed,
            roles=self.roles,
            stream=self.stream,
            max_memory=self.max_memory,
        )


@dataclass(frozen=True)
class Schedule:
    """Plan pipeline parallelism: place layers, compare schedules, search for a shorter one; needs no GPU.

    Prints makespan, bubble, memory and lower bound of every schedule, and writes the timeline of the best as a picture,
    a trace for ui.perfetto.dev, and CSV files, of which torch.distributed.pipelining reads compute_only.csv.
    """

    devices: int
    """Pipeline ranks; each has two stages."""
    microbatches: int
    """Of a step."""
    profile: Path | None = None
    """JSON of measured durations (longcat_model/pipeline/profile.py shows one); by default all are equal."""
    memory: int | None = None
    """Bytes that a device may hold for the backward; by default as many as V-Half does."""
    any_order: bool = False
    """The order of microbatches is free, for a profile with lengths: gradients are sums over them. Schedules but the
    searched one take them as they come."""
    out: Path = Path("runs/schedule")
    """Directory for the files."""
    moves: int = 5_000_000
    """Steps of the search: about 15 seconds for 8 devices and 64 microbatches."""
    seed: int = 0
    """Same seed, same schedule."""

    def __call__(self) -> None:
        from longcat_model.pipeline import report
        from longcat_model.pipeline.schedules.searched import Effort

        for name, least in (("devices", 1), ("microbatches", 1), ("moves", 0), ("memory", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**62:
                raise ValueError(f"schedule: --{name} must be at least {least} and below 2^62, got {value}")
        report.ready(self.out)
        costs, placed = report.costs_of(self.profile, self.devices, self.microbatches)
        limits = None if self.memory is None else [self.memory] * self.devices
        found = report.compare(costs, limits, Effort(moves=self.moves, seed=self.seed), any_order=self.any_order)
        print(placed, report.table(found), sep="\n")
        print(*report.write(found, self.out), sep="\n")


@dataclass(frozen=True)
class Inspect:
    """Print what a trained system, a released checkpoint or a preset consists of: parameters by part, ids, codebooks.

    A released checkpoint is checked first; every tensor that is missing or wrong is listed.
    """

    subject: tyro.conf.Positional[str] = str(RUN)
    """Directory of a trained system or of a released checkpoint, or a preset: longcat_next, demo, tiny."""
    plan: bool = False
    """Print what of a released checkpoint (or longcat_next) goes where: GPU, host, file."""
    memory: tuple[float, ...] = (141e9,)
    """--plan: bytes of each GPU, as in 80e9 80e9; 0: no GPU."""
    rows: int = 2
    """--plan: decoded together; classifier-free guidance takes two an image."""
    positions: int = 8192
    """--plan: of a row, prompt and answer together."""

    def __call__(self) -> None:
        from longcat_model import inspection

        if self.plan:
            print(inspection.describe_plan(self.subject, self.memory, rows=self.rows, positions=self.positions))
        else:
            print(inspection.describe(self.subject))


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Schedule, tyro.conf.subcommand("schedule")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; what a user can cause ends in one line on standard error and exit status 2."""
    command = tyro.cli(Command, args=arguments, prog="longcat", description=DESCRIPTION)
    try:
        seed = getattr(command, "seed", 0)
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed must be in [0, 2^31), got {seed}")
        if getattr(command, "pipeline", 1) < 1:
            raise ValueError(f"pipeline must be at least 1, got {getattr(command, 'pipeline', 1)}")
        command()
        sys.stdout.flush()  # here, where it can be told that nobody reads it any more
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            return 141
        print(f"longcat: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"longcat: {error}; this command needs: pip install 'longcat-kernels[demo]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; give the same command again to go on" if isinstance(command, Demo | Tokenize | Train) else ""
        print(f"\nlongcat: interrupted{again}", file=sys.stderr)
        return 130
    return 0


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe whose reader is gone, as after `| head`; what it still holds is then dropped."""
    watch = select.poll()
    watch.register(stream, select.POLLERR)
    if not watch.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True
