"""The CUDA kernels on the CPU: launchers and plain kernels compiled by the C++ compiler, one fiber a CUDA thread."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat_kernels.layouts import HalfLayout
from longcat_kernels.reference.depth_weights import DepthConfig

ROOT = Path(__file__).parent.parent.parent
FLAGS = ("-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-ffp-contract=off", "-shared", "-fPIC")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library_file(*flags: str) -> Path:
    """The shared object, built where the sources have changed."""
    sources = [*sorted((ROOT / "tests/cuda").glob("*.cpp")), *sorted((ROOT / "csrc/cuda").glob("*_launch.cpp"))]
    headers = [*(ROOT / "tests/cuda").glob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h")]
    text = b"".join(file.read_bytes() for file in [*sources, *sorted(headers)]) + " ".join(flags).encode()
    target = ROOT / "build" / "emulated" / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        folders = ("-Icsrc", "-Icsrc/include", "-Itests/cuda")
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler() or "c++", *FLAGS, *flags, *folders, *map(str, sources), "-o", str(partial)]
        subprocess.run(command, check=True, cwd=ROOT)
        partial.rename(target)
    return target


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_file()))


def call(name: str, *arguments: Any) -> None:
    """Calls a function of tests/cuda/kernels.cpp; tensors by address, integers as long."""
    function = getattr(library(), name)
    function.restype = ctypes.c_char_p
    message = function(*map(_native, arguments))
    assert message is None, message.decode()


def _native(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_long(value)
    return ctypes.c_double(value) if isinstance(value, float) else value


def addresses(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def longs(values: list[int]) -> Any:
    return (ctypes.c_long * len(values))(*values)


def pack(words_KD: Tensor) -> Tensor:
    """The packed form by the pack kernels; memory not written is 0xff."""
    packed = torch.full((HalfLayout(*words_KD.shape).bytes + 256,), 255, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 256 :][: HalfLayout(*words_KD.shape).bytes]
    call("emulate_rvq_pack", words_KD, words_KD.stride(0), *words_KD.shape, packed)
    return packed


class _EncodeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "dim", "row_stride", "column_stride", "levels")),
        ("x", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("residual_dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("words", "entries", "strides", "mask", "packed")),
        *((name, ctypes.c_void_p) for name in ("quantized", "residual", "losses", "codes")),
        ("multiprocessors", ctypes.c_int),
    )


def _encode_arguments(
    x_TD: Tensor, codebooks: list[Tensor], residual_dtype: torch.dtype, keep: list[Any]
) -> _EncodeArguments:
    tables = (
        addresses(codebooks),
        longs([book.shape[0] for book in codebooks]),
        longs([book.stride(0) for book in codebooks]),
    )
    keep.append(tables)
    words, entries, strides = (ctypes.cast(table, ctypes.c_void_p) for table in tables)
    return _EncodeArguments(
        rows=x_TD.shape[0],
        dim=x_TD.shape[1],
        row_stride=x_TD.stride(0),
        column_stride=x_TD.stride(1),
        levels=len(codebooks),
        x=x_TD.data_ptr(),
        dtype=DTYPES.index(x_TD.dtype),
        residual_dtype=DTYPES.index(residual_dtype),
        words=words,
        entries=entries,
        strides=strides,
        multiprocessors=4,
    )


def rvq_encode(
    x_TD: Tensor,
    codebooks: list[Tensor],
    packed: list[Tensor],
    gram: Tensor | None,
    mask_T: Tensor | None,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the schema: quantized, residual, losses, codes; outputs start as NaN and far out of range."""
    rows, levels, keep = x_TD.shape[0], len(codebooks), []
    a = _encode_arguments(x_TD, codebooks, residual_dtype, keep)
    quantized_TD = torch.full(x_TD.shape, torch.nan, dtype=x_TD.dtype)
    residual_TD, losses_L = torch.full(x_TD.shape, torch.nan), torch.full((levels,), torch.nan)
    codes_TL = torch.full((rows, levels), 2**62)
    a.quantized, a.residual, a.losses, a.codes = (
        tensor.data_ptr() for tensor in (quantized_TD, residual_TD, losses_L, codes_TL)
    )
    a.mask = None if mask_T is None else mask_T.data_ptr()
    if packed:
        keep.append(addresses(packed))
        a.packed = ctypes.cast(keep[-1], ctypes.c_void_p)
    call("emulate_rvq_encode", ctypes.byref(a))
    return quantized_TD, residual_TD, losses_L, codes_TL


