"""Contenders of the mixture of experts: each is a function with the arguments of `fused_moe`, [T, D] out.

All ids must be of real experts: most peers know no others.

Dimension key
    T tokens    k slots of a token    R rows: slots sorted by expert    E experts    C rows of the fullest expert
    D model     F hidden units of an expert    Z identity experts
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Call, Skip
from longcat_kernels import PreparedExperts, fused_moe
from longcat_kernels.modules import MoE

Experts = Callable[..., Tensor]  # x, gate_up, down, ids, weights -> out
SCALE = 6.0  # of the routing weights of LongCat-Flash


def forward(experts: Experts, arguments: dict[str, Tensor]) -> Call:
    """Without gradients; gives [out]."""
    own = [tensor.detach() for tensor in arguments.values()]

    @torch.no_grad()
    def call() -> list[Tensor]:
        return [experts(*own)]

    return call


def step(experts: Experts, arguments: dict[str, Tensor], grad_TD: Tensor) -> Call:
    """Forward and backward; gives out and the gradients of all that is floating point."""
    own, leaves = _leaves(arguments)

    def call() -> list[Tensor]:
        out_TD = experts(*own)
        return [out_TD, *torch.autograd.grad(out_TD, leaves, grad_TD)]

    return call


def _leaves(arguments: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh tensors in the same memory; those that have gradients."""
    own = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in arguments.values()]
    return own, [tensor for tensor in own if tensor.requires_grad]


def saved_mb(experts: Experts, arguments: dict[str, Tensor]) -> float:
    """MB that a forward keeps for its backward, each memory once, the weights of experts left out."""
    own, _ = _leaves(arguments)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_TD = experts(*own)  # held: what is freed may lend its address to the next
    for weights in own[1:3]:
        kept.pop(weights.untyped_storage().data_ptr(), None)
    del out_TD
    return sum(kept.values()) / 2**20


def ours(save: str = "h") -> Experts:
    """The op; `save` as there."""
    return lambda x, gate_up, down, ids, weights: fused_moe(x, gate_up, down, ids, weights, save=save)


def ours_prepared(arguments: dict[str, Tensor]) -> Call:
    """The op with packed weights."""
    x, gate_up, down, ids, weights = (tensor.detach() for tensor in arguments.values())
    prepared = PreparedExperts(gate_up, down).refresh()
    return lambda: [fused_moe(x, gate_up, down, ids, weights, prepared=prepared)]


