"""Reads, checks and writes a directory of the released format: config.json, shards of safetensors and their index."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from longcat_model.model import LongcatNext
from longcat_model.released.place import empty
from longcat_model.released.plan import FILE, Placement
from longcat_model.released.sizes import Sizes, from_json, to_json
from longcat_model.released.tensors import TABLES, Entry, entries, slots

INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors format


@dataclass(frozen=True)
class Released:
    """A loaded checkpoint: the language model, and the tokenizers' tensors by their released names."""

    sizes: Sizes
    model: LongcatNext
    tokenizers: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its released name, as a view."""
        return dict(slots(self.model)) | dict(self.tokenizers)


def check(directory: Path) -> tuple[Sizes, list[Path]]:
    """The sizes and the shards of a checkpoint whose every tensor is there, whole and as its config says.

    Reads the config, the index and the shards' headers, so it takes neither time nor memory.

    Raises:
        ValueError: the config or the index is unreadable; or tensors are missing, extra, truncated, damaged, there
            twice, of another shape or type, or not where the index says, which the message lists all at once, a line
            each.
    """
    sizes = from_json(_json(directory / "config.json"))
    places = _places(directory)
    shards = [directory / name for name in sorted(set(places.values()))]
    wanted, found, problems = entries(sizes), {}, []
    homes: dict[str, str] = {}
    for shard in shards:
        try:
            listed = _header(shard)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name, described in listed.items():
            problems += [f"{name}: twice, the second time in {shard.name}"] if name in found else []
            found[name], homes[name] = described, shard.name
            fault = _fault(described, wanted.get(name), shard)
            problems += [f"{name}: {fault}"] if fault else []
    problems += [f"{name}: missing" for name in wanted if name not in found]
    problems += _misplaced(places, homes, wanted)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in sorted(problems))
        raise ValueError(f"released: {directory} has {len(problems)} faults:\n{lines}")
    return sizes, shards


def load(directory: Path, placement: Placement | None = None, *, progress: bool = True) -> Released:
    """Loads a checkpoint for inference: checks it, then copies shard by shard.

    Memory is that of the model plus, while it is copied, one shard, which is mapped from its file.

    Args:
        placement: where the parts go, `plan(...).placement` for one; all on the CPU by default. Mapped n-gram tables
            stay in their files, which the model reads a row at a time as tokens need them; they take no memory but
            the operating system's cache, and the files must stay.
        progress: show a bar of shards on standard error.

    Raises:
        ValueError: see `check` and `place.empty`; raised before any memory is taken.
    """
    placement = placement or Placement()
    sizes, shards = check(directory)
    model = empty(sizes, placement)
    own = slots(model)
    places = {"model.visual_tokenizer.": placement.vision, "model.audio_tokenizer.": placement.audio}
    tokenizers = {}
    for name, entry in entries(sizes).items():
        if name not in own:
            place = next(place for prefix, place in places.items() if name.startswith(prefix))
            tokenizers[name] = torch.empty(entry.shape, dtype=entry.dtype, device=place or placement.main)
    targets = {**own, **tokenizers}
    for shard in tqdm(shards, desc=f"load {directory.name}", unit="shard", disable=not progress):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if placement.tables == FILE and name.startswith(TABLES):
                    i = int(name.removeprefix(TABLES).split(".")[0])
                    _table(model, i).weight = nn.Parameter(file.get_tensor(name), requires_grad=False)
                else:
                    targets[name].copy_(file.get_tensor(name))
    return Released(sizes, model, tokenizers)


def save(released: Released, directory: Path, *, shard_bytes: int = 10_000_000_000, progress: bool = True) -> None:
    """Writes what `load` read, bit by bit; see `write`."""
    tensors = released.tensors()
    write(released.sizes, directory, tensors.__getitem__, shard_bytes=shard_bytes, progress=progress)


def synthesize(sizes: Sizes, directory: Path, *, seed: int = 0, shard_bytes: int = 10_000_000_000) -> None:
    """Writes a checkpoint of random weights (deviation 0.02, norms around 1) with every tensor; see `write`.

    The copies of the shared codebook are equal.
    """
    generator, table = torch.Generator(), entries(sizes)

    def draw(name: str) -> Tensor:
        first = re.sub(r"\.codebooks\.\d+\.", ".codebooks.0.", name)
        generator.manual_seed(zlib.crc32(first.encode(), seed))
        values = torch.randn(table[name].shape, generator=generator) * 0.02
        scale = name.endswith("norm.weight") or ("layernorm" in name and name.endswith("weight"))
        return (values + 1 if scale else values).to(table[name].dtype)

    write(sizes, directory, draw, shard_bytes=shard_bytes, progress=False)


def write(
    sizes: Sizes,
    directory: Path,
    tensor_of: Callable[[str], Tensor],
    *,
    shard_bytes: int,
    progress: bool,
) -> None:
    """Writes a checkpoint into a directory of a temporary name, then renames: it is whole or not there.

    Args:
        tensor_of: gives a tensor by its released name; asked for once each, in order, and let go shard by shard.
        shard_bytes: of tensors in one shard at most, unless a single one is larger.

    Raises:
        ValueError: `directory` exists and is not empty or is the current one, or a tensor has another shape or type
            than the sizes say.
    """
    directory = directory.resolve()  # `.` has no name
    if directory == Path.cwd():
        raise ValueError(f"released: output must be another directory than the current one, got {directory}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"released: output must be a new or empty directory, got {directory}")
    table = entries(sizes)
    groups = list(_groups(table, shard_bytes))
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        places: dict[str, str] = {}
        for i, names in enumerate(tqdm(groups, desc=f"write {directory.name}", unit="shard", disable=not progress)):
            shard = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
            _write_shard(temporary / shard, names, tensor_of, table)
            places |= dict.fromkeys(names, shard)
        total = {"total_size": sum(entry.bytes for entry in table.values())}
        (temporary / INDEX).write_text(json.dumps({"metadata": total, "weight_map": places}, indent=1) + "\n")
        (temporary / "config.json").write_text(json.dumps(to_json(sizes), indent=1) + "\n")
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shard(
    path: Path, names: Iterable[str], tensor_of: Callable[[str], Tensor], table: Mapping[str, Entry]
) -> None:
    tensors = {}
    for name in names:
        tensor, wanted = tensor_of(name), table[name]
        if (tuple(tensor.shape), tensor.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"released: {name} must be {wanted}, got {tuple(tensor.shape)} {tensor.dtype}")
        tensor = tensor.detach().to("cpu").contiguous()
        # Experts are views of one stack; the format refuses tensors that share memory.
        tensors[name] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
    save_file(tensors, path, metadata={"format": "pt"})


def _groups(table: Mapping[str, Entry], shard_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    room = shard_bytes
    for name, entry in table.items():
        if group and entry.bytes > room:
            yield group
            group, room = [], shard_bytes
        group.append(name)
        room -= entry.bytes
    yield group


def _table(model: LongcatNext, i: int) -> nn.Embedding:
    assert model.ngram is not None
    table = model.ngram.embedders[i]
    assert isinstance(table, nn.Embedding)
    return table


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"released: {path.parent} must hold a checkpoint, but has no {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"released: {path} must be JSON, got: {error}") from error


def _misplaced(places: Mapping[str, str], homes: Mapping[str, str], wanted: Mapping[str, Entry]) -> Iterator[str]:
    """Where index and shards disagree about a tensor that has no other fault for that."""
    for name, shard in places.items():
        if name not in homes and name not in wanted:
            yield f"{name}: extra, in the index, and in no shard"
        elif homes.get(name, shard) != shard:
            yield f"{name}: in {homes[name]}, but the index says {shard}"
    for name in homes.keys() & wanted.keys() - places.keys():
        yield f"{name}: in {homes[name]}, but not in the index"


def _places(directory: Path) -> dict[str, str]:
    """The shard of each tensor, as the index says."""
    index = _json(directory / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise ValueError(f"released: {directory / INDEX} must map tensors to files beside it in weight_map")
    return places


def _header(shard: Path) -> dict[str, dict[str, Any]]:
    """Each tensor's description, with the bytes that the file holds of it under "held"."""
    text, held = _header_text(shard)
    try:
        header: dict[str, dict[str, Any]] = json.loads(text, object_pairs_hook=_each_once)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must map names to strings")
        for described in header.values():
            first, last = described["data_offsets"]
            described["held"] = min(last, held) - first
            described["shape"], described["stored"] = tuple(described["shape"]), last - first
            described["dtype"] = str(described["dtype"])
        _check_offsets([described["data_offsets"] for described in header.values()], held)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{shard.name}: damaged header: {error}") from error
    return header


