"""A codebook with what the kernels of `rvq_encode` make of it, kept so that it is made once and not in every call.

Dimension key
    D width    K entries
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat_kernels import triton
from longcat_kernels.layouts import HalfLayout


class PreparedCodebook:
    """A codebook [K, D] float32 and its packed form: centred, rounded, with norms and error bounds.

    Takes the place of a codebook in `rvq_encode` and `rvq_decode`. It never goes stale: writes to `words`, by torch or
    by `ema_update`, are noticed by the tensor's version, and the packed form is made anew at the next use. `ema_update`
    with `prepared=` does that in the pass that writes the codewords.

    Args:
        words: [K, D] float32, K and D at least 1; kept, not copied.
        gram: also keep the products of all pairs of codewords, K x K float32, by which `rvq_encode` quantizes all
            levels of a shared codebook with one matrix product.

    Raises:
        ValueError: words is not such a tensor.
    """

    words: Tensor  # [K, D] float32
    packed: Tensor | None  # uint8: opaque, of the device's layout; None where no kernel wants one
    gram: Tensor | None  # [K, K] float32

    def __init__(self, words: Tensor, *, gram: bool = False) -> None:
        if words.ndim != 2 or words.dtype != torch.float32 or not words.numel():
            raise ValueError(
                f"PreparedCodebook: words must be float32 [K, D], K and D at least 1, got {words.dtype} "
                f"{list(words.shape)}"
            )
        self.words, self.packed, self.gram = words, None, None
        self._wants_gram, self._version = gram, -1

    @property
    def is_current(self) -> bool:
        """Whether the packed form is that of the codewords as they are."""
        return self._version == self.words._version

    def refresh(self) -> PreparedCodebook:
        """Makes the packed form anew if the codewords have changed since; gives itself."""
        if not self.is_current:
            self._pack()
            self.mark_current()
        return self

    def mark_current(self) -> None:
        """Says that the packed form has followed the codewords: for kernels that write both."""
        self._version = self.words._version

    def _pack(self) -> None:
        """Fills `packed`, and `gram` where it is wanted, in the layout of the codewords' device."""
        if triton.on_device(self.words):
            if self.packed is None:
                size = HalfLayout(*self.words.shape).bytes
                self.packed = torch.empty(size, dtype=torch.uint8, device=self.words.device)
            triton.pack(self.words.detach(), self.packed)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the codewords alone."""
        return {"words": self.words, "_wants_gram": self._wants_gram}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["words"], gram=state["_wants_gram"])  # type: ignore[misc]