def _sorted(ids_Tk: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slot of each row, token of each row, and rows of each expert."""
    flat = ids_Tk.flatten()
    slots_R = flat.argsort(stable=True)
    return slots_R, slots_R // ids_Tk.shape[1], torch.bincount(flat, minlength=experts)


def _summed(x_TD: Tensor, tokens_R: Tensor, y_RD: Tensor, weights_R: Tensor) -> Tensor:
    """The weighted sum, in x's dtype: with float32 weights it would take longer."""
    return torch.zeros_like(x_TD).index_add(0, tokens_R, y_RD * weights_R.to(x_TD.dtype)[:, None])


def eager_loop(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Rows sorted once, then linear, SwiGLU and linear an expert."""
    slots_R, tokens_R, counts_E = _sorted(ids_Tk, len(down_EDF))
    parts = []
    for expert, x_rD in enumerate(x_TD[tokens_R].split(counts_E.tolist())):
        if len(x_rD):
            gate_rF, up_rF = F.linear(x_rD, gate_up_EFD[expert]).chunk(2, dim=1)
            parts.append(F.linear(F.silu(gate_rF) * up_rF, down_EDF[expert]))
    return _summed(x_TD, tokens_R, torch.cat(parts), weights_Tk.flatten()[slots_R])


def grouped(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Rows sorted once, and two `torch.nn.functional.grouped_mm`."""
    slots_R, tokens_R, counts_E = _sorted(ids_Tk, len(down_EDF))
    offs_E = counts_E.cumsum(0).int()
    gate_RF, up_RF = F.grouped_mm(x_TD[tokens_R], gate_up_EFD.mT, offs=offs_E).chunk(2, dim=1)
    y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, down_EDF.mT, offs=offs_E)
    return _summed(x_TD, tokens_R, y_RD, weights_Tk.flatten()[slots_R])


def padded_bmm(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Each expert's rows padded to those of the fullest, and two batched products."""
    slots_R, tokens_R, counts_E = _sorted(ids_Tk, len(down_EDF))
    room = int(counts_E.max())
    first_E = counts_E.cumsum(0) - counts_E
    place_R = torch.arange(len(slots_R), device=x_TD.device)
    experts_R = ids_Tk.flatten()[slots_R]
    place_R = place_R + experts_R * room - first_E[experts_R]
    x_ECD = x_TD.new_zeros(len(down_EDF) * room, x_TD.shape[1]).index_copy(0, place_R, x_TD[tokens_R])
    gate_ECF, up_ECF = torch.bmm(x_ECD.view(-1, room, x_TD.shape[1]), gate_up_EFD.mT).chunk(2, dim=2)
    y_ECD = torch.bmm(F.silu(gate_ECF) * up_ECF, down_EDF.mT)
    return _summed(x_TD, tokens_R, y_ECD.flatten(0, 1)[place_R], weights_Tk.flatten()[slots_R])


def hf_grouped(beyond: bool = False) -> Experts:
    """transformers' experts by grouped_mm, as its models with SwiGLU experts call them; ids `beyond` give zeros."""
    moe = _transformers("integrations.moe")

    def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        module = SimpleNamespace(
            num_experts=len(down),
            gate_up_proj=gate_up,
            down_proj=down,
            has_gate=True,
            has_bias=False,
            has_post_expert_norm=False,
            is_transposed=False,
            _is_expert_parallel=beyond,
            act_fn=F.silu,
        )
        module._apply_gate = lambda hidden: moe._default_apply_gate(module, hidden)
        out: Tensor = moe.grouped_mm_experts_forward(module, x, ids, weights)
        return out

    return experts


def hf_longcat() -> Experts:
    """transformers' LongcatFlashExperts: a loop over experts."""
    modeling = _transformers("models.longcat_flash.modeling_longcat_flash")

    def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        module = SimpleNamespace(
            num_routed_experts=len(down),
            total_experts=len(down),
            gate_up_proj=gate_up,
            down_proj=down,
            act_fn=F.silu,
            identity_expert=nn.Identity(),
        )
        out: Tensor = modeling.LongcatFlashExperts.forward(module, x, ids, weights)
        return out

    return experts


def dense_pair(x_RD: Tensor, gate_up_1FD: Tensor, down_1DF: Tensor) -> Tensor:
    """What two dense products and SwiGLU of as many rows cost: one expert, nothing sorted, nothing summed."""
    gate_RF, up_RF = F.linear(x_RD, gate_up_1FD[0]).chunk(2, dim=1)
    return F.linear(F.silu(gate_RF) * up_RF, down_1DF[0])


def dense_arguments(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the dense pair: a row a slot, ready-made, and the first expert."""
    one = {name: arguments[name][:1].clone() for name in ("gate_up", "down")}
    return {"x": arguments["x"].repeat(arguments["ids"].shape[1], 1), **one}


class Layers:
    """A mixture with its router and identity experts, ours and transformers', with the same weights."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: str) -> None:
        """sizes: T, D, F, E, Z, k."""
        self.sizes = sizes
        tokens, dim, width, real, zero, k = sizes
        torch.manual_seed(0)
        self.ours = MoE(dim, width, real, zero, k, SCALE).to(device, dtype)
        self.x_TD = torch.randn(tokens, dim).to(device, dtype).requires_grad_()
        self.grad_TD = torch.randn(tokens, dim).to(device, dtype)

    def theirs(self) -> nn.Module:
        """transformers' layer; its gate_up has rows for the identity experts too, which nobody reads."""
        modeling = _transformers("models.longcat_flash.modeling_longcat_flash")
        _, dim, width, real, zero, k = self.sizes
        sides = {"hidden_size": dim, "expert_ffn_hidden_size": width, "moe_topk": k, "routed_scaling_factor": SCALE}
        config = _transformers("models.longcat_flash.configuration_longcat_flash").LongcatFlashConfig(
            n_routed_experts=real, zero_expert_num=zero, **sides
        )
        layer: nn.Module = modeling.LongcatFlashMoE(config).to(self.x_TD.device, self.x_TD.dtype)
        layer.get_submodule("router").load_state_dict(self.ours.router.state_dict())
        experts: Any = layer.get_submodule("experts")
        with torch.no_grad():
            experts.gate_up_proj[:real].copy_(self.ours.gate_up)
            experts.gate_up_proj[real:].zero_()
            experts.down_proj.copy_(self.ours.down)
        return layer

    def step_of_ours(self) -> Call:
        """Forward and backward; gives out and the gradients of x and of the experts."""
        weights = (self.ours.gate_up, self.ours.down, self.ours.router.classifier.weight)
        return self._step(lambda: self.ours(self.x_TD).output, weights)

    def step_of_theirs(self) -> Call:
        """The same of transformers' layer."""
        layer: Any = self.theirs()
        weights = (layer.experts.gate_up_proj, layer.experts.down_proj, layer.router.classifier.weight)
        return self._step(lambda: layer(self.x_TD), weights)

    def _step(self, run: Callable[[], Tensor], weights: Sequence[Tensor]) -> Call:
        def call() -> list[Tensor]:
            out_TD = run()
            return [out_TD, *torch.autograd.grad(out_TD, (self.x_TD, *weights), self.grad_TD)]

        return call


def _transformers(module: str) -> Any:
    try:
        return importlib.import_module(f"transformers.{module}")
    except ImportError as error:
        raise Skip(f"transformers is not installed ({error})") from error