def rvq_encode_backward(
    grad_TD: Tensor | None,
    scales_L: Tensor | None,
    x_TD: Tensor,
    codes_TL: Tensor,
    codebooks: list[Tensor],
    residual_dtype: torch.dtype,
) -> Tensor:
    """The gradient of x, `scales_L` being 2 grad_losses / count."""
    keep: list[Any] = []
    a = _encode_arguments(x_TD, codebooks, residual_dtype, keep)
    a.codes = codes_TL.data_ptr()
    out_TD = torch.full(x_TD.shape, torch.nan, dtype=x_TD.dtype)
    strides = (0, 0) if grad_TD is None else grad_TD.stride()
    call("emulate_rvq_encode_backward", ctypes.byref(a), grad_TD, *strides, scales_L, out_TD)
    return out_TD


def rvq_decode(codes_TL: Tensor, codebooks: list[Tensor]) -> Tensor:
    keep: list[Any] = []
    a = _encode_arguments(codebooks[0].new_empty(codes_TL.shape[0], codebooks[0].shape[1]), codebooks, DTYPES[0], keep)
    a.codes, (a.row_stride, a.column_stride) = codes_TL.data_ptr(), codes_TL.stride()
    out_TD = torch.full((codes_TL.shape[0], codebooks[0].shape[1]), torch.nan)
    call("emulate_rvq_decode", ctypes.byref(a), out_TD)
    return out_TD


def rvq_decode_backward(grad_TD: Tensor, codes_TL: Tensor, entries: list[int]) -> list[Tensor]:
    """Rows of grad_TD have adjacent elements."""
    out = [torch.full((k, grad_TD.shape[1]), torch.nan) for k in entries]
    call(
        "emulate_rvq_decode_backward",
        grad_TD,
        *grad_TD.shape,
        grad_TD.stride(0),
        codes_TL,
        *codes_TL.stride(),
        longs(entries),
        len(entries),
        addresses(out),
    )
    return out


def ema_update(
    embed_KD: Tensor,
    embed_ema_KD: Tensor,
    cluster_size_ema_K: Tensor,
    packed: Tensor | None,
    vectors_ND: Tensor,
    codes_N: Tensor,
    *rule: Any,
) -> Tensor:
    """As the schema, in place."""
    restarted, dtype = torch.full((), -1), DTYPES.index(vectors_ND.dtype)
    sizes = (*vectors_ND.shape, embed_KD.shape[0], dtype, vectors_ND.stride(0))
    tensors = (embed_KD, embed_ema_KD, cluster_size_ema_K, packed, vectors_ND, codes_N)
    *floats, seed = rule
    call("emulate_ema_update", *tensors, *map(float, floats), seed, *sizes, restarted)
    return restarted


class _DepthArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("config", "strides")),
        *((name, ctypes.c_long) for name in ("config_numbers", "weights", "rows", "dtype", "multiprocessors")),
        *((name, ctypes.c_void_p) for name in ("weight", "hidden", "start", "params")),
        *((name, ctypes.c_long) for name in ("params_row", "params_level", "step_stride")),
        *((name, ctypes.c_long) for name in ("prefix_width", "prefix_row", "history_rows")),
        *((name, ctypes.c_void_p) for name in ("seeds", "steps", "prefix", "leaders", "history", "offsets", "active")),
        *((name, ctypes.c_void_p) for name in ("logprobs", "drawn_logprobs", "logits", "embedding", "codes")),
        ("eps", ctypes.c_float),
    )