def _header_text(shard: Path) -> tuple[bytes, int]:
    """The header, and how many bytes the file holds after it."""
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"{shard.name}: truncated in its header")
            return file.read(length), size - 8 - length
    except FileNotFoundError as error:
        raise ValueError(f"{shard.name}: missing file") from error
    except OSError as error:
        raise ValueError(f"{shard.name}: unreadable: {error.strerror}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _check_offsets(offsets: list[list[int]], held: int) -> None:
    """Tensors must lie one after another, without gaps, up to the end of the file or, in a truncated one, beyond."""
    end = 0
    for first, last in sorted(offsets):
        if first != end or last < first:
            raise ValueError(f"bytes {first} to {last} where those from {end} on belong")
        end = last
    if end < held:
        raise ValueError(f"{held - end} bytes too many after the last tensor")


def _fault(described: dict[str, Any], wanted: Entry | None, shard: Path) -> str | None:
    if wanted is None:
        return f"extra, in {shard.name}"
    if described["shape"] != wanted.shape:
        return f"shape must be {list(wanted.shape)}, got {list(described['shape'])}"
    if _DTYPES.get(described["dtype"]) is not wanted.dtype:
        return f"type must be {wanted.dtype}, got {described['dtype']}"
    if described["stored"] != prod(wanted.shape) * wanted.dtype.itemsize:
        return f"damaged: {described['stored']} bytes in {shard.name} for {wanted.bytes}"
    if described["held"] < wanted.bytes:
        return f"truncated: {max(0, described['held'])} of {wanted.bytes} bytes in {shard.name}"
    return None
