"""Weights with what kernels make of them, kept so that it is made once and not in every call.

Dimension key
    D width    K entries    E experts    F hidden units of an expert
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longcat_kernels import cuda, native, triton
from longcat_kernels.layouts import HalfLayout
from longcat_kernels.reference._depth_checks import check_shapes, check_weights
from longcat_kernels.reference.depth_weights import DepthConfig, DepthWeights


class PreparedCodebook:
    """A codebook [K, D] float32 and its packed form: centred, rounded, with norms and error bounds.

    Takes the place of a codebook in `rvq_encode` and `rvq_decode`. Writes to `words`, by torch or by `ema_update`, are
    noticed by the tensor's version, and moves by where its memory is; the packed form is then made anew at the next
    use. `ema_update` with `prepared=` does that in the pass that writes the codewords. Where torch does not count a
    write, call `mark_stale` after it: those into `words.data` or numpy, and steps of an optimizer with `fused=True`.
    Inside `torch.compile`, which cannot ask for versions, it stands for its codewords alone.

    Args:
        words: [K, D] float32, K and D at least 1; kept, not copied.
        gram: also keep the products of all pairs of codewords, K x K float32, by which `rvq_encode` quantizes all
            levels of a shared codebook with one matrix product. Only on the CPU: on a GPU nothing is kept, for the
            reasons in csrc/cuda/rvq_encode.cuh.

    Raises:
        ValueError: words is not such a tensor.

    Example:
        >>> from longcat_kernels import rvq_encode
        >>> book = PreparedCodebook(torch.tensor([[1.0], [3.0]]))
        >>> rvq_encode(torch.tensor([[2.5]]), [book]).codes.tolist()  # packed here, and kept
        [[1]]
        >>> _ = book.words.neg_()
        >>> rvq_encode(torch.tensor([[-2.5]]), [book]).codes.tolist()  # packed anew
        [[1]]
    """

    words: Tensor  # [K, D] float32
    packed: Tensor | None  # uint8: opaque, of the device's layout; None where no kernel wants one
    gram: Tensor | None  # [K, K rounded up] float32: products of the codewords

    def __init__(self, words: Tensor, *, gram: bool = False) -> None:
        if words.ndim != 2 or words.dtype != torch.float32 or not words.numel():
            raise ValueError(
                f"PreparedCodebook: words must be float32 [K, D], K and D at least 1, got {words.dtype} "
                f"{list(words.shape)}"
            )
        self.words, self.packed, self.gram = words, None, None
        self._wants_gram, self._version = gram, -1
        self._has_memory = words.untyped_storage().device.type != "meta"  # a FakeTensor has none to read
        self._memory = self._memory_now()  # that `packed` and `gram` were made for

    @property
    def is_current(self) -> bool:
        """Whether the packed form is that of the codewords as they are; never of those of inference mode."""
        same = not self.words.is_inference() and self._version == self.words._version
        return same and self._memory == self._memory_now()

    def refresh(self) -> PreparedCodebook:
        """Makes the packed form anew if the codewords have changed since; gives itself."""
        if not self.is_current:
            self._pack()
            self.mark_current()
        return self

    def mark_current(self) -> None:
        """Says that the packed form has followed the codewords: for kernels that write both."""
        self._version = -1 if self.words.is_inference() else self.words._version

    def mark_stale(self) -> None:
        """Says that the codewords have changed by a write that their version does not count."""
        self._version = -1

    def followed(self) -> Tensor | None:
        """`packed`, for a kernel that writes it with the codewords; None where it is to be made at the next use."""
        return self.packed if self.gram is None and self._memory == self._memory_now() else None

    def _memory_now(self) -> tuple[Any, ...] | None:
        return (self.words.data_ptr(), self.words.shape, self.words.stride()) if self._has_memory else None

    def _pack(self) -> None:
        """Fills `packed`, and `gram` where it is wanted, in the layout of the codewords' device."""
        if not self._has_memory:
            return
        memory = self._memory_now()
        if memory != self._memory:
            self.packed, self.gram, self._memory = None, None, memory
        words = self.words.resolve_neg()  # packers read memory as it is
        if cuda.why_not_packed(words) is None:
            self.packed = cuda.packed(words)
        elif triton.on_device(words):
            if self.packed is None:
                size = HalfLayout(*words.shape).bytes
                self.packed = torch.empty(size, dtype=torch.uint8, device=words.device)
            triton.pack(words.detach(), self.packed)
        elif words.device.type == "cpu" and words.stride(1) == 1 and native.why_not() is None:
            self._pack_on_cpu(words)

    def _pack_on_cpu(self, words: Tensor) -> None:
        module, (entries, width), threads = native.module(), words.shape, torch.get_num_threads()
        isa = module.build_info()["isa"]
        if self._wants_gram and isa == "avx512_bf16":
            isa = "avx512"  # the products of all pairs must be as exact as float32 makes them
        if self.packed is None:
            self.packed = torch.empty(module.packed_bytes(entries, width, isa=isa), dtype=torch.uint8)
        module.pack_codebook(words, self.packed, threads=threads, isa=isa)
        if self._wants_gram:
            if self.gram is None:
                self.gram = torch.empty(entries, module.packed_entries(entries, isa=isa))
            module.rvq_gram(words, self.packed, self.gram, threads=threads)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the codewords alone."""
        return {"words": self.words, "_wants_gram": self._wants_gram}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["words"], gram=state["_wants_gram"])  # type: ignore[misc]


class PreparedExperts:
    """The weights of experts and their packed form, of the same size, for `fused_moe(..., prepared=)`: for inference.

    Writes to the weights are noticed by their versions, and moves by where their memory is, as is torch's precision of
    products; the packed form is then made anew at the next use, as at every use of weights of inference mode, which
    have no versions. Where torch does not count a write, call `mark_stale` after it: those through `.data` or numpy,
    and steps of an optimizer with `fused=True`.

    Args:
        gate_up: [E, 2 F, D], down: [E, D, F] of one dtype; kept, not copied.

    Raises:
        ValueError: the weights do not fit each other.

    Example:
        >>> gate_up, down = torch.randn(4, 2 * 8, 16), torch.randn(4, 16, 8)
        >>> PreparedExperts(gate_up, down).refresh().is_current
        True
    """

    gate_up: Tensor
    down: Tensor
    packed: list[Tensor]  # uint8, one each, opaque; empty where no kernel wants them

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        fits = gate_up.ndim == down.ndim == 3 and gate_up.dtype == down.dtype and down.shape[0] >= 1
        if not fits or list(gate_up.shape) != [down.shape[0], 2 * down.shape[2], down.shape[1]]:
            raise ValueError(
                "PreparedExperts: gate_up and down must be [E, 2 F, D] and [E, D, F] of one dtype, got "
                f"{gate_up.dtype} {list(gate_up.shape)} and {down.dtype} {list(down.shape)}"
            )
        self.gate_up, self.down, self.packed = gate_up, down, []
        self._state: Any = None  # that the packed form was made of

    @property
    def is_current(self) -> bool:
        """Whether the packed form is that of the weights as they are; never of those of inference mode."""
        return self._state is not None and self._state == self._now()

    def refresh(self) -> PreparedExperts:
        """Makes the packed form anew if the weights have changed since; gives itself."""
        now = self._now()
        if now is None or now != self._state:
            self._pack()
            self._state = now
        return self

    def mark_stale(self) -> None:
        """Says that the weights have changed by a write that their versions do not count."""
        self._state = None

    def _now(self) -> Any:
        weights = (self.gate_up, self.down)
        if any(w.is_inference() for w in weights):
            return None
        products = native.product_dtype(self.down.dtype)
        return [products, *((w._version, w.data_ptr(), w.dtype) for w in weights)]

    def _pack(self) -> None:
        weights = [w.detach().resolve_neg() for w in (self.gate_up, self.down)]  # packers read memory as it is
        self.packed = []
        on_cpu = self.down.device.type == "cpu" and all(w.stride(2) == 1 for w in weights)
        if not on_cpu or self.down.dtype not in (torch.float32, torch.bfloat16, torch.float16) or native.why_not():
            return
        module, products = native.module(), native.product_dtype(self.down.dtype)
        sizes = module.packed_experts_bytes(*self.down.shape, products)
        self.packed = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        module.pack_experts(*weights, *self.packed, threads=torch.get_num_threads(), products=products)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the weights alone."""
        return {"gate_up": self.gate_up, "down": self.down}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class PreparedDepth:
    """The weights of a depth transformer and their packed form, for `depth_decode`: packed once, at first use.

    Writes to `weights` are noticed by their versions, and moves by where their memory is; the packed form is then made
    anew at the next use. Where torch does not count a write, call `mark_stale` after it, as with the others here.
    Tables are never copied.

    Args:
        weights: kept, not copied, unless they are rounded.
        precision: None keeps the weights as they are; "int8", of float32 ones, rounds each row w of each matrix (not of
            tables, norms and biases) to multiples of s = max |w| / 127, half to even. `weights` is then the rounded
            copy, so that every implementation computes the same, and later writes to the given ones do not matter.
            With four layers of normally distributed weights, logits are off by less than 2 % of their rms.

    Raises:
        ValueError: the weights do not fit their config or each other, or no such precision.
    """

    weights: DepthWeights
    tensors: list[Tensor]  # of `weights`
    like: Tensor  # one of them: `weights.like`
    packed: list[Tensor]  # uint8, opaque; empty where no kernel wants them

    def __init__(self, weights: DepthWeights, precision: str | None = None) -> None:
        if precision not in (None, "int8"):
            raise ValueError(f"PreparedDepth: precision must be None or int8, got {precision!r}")
        check_weights(weights)
        like = weights.like
        check_shapes(weights, like)
        if precision is not None and like.dtype != torch.float32:
            raise ValueError(f"PreparedDepth: weights must be float32 for precision int8, got {like.dtype}")
        self.weights = weights if precision is None else weights.map_matrices(rounded_to_int8)
        self.precision, self.packed = precision, []
        self.tensors, self.like = self.weights.tensors(), self.weights.like
        self._counted = [tensor for tensor in self.tensors if tensor.numel() and not tensor.is_inference()]
        has_memory = self.like.untyped_storage().device.type != "meta"  # a FakeTensor has none to read
        self._placed = [tensor for tensor in self.tensors if tensor.numel() and has_memory]
        self._state: list[int] | None = None  # that the packed form was made of

    @property
    def is_current(self) -> bool:
        """Whether the packed form is that of the weights as they are; those of inference mode stay as they were."""
        return self._state == self._now()

    def refresh(self) -> PreparedDepth:
        """Makes the packed form anew if the weights have changed since; gives itself."""
        now = self._now()
        if self._state != now:
            self._pack()
            self._state = now
        return self

    def _now(self) -> list[int]:
        return [tensor._version for tensor in self._counted] + list(map(Tensor.data_ptr, self._placed))

    def mark_stale(self) -> None:
        """Says that the weights have changed by a write that their versions do not count."""
        self._state = None

    def _pack(self) -> None:
        """Fills `packed` in the layout of the weights' device."""
        on_cpu = self.like.device.type == "cpu" and self.like.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if on_cpu and native.why_not() is None:
            self.packed = [packed_depth(self.weights.tensors(), self.weights.config.numbers(), self.precision)]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the weights alone."""
        return {"weights": self.weights, "precision": self.precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def packed_depth(
    weights: Sequence[Tensor], config: Sequence[int], precision: str | None = None, *, isa: str = "auto"
) -> Tensor:
    """uint8: the weights of a depth transformer as the kernel on the CPU streams them."""
    tensors = [w.detach() if not w.ndim or w.stride(-1) == 1 else w.detach().contiguous() for w in weights]
    dtype = DepthWeights.of(weights, DepthConfig.of(config, 0.0)).like.dtype
    module, options = native.module(), {"precision": precision or "", "isa": isa}
    packed = torch.empty(module.packed_depth_bytes(tensors, config, dtype, **options), dtype=torch.uint8)
    module.pack_depth(tensors, packed, config, dtype, threads=torch.get_num_threads(), **options)
    return packed


def rounded_to_int8(matrix: Tensor) -> Tensor:
    """Each row [..., D] as multiples, -127 to 127, of a 127th of its largest magnitude; half to even."""
    scale = matrix.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1)
    return (matrix / scale).round() * scale


def repack(words: Tensor, packed: Tensor) -> None:
    """Makes `packed`, which a `PreparedCodebook` made, follow the codewords: for implementations that do not do so."""
    if words.device.type == "cuda":
        pack = cuda.pack if cuda.why_not_packed(words) is None else triton.pack
        pack(words, packed)
    else:
        native.module().pack_codebook(words, packed, threads=torch.get_num_threads())
