"""The loss against a position-by-position calculation, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longcat_model import presets
from longcat_model.model import LongcatNext
from longcat_model.sequence import IGNORE, NONE, Batch, Document, Layout, pack
from longcat_model.tokenizers.text import ByteTokenizer
from longcat_model.training.balance import Balancer
from longcat_model.training.loss import LossWeights, Totals, loss
from longcat_model.training.microbatches import cut
from longcat_model.vocabulary import Vocabulary

IDS = Vocabulary.of(presets.tiny().vocabulary)  # levels: visual 8 8 8, audio 8 6 4 4
LAYOUT = Layout(IDS, ByteTokenizer().encode)
ENTROPIES_ONLY = LossWeights(hidden_z=0, router_z=0, balance=0)


@pytest.fixture
def model() -> LongcatNext:
    torch.manual_seed(0)
    return LongcatNext(presets.tiny())


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    frames, cells = torch.tensor([[1, 2, 3, 0], [7, 5, 3, 3], [0, 0, 1, 1]]), torch.arange(12).view(2, 2, 3) % 8
    prompt, answer = LAYOUT.text([70, 71]), LAYOUT.text([72, 73, 74], loss=True)
    return [
        LAYOUT.document(prompt, LAYOUT.understand_image(cells), answer),
        LAYOUT.document(prompt, LAYOUT.generate_image(cells)),
        LAYOUT.document(LAYOUT.hear(frames), answer, LAYOUT.speak([75, 76], frames, delay=1)),
        LAYOUT.document(prompt, LAYOUT.speak([75, 76], frames)),
    ]


def test_cross_entropies_are_summed_over_labels_and_divided_by_their_number(
    model: LongcatNext, documents: list[Document]
) -> None:
    batch = pack(documents, 40)
    total, metrics = loss(model, batch, weights=ENTROPIES_ONLY)
    text, visual, audio = labels_one_by_one(model, batch)
    levels = [entropy for position in (*visual, *audio) for entropy in position]
    wanted = (sum(text) + 0.25 * sum(levels)) / (len(text) + len(visual) + len(audio))
    assert total.item() == pytest.approx(wanted, rel=1e-5)
    assert (len(text), len(visual), len(audio)) == (16, 5, 8)
    assert metrics["text_loss"].item() == pytest.approx(sum(text) / len(text), rel=1e-5)
    assert metrics["visual_loss"].item() == pytest.approx(sum(map(sum, visual)) / 15, rel=1e-5)
    assert metrics["audio_loss_0"].item() == pytest.approx(sum(p[0] for p in audio) / 8, rel=1e-5)
    assert metrics["audio_loss_3"].item() == pytest.approx(sum(p[3] for p in audio if len(p) > 1) / 6, rel=1e-5)


def test_the_other_terms_follow_their_formulas(model: LongcatNext, documents: list[Document]) -> None:
    batch = pack(documents, 40)
    weights = LossWeights(hidden_z=0.5, router_z=0.25, balance=2.0)
    total, metrics = loss(model, batch, weights=weights)
    bare, _ = loss(model, batch, weights=ENTROPIES_ONLY)
    real = batch.inputs.documents.flatten() >= 0
    output = model(batch.inputs)
    hidden_z = output.last.flatten(0, 1)[real].abs().exp().sum(-1).log().square().mean()
    router_z = torch.stack([x[real].exp().sum(-1).log().square().mean() for x in output.router_logits]).sum()
    assert metrics["hidden_z"].item() == pytest.approx(hidden_z.item(), rel=1e-4)
    assert metrics["router_z"].item() == pytest.approx(router_z.item(), rel=1e-4)
    wanted = bare + 0.5 * hidden_z + 0.25 * router_z + 2 * metrics["balance"]
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_weights_choose_what_counts(model: LongcatNext, documents: list[Document]) -> None:
    """Text alone: as if images and speech had no labels, but for their share in the number of labels."""
    batch = pack(documents, 40)
    text_only = LossWeights(visual=0, audio=0, hidden_z=0, router_z=0, balance=0)
    total, metrics = loss(model, batch, weights=text_only)
    assert total.item() == pytest.approx(metrics["text_loss"].item() * 16 / 29, rel=1e-5)


def test_padding_changes_nothing(model: LongcatNext, documents: list[Document]) -> None:
    tight, tight_metrics = loss(model, pack(documents[:1], len(documents[0])))
    loose, loose_metrics = loss(model, pack(documents[:1], len(documents[0]) + 7))
    assert loose.item() == pytest.approx(tight.item(), rel=1e-5)
    for name, value in tight_metrics.items():
        assert loose_metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_every_parameter_that_took_part_gets_a_gradient(model: LongcatNext, documents: list[Document]) -> None:
    loss(model, pack(documents, 40))[0].backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without


def test_the_balance_loss_reaches_the_router(model: LongcatNext, documents: list[Document]) -> None:
    only_balance = LossWeights(text=0, visual=0, audio=0, hidden_z=0, router_z=0, balance=1)
    loss(model, pack(documents, 40), weights=only_balance)[0].backward()
    routers = [p for name, p in model.named_parameters() if name.endswith("router.classifier.weight")]
    assert len(routers) == 2
    assert all(p.grad is not None and bool(p.grad.any()) for p in routers)


def test_depth_heads_run_at_supervised_positions_only(
    model: LongcatNext, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    for name in ("visual_head", "audio_head"):
        head = getattr(model, name)
        original = head.logits

        def logits(hidden: Tensor, *rest: object, name: str = name, original: object = original) -> object:
            seen[name] = hidden.shape[0]
            assert callable(original)
            return original(hidden, *rest)

        monkeypatch.setattr(head, "logits", logits)
    loss(model, pack(documents, 40))
    assert seen == {"visual_head": 5, "audio_head": 8}
    seen.clear()
    _, metrics = loss(model, pack([LAYOUT.document(LAYOUT.text([70], loss=True))], 40))
    assert seen == {}
    assert {name.split("_")[0] for name in metrics} == {"text", "hidden", "router", "balance"}


def test_accuracy_is_one_for_a_model_that_knows(model: LongcatNext) -> None:
    """The text head of a model whose last row of weights always wins."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[70] = 1
        hidden = model(pack([LAYOUT.text([71, 70])], 2).inputs).hidden[0, 0]
        model.lm_head.weight[70] = hidden
    _, metrics = loss(model, pack([LAYOUT.text([71, 70], loss=True)], 2))
    assert metrics["text_accuracy"].item() == 1
    _, metrics = loss(model, pack([LAYOUT.text([71, 72], loss=True)], 2))
    assert metrics["text_accuracy"].item() == 0


