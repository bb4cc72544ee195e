"""Training on a mesh of processes, pipeline by data-parallel replicas: one process's training, whoever is killed."""

from __future__ import annotations

import errno
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed as dist

from longcat_model.model import LongcatNext
from longcat_model.pipeline.launch import Rank, launch
from longcat_model.pipeline.parts import Saved
from longcat_model.pipeline.transport import PipelineError
from longcat_model.sequence import IGNORE, NONE, Batch, pack
from longcat_model.training import checkpoint
from longcat_model.training.checkpoint import PARTIAL
from longcat_model.training.loop import Stage, train
from longcat_model.training.mesh import Mesh
from longcat_model.training.microbatches import padding
from longcat_model.training.model_stages import joint
from longcat_model.training.pipelined import train_pipelined
from longcat_model.training.replicas import Replicas

RATE, STEPS = 1e-2, 3


def batch(step: int) -> Batch:
    """Five, three and one rows: replicas get unequal shares, and one of them nothing."""
    documents = small.documents()
    return pack([documents[(step + i) % 5] for i in range((6, 4, 1)[step])], 30)


def make(model: LongcatNext) -> Stage:
    return joint(model, batch, steps=STEPS, learning_rate=RATE, weights=small.WEIGHTS)


def killed(folder: Path, model: LongcatNext) -> Stage:
    """The stage; the process that has the depth heads dies while it writes the checkpoint of step 2."""
    write = checkpoint.FileSystemWriter.write_data

    def dying(self: Any, *args: Any) -> Any:
        if str(self.path).endswith(f"2{PARTIAL}") and not model.visual_head.headnorm.weight.is_meta:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *args)

    checkpoint.FileSystemWriter.write_data = dying  # type: ignore[method-assign]
    return make(model)


def full(model: LongcatNext) -> Stage:
    """The stage; the disk of rank 1 is full after the checkpoint of step 1."""
    write = checkpoint.FileSystemWriter.write_data

    def failing(self: Any, *args: Any) -> Any:
        if str(self.path).endswith(f"2{PARTIAL}") and dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    checkpoint.FileSystemWriter.write_data = failing  # type: ignore[method-assign]
    return make(model)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    directory = tmp_path_factory.mktemp("alone")
    return directory, train(make(small.model()), directory, quiet=True)


def assert_alike(directory: Path, alone: tuple[Path, list[dict[str, float]]]) -> None:
    """What stands in a directory is what one process makes of the same batches."""
    rows = train(make(small.model(seed=1)), directory, quiet=True)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone[1]], rel=1e-6)
    for name in ("gradient_norm", "balance", "router_z", "text_loss", "text_accuracy"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone[1]], rel=1e-5), name
    found, wanted = (small.saved(path / "language_joint") for path in (directory, alone[0]))
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.startswith("balancer.") or name.endswith("correction_bias"):
            assert torch.equal(found[name], wanted[name]), name
        elif name.startswith("module."):  # Adam divides: where gradients are small, rounding is a part of an update
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-2 * RATE)


def test_a_mesh_trains_as_one_process(tmp_path: Path, alone: tuple[Path, list[dict[str, float]]]) -> None:
    mesh = Mesh(2, 2)
    saved = Saved.of(small.model(), tmp_path / "before.safetensors")
    assert train_pipelined(make, saved, tmp_path / "mesh", mesh, microbatches=2, weights=small.WEIGHTS)
    files = {path.name for path in (tmp_path / "mesh" / "language_joint" / str(STEPS)).iterdir()}
    assert files == {".metadata", *(f"__{rank}_0.distcp" for rank in range(mesh.ranks))}, "every rank writes"
    assert_alike(tmp_path / "mesh", alone)


def test_a_run_killed_while_it_writes_goes_on(tmp_path: Path, alone: tuple[Path, list[dict[str, float]]]) -> None:
    """The first checkpoint is whole, the second one is not: a mesh that shares experts out goes on from the first."""
    saved = Saved.of(small.model(), tmp_path / "before.safetensors")
    run = partial(train_pipelined, saved=saved, directory=tmp_path / "run", weights=small.WEIGHTS, save_every=1)
    with pytest.raises(ChildProcessError, match="pipeline: rank"):
        run(partial(killed, tmp_path), mesh=Mesh(2), microbatches=3)
    assert {path.name for path in (tmp_path / "run" / "language_joint").iterdir()} == {"1", f"2{PARTIAL}"}
    assert run(make, mesh=Mesh(1, 4, 2), microbatches=2)
    assert_alike(tmp_path / "run", alone)


def test_a_rank_that_cannot_write_is_named_and_what_was_whole_stays(tmp_path: Path) -> None:
    saved = Saved.of(small.model(), tmp_path / "before.safetensors")
    told = rf"language_joint/2{PARTIAL} could not be written by rank 1: .*No space left on device"
    with pytest.raises(ChildProcessError, match=told):
        train_pipelined(full, saved, tmp_path / "run", Mesh(2), weights=small.WEIGHTS, save_every=1)
    assert {path.name for path in (tmp_path / "run" / "language_joint").iterdir()} == {"1", f"2{PARTIAL}"}


def test_refuses_experts_that_cannot_be_shared_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expert-parallel must divide data-parallel \(4\), got 3"):
        Mesh(1, 4, 3)
    saved = Saved.of(small.model(), tmp_path / "before.safetensors")
    with pytest.raises(ValueError, match="expert-parallel must divide the 4 experts of a layer, got 8"):
        train_pipelined(make, saved, tmp_path, Mesh(1, 8, 8))


def test_a_rank_knows_its_pipeline() -> None:
    assert Mesh(2, 3).pipelines() == [[0, 3], [1, 4], [2, 5]]


def test_replicas_share_microbatches_in_order_and_equally() -> None:
    parts = [pack(small.documents()[i : i + 1], 30) for i in range(5)]
    shares = []
    for number in range(3):
        replicas = Replicas()
        replicas.number, replicas.count = number, 3
        shares.append(replicas.share(parts))
    assert [[id(part) for part in share] for share in shares[:2]] == [
        list(map(id, parts[:2])),
        list(map(id, parts[2:4])),
    ]
    assert shares[2][0] is parts[4] and bool((shares[2][1].inputs.documents == -1).all())


def wait_in_vain(rank: Rank, folder: str) -> None:
    groups, shards = Mesh(1, 2, 2).connect(rank.device, 4, timeout_s=1)
    said, began = Path(folder, "said"), time.monotonic()
    if rank.rank == 0:
        assert shards is not None
        with pytest.raises(RuntimeError, match="waiting 1000ms"):  # as tokens do on their way to their experts
            dist.all_to_all_single(torch.empty(2), torch.ones(2), group=shards.parallel.group)
        with pytest.raises(PipelineError) as error:
            groups.data.gather(0)
        said.write_text(str(error.value))
    while not said.exists() and time.monotonic() < began + 30:
        time.sleep(0.05)
    assert time.monotonic() < began + 30


def test_replicas_wait_no_longer_than_they_are_told(tmp_path: Path) -> None:
    launch(2, wait_in_vain, str(tmp_path))
    said = (tmp_path / "said").read_text()
    assert said.startswith("pipeline: rank 0, gathering with ranks [1], stopped: ")


def test_padding_reads_and_predicts_nothing() -> None:
    empty = padding(batch(0))
    assert all(bool((x == NONE).all()) and x.shape[:2] == (1, 1) for x in vars(empty.inputs).values())
    assert all(bool((x == IGNORE).all()) for x in vars(empty.targets).values())
