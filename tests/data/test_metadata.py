"""What a run's directory says of itself, damaged: refused in one line that names the file, or harmless."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import make
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longcat_model import presets
from longcat_model.data import rows, tokenize
from longcat_model.data.media import changed_media
from longcat_model.data.shards import Shards, media_path, read_index
from longcat_model.demo.workspace import Workspace
from longcat_model.pipeline import profile
from longcat_model.pipeline.place import place
from longcat_model.system import read_sizes
from longcat_model.training import finetune, loop

COSTS = rows.HeadCosts(3, 5)


def workspace(directory: Path) -> None:
    with mock.patch("longcat_model.demo.workspace.commit", lambda: "a"):  # it asks git, again and again
        found = Workspace(directory, {"seed": 0})
        found.commits(), found.seconds(), found.peak_rss_bytes()


def planned(path: Path) -> None:
    place(profile.load(path), 2, 3)


READERS: dict[str, Callable[[Path], Any]] = {  # name in the directory -> who reads it
    "shards/index.json": lambda path: tokenize.described(Shards(path.parent).index),
    "shards/media.jsonl": changed_media,
    "run/finetune.json": lambda path: finetune._refuse_another(path.parent, {"steps": 1}),
    "run/finetune.jsonl": lambda path: loop._read_rows(path, 1),
    "run/profile.json": planned,
    "system/config.json": lambda path: read_sizes(path.parent),
    **{f"demo/{name}.json": lambda path: workspace(path.parent) for name in
       ("settings", "commits", "seconds", "peak_rss_bytes")},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    for name in ("system", "run", "demo"):
        (directory / name).mkdir()
    make.system(directory / "system")
    make.media(directory)
    data = make.jsonl(directory / "data.jsonl", make.LINES)
    job = tokenize.Job.of([data], directory / "system", tokenize.Settings(shard_documents=2))
    tokenize.tokenize(job, directory / "shards")
    finetune._claim(directory / "run", {"steps": 1, "system": "a"})
    loop._write_rows(directory / "run" / "finetune.jsonl", [{"step": 0, "loss": 1.5, "bubble": 0.5}])
    module, links = profile.Module(1.0, 1.0, 1.0, 100, 10), (((10, 0.5), (90, 0.75)),)
    one = profile.Profile(module, (module,) * 3, module, module, lengths=(1.0, 2.0), links=links)
    profile.save(one, directory / "run" / "profile.json")
    found = Workspace(directory / "demo", {"seed": 0})
    with found.timed("data"):
        found.commits()
    return directory


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = copy.deepcopy(value)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copied


HUGE = st.sampled_from([-(10**30), 10**400])
SCALARS = st.none() | st.booleans() | st.floats() | st.integers(-1, 3) | HUGE | st.text(max_size=3)
VALUES = st.recursive(SCALARS, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chance=st.randoms(use_true_random=False), new=VALUES)
def test_wrong_types_are_named(name: str, whole: Path, tmp_path: Path, chance: random.Random, new: Any) -> None:
    """A value anywhere in the file is replaced by another one."""
    source = whole / name
    lines = [json.loads(line) for line in source.read_text().splitlines()] if name.endswith("l") else None
    value = json.loads(source.read_text()) if lines is None else lines
    path = chance.choice(list(places(value))[lines is not None :])
    written = changed(value, path, new)
    copied = tmp_path / Path(name).parent
    shutil.copytree(source.parent, copied, dirs_exist_ok=True)
    texts = [json.dumps(one) for one in ([written] if lines is None else written)]
    (tmp_path / name).write_text("\n".join(texts) + "\n")
    try:
        READERS[name](tmp_path / name)
    except ValueError as error:
        assert str(copied) in str(error) and "\n" not in str(error), error


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]\n", b"null\n"])
def test_what_is_no_json_is_named(name: str, content: bytes, whole: Path, tmp_path: Path) -> None:
    shutil.copytree((whole / name).parent, tmp_path / Path(name).parent)
    (tmp_path / name).write_bytes(content)
    if not content and name.endswith("l"):
        assert not READERS[name](tmp_path / name), "no line at all is no damage"
        return
    with pytest.raises(ValueError, match=Path(name).name):
        READERS[name](tmp_path / name)


def test_an_index_names_its_wrong_key(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    for key, value, rule in (
        ("made_from", "files", "made_from must be an object, got 'files'"),
        ("documents", {"0": 2}, "documents must be null or a number for each shard"),
        ("documents", [2, True], "documents must be null or a number for each shard"),
    ):
        found = json.loads((whole / "shards/index.json").read_text()) | {key: value}
        path.write_text(json.dumps(found))
        with pytest.raises(ValueError, match=f"{path}: {rule}"):
            read_index(tmp_path)


def test_rows_and_shards_that_are_not_whole_are_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "shards", tmp_path / "shards")
    shards = Shards(tmp_path / "shards")
    planned = rows.plan(shards, 96, COSTS, 0, tmp_path)
    for name in ("documents.bin", "ends.bin"):
        path = planned.directory / name
        content = path.read_bytes()
        for damaged in (b"", content[:-3], content[:-8]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"\.bin.*to go on"):
                rows.plan(shards, 96, COSTS, 0, tmp_path)
        path.write_bytes(content)
    other = (whole / "system" / "vision.safetensors").read_bytes()
    (tmp_path / "shards" / "shard-00001.safetensors").write_bytes(other)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: lengths must be arrays of integers"):
        Shards(tmp_path / "shards")[2]
    assert presets.tiny() == read_sizes(whole / "system")
    media_path(tmp_path / "shards").write_text('["a", 1]\n')
    with pytest.raises(ValueError, match=r"media\.jsonl: line 1 must be \[path, size, time, digest\]"):
        changed_media(media_path(tmp_path / "shards"))
