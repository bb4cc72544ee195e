"""What a user may say of a pipeline: memory, recomputation, free order, timeout. None of it changes what is learnt."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
import torch.distributed as dist
from torch import Tensor

from longcat_model.model import LongcatNext
from longcat_model.pipeline import measure
from longcat_model.pipeline.costs import Costs, uniform
from longcat_model.pipeline.ir import Action, Kind
from longcat_model.pipeline.measure import SMALL, measure_links
from longcat_model.pipeline.parts import Saved
from longcat_model.pipeline.profile import Module, Profile, save
from longcat_model.pipeline.schedules.searched import Effort
from longcat_model.pipeline.schedules.v import v_half
from longcat_model.pipeline.simulate import peak_bytes, simulate
from longcat_model.pipeline.split import split
from longcat_model.pipeline.transport import InProcess
from longcat_model.pipeline.verify import verify
from longcat_model.sequence import Batch, pack
from longcat_model.training.balance import Balancer
from longcat_model.training.loop import Stage
from longcat_model.training.loss import Totals, loss
from longcat_model.training.mesh import Mesh
from longcat_model.training.microbatches import cut, size
from longcat_model.training.model_stages import joint
from longcat_model.training.pipelined import Pipelined, _Training, train_pipelined
from longcat_model.training.plan import Piping, Plan, Sample, Weights, planned

LITTLE = Effort(moves=20_000, tries=100, blocks=1, starts=2)
PARTS = 6


def batch(step: int) -> Batch:
    """Six rows of very different lengths, in another order each step."""
    documents, order = small.documents(), [0, 4, 2, 4, 6, 1]
    rows = [[documents[order[(k + step) % PARTS]]] * (1 + (k + step) % 3) for k in range(PARTS)]
    return pack([document for row in rows for document in row], 30)


def make(model: LongcatNext) -> Stage:
    return joint(model, batch, steps=2, learning_rate=1e-2, weights=small.WEIGHTS)


def profile(model: LongcatNext) -> Profile:
    """As if measured, the same on every machine: heads cost by their labels."""
    layer, end = Module(1.0, 1.1, 0.9, 4000, 400), Module(0.3, 0.3, 0.3, 900, 100)
    layers = (layer,) * len(model.backbone.layers)
    return Profile(end, layers, end, Module(2.0, 2.0, 1.0, 3000, 200), links=(((SMALL, 0.1),),))


def plan(model: LongcatNext, piping: Piping) -> Plan:
    return planned(profile(model), Sample.of([batch(step) for step in range(3)], PARTS), 2, piping, LITTLE)[0]


def gradients(piping: Piping) -> tuple[list[Pipelined], list[float], dict[str, Tensor]]:
    """Of a step on two devices that are threads: the engines, every device's loss, all gradients."""
    ends, models = InProcess.connect(2), [small.model(), small.model()]

    def work(device: int) -> tuple[Pipelined, float]:
        engine = Pipelined(make(models[device]), plan(models[device], piping), ends[device], small.WEIGHTS)
        return engine, engine.backward(batch(1))["loss"]

    engines, losses = zip(*small.in_threads(work, 2), strict=True)
    found = {name: w.grad for engine in engines for name, w in engine.parameters().items() if w.grad is not None}
    return list(engines), list(losses), found


def one_by_one(parts: list[Batch]) -> tuple[float, list[dict[str, Tensor]]]:
    """Of one process: the loss, and the gradients of every microbatch by itself."""
    model, totals, found, total = small.model(), Totals.of(parts), [], 0.0
    balancer = Balancer(model, model.sizes.backbone.experts)
    for part in parts:
        model.zero_grad()
        one, _ = loss(model, part, weights=small.WEIGHTS, balancer=balancer, totals=totals)
        one.backward()
        total += one.item()
        found.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
    return total, found


def added(grads: list[Tensor]) -> Tensor:
    """In order."""
    total = grads[0].clone()
    for grad in grads[1:]:
        total += grad
    return total


