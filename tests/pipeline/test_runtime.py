"""The runtime against one process: the same bits for every schedule, and nothing kept that the plan does not keep."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
from counting import Calls
from hypothesis import given, settings
from hypothesis.strategies import data, integers, sampled_from
from small import SCHEDULES, Toy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_kernels import defer_weight_grads
from longcat_model.pipeline import runtime
from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.ir import (
    Action,
    Kind,
    Placement,
    Schedule,
    parse,
    show,
    v_placement,
    without,
)
from longcat_model.pipeline.lower import lower
from longcat_model.pipeline.runtime import Runtime
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import peak_bytes
from longcat_model.pipeline.split import Microbatch, ModelStage, split
from longcat_model.pipeline.stage import Output
from longcat_model.pipeline.transport import InProcess, PipelineError
from longcat_model.pipeline.verify import verify


@pytest.fixture(scope="module")
def reference() -> Callable[..., tuple[dict[str, Tensor], list[Tensor]]]:
    """Gradients and losses of one process for a number of microbatches of a kind."""

    @functools.cache
    def of(microbatches: int, kind: str = "mixed") -> tuple[dict[str, Tensor], list[Tensor]]:
        whole = small.model()
        losses = small.one_process(whole, small.batches(microbatches, kind))
        return small.gradients([whole]), losses

    return of


@pytest.mark.parametrize(
    ("devices", "microbatches", "kind"),
    [(1, 3, "mixed"), (2, 6, "mixed"), (3, 2, "mixed"), (4, 7, "mixed"), *((2, 3, kind) for kind in small.KINDS[1:])],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_gradients_are_those_of_one_process(
    name: str, devices: int, microbatches: int, kind: str, reference: Any
) -> None:
    make, place = SCHEDULES[name]
    schedule, placement, parts = make(devices, microbatches), place(devices), small.batches(microbatches, kind)
    schedule = lower(schedule, placement, microbatches)
    models, results = small.piped(small.model(), schedule, placement, parts)
    want, losses = reference(microbatches, kind)
    found = small.gradients(models)
    assert found.keys() == want.keys()
    for weight, grad in found.items():
        # The table's two uses are on two devices, so each is summed over the microbatches first.
        is_apart = weight == "embed_tokens.weight" and placement[0] != placement[-1]
        compare = (lambda a, b: torch.allclose(a, b, rtol=1e-6, atol=1e-7)) if is_apart else torch.equal
        assert compare(grad, want[weight]), weight
    assert all(map(torch.equal, small.losses(results, placement, parts), losses))
    planned = peak_bytes(schedule, uniform(len(placement), microbatches, saved=1))
    assert tuple(result.peak_live for result in results) == planned


def test_a_forward_that_is_done_again_gives_the_same_bits(reference: Any) -> None:
    again = lower(v_half(2, 5), v_placement(2), 5, recomputed=range(4))
    assert sum(action.kind is Kind.R for row in again for action in row) == 20
    models, results = small.piped(small.model(), again, v_placement(2), small.batches(5))
    want, losses = reference(5)
    for name, grad in small.gradients(models).items():
        assert torch.equal(grad, want[name]), name
    assert all(map(torch.equal, small.losses(results, v_placement(2), small.batches(5)), losses))


def test_a_stage_without_modules_is_done_again_too() -> None:
    """As a long pipeline has of a short model."""
    parts, want = small.batches(2), small.model()
    small.one_process(want, parts)
    again = lower(v_half(4, 2), v_placement(4), 2, recomputed=range(8))
    models, _ = small.piped(small.model(), again, v_placement(4), parts)
    assert 0 in {len(stage.units) for stage in split(want, small.cuts(len(want.backbone.layers), 8))}
    wanted = small.gradients([want])
    for name, grad in small.gradients(models).items():
        if name != "embed_tokens.weight":  # its two uses are summed over the microbatches each
            assert torch.equal(grad, wanted[name]), name


def test_forwards_alone_keep_nothing(reference: Any) -> None:
    placement = v_placement(2)
    rows = lower(without(v_half(2, 4), {Kind.I, Kind.W, Kind.B}), placement, 4)
    models, results = small.piped(small.model(), rows, placement, small.batches(4))
    assert not small.gradients(models) and [result.peak_live for result in results] == [0, 0]
    assert all(map(torch.equal, small.losses(results, placement, small.batches(4)), reference(4)[1]))


def test_gradients_add_up_over_steps() -> None:
    placement, parts = v_placement(2), small.batches(3)
    whole, want = small.model(), small.model()
    (end,) = InProcess.connect(1)
    own = small.runtime(whole, lower(v_half(1, 3), v_placement(1), 3), v_placement(1), end)
    for _ in range(2):
        own.step(Microbatch.of(parts))
        small.one_process(want, parts)
    found, wanted = small.gradients([whole]), small.gradients([want])
    assert placement and all(torch.equal(found[name], wanted[name]) for name in wanted)


def _matrices() -> list[Tensor]:
    """Every one that is alive."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.dim() == 2]


