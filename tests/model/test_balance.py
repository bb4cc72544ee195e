"""Expert balancing: the published update and loss, and that they balance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longcat_model import presets
from longcat_model.config import Experts
from longcat_model.sequence import Layout, pack
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.training.balance import (
    MODALITIES,
    Balancer,
    balance_loss,
    bias_rate,
    expert_counts,
    expert_usage,
    update_bias,
    use,
)
from longcat_model.vocabulary import Vocabulary

EXPERTS = Experts(real=4, zero=2, top_k=3, target_real=2.0, width=8)


def test_counts_leave_out_what_was_not_chosen() -> None:
    ids = torch.tensor([[0, 3, 5], [3, -1, -1]])
    assert expert_counts(ids, EXPERTS).tolist() == [1, 0, 0, 2, 0, 1]


def test_the_balance_loss_is_one_at_the_wanted_use() -> None:
    """Each of 4 tokens takes 2 of 4 real experts and 1 identity; router mass is in the same proportion."""
    counts = expert_counts(torch.tensor([[0, 1, 4], [2, 3, 5], [0, 2, 4], [1, 3, 5]]), EXPERTS)
    logits = torch.tensor([2 / 12] * 4 + [2 / 12] * 2).log().expand(4, 6)
    for groups in (1, 2, 4, None):
        found = use(counts, EXPERTS, groups=groups)
        assert found.tolist() == [1.0] * 6
        assert balance_loss(logits, found, 4).item() == pytest.approx(1.0)


def test_the_balance_loss_against_a_calculation_by_hand() -> None:
    """Two tokens, both on experts 0, 1 and identity 4; P = (.4, .2, .1, .1, .1, .1) for both."""
    logits = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.1]).log().expand(2, 6)
    counts = expert_counts(torch.tensor([[0, 1, 4], [0, 1, 4]]), EXPERTS)
    # two groups of two: f = 2 / (2 * 2) * (4, 0), P = (.6, .2); identity: f = 1 / (1 * 2) * 2, P = .2
    found = balance_loss(logits, use(counts, EXPERTS, groups=2), 2)
    assert found.item() == pytest.approx(2 * 0.6 + 0 * 0.2 + 1 * 0.2)
    # four groups of one: f = 4 / (2 * 2) * (2, 2, 0, 0)
    assert balance_loss(logits, use(counts, EXPERTS), 2).item() == pytest.approx(2 * 0.4 + 2 * 0.2 + 1 * 0.2)


def test_the_balance_loss_moves_probability_to_experts_in_want() -> None:
    logits = torch.zeros(8, 6, requires_grad=True)
    counts = torch.tensor([8, 8, 8, 0, 0, 0])  # real experts beyond the budget, never 3, never an identity expert
    balance_loss(logits, use(counts, EXPERTS), 8).backward()
    assert logits.grad is not None
    used, wanted = logits.grad[:, :3], logits.grad[:, 3:]
    assert bool((used > 0).all()) and bool((wanted < 0).all())


def test_the_balance_loss_of_nothing_is_nothing() -> None:
    """No token, or no step before: no loss. Where all slots are for real experts, identity experts have no part."""
    assert balance_loss(torch.zeros(0, 6), torch.ones(6), 0).item() == 0
    assert use(torch.zeros(6, dtype=torch.int64), EXPERTS).tolist() == [0.0] * 6
    every_slot = dataclasses.replace(EXPERTS, target_real=3.0)
    assert use(torch.tensor([1, 0, 1, 0, 1, 0]), every_slot)[4:].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="balance_loss: groups must divide 4 experts, got 3"):
        use(torch.zeros(6), EXPERTS, groups=3)


def test_the_bias_moves_as_published() -> None:
    """rate * (K_e / (K E) - T_i / (K T_all)) with K_e / (K E) = 2 / 12; identity experts stay."""
    bias = torch.zeros(6)
    update_bias(bias, torch.tensor([6, 2, 0, 0, 4, 0]), EXPERTS, rate=0.6)
    torch.testing.assert_close(bias, 0.6 * torch.tensor([1 / 6 - 6 / 12, 1 / 6 - 2 / 12, 1 / 6, 1 / 6, 0.0, 0.0]))
    before = bias.clone()
    update_bias(bias, torch.zeros(6, dtype=torch.int64), EXPERTS, rate=0.6)
    assert bool((bias == before).all())


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_the_bias_brings_a_skewed_router_to_its_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(512, 6, generator=generator) + torch.tensor([2.0, 0, 0, -1, 1, 1])).softmax(-1)
    bias = torch.zeros(6)
    for step in range(600):
        counts = expert_counts(choose(scores, bias), EXPERTS)
        update_bias(bias, counts, EXPERTS, rate=bias_rate(step, half_life=100))
    counts = expert_counts(choose(scores, bias), EXPERTS)
    assert counts[:4].sum().item() / 512 == pytest.approx(EXPERTS.target_real, rel=0.03)
    assert counts[:4].max().item() <= 1.1 * counts[:4].min().item()


def test_the_rate_halves_down_to_its_floor() -> None:
    assert [bias_rate(step) for step in (0, 999, 1000, 2500, 9000)] == [0.1, 0.1, 0.05, 0.025, 0.01]


def test_the_balancer_updates_every_layer_once_from_what_it_saw() -> None:
    model = nn.ModuleDict({"first": Router(), "second": Router()})
    balancer = Balancer(model, EXPERTS)
    balancer.observe([torch.tensor([[0, 1, 4]]), torch.tensor([[2, 3, 5]])])
    balancer.observe([torch.tensor([[0, 1, 4]]), torch.tensor([[2, 3, 5]])])
    assert balancer.use()[0].tolist() == [0.0] * 6, "nothing is known of a step before the first"
    balancer.step(0)
    assert [before.tolist() for before in balancer.before] == [[2, 2, 0, 0, 2, 0], [0, 0, 2, 2, 0, 2]]
    assert not any(counts.any() for counts in balancer.counts)
    first, second = (bias.clone() for bias in balancer.biases)
    assert first[0] < 0 < first[2] and second[2] < 0 < second[0]
    balancer.step(1)
    assert bool((balancer.biases[0] == first).all()) and bool((balancer.biases[1] == second).all())
    with pytest.raises(ValueError, match="Balancer: expert_ids must have 2 layers, got 1"):
        balancer.observe([torch.tensor([[0, 1, 4]])])


def test_a_balancer_may_only_count() -> None:
    model = nn.ModuleDict({"first": Router()})
    balancer = Balancer(model, EXPERTS, moves_bias=False)
    balancer.observe([torch.tensor([[0, 1, 4]])])
    balancer.step(0)
    assert not balancer.biases[0].any() and balancer.use()[0].tolist() == [2, 2, 0, 0, 1, 1]


def test_use_is_counted_by_modality() -> None:
    layout = Layout(Vocabulary.of(presets.tiny().vocabulary), ByteTokenizer().encode)
    image = layout.understand_image(torch.zeros(1, 2, 3))  # 2 text positions, 2 visual
    speech = layout.speak([10, 11], torch.zeros(3, 4), delay=1)  # G, AS with 10; three frames; end
    inputs = pack([image, speech], 12).inputs  # and two positions of padding
    by_position = torch.arange(3).expand(12, 3).contiguous()
    usage = expert_usage([by_position, by_position], inputs, EXPERTS)
    assert usage.shape == (2, 3, 6)
    assert dict(zip(MODALITIES, usage[1].sum(-1).tolist(), strict=True)) == {"text": 15, "visual": 6, "audio": 9}
    assert usage[0, 1].tolist() == [2, 2, 2, 0, 0, 0]


class Router(nn.Module):
    e_score_correction_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(6))


def choose(scores: Tensor, bias: Tensor) -> Tensor:
    return (scores + bias).topk(EXPERTS.top_k, dim=-1).indices
