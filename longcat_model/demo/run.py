"""`longcat demo`: data, tokenizers, language model, evaluation, report; every finished step is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longcat_model import config, files, presets
from longcat_model.demo import digits, language, speech, speed
from longcat_model.demo.data import Data, load_data
from longcat_model.demo.evaluate import Exam, Result
from longcat_model.demo.page import GOALS, REAL_SPEECH_GOALS, SHOWN_TOO, Goals, picture, sections
from longcat_model.demo.report import render
from longcat_model.demo.settings import Settings
from longcat_model.demo.tasks import Tasks
from longcat_model.demo.workspace import LOCK, Workspace, check_removable
from longcat_model.pipeline.parts import Saved
from longcat_model.system import System
from longcat_model.tokenizers.audio.answers import AnswerDecoder
from longcat_model.training import audio_stages, model_stages, vision_stages
from longcat_model.training.loop import Row, Stage, train
from longcat_model.training.mesh import Mesh
from longcat_model.training.pipelined import train_pipelined


def demo(out: Path, *, speech_dir: Path | None, smoke: bool, fresh: bool, seed: int, ranks: int = 1) -> None:
    """Trains and evaluates the demo model in `out`, or goes on with it, and writes report.html and report.json.

    Raises:
        ValueError: `out` holds a run with other settings, another process works there, or `speech_dir` is no data set
            of spoken digits.
    """
    if fresh:
        check_removable(out)  # before the lock: a file that nobody else's directory should get
    files.make_writable(out, "demo")
    with files.locked(out / LOCK):
        _demo(out, speech_dir, smoke, fresh, seed, ranks)


def _demo(out: Path, speech_dir: Path | None, smoke: bool, fresh: bool, seed: int, ranks: int) -> None:
    settings = Settings.small() if smoke else Settings()
    sizes = presets.demo()
    described = dataclasses.asdict(settings) | {"seed": seed, "speech_dir": str(speech_dir) if speech_dir else None}
    workspace = Workspace(out, described | {"model": config.to_dict(sizes)}, fresh=fresh)
    workspace.commits()
    with workspace.timed("data"):
        data = load_data(workspace.directory, settings, speech_dir)
    torch.manual_seed(seed)
    system = System.create(sizes)
    curves = train_tokenizers(workspace, system, data, settings, seed)
    pools = tokenize(workspace, system, data, settings, seed)
    curves |= train_language(workspace, system, pools, settings, seed, ranks)
    with workspace.timed("save"):
        system.save(workspace.directory)
    results = evaluate_tasks(workspace, system, data, settings, seed)
    goals = GOALS | ({} if speech_dir is None else REAL_SPEECH_GOALS)
    goals |= {name: goal for name, goal in SHOWN_TOO.items() if name in results}
    speeds = workspace.once("speed", lambda: {"rows": speed.measure(system, settings, workspace.seconds())})["rows"]
    finish(workspace, system, data, pools, curves, results, goals, speeds)


def train_tokenizers(
    workspace: Workspace, system: System, data: Data, settings: Settings, seed: int
) -> dict[str, list[Row]]:
    """Vision, then audio; returns every stage's metrics."""
    torch.manual_seed(seed + 1)
    stages = [*vision(system, data, settings, seed), *audio(system, data, settings, seed)]
    return {stage.name: run_stage(workspace, stage, seed) for stage in stages}


def vision(system: System, data: Data, settings: Settings, seed: int) -> Sequence[Stage]:
    answerer = digits.answerer(system.vision.encoder.sizes.bridge_width)
    source = digits.training_pictures(data.scans, seed=seed)
    return vision_stages.vision_stages(system.vision, answerer, source, settings.vision)


def audio(system: System, data: Data, settings: Settings, seed: int) -> Sequence[Stage]:
    source = speech.lessons(speech.Composer(data.speech.train), seed=seed, count=settings.clips)
    trainee = audio_stages.AudioTrainee(system.audio, AnswerDecoder(system.sizes.audio.quantizer.dim, tokens=10))
    return audio_stages.stages(trainee, source, settings.audio)


def run_stage(workspace: Workspace, stage: Stage, seed: int) -> list[Row]:
    with workspace.timed(stage.name):
        return train(stage, workspace.directory / "stages", seed=seed)


def tokenize(
    workspace: Workspace, system: System, data: Data, settings: Settings, seed: int
) -> dict[str, language.Pool]:
    """The language model's training numbers as codes."""
    system.vision.eval(), system.audio.eval()
    sizes = settings.language
    pictures = workspace.once(
        "tokens_pictures",
        lambda: language.picture_pool(system, data.scans, count=sizes.pictures, seed=seed + 2).as_dict(),
    )
    utterances = workspace.once(
        "tokens_utterances",
        lambda: language.utterance_pool(system, data.speech.train, count=sizes.utterances, seed=seed + 3).as_dict(),
    )
    return {"pictures": language.Pool(**pictures), "utterances": language.Pool(**utterances)}