def test_no_logits_live_between_forward_and_backward() -> None:
    """Heads leave the gradient of their input, which is as large as the hidden state, and no more."""
    whole = small.model()
    (part,) = Microbatch.of(small.batches(1))
    stages = split(whole, (1, 2, 4), small.WEIGHTS)
    hidden: Tensor | None = None
    kept = []
    before = _matrices()  # of other tests
    for stage in stages:
        output = stage(hidden, part)
        kept.append(output)
        hidden = None if output.hidden is None else output.hidden.detach().requires_grad_()
    classes = {whole.ids.text_rows, *(size + 1 for size in whole.ids.visual_sizes + whole.ids.audio_sizes)}
    known = {id(tensor) for tensor in before}
    shapes = {tuple(tensor.shape) for tensor in _matrices() if id(tensor) not in known}
    weights = {tuple(p.shape) for p in whole.parameters()}
    positions = part.batch.inputs.text.numel()
    assert not [shape for shape in shapes - weights if shape[1] in classes and shape[0] <= positions and shape[0] > 1]


def toys(
    schedule: Schedule, placement: Placement, microbatches: int, timeout_s: float, **trouble: Callable[[int], None]
) -> list[str]:
    """Runs a step of toys; gives what each device raised."""
    ends, messages = InProcess.connect(len(schedule), timeout_s), [""] * len(schedule)

    def work(device: int) -> None:
        own = {
            s: Toy(s == len(placement) - 1, trouble.get(f"stage{s}", lambda microbatch: None))
            for s, home in enumerate(placement)
            if home == device
        }
        try:
            Runtime(schedule, placement, own, ends[device]).step(range(microbatches))
        except PipelineError as error:
            messages[device] = str(error)

    small.in_threads(work, len(schedule))
    return messages


def test_who_waits_in_vain_names_action_peer_and_microbatch() -> None:
    schedule = parse("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0\n")
    first, second = toys(schedule, (0, 1), 1, 0.2, stage1=lambda microbatch: time.sleep(1))
    assert first == "pipeline: device 0, 0RECV_B0 (microbatch 0) from device 1 stopped: nothing came for 0.2 s"
    assert not second


def test_a_failing_stage_stops_all_devices_with_its_reason() -> None:
    def trouble(microbatch: int) -> None:
        if microbatch == 2:
            raise RuntimeError("out of luck")

    messages = toys(lower(v_half(3, 4), v_placement(3), 4), v_placement(3), 4, 30.0, stage4=trouble)
    assert messages[1] == "pipeline: 4F2 (microbatch 2) stopped: out of luck"
    assert all(f"device 1 failed: {messages[1]}" in messages[device] for device in (0, 2))


def trained(schedule: Schedule, placement: Placement, microbatches: int) -> list[Tensor] | None:
    """Gradients of toys by stage, where sends and receives wait for each other; None where a device did not end."""
    ends, well = InProcess.connect(len(schedule), 10.0, rendezvous=True), [False] * len(schedule)
    toys = [Toy(stage == len(placement) - 1) for stage in range(len(placement))]

    def work(device: int) -> None:
        own = {s: toys[s] for s, home in enumerate(placement) if home == device}
        try:
            Runtime(schedule, placement, own, ends[device]).step(range(microbatches))
            well[device] = True
            ends[device].gather(None)  # who has ended waits for the others, so that they do not wait for it
        except (KeyError, PipelineError, ValueError) as error:
            ends[device].fail(error)

    small.in_threads(work, len(schedule))
    return [torch.zeros(2, 2) if toy.weight.grad is None else toy.weight.grad for toy in toys] if all(well) else None


def straight(stages: int, microbatches: int) -> list[Tensor]:
    """The same gradients without a pipeline."""
    toys = [Toy(stage == stages - 1) for stage in range(stages)]
    for microbatch in range(microbatches):
        out = Output(None)
        for toy in toys:
            out = toy(out.hidden, microbatch)
        assert out.loss is not None
        out.loss.backward()
    return [toy.weight.grad for toy in toys if toy.weight.grad is not None]


CHANGES = ("swap", "swap", "swap", "move", "drop", "double", "rename")