def test_a_batch_without_labels_has_no_cross_entropy(model: LongcatNext) -> None:
    total, metrics = loss(model, pack([LAYOUT.text([70, 71])], 4), weights=ENTROPIES_ONLY)
    assert total.item() == 0
    assert "text_loss" not in metrics


def test_the_balancer_sees_every_real_position_once(model: LongcatNext, documents: list[Document]) -> None:
    experts = model.sizes.backbone.experts
    balancer = Balancer(model, experts)
    loss(model, pack(documents, 40), balancer=balancer)
    positions = sum(map(len, documents))
    assert [int(counts.sum()) for counts in balancer.counts] == [positions * experts.top_k] * 2


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_microbatches_add_up_to_the_global_batch(model: LongcatNext, documents: list[Document], parts: int) -> None:
    """Losses and gradients, the balance loss among them, in float64; the experts were used unevenly before."""
    weights, whole = LossWeights(hidden_z=1e-2, router_z=1e-1, balance=10.0), pack(documents, max(map(len, documents)))
    model.double()
    balancer = Balancer(model, model.sizes.backbone.experts)
    loss(model, whole, balancer=balancer)
    balancer.step(0)
    cuts = cut(whole, parts)
    assert len(cuts) == parts
    totals = Totals.of(cuts)
    found = sum(loss(model, part, weights=weights, balancer=balancer, totals=totals)[0] for part in cuts)
    wanted, _ = loss(model, whole, weights=weights, balancer=balancer)
    assert isinstance(found, Tensor) and found.item() == pytest.approx(wanted.item(), rel=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x, parameters, allow_unused=True) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_metrics_carry_no_graph(model: LongcatNext, documents: list[Document]) -> None:
    total, metrics = loss(model, pack(documents, 40))
    assert total.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def labels_one_by_one(model: LongcatNext, batch: Batch) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """Cross entropy of each text label, and of each level of each visual and audio label."""
    hidden = model(batch.inputs).hidden
    text, visual, audio = [], [], []
    for row, s in (batch.inputs.documents >= 0).nonzero().tolist():
        here = hidden[row, s][None]
        if (label := int(batch.targets.text[row, s])) != IGNORE:
            text.append(entropy(model.text_logits(here)[0], label))
        heads = (
            (visual, batch.targets.visual, model.visual_head, model.visual_tables()),
            (audio, batch.targets.audio, model.audio_head, model.audio_tables()),
        )
        for found, targets, head, tables in heads:
            labels = targets[row, s]
            if int(labels[0]) != IGNORE:
                logits = head.logits(here, labels[None].clamp(min=NONE), tables)
                pairs = zip(logits, labels.tolist(), strict=True)
                found.append([entropy(level[0], label) for level, label in pairs if label != IGNORE])
    return text, visual, audio


def entropy(logits: Tensor, label: int) -> float:
    return float(-logits.detach().double().log_softmax(-1)[label])
