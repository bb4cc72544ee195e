"""The CUDA kernels without anything around them, for gpu_check.py.

python gpu_kernels.py load       machine code of every op, by nvcc and by NVRTC, goes into the driver
python gpu_kernels.py OP         the op's edge cases, forward and backward: what compute-sanitizer watches
python gpu_kernels.py planted    writes past the end of an allocation: what compute-sanitizer must find
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from longcat_kernels import cuda, jit, native
from longcat_kernels.ops import OPS
from longcat_kernels.spec import Op
from longcat_kernels.testing import Call, record

CUDA_OPS = {op.name: op for op in OPS if "cuda" in op.impls}
KERNELS = ("rvq_", "ema_", "sort_", "segment_", "depth_", "planted")  # how the names of the kernels begin


def load() -> str | None:
    """None, or why not."""
    arch = jit.arch_of(*torch.cuda.get_device_capability())
    for name in CUDA_OPS:
        reason = cuda.why_not(name, torch.empty(1, device="cuda"))
        if reason is not None:
            return f"{name}: {reason}"
        made = {"the package": jit.cubin(name, arch), "NVRTC": jit.compile_cubin(name, arch)}
        for maker, code in made.items():
            native.module().CudaModule(name, code, 0)
            print(f"{name} for {arch} by {maker}: {len(code)} bytes")
    return None


def run_cases(op: Op) -> str | None:
    """None, or why not."""
    done = 0
    for number, case in enumerate(op.spec.EDGE):
        call = on_gpu(record(op, op.spec.inputs(case, "cpu")))
        reason = op.impls["cuda"].why_not(*call.arguments[:-1])
        if reason is None:
            call.run("cuda"), call.gradients(op, "cuda")
            torch.cuda.synchronize()
            done += 1
        print(f"{op.name} {number}: {reason or 'done'}", flush=True)
    return None if done else "no case ran"


def on_gpu(call: Call) -> Call:
    """The same call there; what was made on the CPU by the definition costs the sanitizer nothing."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().cuda().requires_grad_(tensor.requires_grad)

    moved: tuple[Any, ...] = tree_map_only(Tensor, move, call.arguments)
    return Call(call.overload, moved)


def main(what: str) -> int:
    if what == "planted":
        import gpu_planted

        gpu_planted.run()
        return 0
    reason = load() if what == "load" else run_cases(CUDA_OPS[what])
    if reason is not None:
        print(f"gpu_kernels: {reason}", file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