def train_language(
    workspace: Workspace,
    system: System,
    pools: dict[str, language.Pool],
    settings: Settings,
    seed: int,
    ranks: int = 1,
) -> dict[str, list[Row]]:
    """Pre-Align, then all, by a pipeline where there are several ranks; returns both stages' metrics."""
    sizes = settings.language
    batch = language.training_batches(
        Tasks.of(system.model.ids, system.text),
        **pools,
        documents=sizes.documents,
        row_length=sizes.row_length,
        seed=seed,
    )
    align = partial(
        model_stages.pre_align, batch=batch, steps=sizes.pre_align_steps, learning_rate=sizes.pre_align_rate
    )
    joint = partial(
        model_stages.joint,
        batch=batch,
        steps=sizes.joint_steps,
        learning_rate=sizes.joint_rate,
        weights=sizes.weights,
    )
    curves = {}
    for make, weights in ((align, None), (joint, sizes.weights)):
        stage = make(system.model)
        if ranks > 1:
            with workspace.timed(stage.name):
                saved = Saved.of(system.model, workspace.directory / "stages" / "before.safetensors")
                train_pipelined(make, saved, workspace.directory / "stages", Mesh(ranks), weights=weights, seed=seed)
        curves[stage.name] = run_stage(workspace, stage, seed)
    return curves


def evaluate_tasks(
    workspace: Workspace, system: System, data: Data, settings: Settings, seed: int
) -> dict[str, Result]:
    """Every task on held-out data; keys as in `page.GOALS`, and a few more."""
    for module in system.parts().values():
        module.eval()
    exam = Exam(system, data, settings.evaluation, seed)
    results: dict[str, Result] = {}
    for name, task in (("see", exam.see), ("paint", exam.paint), ("hear", exam.hear), ("talk", exam.talk)):
        print(f"evaluate: {name}", flush=True)
        found = workspace.once(f"evaluate_{name}", partial(_as_dicts, task))
        results |= {key: Result(**fields) for key, fields in found.items()}
    return results


def _as_dicts(task: Callable[[], dict[str, Result]]) -> dict[str, Any]:
    return {name: result.as_dict() for name, result in task().items()}


def finish(
    workspace: Workspace,
    system: System,
    data: Data,
    pools: dict[str, language.Pool],
    curves: dict[str, list[Row]],
    results: dict[str, Result],
    goals: Goals,
    speeds: list[dict[str, Any]],
) -> None:
    """Writes report.json and report.html, prints the table and the report's path."""
    with workspace.timed("report"):
        content = sections(system, data.held_out_scans, data.speech.takes, pools, curves, results)
        picture(results).savefig(workspace.directory / "report.png", dpi=110, bbox_inches="tight")
    began, *later = workspace.commits()
    summary: dict[str, Any] = {
        **{name: {"value": r.value, "n": len(r.expected), "judge": r.judge} for name, r in results.items()},
        "seconds": workspace.seconds(),
        "speed": speeds,
        "peak_rss_bytes": workspace.peak_rss_bytes(),
        "settings": workspace.settings,
        "commit": began,
        "commits_that_resumed": later,
    }
    workspace.write("report.json", summary)
    page = render(summary, goals, content, system.sizes.audio.encoder.sample_rate)
    files.write(workspace.directory / "report.html", page.encode())
    print(table(summary, goals))
    print(f"report: {workspace.directory / 'report.html'}")


def table(summary: dict[str, Any], goals: Goals) -> str:
    """The scores beside their goals, as text."""
    lines = [f"{'task':<15} {'score':>7} {'goal':>6} {'n':>5} {'judge':>7}  judged by"]
    for name, (what, goal) in goals.items():
        score = summary[name]
        wanted = "" if goal is None else f"{goal:.0%}"
        judge = "" if score["judge"] is None else f"{score['judge']:.1%}"
        lines.append(f"{name:<15} {score['value']:>7.1%} {wanted:>6} {score['n']:>5} {judge:>7}  {what}")
    minutes = sum(summary["seconds"].values()) / 60
    lines.append(f"{minutes:.1f} minutes, peak memory {summary['peak_rss_bytes'] / 1e9:.2f} GB")
    if summary["settings"]["smoke"]:
        lines.append("smoke run: a few steps a stage; the scores mean nothing")
    return "\n".join(lines)
