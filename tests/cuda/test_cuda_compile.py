"""What the compiler made of every CUDA kernel, for every processor: no spills, the right instructions, room to run."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from longcat_kernels import jit, native

OPS = ("rvq_encode", "rvq_decode", "ema_update", "depth_decode")
ROOT = Path(__file__).parent.parent.parent


def cuobjdump() -> str | None:
    """Of a CUDA toolkit, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(inside) if inside is not None and inside.is_file() else None


pytestmark = [
    pytest.mark.skipif(cuobjdump() is None, reason="CUDA machine code: no cuobjdump (triton has it)"),
    pytest.mark.skipif(not jit._has_nvrtc(), reason="NVRTC: not installed"),
]


@functools.cache
def cubin_file(op: str, arch: str, folder: Path) -> Path:
    file = folder / f"{op}.{arch}.cubin"
    file.write_bytes(jit.compile_cubin(op, arch))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


def dump(file: Path, *options: str) -> str:
    command = [cuobjdump() or "", *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(op: str, arch: str, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, stack, shared and local bytes of each kernel."""
    text = dump(cubin_file(op, arch, folder), "-res-usage")
    kernels = re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)} for name, line in kernels}


@functools.cache
def instructions(op: str, arch: str, kernel: str, folder: Path) -> tuple[str, ...]:
    """Opcodes, in order."""
    text = dump(cubin_file(op, arch, folder), "-sass", "-fun", kernel)
    return tuple(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M))


@pytest.mark.parametrize("arch", jit.ARCHES)
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_spills(op: str, arch: str, folder: Path) -> None:
    found = resources(op, arch, folder)
    source = (ROOT / "csrc/cuda" / f"{op}.cuh").read_text()
    assert set(re.findall(r"LC_KERNEL\(.*?\) (\w+)\(", source)) <= set(found)
    for kernel, used in found.items():
        print(f"{arch:8} {kernel:18} {used['REG']:4} registers {used['SHARED']:6} shared {used['STACK']:3} stack")
        assert used["STACK"] == 0 and used["LOCAL"] == 0, kernel
        assert not any(opcode.split(".")[0] in ("LDL", "STL") for opcode in instructions(op, arch, kernel, folder))


def test_the_hopper_screen_uses_what_hopper_has(folder: Path) -> None:
    """Four wgmmas of 64 x 256 x 16 a stage and no other product; the copy engine brings operands, one to two blocks."""
    opcodes = instructions("rvq_encode", "sm_90a", "rvq_coarse_wgmma", folder)
    products = [opcode for opcode in opcodes if "MMA" in opcode]
    assert len(products) == 4 and all(opcode.startswith("HGMMA.64x256x16.F32") for opcode in products), products
    copies = [opcode for opcode in opcodes if opcode.startswith("UTMALDG")]
    assert len(copies) == 2 and sum("MULTICAST" in opcode for opcode in copies) == 1, copies
    assert sum(opcode.startswith("USETMAXREG") for opcode in opcodes) == 2
    between = opcodes[opcodes.index(products[0]) : len(opcodes) - opcodes[::-1].index(products[-1])]
    assert len(between) < 60 and not any(opcode.startswith(("MEMBAR", "BAR", "WARPSYNC", "LDG")) for opcode in between)
    fences, meetings = ([o for o in opcodes if o.startswith(name)] for name in ("MEMBAR.ALL.GPU", "UCGABAR_ARV"))
    assert len(fences) == len(meetings) == 2, "a fence of the whole device at every stage"
    # Launched with what registers three warpgroups can have; the producer gives up what the consumers take.
    assert resources("rvq_encode", "sm_90a", folder)["rvq_coarse_wgmma"]["REG"] == 168
    assert 128 * 40 + 256 * 232 <= 384 * 168


@pytest.mark.parametrize("arch", jit.ARCHES)
def test_the_other_screen_uses_tensor_cores_and_asynchronous_copies(arch: str, folder: Path) -> None:
    opcodes = instructions("rvq_encode", arch, "rvq_coarse_mma", folder)
    assert sum(opcode.startswith("HMMA.16816.F32") for opcode in opcodes) == 64
    assert sum(opcode.startswith("LDSM.16.M88.4") for opcode in opcodes) == 24
    assert any(opcode.startswith("LDGSTS") and "128" in opcode for opcode in opcodes)


@pytest.mark.parametrize("arch", jit.ARCHES)
def test_depth_decode_fills_a_multiprocessor_with_one_block(arch: str, folder: Path) -> None:
    """384 threads, as many registers as there are for them; weights come by asynchronous copies, 16 bytes each; a grid
    barrier is one release and one acquire, without a fence of the whole device."""
    used = resources("depth_decode", arch, folder)["depth_decode"]
    assert 65536 // 2 < 384 * used["REG"] <= 65536
    opcodes = instructions("depth_decode", arch, "depth_decode", folder)
    assert sum(opcode.startswith("LDGSTS.E.BYPASS.128") for opcode in opcodes) >= 1, opcodes
    assert any(opcode.startswith("LD.E.STRONG.GPU") or opcode.startswith("LDG.E.STRONG.GPU") for opcode in opcodes)
    assert sum(opcode.startswith("FFMA") for opcode in opcodes) >= 3 * 4 * (1 + 4 + 16 + 32)


@pytest.mark.parametrize("arch", jit.ARCHES)
def test_depth_decode_of_many_rows_multiplies_on_tensor_cores(arch: str, folder: Path) -> None:
    """32 rows by three strips of sixteen weights, 64 deep: so many products and loads; a block fills a processor."""
    used = resources("depth_decode", arch, folder)["depth_decode_mma"]
    assert 65536 // 2 < 384 * used["REG"] <= 65536
    opcodes = instructions("depth_decode", arch, "depth_decode_mma", folder)
    assert sum(opcode.startswith("HMMA.16816.F32.BF16") for opcode in opcodes) == 3 * 4 * 4
    assert sum(opcode.startswith("LDSM.16.M88.4") for opcode in opcodes) == 3 * 4
    assert sum(opcode.startswith(("LDG.E.128", "LD.E.128")) for opcode in opcodes) == 4 * 2
    assert any(opcode.startswith("LDGSTS.E.BYPASS.128") for opcode in opcodes)


def test_kernels_are_named_as_launchers_name_them(folder: Path) -> None:
    for op in OPS:
        names = set().union(*(resources(op, arch, folder) for arch in jit.ARCHES))
        launcher = (ROOT / "csrc/cuda" / f"{op}_launch.cpp").read_text()
        called = set(re.findall(r'\{"(\w+)"', launcher))
        called |= {"sort_count", "sort_scan", "sort_scatter"} if "sort_by_code" in launcher else set()
        assert called <= names, op


def test_the_drivers_interface_is_declared_as_cuda_h_has_it(tmp_path: Path) -> None:
    headers = [Path(p) for p in ("/usr/local/cuda/include", "/opt/cuda/include") if (Path(p) / "cuda.h").is_file()]
    if not headers:
        pytest.skip("CUDA machine code: no cuda.h")
    source = tmp_path / "same.cpp"
    source.write_text(
        "#include <cuda.h>\n#include <cstddef>\n"
        '#include "cuda/driver_api.h"\n#include "cuda/rvq_params.cuh"\n'
        "using namespace longcat::cuda;\n"
        "static_assert(sizeof(api::LaunchConfig) == sizeof(CUlaunchConfig));\n"
        "static_assert(offsetof(api::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));\n"
        "static_assert(offsetof(api::LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));\n"
        "static_assert(sizeof(api::LaunchAttribute) == sizeof(CUlaunchAttribute));\n"
        "static_assert(offsetof(api::LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));\n"
        "static_assert(api::kCooperative == CU_LAUNCH_ATTRIBUTE_COOPERATIVE);\n"
        "static_assert(api::kClusterDimension == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);\n"
        "static_assert(api::kMultiprocessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);\n"
        "static_assert(api::kMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);\n"
        "static_assert(api::kMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);\n"
        "static_assert(api::kMaxDynamicShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);\n"
        "static_assert(api::kTensorFloat16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16);\n"
        "static_assert(api::kSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B);\n"
        "static_assert(api::kInterleaveNone == CU_TENSOR_MAP_INTERLEAVE_NONE);\n"
        "static_assert(api::kPromotion256 == CU_TENSOR_MAP_L2_PROMOTION_L2_256B);\n"
        "static_assert(api::kFillZero == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);\n"
        "static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));\n"
        "template <class... A, class... B> constexpr bool same(CUresult (*)(A...), int (*)(B...)) {\n"
        "    return sizeof...(A) == sizeof...(B) && ((sizeof(A) == sizeof(B)) && ...);\n}\n"
        "using D = api::Driver;\n"
        + "".join(
            f"static_assert(same(decltype(&{name}){{}}, decltype(D::{name}){{}}));\n"
            for name in re.findall(r"\(\*(cu\w+)\)", (ROOT / "csrc/cuda/driver_api.h").read_text())
        )
    )
    command = ["c++", "-std=c++17", "-fsyntax-only", *(f"-I{h}" for h in headers), f"-I{ROOT}/csrc", str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_without_a_driver_there_is_a_reason_and_no_crash() -> None:
    reason = native.module().cuda_why_not()
    if not reason:
        pytest.skip("CUDA driver: there is one here")
    assert re.match("no NVIDIA driver is installed|the NVIDIA driver ", reason)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        native.module().CudaModule("rvq_encode", b"", 0)