def changed(row: list[Action], draw: Callable[[int, int], int]) -> None:
    """One action of a row swapped with the next, moved, dropped, doubled, or made that of another microbatch."""
    what, i = CHANGES[draw(0, len(CHANGES) - 1)], draw(0, len(row) - 2)
    if what == "swap":
        row[i], row[i + 1] = row[i + 1], row[i]
    elif what == "move":
        row.insert(draw(0, len(row) - 1), row.pop(i))
    elif what == "drop":
        del row[i]
    elif what == "double":
        row.insert(draw(0, len(row)), row[i])
    else:
        row[i] = row[i]._replace(microbatch=1 - row[i].microbatch)


def agrees(schedule: Schedule, placement: Placement, microbatches: int) -> bool:
    """Whether the verifier accepts; asserts that the runtime then has the right gradients, and else does not end."""
    try:
        verify(schedule, placement, microbatches)
        is_valid = True
    except ValueError:
        is_valid = False
    found = trained(schedule, placement, microbatches)
    assert (found is not None) == is_valid, show(schedule)
    if found is not None:
        for grad, want in zip(found, straight(len(placement), microbatches), strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-6)
    return is_valid


@settings(max_examples=150, deadline=None)
@given(data())
def test_the_verifier_accepts_what_the_runtime_can_run(data: Any) -> None:
    """Valid schedules, some with forwards that are done again, of which up to three actions are changed."""
    make, place = SCHEDULES[data.draw(sampled_from(sorted(SCHEDULES)))]
    placement = place(2)
    again = range(data.draw(integers(0, len(placement))))
    lowered = lower(make(2, 2), placement, 2, recomputed=again)
    rows = [list(row) for row in without(lowered, {Kind.REDUCE_GRAD, Kind.FREE})]
    for _ in range(data.draw(integers(0, 3))):
        changed(rows[data.draw(integers(0, 1))], lambda low, high: data.draw(integers(low, high)))
    agrees(tuple(map(tuple, rows)), placement, 2)


def test_the_comparison_sees_both_answers() -> None:
    """So that the property above cannot hold for want of cases: all single swaps and doublings of one schedule."""
    placement = v_placement(2)
    plain = without(lower(v_half(2, 2), placement, 2), {Kind.REDUCE_GRAD, Kind.FREE})
    answers = []
    for device, row in enumerate(plain):
        for i in range(len(row) - 1):
            swapped = (*row[:i], row[i + 1], row[i], *row[i + 2 :])
            answers.append(agrees((*plain[:device], swapped, *plain[device + 1 :]), placement, 2))
            doubled = (*row[: i + 1], *row[i:])
            assert not agrees((*plain[:device], doubled, *plain[device + 1 :]), placement, 2)
    assert 5 < sum(answers) < len(answers) - 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0F0 0B0", "0F0 cannot run here, it must run once"),
        ("0B0 0F0", "0B0 cannot run here, it must run once, F before I before W"),
        ("0F0 0I0 0I0 0W0", "0I0 cannot run here, it must run once, F before I before W"),
        ("0F0 0W0 0I0", "0W0 cannot run here, it must run once, F before I before W"),
        ("0F0 0R0 0R0 0B0", "0R0 cannot run here, it must run once"),
        ("0F0 0FREE0 0B0", "0FREE0 cannot run here, W must come first"),
        ("0F0 0I0", "must bring each of 1 microbatches through every stage and leave nothing behind"),
        ("", "must bring each of 1 microbatches through every stage and leave nothing behind"),
    ],
)
def test_a_schedule_that_was_not_verified_is_refused_where_it_breaks(text: str, message: str) -> None:
    (end,) = InProcess.connect(1)
    with pytest.raises(ValueError, match=f"{message}.*`verify` says"):
        Runtime((parse(text) or ((),))[:1], (0,), {0: Toy(True)}, end).step(range(1))


def test_refuses_what_it_cannot_run() -> None:
    (end,) = InProcess.connect(1)
    schedule = parse("0UNSHARD 0F0 0B0\n")
    with pytest.raises(ValueError, match=r"actions must be among those it runs, got UNSHARD"):
        Runtime(schedule, (0,), {0: Toy(True)}, end)
    with pytest.raises(ValueError, match=r"stages must be \[0\] on device 0, got \[1\]"):
        Runtime(parse("0F0 0B0\n"), (0,), {1: Toy(True)}, end)


