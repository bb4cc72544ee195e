"""One contender of one case in a process of its own; started by machine.Worker.

    python worker.py OP CASE CONTENDER DEVICE THREADS

Answers each line of its input by one number: "time" by the seconds of a call, "memory" by the MB by which a first call
grows the resident memory, inputs and all that is ready-made being there.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import torch

import harness


def main() -> None:
    op, case_name, name, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    (case,) = (case for case in importlib.import_module(f"bench_{op}").CASES if case.name == case_name)
    (contender,) = (contender for contender in case.contenders(device) if contender.name == name)
    call, sample = contender.make(), None
    for line in sys.stdin:
        if line.strip() == "memory":
            print(extra_mb(call, device), flush=True)
            continue
        if sample is None:
            call()
            sample = harness.sampler(call, device=device, threads=int(threads), precision="highest", wall=case.wall)
        print(sample(), flush=True)


def extra_mb(call: harness.Call, device: str) -> float:
    """MB by which one call raises the highest memory in use: of the GPU, or resident in the process (Linux only)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes the present one
    before = _status_mb("VmRSS")
    call()
    return max(0.0, _status_mb("VmHWM") - before)


def _status_mb(field: str) -> float:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
