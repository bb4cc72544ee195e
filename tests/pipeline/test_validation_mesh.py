"""Steps that do not wait for the norm, with replicas and shared experts: the bits of a mesh that does."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import small
import torch
import torch.distributed as dist

from longcat_model.pipeline.costs import uniform
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.transport import Distributed
from longcat_model.sequence import Batch, pack
from longcat_model.training import loop
from longcat_model.training.loop import Row, train
from longcat_model.training.mesh import Mesh
from longcat_model.training.model_stages import joint
from longcat_model.training.pipelined import Pipelined
from longcat_model.training.plan import Plan, Weights
from longcat_model.training.post_validated import PostValidated
from longcat_model.training.rates import MEASURED

STEPS, SAVE_EVERY, SPOILT, CUT = 6, 3, 2, 4
MESHES = {"data": Mesh(2, 2), "experts": Mesh(2, 2, 2), "both": Mesh(1, 4, 2)}


class Stop(Exception):
    pass


class Steps:
    """Batches; in odd steps every gradient is clipped, in the others none; ends before step `last`."""

    def __init__(self, last: int) -> None:
        self.last, self.reached = last, -1

    def __call__(self, step: int) -> Batch:
        if step == self.last:
            raise Stop
        self.reached, loop.CLIP_NORM = step, 1e-3 if step % 2 else 1e9
        documents = small.documents()
        return pack([documents[(step + i) % 5] for i in range(10)], 30)


def run(rank: Rank, mesh: Mesh, kind: type[Pipelined], directory: Path, last: int) -> list[Row]:
    """One rank's training: in step `SPOILT` a gradient is not finite on one rank alone, of its experts if it can be."""
    stages = 2 * mesh.pipeline
    end, model, steps = Distributed.connect(stages, mesh.pipelines(), timeout_s=60), small.model(), Steps(last)
    assert end is not None
    groups, shards = mesh.connect(rank.device, model.sizes.backbone.experts.real)
    if shards is not None:
        shards.divide(model)
    stage = joint(model, steps, steps=STEPS, learning_rate=1e-2, weights=small.WEIGHTS)
    cuts = small.cuts(len(model.backbone.layers), stages)
    order = None if shards is not None else Weights(1.0, 0.5)  # one mesh runs the longest microbatch first
    plan = Plan.of(cuts, uniform(stages, 3, 3.0, 4.0, 2.0), small.EFFORT, weights=order)
    spread = dict if shards is None else shards.spread
    engine = kind(stage, plan, end, small.WEIGHTS, groups, dist.new_group(backend="gloo"), spread)
    if rank.rank == (mesh.pipeline - 1) * mesh.data + 1:
        wanted = "lm_head.weight" if shards is None else ".mlp.gate_up"
        weight = next(weight for name, weight in engine.own.items() if name.endswith(wanted))
        weight.register_hook(lambda grad: grad if grad is None or steps.reached != SPOILT else grad * torch.inf)
    try:
        return train(stage, directory, save_every=SAVE_EVERY, quiet=True, engine=engine)
    finally:
        end.close()


def run_all(rank: Rank, folder: str) -> None:
    torch.set_num_threads(1)
    for name, mesh in MESHES.items():
        waits = partial(run, rank, mesh, Pipelined, Path(folder, name, "wait"))
        goes_on = partial(run, rank, mesh, PostValidated, Path(folder, name, "go"))
        with pytest.raises(Stop):
            goes_on(CUT)  # goes on from a checkpoint that was written right after a step was taken back
        rows = {"wait": waits(STEPS), "go": goes_on(STEPS)}
        Path(folder, name, f"{rank.rank}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All meshes in one start of four processes."""
    folder = tmp_path_factory.mktemp("meshes")
    launch(4, run_all, str(folder))
    return folder


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_that_goes_on_trains_as_one_that_waits(name: str, folder: Path) -> None:
    rows, found = (json.loads((folder / name / "0.json").read_text())[way] for way in ("wait", "go"))
    for row, found_row in zip(rows, found, strict=True):
        assert row.keys() == found_row.keys()
        for key in row.keys() - set(MEASURED):
            assert row[key] == found_row[key] or (key == "gradient_norm" and row["step"] == SPOILT), key
    for norms in ([row["gradient_norm"] for row in some] for some in (rows, found)):
        assert [math.isfinite(norm) for norm in norms] == [step != SPOILT for step in range(STEPS)]
        assert all(norm > 1e-3 for step, norm in enumerate(norms) if step != SPOILT)
    state, found_state = (small.saved(folder / name / way / "language_joint") for way in ("wait", "go"))
    assert state.keys() == found_state.keys() and state["optimizer.lm_head.weight.step"] == STEPS - 1
    assert all(torch.equal(state[key], found_state[key]) for key in state)


@pytest.mark.parametrize("name", MESHES)
def test_all_ranks_have_the_same_norm(name: str, folder: Path) -> None:
    ranks = [json.loads((folder / name / f"{rank}.json").read_text())["go"] for rank in range(4)]
    norms = [[row["gradient_norm"] for row in rows] for rows in ranks]
    assert all(str(some) == str(norms[0]) for some in norms), norms