@pytest.mark.parametrize(
    "piping", [Piping(microbatches=PARTS, recompute=True), Piping(microbatches=PARTS, any_order=True)]
)
def test_gradients_are_sums_of_one_process_in_the_order_of_the_schedule(piping: Piping) -> None:
    """To the bit, stage by stage; the loss to 1e-6. The plan is the same whoever makes it."""
    engines, losses, found = gradients(piping)
    assert engines[0].plan == engines[1].plan == plan(small.model(), piping)
    parts = engines[0].plan.arranged(cut(batch(1), PARTS))
    total, alone = one_by_one(parts)
    assert losses[0] == losses[1] == pytest.approx(total, rel=1e-6)
    seen = set()
    for engine in engines:
        row = engine.plan.order(len(parts)).schedule[engine.transport.device]
        for number, stage in engine.stages.items():
            own = [a for a in row if a.stage == number]
            by_kind = [[a.microbatch for a in own if a.kind in (kind, Kind.B)] for kind in (Kind.W, Kind.I)]
            for name in {name for name, _ in stage.named_parameters()} & found.keys():
                sums = [added([alone[k][name] for k in order if name in alone[k]]) for order in by_kind]
                if name == "embed_tokens.weight":  # its two uses meet in stage 0
                    torch.testing.assert_close(found[name], sums[0], rtol=1e-5, atol=1e-6)
                else:  # of most weights in W, of norms' and the like already in I
                    assert any(torch.equal(found[name], one) for one in sums), name
                seen.add(name)
    assert seen == found.keys()


def test_the_longest_microbatch_comes_by_its_number_and_not_by_its_place() -> None:
    free = plan(small.model(), Piping(microbatches=PARTS, any_order=True))
    parts = cut(batch(1), PARTS)
    assert len({size(part) for part in parts}) > 2
    costs = [free.weights.of(size(part)) for part in free.arranged(parts)] if free.weights else []
    assert len(costs) == PARTS and costs == sorted(costs, reverse=True) and costs[0] > 1.5 * costs[-1]
    work = [sum(free.costs.forward[stage][k] for stage in range(4)) for k in range(PARTS)]
    assert work[0] == max(work) > 1.5 * work[-1]
    assert size(Sample([[*parts, pack(small.documents()[4:5] * 9, 200)]]).longest).labels, (
        "losses cannot be measured else"
    )
    given = plan(small.model(), Piping(microbatches=PARTS))
    assert given.arranged(parts) == parts and given.weights is None


def lengths(devices: int, microbatches: int) -> Costs:
    scales = [2.0 / (1 + k) for k in range(microbatches)]
    return uniform(2 * devices, microbatches, 10, 12, 8, 1, microbatch_scales=scales)


def test_a_free_order_is_shorter() -> None:
    costs = lengths(3, 9)
    given, free = (Plan.of((1, 2, 3, 4, 5), costs, LITTLE, None, weights) for weights in (None, Weights(1.0, 1.0)))
    for one in (given, free):
        verify(one.schedule, one.placement, 9, costs)
        assert max(peak_bytes(one.order(9).schedule, costs)) <= one.memory
    assert free.order(9).makespan_s < 0.95 * given.order(9).makespan_s
    assert free == Plan.of((1, 2, 3, 4, 5), costs, LITTLE, None, Weights(1.0, 1.0))
    alike = uniform(6, 9)
    assert (
        Plan.of((1, 2, 3, 4, 5), alike, LITTLE, None, Weights(1.0, 1.0)).schedule
        == Plan.of((1, 2, 3, 4, 5), alike, LITTLE).schedule
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_no_device_holds_more_than_its_memory(recompute: bool) -> None:
    """From what V-Half holds down to one microbatch at a time; less is refused."""
    cuts, costs = (1, 2, 3, 4, 5, 6, 7), lengths(4, 8)
    roomy = Plan.of(cuts, costs, LITTLE, Piping(recompute=recompute))
    with pytest.raises(ValueError, match="train: memory must be at least") as refused:
        Plan.of(cuts, costs, LITTLE, Piping(memory=1, recompute=recompute))
    assert ("with recompute" in str(refused.value)) != recompute
    least = int(str(refused.value).split("at least ")[1].split()[0])
    assert least < roomy.memory
    spans = []
    for memory in (roomy.memory, (least + roomy.memory) // 2, least):
        found = Plan.of(cuts, costs, LITTLE, Piping(memory=memory, recompute=recompute))
        for microbatches in (1, 3, 8):
            order = found.order(microbatches)
            assert max(peak_bytes(order.schedule, costs)) <= memory
            assert any(a.kind is Kind.R for row in order.schedule for a in row) == recompute
        spans.append(found.order(8).makespan_s)
    assert spans == sorted(spans) and spans[0] < spans[-1]
    if recompute:
        assert roomy.memory < Plan.of(cuts, costs, LITTLE).memory and 0 <= roomy.order(8).bubble < 1


class Slow(InProcess):
    """To send takes a second and one more for each MiB, by a clock that nothing else moves."""

    now = 0.0

    def send(self, tensor: Tensor, to: int, action: Action) -> None:
        Slow.now += 1 + tensor.numel() / 2**20
        super().send(tensor, to, action)


def test_links_are_measured_pair_by_pair_and_size_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were two pairs at it together, one would see the other's seconds too."""
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: Slow.now))
    ends, sizes = Slow.connect(3), [2**20, 2**21]
    found = small.in_threads(lambda d: measure_links(ends[d], sizes, torch.device("cpu"), repeats=2), 3)
    link = ((2**20, 2.0), (2**21, 3.0))
    assert found == [(link, link)] * 3
    alone = InProcess.connect(1)[0]
    assert measure_links(alone, [SMALL], torch.device("cpu")) == ()


