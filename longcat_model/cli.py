"""The command line: `longcat demo | tokenize | train | generate | schedule | inspect`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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

    def __call__(self) -> None:
        from longcat_model.training import finetune
        from longcat_model.training.mesh import Mesh

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
            workers=self.workers,
        )


@dataclass(frozen=True)
class Generate:
    """Use a trained system: read an image, paint a number, transcribe speech, speak.

    see and hear take a file and print text; paint and say take text and write a file.
    """

    task: tyro.conf.Positional[Literal["see", "paint", "hear", "say"]]
    """What to do."""
    subject: tyro.conf.Positional[str]
    """An image or sound file (see, hear), or the text to paint or say."""
    run: Path = RUN
    """Directory of the trained system."""
    out: Path | None = None
    """File to write: paint.png or say.wav by default."""
    mode: Literal["serial", "parallel"] = "serial"
    """say: the whole transcript before the speech, or both together."""
    temperature: float | None = None
    """0 takes the most likely one. By default 0 to see and hear, 0.5 for the codes of paint and say."""
    top_k: int = 0
    """Sample among the K most likely; 0: all."""
    top_p: float = 0.9
    """Sample among the most likely that together have this probability."""
    guidance: float = 1.5
    """paint: classifier-free guidance scale; 1: none."""
    seed: int = 0
    """Same seed, same result."""

    def __call__(self) -> None:
        from longcat_model.demo.generate import Request, generate
        from longcat_model.generation import Sampling

        temperature = self.temperature
        if temperature is None:
            temperature = 0.5 if self.task in ("paint", "say") else 0.0
        sampling = Sampling(temperature=temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        request = Request(
            task=self.task,
            subject=self.subject,
            run=self.run,
            out=self.out,
            mode=self.mode,
            sampling=sampling,
            guidance=self.guidance,
        )
        print(generate(request))


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
        found = report.compare(costs, limits, Effort(moves=self.moves, seed=self.seed))
        print(placed, report.table(found), sep="\n")
        print(*report.write(found, self.out), sep="\n")


@dataclass(frozen=True)
class Inspect:
    """Print what a trained system or a preset consists of: parameters by part, ids, codebooks."""

    subject: tyro.conf.Positional[str] = str(RUN)
    """Directory of a trained system, or a preset: longcat_next, demo, tiny."""

    def __call__(self) -> None:
        from longcat_model import inspection

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
    except (ValueError, OSError, FloatingPointError) as error:
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


if __name__ == "__main__":
    sys.exit(main())
