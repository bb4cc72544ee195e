"""`fused_moe` inside transformers' models.

    from longcat_kernels.integrations import transformers
    transformers.patch()

Dimension key
    T tokens    k experts of one token    E real experts    Z identity experts    D model    F hidden units of an expert
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from longcat_kernels.ops.fused_moe import fused_moe

NAME = "longcat"  # of the experts implementation
_ORIGINAL = "_longcat_kernels_original"  # attribute of the patched class: what it had before
_MODEL = "longcat_flash"


def patch() -> None:
    """Makes transformers compute mixtures of experts by `fused_moe`: forward, gradients, identity experts included.

    - LongcatFlash models do so from now on, those that exist already too; other activations than SiLU stay as they are.
    - New LongcatFlash models allocate `gate_up_proj` for their E real experts only, where transformers allocates E + Z
      rows and reads E of them (1.6 GB a layer in bfloat16 at LongCat-Flash-Lite's sizes). State dicts of either size
      load into models of either size, and `from_pretrained` takes checkpoints that hold E experts, which transformers
      refuses.
    - Other models whose experts stand behind transformers' interface may ask for it, by
      `model.set_experts_implementation("longcat")`.

    A second call changes nothing; `unpatch` undoes it.

    Raises:
        ImportError: transformers is missing, or older than 5.
    """
    experts, interface, conversions, loading = _modules()
    if _ORIGINAL in vars(experts):
        return
    original = {name: vars(experts).get(name) for name in ("__init__", "forward", "_load_from_state_dict")}
    mapping = conversions.get_checkpoint_conversion_mapping(_MODEL)
    setattr(experts, _ORIGINAL, {**original, "mapping": mapping})

    def init(self: nn.Module, config: Any) -> None:
        with torch.device("meta"):
            original["__init__"](self, config)
        for name, parameter in list(self.named_parameters(recurse=False)):
            shape = (self.num_routed_experts, *parameter.shape[1:])
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=parameter.dtype)))

    silu = type(importlib.import_module("transformers.activations").ACT2FN["silu"])

    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not isinstance(self.act_fn, (silu, nn.SiLU)):
            return original["forward"](self, hidden_states, top_k_index, top_k_weights)
        return _longcat_flash_forward(self, hidden_states, top_k_index, top_k_weights)

    experts.__init__, experts.forward, experts._load_from_state_dict = init, forward, _load_from_state_dict
    interface[NAME] = experts_forward
    keep = _keep_real_experts(loading)
    conversions.register_checkpoint_conversion_mapping(_MODEL, [keep(c) for c in mapping], overwrite=True)


def unpatch() -> None:
    """Undoes `patch`; models stay usable. Without a patch it does nothing.

    Raises:
        ImportError: transformers is missing, or older than 5.
    """
    experts, interface, conversions, _ = _modules()
    original = vars(experts).get(_ORIGINAL)
    if original is None:
        return
    conversions.register_checkpoint_conversion_mapping(_MODEL, original.pop("mapping"), overwrite=True)
    del interface[NAME]
    for name, function in original.items():
        if function is None:
            delattr(experts, name)
        else:
            setattr(experts, name, function)
    delattr(experts, _ORIGINAL)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' experts interface calls: hidden_states [T, D], top_k_index and top_k_weights [T, k] -> [T, D].

    Raises:
        ValueError: the experts are not bias-free SwiGLU with gate and up side by side.
    """
    module: Any = self
    fits = (
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False))
        and type(module)._apply_gate.__module__ == "transformers.integrations.moe"
        and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )
    if not fits:
        name = type(module).__name__
        raise ValueError(f"experts_forward: experts must be SwiGLU with gate and up side by side, no bias, got {name}")
    # An id past the experts stands for another rank's.
    ids_Tk = torch.where(top_k_index < len(module.down_proj), top_k_index, -1)
    return _run(hidden_states, module.gate_up_proj, module.down_proj, ids_Tk, top_k_weights)


def _longcat_flash_forward(module: Any, x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    if module.gate_up_proj is None:
        return (weights_Tk.sum(1, keepdim=True) * x_TD).to(x_TD.dtype)
    return _run(x_TD, module.gate_up_proj[: module.num_routed_experts], module.down_proj, ids_Tk, weights_Tk)


def _run(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    return fused_moe(x_TD, gate_up_EFD.to(x_TD.dtype), down_EDF.to(x_TD.dtype), ids_Tk.long(), weights_Tk)


def _load_from_state_dict(
    self: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
) -> None:
    """`nn.Module`'s, after `gate_up_proj` was made as long as this module's: rows of identity experts hold nothing."""
    key, own = f"{prefix}gate_up_proj", self.gate_up_proj
    if key in state_dict and isinstance(own, Tensor) and len(state_dict[key]) != len(own):
        value = state_dict[key]
        rows, has = len(own), len(value)
        # A copy, for `assign=True` would keep the rows that were cut off.
        fitted = (
            value[:rows].clone() if has > rows else torch.cat([value, value.new_zeros(rows - has, *value.shape[1:])])
        )
        state_dict = {**state_dict, key: fitted}
    nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *rest)


def _keep_real_experts(loading: ModuleType) -> Any:
    """What ends a conversion of a checkpoint's experts by cutting off those that are not real."""

    class KeepRealExperts(loading.ConversionOps):  # type: ignore[name-defined]
        def convert(self, input_dict: dict[str, Any], *rest: Any, config: Any = None, **others: Any) -> dict[str, Any]:
            return {name: value[: config.n_routed_experts] for name, value in input_dict.items()}

        @property
        def reverse_op(self) -> Any:
            return self

    def keep(converter: Any) -> Any:
        if isinstance(converter, loading.WeightConverter) and "gate_up_proj" in str(converter.target_patterns):
            operations = [*converter.operations, KeepRealExperts()]
            return loading.WeightConverter(converter.source_patterns, converter.target_patterns, operations)
        return converter

    return keep


def _modules() -> tuple[Any, Any, ModuleType, ModuleType]:
    """LongcatFlash's class of experts, the interface of experts, and the modules that convert checkpoints."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("patch: transformers must be at least 5, got none: pip install 'transformers>=5'")
    version = importlib.import_module("transformers").__version__
    if int(version.split(".")[0]) < 5:
        raise ImportError(f"patch: transformers must be at least 5, got {version}: pip install 'transformers>=5'")
    names = (
        "models.longcat_flash.modeling_longcat_flash",
        "integrations.moe",
        "conversion_mapping",
        "core_model_loading",
    )
    modeling, moe, conversions, loading = (importlib.import_module(f"transformers.{name}") for name in names)
    return modeling.LongcatFlashExperts, moe.ALL_EXPERTS_FUNCTIONS, conversions, loading
