"""Training stages of the audio tokenizer and the answer decoder, at a tiny size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longcat_model import presets
from longcat_model.tokenizers.audio import AudioTokenizer
from longcat_model.tokenizers.audio.answers import IGNORED, AnswerDecoder
from longcat_model.training.audio_stages import AudioTrainee, AudioTraining, draw_kept, stages
from longcat_model.training.loop import train

SETTINGS = AudioTraining(warm_up_steps=25, joint_steps=25, flow_steps=25, learning_rate=3e-3)


def tones(step: int) -> tuple[Sequence[Tensor], Sequence[Sequence[int]]]:
    """Tones of two pitches; the answer names the pitch."""
    draw = torch.Generator().manual_seed(step)
    answers = torch.randint(2, (8,), generator=draw).tolist()
    lengths = torch.randint(3000, 6000, (8,), generator=draw).tolist()
    waves = [0.3 * torch.sin(torch.arange(n) * (0.1 + 0.6 * a)) for a, n in zip(answers, lengths, strict=True)]
    return waves, [[a] for a in answers]


def trainee(language: bool = True) -> AudioTrainee:
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(presets.tiny().audio)
    return AudioTrainee(tokenizer, AnswerDecoder(128, 2, width=32, layers=1) if language else None)


def test_three_stages_learn_tones_and_move_only_their_own_weights(tmp_path: Path) -> None:
    learner = trainee()
    tokenizer = learner.tokenizer
    refiner = {k: v.clone() for k, v in tokenizer.refiner.state_dict().items()}
    books = {k: v.clone() for k, v in tokenizer.quantizer.state_dict().items()}
    warm_up, joint, flow = stages(learner, tones, SETTINGS)
    rows = train(warm_up, tmp_path, quiet=True)
    assert rows[-1]["mel"] < 0.7 * rows[0]["mel"]
    assert all(torch.equal(v, books[k]) for k, v in tokenizer.quantizer.state_dict().items())
    rows = train(joint, tmp_path, quiet=True)
    assert {"mel", "commitment", "language"} <= rows[0].keys()
    assert all(torch.equal(v, refiner[k]) for k, v in tokenizer.refiner.state_dict().items())
    joint_state = {k: v.clone() for k, v in learner.state_dict().items() if "refiner" not in k}
    rows = train(flow, tmp_path, quiet=True)
    assert sum(r["flow"] for r in rows[-5:]) < 0.8 * sum(r["flow"] for r in rows[:5])
    assert all(torch.equal(v, joint_state[k]) for k, v in learner.state_dict().items() if "refiner" not in k)
    waves, answers = tones(999)
    codes = tokenizer.encode(waves)
    features = tokenizer.quantizer.decode(torch.nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1))
    assert isinstance(learner.language, AnswerDecoder)
    assert learner.language.transcribe(features, torch.tensor([len(c) for c in codes])) == answers


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_language_term_can_be_switched_off(weight: float) -> None:
    learner = trainee(language=weight > 0)
    for stage in stages(learner, tones, AudioTraining(language_weight=weight))[:2]:
        metrics = stage.loss(stage.batch(0))[1]
        assert ("language" in metrics) == (weight > 0)


def test_a_frozen_language_model_stays_frozen() -> None:
    learner = trainee()
    assert learner.language is not None
    frozen = AudioTrainee(learner.tokenizer, learner.language.requires_grad_(False))
    ids = {id(weight) for stage in stages(frozen, tones, SETTINGS) for weight in stage.parameters}
    assert not ids & {id(weight) for weight in learner.language.parameters()}
    assert id(learner.tokenizer.encoder.whisper.embed_positions.weight) not in ids


def test_batches_are_a_function_of_the_step() -> None:
    stage = stages(trainee(), tones, SETTINGS)[1]
    one, same, other = stage.batch(3), stage.batch(3), stage.batch(4)
    assert torch.equal(one.mels.log_mel, same.mels.log_mel) and torch.equal(one.answers, same.answers)
    assert not torch.equal(one.mels.positions, other.mels.positions)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 8), st.integers(0, 100))
def test_kept_levels_are_in_range(clips: int, levels: int, seed: int) -> None:
    torch.manual_seed(seed)
    kept = draw_kept(clips, levels, 0.5)
    assert kept.shape == (clips,) and 1 <= int(kept.min()) <= int(kept.max()) <= levels
    assert bool((draw_kept(clips, levels, 1.0) == levels).all())


def test_half_the_clips_keep_all_levels() -> None:
    torch.manual_seed(0)
    counts = torch.bincount(draw_kept(8000, 4, 0.5), minlength=5).tolist()
    assert counts[0] == 0 and all(abs(count - 1000) < 150 for count in counts[1:4]) and abs(counts[4] - 5000) < 250


def test_answers_do_not_feel_padding_and_greedy_equals_teacher_forcing() -> None:
    torch.manual_seed(0)
    decoder = AnswerDecoder(8, 5, width=16, layers=2).eval()
    features = torch.randn(2, 6, 8)
    positions = torch.tensor([6, 4])
    answers = torch.tensor([[1, 2, 3], [4, IGNORED, IGNORED]])
    with torch.no_grad():
        together = decoder(features, positions, answers)
        alone = [
            decoder(features[:1], positions[:1], answers[:1]),
            decoder(features[1:, :4], positions[1:], answers[1:, :1]),
        ]
    torch.testing.assert_close(together, (4 * alone[0] + 2 * alone[1]) / 6)
    said = decoder.transcribe(features, positions, longest=3)
    for row, answer in enumerate(said):
        logits = decoder._logits(
            features[row : row + 1], positions[row : row + 1], torch.tensor([answer]).long().view(1, -1)
        )
        assert logits[0, : len(answer)].argmax(-1).tolist() == answer
