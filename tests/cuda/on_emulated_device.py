"""Run by test_emulated_device.py: a second device, whose tensors hold CPU tensors and may meet no others.

What runs here mixes up no devices, so it will not on a GPU: the ops' definitions with the inputs that tests make for
them, and the training run of gpu-check.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
KERNELS: dict[str, Any] = {}  # of the package's ops, which torch would not call on tensors of a mode
MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::_index_put_impl_")  # as CUDA lets them


class There(torch.Tensor):
    """A tensor of the device."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=f"{NAME}:0",
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=options.get("dtype", self.dtype)).to(self.device)


class Device(TorchDispatchMode):
    """Sees what is made there out of nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(function, args, kwargs or {})


def call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = function._schema.name, tree_leaves((args, kwargs))
    if function.namespace == "longcat":
        with Device():
            return KERNELS[name](*args, **kwargs)
    there = [leaf for leaf in leaves if isinstance(leaf, There)]
    wanted = [torch.device(leaf) for leaf in leaves if isinstance(leaf, torch.device)]
    if there and not name.startswith(MAY_MIX):
        strange = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, There) and x.ndim > 0]
        assert not strange, f"{name} gets a CPU tensor {list(strange[0].shape)} beside one of the device"
    args, kwargs = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    with _disable_current_modes():
        found = function(*args, **kwargs)
    if (wanted and wanted[0].type == "cpu") or not (there or wanted):
        return found
    known = {id(tensor.here): tensor for tensor in there}  # what was written in place is the tensor it was
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else There(x), found)


def emulate() -> None:
    """Sets the device up, before the package is imported."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    impl, tensor = torch.library.Library.impl, torch.tensor

    def remembering(self: Any, name: Any, function: Any, *key: Any, **more: Any) -> Any:
        if key[:1] == ("CompositeExplicitAutograd",):
            KERNELS[f"longcat::{name}"] = function
        return impl(self, name, function, *key, **more)

    def made_here_first(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    torch.library.Library.impl = remembering  # type: ignore[method-assign]
    torch.tensor = torch.as_tensor = made_here_first  # type: ignore[assignment]
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment, misc]


def mixing_is_noticed() -> None:
    try:
        torch.ones(2) + torch.ones(2, device=NAME)
    except AssertionError:
        return
    raise SystemExit("the emulation lets devices mix")


def definitions() -> None:
    from longcat_kernels.ops import OPS
    from longcat_kernels.testing import record

    for op in OPS:
        for case in op.spec.EDGE[-3:]:
            recorded = record(op, op.spec.inputs(case, NAME))
            tensors = [leaf for leaf in tree_leaves(recorded.arguments) if isinstance(leaf, torch.Tensor)]
            assert all(isinstance(leaf, There) for leaf in tensors), f"{op.name}: inputs are on the CPU"
            recorded.run("reference"), recorded.gradients(op, "reference")
        print(op.name)


def training(absent: list[str]) -> None:
    sys.modules.update(dict.fromkeys(absent))  # whoever imports one finds none
    import gpu_check  # noqa: F401
    import gpu_training
    import run
    from longcat_kernels.ops import OPS

    for op in OPS:
        __import__(f"bench_{op.name}")
    assert run.parse(["rvq_encode", "--brief"]).brief
    gpu_training.presets.demo = gpu_training.presets.tiny
    settings = gpu_training.Settings(sae_steps=1, quantizer_steps=1, decoder_steps=1, refiner_steps=1, images=8)
    with Device():
        message = gpu_training.run(NAME, settings=settings, steps=1)
    assert message is not None and "the loss must fall" in message  # all else is right


if __name__ == "__main__":
    emulate()
    with Device():
        mixing_is_noticed()
        definitions()
    training(sys.argv[1:])
