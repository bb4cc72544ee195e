"""Device code to machine code without a device: NVRTC, the disk cache, prebuilt cubins, errors without them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longcat_kernels import jit

needs_nvrtc = pytest.mark.skipif(not jit._has_nvrtc(), reason="NVRTC: not installed")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """No prebuilt cubins, and a compiler that keeps a list of what it was asked for."""
    asked: list[tuple[str, str]] = []

    def compile_cubin(op: str, arch: str) -> bytes:
        asked.append((op, arch))
        return f"cubin of {op} for {arch}".encode() * 1000

    monkeypatch.setattr(jit, "_prebuilt", lambda op, arch: Path("/nonexistent"))
    monkeypatch.setattr(jit, "compile_cubin", compile_cubin)
    return asked


@needs_nvrtc
@pytest.mark.parametrize("arch", jit.ARCHES)
def test_nvrtc_needs_neither_driver_nor_headers(arch: str) -> None:
    assert jit.compile_cubin("rvq_decode", arch)[:4] == b"\x7fELF"


@needs_nvrtc
def test_an_error_in_device_code_is_told_with_its_line() -> None:
    with pytest.raises(jit.JitError, match=r"NVRTC refuses rvq_decode for sm_9: .*arch"):
        jit.compile_cubin("rvq_decode", "sm_9")


@needs_nvrtc
def test_compiles_once(counted: list[tuple[str, str]], tmp_path: Path) -> None:
    first = jit.cubin("rvq_encode", "sm_80", tmp_path)
    assert jit.cubin("rvq_encode", "sm_80", tmp_path) == first and len(counted) == 1
    assert jit.cubin("rvq_encode", "sm_90a", tmp_path) != first
    assert jit.cubin("rvq_decode", "sm_80", tmp_path) != first
    assert counted == [("rvq_encode", "sm_80"), ("rvq_encode", "sm_90a"), ("rvq_decode", "sm_80")]


@needs_nvrtc
def test_new_source_or_options_are_compiled_anew(
    counted: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit.cubin("rvq_encode", "sm_80", tmp_path)
    monkeypatch.setattr(jit, "source_hash", lambda: "another source")
    jit.cubin("rvq_encode", "sm_80", tmp_path)
    monkeypatch.setattr(jit, "OPTIONS", ("-std=c++20",))
    jit.cubin("rvq_encode", "sm_80", tmp_path)
    assert len(counted) == 3


@needs_nvrtc
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b[:200] + b"x" + b[201:], lambda b: b"", lambda b: b[:9]]
)
def test_a_damaged_entry_is_compiled_anew(counted: list[tuple[str, str]], tmp_path: Path, damage: Any) -> None:
    good = jit.cubin("rvq_encode", "sm_80", tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert jit.cubin("rvq_encode", "sm_80", tmp_path) == good and len(counted) == 2
    assert jit.cubin("rvq_encode", "sm_80", tmp_path) == good and len(counted) == 2


@needs_nvrtc
def test_many_writers_leave_one_good_entry(counted: list[tuple[str, str]], tmp_path: Path) -> None:
    results: list[bytes] = []
    entry_seen: list[bool] = []

    def work() -> None:
        for _ in range(20):
            results.append(jit.cubin("rvq_encode", "sm_80", tmp_path))
            for file in tmp_path.glob("*.cubin"):
                entry_seen.append(jit._read(file) is not None)
                file.unlink(missing_ok=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and len(results) == 80
    jit.cubin("rvq_encode", "sm_80", tmp_path)
    assert [jit._read(file) for file in tmp_path.iterdir()] == [results[0]], "only the entry is left, and it is whole"


@needs_nvrtc
def test_a_cache_that_cannot_be_written_does_no_harm(counted: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert jit.cubin("rvq_encode", "sm_80", tmp_path / "file") == jit.cubin("rvq_encode", "sm_80", tmp_path / "file")
    assert len(counted) == 2


def test_a_disk_that_is_full_keeps_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit.os, "replace", refuse)
    jit._write(tmp_path / "entry.cubin", b"code")
    assert list(tmp_path.iterdir()) == []


def test_a_prebuilt_cubin_of_the_same_source_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_PACKAGE", tmp_path / "longcat_kernels")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    device, cubins = tmp_path / "csrc" / "cuda", tmp_path / "longcat_kernels" / "cubins"
    device.mkdir(parents=True)
    cubins.mkdir(parents=True)
    (device / "rvq_encode.cuh").write_text("// source")
    (cubins / f"rvq_encode.sm_80.{jit.source_hash()}.cubin").write_bytes(b"prebuilt")
    assert jit.cubin("rvq_encode", "sm_80", tmp_path) == b"prebuilt"
    (device / "rvq_encode.cuh").write_text("// changed")
    with pytest.raises(jit.JitError):
        jit.cubin("rvq_encode", "sm_80", tmp_path)


def test_without_nvrtc_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_prebuilt", lambda op, arch: Path("/nonexistent"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(jit.JitError) as caught:
        jit.cubin("rvq_encode", "sm_80", tmp_path)
    message = str(caught.value)
    assert message.startswith("longcat_kernels: rvq_encode has no prebuilt kernels for sm_80, and NVRTC is missing (")
    assert message.endswith('pip install "longcat-kernels[cuda]"') and "\n" not in message


def test_the_reason_is_known_before_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_prebuilt", lambda op, arch: Path("/nonexistent"))
    monkeypatch.setattr(jit, "_has_nvrtc", lambda: False)
    assert jit.why_not("rvq_encode", "sm_75") == (
        'it has no prebuilt kernels for sm_75, and NVRTC is not installed: pip install "longcat-kernels[cuda]"'
    )
    monkeypatch.setattr(jit, "_has_nvrtc", lambda: True)
    assert jit.why_not("rvq_encode", "sm_75") is None


def test_code_of_a_processor_runs_on_the_newer_ones_it_says() -> None:
    found = [jit.arch_of(*c) for c in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))]
    assert found == ["sm_75", "sm_80", "sm_80", "sm_80", "sm_90a", "sm_100a", "sm_103", "sm_120"]


def test_the_cache_stands_where_caches_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / "longcat-kernels"
    for other in ("", "relative"):  # which the specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert jit.cache_folder() == Path.home() / ".cache" / "longcat-kernels"


def test_a_user_without_a_home_compiles_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(jit.Path, "home", refuse)
    monkeypatch.setattr(jit, "_prebuilt", lambda op, arch: Path("/nonexistent"))
    monkeypatch.setattr(jit, "_nvrtc", lambda op, arch: SimpleNamespace(nvrtcVersion=lambda: (0, 12, 0)))
    monkeypatch.setattr(jit, "_checked", lambda nvrtc, result, *values: values)
    monkeypatch.setattr(jit, "compile_cubin", lambda op, arch: b"compiled")
    assert jit.cache_folder() is None and jit.cubin("rvq_encode", "sm_80") == b"compiled"


def test_importing_the_package_loads_no_compiler() -> None:
    code = "import sys, longcat_kernels; print([name for name in sys.modules if 'nvrtc' in name])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
