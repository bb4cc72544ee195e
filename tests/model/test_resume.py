"""Every kind of stage, cut and resumed from its checkpoint, has bit for bit the losses of one that was not cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat_model import presets
from longcat_model.demo import digits
from longcat_model.demo.language import Pool, training_batches
from longcat_model.demo.tasks import Tasks
from longcat_model.model import LongcatNext
from longcat_model.tokenizers.audio import AudioTokenizer
from longcat_model.tokenizers.audio.answers import AnswerDecoder
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.tokenizers.vision import VisionTokenizer
from longcat_model.training import audio_stages, model_stages, vision_stages
from longcat_model.training.loop import Stage, train
from longcat_model.training.rates import MEASURED

STEPS, SAVED, CUT = 8, 3, 5


def vision(index: int) -> Stage:
    tokenizer = VisionTokenizer(presets.tiny().vision)
    answerer = digits.answerer(presets.tiny().vision.encoder.bridge_width)
    scans, _ = digits.load_scans()
    settings = vision_stages.Settings(images=4)
    source = digits.training_pictures(scans)
    return vision_stages.vision_stages(tokenizer, answerer, source, settings)[index]


def audio(index: int) -> Stage:
    tokenizer = AudioTokenizer(presets.tiny().audio)
    trainee = audio_stages.AudioTrainee(tokenizer, AnswerDecoder(presets.tiny().audio.quantizer.dim, tokens=10))

    def source(step: int) -> tuple[list[Tensor], list[list[int]]]:
        generator = torch.Generator().manual_seed(step)
        return [0.1 * torch.randn(4000 + 900 * i, generator=generator) for i in range(3)], [[1], [2, 3], [4]]

    return audio_stages.stages(trainee, source, audio_stages.AudioTraining())[index]


def language(make: Callable[..., Stage]) -> Stage:
    model = LongcatNext(presets.tiny())
    draw = torch.Generator().manual_seed(0)

    def pool(shape: tuple[int, ...], sizes: tuple[int, ...]) -> Pool:
        codes = [torch.stack([torch.randint(n, shape, generator=draw) for n in sizes], -1) for _ in range(10)]
        return Pool([str(i) for i in range(10)], codes)

    pictures, utterances = pool((2, 2), model.ids.visual_sizes), pool((5,), model.ids.audio_sizes)
    tasks = Tasks.of(model.ids, ByteTokenizer())
    batch = training_batches(tasks, pictures, utterances, documents=8, row_length=64, seed=0)
    return make(model, batch, steps=STEPS, learning_rate=1e-2)


STAGES: dict[str, Callable[[], Stage]] = {
    "vision_sae": lambda: vision(0),
    "vision_quantizer": lambda: vision(1),
    "vision_decoder": lambda: vision(2),
    "vision_refiner": lambda: vision(3),
    "audio_warm_up": lambda: audio(0),
    "audio_joint": lambda: audio(1),
    "audio_flow": lambda: audio(2),
    "language_pre_align": lambda: language(model_stages.pre_align),
    "language_joint": lambda: language(model_stages.joint),
}


class CutOff(Exception):
    pass


@pytest.mark.parametrize("name", STAGES)
def test_resumed_stage_is_bit_identical(tmp_path: Path, name: str) -> None:
    def fresh(after_step: Callable[[int], None] | None = None) -> Stage:
        torch.manual_seed(0)
        stage = STAGES[name]()
        before = stage.after_step

        def after(step: int) -> None:
            if before is not None:
                before(step)
            if after_step is not None:
                after_step(step)

        return dataclasses.replace(stage, steps=STEPS, after_step=after)

    def cut(step: int) -> None:
        if step == CUT:
            raise CutOff

    whole = fresh()
    assert whole.name == name
    want = train(whole, tmp_path / "whole", save_every=SAVED, quiet=True)
    with pytest.raises(CutOff):
        train(fresh(cut), tmp_path / "cut", save_every=SAVED, quiet=True)
    resumed = fresh()
    got = train(resumed, tmp_path / "cut", save_every=SAVED, quiet=True)
    one, two = ([{k: v for k, v in row.items() if k not in MEASURED} for row in rows] for rows in (got, want))
    assert one == two and len(got) == STEPS
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[key]), key
