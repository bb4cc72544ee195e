"""The compiled module: what it says of itself, what it refuses, and life without it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat_kernels import PreparedCodebook, jit, native
from longcat_kernels.ops import OPS

ROOT = Path(__file__).parent.parent
MODULE = native.module().build_info()


def test_says_what_it_was_built_from() -> None:
    assert MODULE["version"] == importlib.metadata.version("longcat-kernels")
    assert MODULE["cxx_standard"] >= 201703
    assert MODULE["compiler"] and MODULE["isa"] == MODULE["isas_available"][-1]
    assert MODULE["isas_compiled"][0] == "portable" and set(MODULE["isas_available"]) <= set(MODULE["isas_compiled"])


def test_is_built_from_the_sources_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert MODULE["sources"] == native.source_hash()
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "other.cpp").write_text("int answer() { return 42; }")
    monkeypatch.setattr(native, "SOURCES", sources)
    with pytest.raises(RuntimeError, match=r"must be built from the sources in csrc, got one of others .*build_ext"):
        native._load.__wrapped__()
    monkeypatch.setattr(native, "SOURCES", tmp_path / "none")  # as in an installed package
    assert native._load.__wrapped__()[1] is None


def test_refuses_an_instruction_set_that_is_not_there() -> None:
    outputs = (torch.empty(1, 1), torch.empty(1, 1), torch.empty(1), torch.empty(1, 1).long())
    with pytest.raises(ValueError, match="isa must be one that this processor has, got 'sse9'"):
        native.module().rvq_encode(
            torch.ones(1, 1), [torch.ones(1, 1)], [], None, None, torch.float32, *outputs, threads=1, isa="sse9"
        )


def test_refuses_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.module().rvq_encode([1.0], [], [], None, None, torch.float32, None, None, None, None, threads=1)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool, torch.float64]
)
def test_a_tensor_and_a_subclass_are_read_alike(dtype: torch.dtype) -> None:
    """The first by DLPack where torch has it, the second by its attributes: codewords may be of no other dtype."""
    words = torch.arange(30.0).reshape(10, 3).to(dtype)[::2, 1:]
    codes = torch.tensor([[4], [-1], [2]])
    found: list[Any] = []
    for book in (words, words.as_subclass(Subclass)):
        out = torch.full((3, 2), torch.nan)
        try:
            native.module().rvq_decode(codes, [book], out, threads=1)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(out.tolist())
    assert found[0] == found[1]
    assert (found[0] == [[25, 26], [0, 0], [13, 14]]) == (dtype == torch.float32)


def test_no_attribute_of_a_plain_tensor_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("torch: this one has no DLPack exchange table")
    codes, words, out = torch.tensor([[0]]), torch.ones(1, 2), torch.empty(1, 2)
    native.module().rvq_decode(codes, [words], out, threads=1)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 1 / 0)
    native.module().rvq_decode(codes, [words], out, threads=1)
    with pytest.raises(ZeroDivisionError):
        native.module().rvq_decode(codes, [words.as_subclass(Subclass)], out, threads=1)
    assert out.tolist() == [[1, 1]]


class Subclass(torch.Tensor):
    """A tensor that could say anything of itself."""


def rvq_arguments() -> dict[str, Any]:
    """A good call of the compiled rvq_encode: 6 rows of 4, two levels."""
    return {
        "x": torch.randn(6, 4),
        "codebooks": [torch.randn(5, 4), torch.randn(3, 4)],
        "packed": [],
        "gram": None,
        "mask": torch.ones(6, dtype=torch.bool),
        "residual_dtype": torch.float32,
        "quantized": torch.empty(6, 4),
        "residual": torch.empty(6, 4),
        "losses": torch.empty(2),
        "codes": torch.empty(6, 2, dtype=torch.int64),
        "threads": 2,
    }


def packed(entries: int, dim: int) -> torch.Tensor:
    """The packed form of some codebook."""
    prepared = PreparedCodebook(torch.randn(entries, dim)).refresh()
    assert prepared.packed is not None
    return prepared.packed


def ema_arguments() -> dict[str, Any]:
    """A good call of the compiled ema_update: 6 rows of 4, 5 entries."""
    return {
        "embed": torch.randn(5, 4),
        "embed_ema": torch.randn(5, 4),
        "cluster_size_ema": torch.ones(5),
        "packed": None,
        "vectors": torch.randn(6, 4),
        "codes": torch.zeros(6, dtype=torch.int64),
        "decay": 0.9,
        "eps": 1e-5,
        "restart_threshold": 1.0,
        "restart_fraction": 0.0,
        "restart_count": 1.0,
        "seed": 0,
        "restarted": torch.empty((), dtype=torch.int64),
        "threads": 2,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.tensor(1.0)),
        ("x", torch.ones(6, 4, dtype=torch.int64)),
        ("x", torch.ones(6, 4, device="meta")),
        ("x", torch.ones(6, 0)),
        ("codebooks", [torch.ones(0, 4)] * 2),
        ("codebooks", [torch.ones(4)] * 2),
        ("codebooks", [torch.ones(5, 3)] * 2),
        ("codebooks", [torch.ones(4, 5).T] * 2),
        ("codebooks", [torch.ones(5, 4)] * 3),
        ("packed", [torch.zeros(4096, dtype=torch.uint8)]),
        ("packed", [torch.zeros(4096, dtype=torch.uint8)] * 2),
        ("gram", torch.zeros(5, 32)),
        ("mask", torch.ones(5, dtype=torch.bool)),
        ("mask", torch.ones(12, dtype=torch.bool)[::2]),
        ("mask", torch.ones(6)),
        ("residual_dtype", torch.int64),
        ("quantized", torch.empty(6, 4, dtype=torch.float16)),
        ("quantized", torch.empty(4, 6).T),
        ("residual", torch.empty(5, 4)),
        ("losses", torch.empty(1)),
        ("codes", torch.empty(6, 1, dtype=torch.int64)),
        ("codes", torch.empty(6, 2)),
        ("threads", 0),
    ],
)
def test_rvq_encode_refuses_what_would_lead_it_astray(name: str, value: Any) -> None:
    """The module trusts no caller: a wrong buffer is an error, never a wild read or write."""
    native.module().rvq_encode(**rvq_arguments())
    with pytest.raises(ValueError, match="rvq_encode: "):
        native.module().rvq_encode(**{**rvq_arguments(), name: value})


def test_refuses_packed_bytes_of_another_codebook() -> None:
    good = [packed(5, 4), packed(3, 4)]
    native.module().rvq_encode(**{**rvq_arguments(), "packed": good})
    for bad in (good[::-1], good[:1], [packed(5, 3), good[1]], [good[0].clone().zero_(), good[1]]):
        with pytest.raises(ValueError, match="rvq_encode: packed must be"):
            native.module().rvq_encode(**{**rvq_arguments(), "packed": bad})
    for wrong in (torch.zeros(5, 5), torch.zeros(4, 32), torch.zeros(5, 32, dtype=torch.float64)):
        with pytest.raises(ValueError, match="rvq_encode: gram must be"):
            native.module().rvq_encode(**{**rvq_arguments(), "packed": good, "gram": wrong})
    with pytest.raises(ValueError, match="packed must be the packed form"):
        native.module().ema_update(**{**ema_arguments(), "packed": good[1]})
    with pytest.raises(ValueError, match="packed must be the packed form"):
        native.module().pack_codebook(torch.randn(5, 4), good[1], threads=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embed", torch.ones(4)),
        ("embed", torch.ones(5, 3)),
        ("embed_ema", torch.ones(4, 4)),
        ("embed_ema", torch.ones(4, 5).T),
        ("cluster_size_ema", torch.ones(4)),
        ("vectors", torch.ones(6)),
        ("vectors", torch.ones(6, 3)),
        ("vectors", torch.ones(4, 6).T),
        ("vectors", torch.ones(6, 4, dtype=torch.int64)),
        ("vectors", torch.ones(6, 4, device="meta")),
        ("codes", torch.zeros(5, dtype=torch.int64)),
        ("codes", torch.zeros(12, dtype=torch.int64)[::2]),
        ("codes", torch.full((6,), 5)),
        ("codes", torch.full((6,), 2**62)),
        ("restarted", torch.empty(0, dtype=torch.int64)),
        ("restarted", torch.empty(())),
        ("threads", 0),
    ],
)
def test_ema_update_refuses_what_would_lead_it_astray(name: str, value: Any) -> None:
    native.module().ema_update(**ema_arguments())
    with pytest.raises(ValueError, match="ema_update: "):
        native.module().ema_update(**{**ema_arguments(), name: value})


def test_more_threads_than_any_machine_has_cost_no_memory() -> None:
    few, other = rvq_arguments(), rvq_arguments()
    many = {**other, "x": few["x"], "codebooks": few["codebooks"]}
    native.module().rvq_encode(**few)
    native.module().rvq_encode(**{**many, "threads": 2**31 - 1})
    assert torch.equal(few["codes"], many["codes"]) and torch.equal(few["residual"], many["residual"])


def test_one_openmp_runtime_serves_torch_and_the_module() -> None:
    """Two pools would fight for the cores: up to 18 times slower."""
    if MODULE["openmp"] is None or not Path("/proc/self/maps").exists():
        return
    # In a process of its own: scikit-learn, which other tests import, brings a runtime too.
    code = (
        "import torch\n"
        "from longcat_kernels import native\n"
        "native.module(); torch.ones(4) + 1\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}, sep='\\n')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 1


def test_without_the_module_ops_run_and_say_so_once(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "longcat_kernels", tmp_path / "longcat_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd")
    )
    code = (
        "import torch, longcat_kernels as lk\n"
        "for _ in range(3): lk.rvq_encode(torch.ones(2, 3), [torch.ones(4, 3)])\n"
        "try: lk.rvq_encode(torch.ones(2, 3), [torch.ones(4, 3)], backend='cpu')\n"
        "except ValueError as error: print(error)\n"
    )
    # -S and an explicit path: no installed copy of the package can stand in.
    paths = [str(tmp_path), *(p for p in sys.path if p.endswith("-packages"))]
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert run.stderr.count("longcat_kernels: the compiled module is missing") == 1
    assert run.stdout.startswith("rvq_encode: no backend takes these tensors:\n  cpu: the compiled module is missing")
    assert "install a C++17 compiler" in run.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads."""
    copy = tmp_path_factory.mktemp("a source")
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "longcat_kernels").mkdir()
    return copy


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(source / "out")],
        cwd=source,
        env={**os.environ, "LONGCAT_CUDA": "OFF", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def configured(source: Path, **environment: str) -> str | None:
    """The compiler that a build of sources without a line of code settles on."""
    for file in (source / "csrc").rglob("*.cpp"):
        file.write_text("")
    assert build(source, **environment).returncode == 0
    cache = next((source / "build").rglob("CMakeCache.txt")).read_text()
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    return found and found[1]


def test_a_source_distribution_carries_all_that_a_build_reads(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert needed | {"setup.py", "CMakeLists.txt", "pyproject.toml"} <= inside


def test_a_machine_without_a_compiler_leaves_the_module_out_and_says_so(source: Path) -> None:
    shutil.rmtree(source / "build", ignore_errors=True)
    run = build(source, CXX="/nonexistent/c++")
    assert run.returncode == 0, run.stderr
    said = " ".join((run.stdout + run.stderr).split())  # CMake wraps lines
    assert "no working C++ compiler was found, so the compiled module is left out" in said
    assert not list((source / "out").rglob("*.so"))
    # A compiler installed later must be found.
    assert "CMAKE_CXX_COMPILER-NOTFOUND" not in next((source / "build").rglob("CMakeCache.txt")).read_text()


def test_a_moved_tree_and_a_removed_compiler_do_not_trouble_the_next_build(source: Path, tmp_path: Path) -> None:
    tree, moved, compiler = tmp_path / "tree", tmp_path / "moved", tmp_path / "c++"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("build"))
    compiler.symlink_to(shutil.which(os.environ.get("CXX", "c++")) or "c++")
    assert configured(tree, CXX=str(compiler)) == str(compiler)
    compiler.unlink()
    shutil.copytree(tree, moved)
    assert configured(moved) not in (None, str(compiler))


@pytest.mark.parametrize("works", [True, False])
def test_device_code_is_built_where_nvcc_is_and_left_to_nvrtc_where_it_fails(
    source: Path, tmp_path: Path, works: bool
) -> None:
    """With a compiler in nvcc's place: each op for each processor, under the name that jit.py looks for."""
    tree, nvcc = tmp_path / "tree", tmp_path / "bin" / "nvcc"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("build", "out"))
    for file in (tree / "csrc").rglob("*.cpp"):
        file.write_text("")
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n' if works else "#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    run = build(tree, LONGCAT_CUDA="ON", PATH=f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    assert run.returncode == 0, run.stderr
    built = {file.name for file in (tree / "out" / "longcat_kernels").glob("cubins/*")}
    ops = [op.name for op in OPS if "cuda" in op.impls]
    wanted = {f"{op}.{arch}.{jit.source_hash()}.cubin" for op in ops for arch in jit.ARCHES}
    assert built == (wanted if works else set())
    assert ("nvcc failed on rvq_encode for sm_90a, so NVRTC will compile it" in run.stdout) is not works
    device = {file.name for file in (tree / "out" / "longcat_kernels" / "device").iterdir()}
    assert device == {file.name for file in jit.device_files()}, "what NVRTC needs is in the wheel"


def test_an_error_in_the_sources_fails_the_build(source: Path) -> None:
    shutil.rmtree(source / "build", ignore_errors=True)
    (source / "csrc/include/longcat/isa.h").write_text("this is not C++;\n")
    run = build(source)
    assert run.returncode != 0 and "this is not C++" in run.stdout + run.stderr