def depth_decode(
    hidden: Tensor,
    weights: list[Tensor],
    packed: list[Tensor],
    params: Tensor,
    seeds: Tensor,
    steps: Tensor,
    start: Tensor | None,
    prefix: Tensor | None,
    active: Tensor | None,
    leaders: Tensor | None,
    history: Tensor | None,
    offsets: Tensor | None,
    config: list[int],
    eps: float,
    wants_logits: bool,
    multiprocessors: int = 3,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the schema: logprobs, drawn_logprobs, embedding, logits, codes; outputs start as NaN and far out of range."""
    rows, sizes = len(hidden), DepthConfig.of(config, eps)
    hidden = hidden.contiguous()
    outputs = [torch.full((rows, sizes.levels), torch.nan) for _ in range(2)]
    outputs.append(torch.full((rows, sizes.width), torch.nan, dtype=hidden.dtype))
    outputs.append(torch.full((rows, sum(sizes.classes[sizes.given :])), torch.nan))
    codes_TL = torch.full((rows, sizes.levels), 2**62)
    strides = longs([n for tensor in weights for n in (*tensor.stride(), 0, 0, 0)[:3]])
    tables = (longs(config), strides, addresses(weights))
    optional = {"start": start, "prefix": prefix, "active": active, "leaders": leaders}
    optional |= {"history": history, "offsets": offsets}
    kept = {name: None if tensor is None else tensor.contiguous() for name, tensor in optional.items()}
    arguments = _DepthArguments(
        **{
            name: ctypes.cast(t, ctypes.c_void_p)
            for name, t in zip(("config", "strides", "weight"), tables, strict=True)
        },
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in kept.items()},
        config_numbers=len(config),
        weights=len(weights),
        rows=rows,
        dtype=DTYPES.index(hidden.dtype),
        multiprocessors=multiprocessors,
        hidden=hidden.data_ptr(),
        params=params.data_ptr(),
        params_row=params.stride(0),
        params_level=params.stride(1),
        step_stride=steps.stride(0),
        prefix_width=0 if prefix is None else prefix.shape[1],
        prefix_row=0 if prefix is None else prefix.shape[1],
        history_rows=0 if history is None else len(history),
        seeds=seeds.data_ptr(),
        steps=steps.data_ptr(),
        codes=codes_TL.data_ptr(),
        eps=eps,
        **{
            name: tensor.data_ptr()
            for name, tensor in zip(("logprobs", "drawn_logprobs", "embedding", "logits"), outputs, strict=True)
        },
    )
    if not wants_logits:
        arguments.logits, outputs[3] = None, torch.empty(rows, 0)
    call("emulate_depth_decode", ctypes.byref(arguments))
    return (*outputs, codes_TL)


def runtime(name: str) -> str | None:
    """A library of the compiler's, by its full path."""
    run = subprocess.run([compiler() or "c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    found = run.stdout.strip()
    return found if os.path.isabs(found) else None


def assert_clean(module: str, *calls: str) -> None:
    """Runs calls of a test module, `t`, in a process of its own: no wild access, no undefined behaviour."""
    if not sys.platform.startswith("linux"):
        pytest.skip("CUDA emulation: sanitizers are tried on Linux")
    needed = [runtime(name) for name in ("libasan.so", "libstdc++.so")]
    if None in needed:
        pytest.skip("CUDA emulation: no sanitizer runtime")
    instrumented = library_file("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
    lines = (
        f"import ctypes, emulated\nemulated.library = lambda library=ctypes.CDLL({str(instrumented)!r}): library",
        f"import {module} as t",
        *calls,
        "print('clean')",
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str, needed)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "cuda"), str(ROOT)]),
    }
    command = [sys.executable, "-c", "\n".join(lines)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "clean\n", run.stderr[-3000:]