def test_a_stage_is_reduced_when_its_last_gradient_is_there() -> None:
    (end,) = InProcess.connect(1)
    stages, seen = {0: Toy(False), 1: Toy(True)}, []

    def reduce(stage: int) -> None:
        grad = stages[stage].weight.grad
        assert grad is not None
        seen.append((stage, grad.sum().item()))

    Runtime(lower(v_half(1, 3), v_placement(1), 3), v_placement(1), stages, end, reduce=reduce).step(range(3))
    assert sorted(seen) == [(stage, stages[stage].weight.grad.sum().item()) for stage in (0, 1)]  # type: ignore[union-attr]


def test_the_timeline_has_every_action_in_order() -> None:
    (end,) = InProcess.connect(1)
    schedule = lower(v_half(1, 3), v_placement(1), 3)
    result = Runtime(schedule, v_placement(1), {0: Toy(False), 1: Toy(True)}, end).step(range(3))
    assert tuple(ran.action for ran in result.timeline) == schedule[0]
    times = [moment for ran in result.timeline for moment in (ran.start_s, ran.end_s)]
    assert times == sorted(times) and Action(0, Kind.F, 0) in schedule[0]


def test_no_work_of_the_whole_model_is_done_twice() -> None:
    """F, I and W together call what forward and backward of one process call."""
    parts, whole, want = small.batches(3), small.model(), small.model()
    (end,), placement = InProcess.connect(1), v_placement(1)
    halves = {Kind.B: (Kind.I, Kind.W)}
    (row,) = lower(v_half(1, 3), placement, 3)
    split_apart = (tuple(a._replace(kind=kind) for a in row for kind in halves.get(a.kind, (a.kind,))),)
    own = small.runtime(whole, split_apart, placement, end)
    with Calls() as expected:
        small.one_process(want, parts)
    with Calls() as found:
        own.step(Microbatch.of(parts))
    assert found.counts == expected.counts and any("longcat" in name for name in found.counts)


def test_weights_wait_for_w_but_for_those_of_the_heads() -> None:
    """Heads have theirs from F, in which their logits come and go; I gives no weight a gradient."""
    whole, placement = small.model(), v_placement(1)
    (end,) = InProcess.connect(1)
    own, seen = small.runtime(whole, lower(v_half(1, 1), placement, 1), placement, end), dict[str, Kind]()
    handlers = dict(runtime._HANDLERS)

    def noting(kind: Kind) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            handlers[kind](*arguments)
            for name, weight in whole.named_parameters():
                if weight.grad is not None:
                    seen.setdefault(name, kind)

        return run

    (own.actions,) = parse("0F0 1F0 1I0 0I0 1W0 0W0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "_HANDLERS", {kind: noting(kind) for kind in handlers})
        own.step(Microbatch.of(small.batches(1)))
    heads = {"lm_head", "visual_head", "audio_head"}
    for name, kind in seen.items():
        assert kind is (Kind.F if name.split(".")[0] in heads else Kind.W), name
    assert {name.split(".")[0] for name in seen} == heads | {"embed_tokens", "ngram", "pre_buffer", "backbone"}


class VocabularyProducts(TorchDispatchMode):
    """Counts matrix products of which one side is a vocabulary."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.count = rows, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = {size for tensor in (*args, out) if isinstance(tensor, Tensor) for size in tensor.shape}
        self.count += str(func) == "aten.mm.default" and self.rows in sizes
        return out


def test_the_text_head_takes_three_products_all_in_f() -> None:
    """Logits and both gradients: none is left for W, which would need N x V numbers until then, or a fourth product."""
    whole = small.model()
    (part,), unit = Microbatch.of(small.batches(1)), len(whole.backbone.layers) + 1
    stage, rows = ModelStage(whole, range(unit, unit + 1), small.WEIGHTS), whole.ids.text_rows
    hidden = torch.randn(stage.takes(part).shape, requires_grad=True)
    with VocabularyProducts(rows) as forward, defer_weight_grads() as pending:
        output = stage(hidden, part)
    assert output.loss is not None and output.hidden is not None
    with VocabularyProducts(rows) as later:
        torch.autograd.backward([output.loss, output.hidden], [None, torch.ones_like(output.hidden)])
        pending.run()
    assert (forward.count, later.count) == (3, 0) and hidden.grad is not None and whole.lm_head.weight.grad is not None


def test_a_profiler_of_cuda_sees_every_action(monkeypatch: pytest.MonkeyPatch) -> None:
    (end,), seen = InProcess.connect(1), []
    schedule = lower(v_half(1, 2), v_placement(1), 2)
    own = Runtime(schedule, v_placement(1), {0: Toy(False), 1: Toy(True)}, end)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("."))
    own.step(range(2))
    assert seen == [part for action in schedule[0] for part in (str(action), ".")]