def test_slow_links_make_other_plans() -> None:
    """The simulator knows what the links cost."""
    model = small.model()
    quick, slow = (dataclasses.replace(profile(model), links=(((SMALL, x), (10**6, x)),)) for x in (0.0, 3.0))
    sample = Sample.of([batch(0)], PARTS)
    plans = [planned(one, sample, 2, Piping(microbatches=PARTS), LITTLE)[0] for one in (quick, slow)]
    assert plans[1].order(6).makespan_s > plans[0].order(6).makespan_s + 6.0
    half = simulate(v_half(2, 6), plans[1].placement, plans[1].costs).makespan
    assert plans[1].order(6).makespan_s <= half
    assert split(model, plans[1].cuts)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"microbatches": 0}, "microbatches must be from 1 to"),
        ({"memory": 0}, "memory must be from 1 to"),
        ({"timeout_s": float("nan")}, "timeout_s must be from 0.001 to 1000000.0, got nan"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(said: dict, message: str, tmp_path: Path) -> None:
    nothing = Saved(small.model().sizes, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=f"train: {message}"):
        train_pipelined(make, nothing, tmp_path, Mesh(2), **said)


def asleep(step: int) -> Batch:
    if dist.get_rank() == 1 and step == 1:
        time.sleep(60)
    return batch(step)


def hanging(model: LongcatNext) -> Stage:
    return joint(model, asleep, steps=2, learning_rate=1e-2)


def test_a_rank_that_hangs_is_named_within_the_timeout(tmp_path: Path) -> None:
    saved, began = Saved.of(small.model(), tmp_path / "before.safetensors"), time.monotonic()
    with pytest.raises(
        ChildProcessError, match=r"rank 0 failed: .*device 0, .* \(microbatch \d\) from device 1 stopped"
    ):
        train_pipelined(hanging, saved, tmp_path / "run", Mesh(2), microbatches=2, timeout_s=4)
    assert time.monotonic() - began < 50


def test_a_run_in_free_order_goes_on_with_the_durations_it_began_with(tmp_path: Path) -> None:
    """Measured anew they would give another schedule, and other bits."""
    saved = Saved.of(small.model(), tmp_path / "before.safetensors")

    def durations(free: bool, microbatches: int) -> Profile:
        piping = Piping(any_order=free, microbatches=microbatches)
        work = _Training(make, saved, tmp_path, Mesh(2), piping, small.WEIGHTS, 0, 1, Pipelined)
        sample, found = work._measured(torch.device("cpu"), tmp_path / "profile.json")
        assert len(sample.shares) == (2 if free else 1), "steps that there are, up to some"
        return found

    noted = dataclasses.replace(durations(True, PARTS), links=(((SMALL, 0.1),),), lengths=(1.0, 0.5))
    save(noted, tmp_path / "profile.json")
    assert durations(True, PARTS) == noted
    for anew in (durations(False, PARTS), durations(True, PARTS // 2)):  # of larger ones the bytes are others, too
        assert anew.layers != noted.layers and not anew.links
