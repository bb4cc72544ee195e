"""Device code to machine code: a cubin that nvcc built with the package, one from the disk cache, or one that NVRTC
compiles now. All three come from the same files, `csrc/cuda/*.cuh`, which need no header of the CUDA toolkit.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ARCHES = ("sm_80", "sm_90a", "sm_100a")  # built ahead of time where nvcc is found
OPTIONS = ("-std=c++17", "--fmad=false")  # fused only where the source says so
HOW_TO_GET_NVRTC = 'pip install "longcat-kernels[cuda]"'
_PACKAGE = Path(__file__).parent
_DIGEST = hashlib.sha256().digest_size


class JitError(RuntimeError):
    """No machine code for a kernel: says why and what to install."""


def arch_of(major: int, minor: int) -> str:
    """What to compile for on a device of this compute capability: a name of ARCHES where such code runs there."""
    if (major, minor) in ((9, 0), (10, 0)):
        return f"sm_{major}{minor}a"
    return "sm_80" if major == 8 else f"sm_{major}{minor}"


def why_not(op: str, arch: str) -> str | None:
    """None where `cubin` is expected to succeed, else what is missing; compiles nothing."""
    if not device_folder().is_dir():
        return f"its device code is not installed ({device_folder()})"
    if _prebuilt(op, arch).exists() or _has_nvrtc():
        return None
    return f"it has no prebuilt kernels for {arch}, and NVRTC is not installed: {HOW_TO_GET_NVRTC}"


def cubin(op: str, arch: str, cache: Path | None = None) -> bytes:
    """The kernels of an op as a cubin.

    Args:
        op: `csrc/cuda/<op>.cuh` is compiled.
        arch: as "sm_90a".
        cache: folder of compiled cubins; `cache_folder()` by default.

    Raises:
        JitError: it is not there and NVRTC is missing or refuses the source.
    """
    prebuilt = _prebuilt(op, arch)
    if prebuilt.exists():
        return prebuilt.read_bytes()
    nvrtc = _nvrtc(op, arch)
    version = _checked(nvrtc, *nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source_hash(), op, arch, version, OPTIONS)).encode()).hexdigest()[:16]
    folder = cache or cache_folder()
    if folder is None:
        return compile_cubin(op, arch)
    entry = folder / f"{op}.{arch}.{key}.cubin"
    known = _read(entry)
    if known is not None:
        return known
    built = compile_cubin(op, arch)
    _write(entry, built)
    return built


def compile_cubin(op: str, arch: str) -> bytes:
    """Compiles with NVRTC, which needs no driver and no device; raises JitError."""
    nvrtc = _nvrtc(op, arch)
    headers = [(f"cuda/{file.name}".encode(), file.read_bytes()) for file in device_files()]
    names, texts = [name for name, _ in headers], [text for _, text in headers]
    main = f'#include "cuda/{op}.cuh"\n'.encode()
    program = _checked(nvrtc, *nvrtc.nvrtcCreateProgram(main, f"{op}.cu".encode(), len(headers), texts, names))
    options = [option.encode() for option in (f"-arch={arch}", *OPTIONS)]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc, *nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc, *nvrtc.nvrtcGetProgramLog(program, log), None)
        raise JitError(f"longcat_kernels: NVRTC refuses {op} for {arch}: {log.rstrip(chr(0).encode()).decode()}")
    code = b" " * _checked(nvrtc, *nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc, *nvrtc.nvrtcGetCUBIN(program, code), None)
    _checked(nvrtc, *nvrtc.nvrtcDestroyProgram(program), None)
    return code


def device_folder() -> Path:
    """Where the device code stands: inside an installed package, or beside it in a source tree."""
    installed = _PACKAGE / "device"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc" / "cuda"


def device_files() -> list[Path]:
    return sorted(device_folder().glob("*.cuh"))


def source_hash() -> str:
    """Of all device code together; CMakeLists.txt computes the same for the names of what it builds."""
    lines = [f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in device_files()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def cache_folder() -> Path | None:
    """As the XDG Base Directory Specification has it; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "longcat-kernels"
    try:
        return Path.home() / ".cache" / "longcat-kernels"
    except RuntimeError:
        return None


def _prebuilt(op: str, arch: str) -> Path:
    """Named after its source, so that one of other source is not found."""
    return _PACKAGE / "cubins" / f"{op}.{arch}.{source_hash()}.cubin"


@functools.cache
def _has_nvrtc() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:
        return False


def _nvrtc(op: str, arch: str) -> ModuleType:
    """The bindings, with a library that answers."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # cuda-python raises RuntimeError where it finds no library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JitError(
            f"longcat_kernels: {op} has no prebuilt kernels for {arch}, and NVRTC is missing ({reason}): "
            f"{HOW_TO_GET_NVRTC}"
        ) from None
    return nvrtc


def _checked(nvrtc: Any, result: Any, *values: Any) -> Any:
    """The values of a call, or an error with NVRTC's name for it."""
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise JitError(f"longcat_kernels: NVRTC says {result.name}")
    return values if len(values) > 1 else values[0]


def _read(entry: Path) -> bytes | None:
    """A cache entry is the digest of a cubin and the cubin: one cut short or overwritten counts as absent."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(entry: Path, code: bytes) -> None:
    """Renames a finished file into place, so that a reader never sees half of one."""
    partial = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, prefix=entry.name, delete=False) as partial:
            partial.write(hashlib.sha256(code).digest() + code)
        os.replace(partial.name, entry)
    except OSError:  # no place to keep it: the next process compiles again
        if partial is not None:
            Path(partial.name).unlink(missing_ok=True)
