"""Puts a model's parts where a placement says, and lets positions travel to those that are elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longcat_kernels.modules import MoE
from longcat_model.model import LongcatNext
from longcat_model.released.plan import FILE, Placement
from longcat_model.released.sizes import Sizes
from longcat_model.released.tensors import dtype


def empty(sizes: Sizes, placement: Placement) -> LongcatNext:
    """The model in the released types, with memory where the placement says but no values in it; frozen.

    Mapped tables have no memory.

    Raises:
        ValueError: the experts' places are not one a layer, the tables are neither mapped, on the host nor on main, or
            this machine lacks a device.
    """
    _check(placement, sizes.model.backbone.layers)
    main, experts, tables = placement.main, placement.experts, placement.tables or placement.main
    with torch.device("meta"):
        model = LongcatNext(sizes.model, tables_on_host=tables != main)
    model.bfloat16()
    for name, module in model.named_modules():
        if dtype(f"{name}.") is torch.float32:
            module.float()
    places: dict[nn.Module, str] = {}
    for layer, place in zip(model.backbone.layers, experts, strict=bool(experts)):
        places[layer.mlp] = place  # type: ignore[index]
        if torch.device(place) != torch.device(main):
            visit(layer.mlp, place, main)  # type: ignore[arg-type]
    if model.ngram is not None:
        places[model.ngram.embedders] = "meta" if tables == FILE else tables
    _to_empty(model, main, places)
    return model.eval().requires_grad_(False)


def _check(placement: Placement, layers: int) -> None:
    main, experts, tables = placement.main, placement.experts, placement.tables or placement.main
    if experts and len(experts) != layers:
        raise ValueError(f"released: placement.experts must be one place a layer ({layers}), got {len(experts)}")
    if tables not in (FILE, "cpu", main):
        raise ValueError(f"released: placement.tables must be {FILE!r}, 'cpu' or main {main!r}, got {tables!r}")
    for place in {main, *experts, placement.vision or main, placement.audio or main}:
        try:
            torch.empty(0, device=place)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"released: placement must name devices here, got {place!r}: {reason}") from error


def visit(moe: MoE, place: str, main: str) -> None:
    """Sends positions to experts at `place`, and what they give back to `main`."""

    def there(_: nn.Module, args: Any) -> Any:
        return tuple(x.to(place) for x in args)

    def back(_: nn.Module, __: Any, routed: Any) -> Any:
        return type(routed)(*(x.to(main) for x in routed))

    moe.register_forward_pre_hook(there)
    moe.register_forward_hook(back)


def _to_empty(module: nn.Module, place: str, places: dict[nn.Module, str]) -> None:
    """Gives memory at `place`, or at that of the innermost module in `places`."""
    place = places.get(module, place)
    module.to_empty(device=place, recurse=False)
    for child in module.children():
        _to_empty(child, place, places)
