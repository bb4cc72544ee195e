"""A process has the parts of a model that it brought, bit for bit, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small
import torch

from longcat_model.model import LongcatNext
from longcat_model.pipeline.measure import measure
from longcat_model.pipeline.parts import Parts, Saved
from longcat_model.pipeline.split import Microbatch, ModelStage, split

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved.of(small.model(), tmp_path / "model.safetensors")


def size(model: LongcatNext) -> int:
    """Bytes in memory."""
    return sum(tensor.nbytes for tensor in model.state_dict().values() if not tensor.is_meta)


@pytest.mark.parametrize("number", range(4))
def test_a_stage_has_the_weights_of_the_whole_model(number: int, saved: Saved) -> None:
    whole, parts = small.model(), Parts(saved, CPU)
    assert size(parts.model) == 0
    stage = split(parts.model, small.cuts(2, 4))[number]
    parts.bring(stage)
    own = {f"{prefix}.{name}" for prefix, module in stage.modules() for name in module.state_dict()}
    wanted = whole.state_dict()
    for name, tensor in parts.model.state_dict().items():
        assert tensor.is_meta != (name in own), name
        assert tensor.is_meta or torch.equal(tensor, wanted[name]), name
    assert size(parts.model) == sum(wanted[name].nbytes for name in own)


def test_a_measurement_has_one_module_at_a_time(saved: Saved) -> None:
    parts, sizes = Parts(saved, CPU), []

    @contextmanager
    def lend(stage: ModelStage) -> Iterator[None]:
        with parts.lend(stage):
            sizes.append(size(parts.model))
            yield

    (microbatch,) = Microbatch.of(small.batches(1))
    profile = measure(parts.model, microbatch, lend=lend)
    assert size(parts.model) == 0
    table, whole = parts.model.embed_tokens.weight.nbytes, sum(t.nbytes for t in small.model().state_dict().values())
    assert len(sizes) == 5 and sum(sizes) == whole + table  # embedding and depth heads both use the table
    assert [layer.saved for layer in profile.layers] == [
        layer.saved for layer in measure(small.model(), microbatch).layers
    ]


def test_refuses_a_file_that_does_not_fit(saved: Saved, tmp_path: Path) -> None:
    other = small.model()
    other.lm_head = torch.nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"must fit the config, got others of lm_head\.bias, lm_head\.weight"):
        Parts(Saved.of(other, tmp_path / "other.safetensors"), CPU)
    saved.file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="must be a readable safetensors file"):
        Parts(saved, CPU)
    with pytest.raises(ValueError, match="must be a readable safetensors file"):
        Parts(saved._replace(file=tmp_path / "none"), CPU)
