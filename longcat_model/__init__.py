"""The whole of LongCat-Next: tokenizers, language model, training, generation, and a demo. Begin with `model.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_model.generation.converse import generate

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    """`generate` needs the tokenizers' libraries, which take seconds to import: they are, when it is asked for."""
    if name in __all__:
        from longcat_model.generation import converse

        return converse.generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
