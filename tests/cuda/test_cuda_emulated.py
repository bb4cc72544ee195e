"""The CUDA kernels of the RVQ ops, run on the CPU one fiber a thread, against the definitions."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from longcat_kernels.layouts import HalfLayout
from longcat_kernels.ops import OPS
from longcat_kernels.reference import ema_update as ema_spec
from longcat_kernels.reference import rvq_decode as decode_spec
from longcat_kernels.reference import rvq_encode as spec
from longcat_kernels.testing import assert_close, record

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="CUDA emulation: no C++ compiler")
BY_NAME = {op.name: op for op in OPS}


def arguments(name: str, case: Any, seed: int = 0) -> list[Any]:
    """Of the schema, without the backend; tensors that no gradient is wanted of."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    op = BY_NAME[name]
    return [plain(value) for value in record(op, op.spec.inputs(case, "cpu", seed)).arguments[:-1]]


def assert_encodes(x_TD: Tensor, codebooks: list[Tensor], mask_T: Tensor | None = None, **rest: Any) -> Tensor:
    """Codes and residuals are the definition's to the last bit; gives the codes."""
    packed = rest.pop("packed", [])
    dtype = rest.pop("residual_dtype", torch.float32)
    actual = emulated.rvq_encode(x_TD, codebooks, packed, None, mask_T, dtype)
    quantized_TD, residual_TD, losses_L, codes_TL = spec.rvq_encode(x_TD, codebooks, [], None, mask_T, dtype)
    assert torch.equal(actual[3], codes_TL)
    assert torch.equal(actual[1].nan_to_num(7), residual_TD.nan_to_num(7))
    assert torch.equal(actual[0].nan_to_num(7), quantized_TD.nan_to_num(7))
    assert_close(actual[2], losses_L.float().double())
    return codes_TL


@pytest.mark.parametrize("case", spec.EDGE)
def test_rvq_encode_is_the_definition(case: Any) -> None:
    x_TD, codebooks, _, _, mask_T, dtype = arguments("rvq_encode", case)
    assert_encodes(x_TD, codebooks, mask_T, residual_dtype=dtype)
    packed = [emulated.pack(book_KD) for book_KD in codebooks]
    assert_encodes(x_TD, codebooks, mask_T, residual_dtype=dtype, packed=packed)


def test_candidates_of_many_parts_come_together() -> None:
    g = torch.Generator().manual_seed(1)
    codebooks = [torch.randn(k, 40, generator=g) for k in (2300, 1025)]
    codes_TL = assert_encodes(torch.randn(150, 40, generator=g), codebooks)
    assert codes_TL[:, 0].max() >= 2048


def test_rows_with_more_near_codewords_than_are_kept_are_scanned() -> None:
    """Hundreds of codewords that float16 cannot tell apart, the nearest anywhere among them."""
    g = torch.Generator().manual_seed(2)
    centre = torch.randn(1, 24, generator=g)
    book = centre + 1e-5 * torch.randn(900, 24, generator=g)
    far = torch.randn(300, 24, generator=g) + 4
    codes = assert_encodes(centre + 1e-5 * torch.randn(40, 24, generator=g), [torch.cat([far, book])])
    assert codes.unique().numel() > 20
    same = torch.randn(1, 24, generator=g).expand(700, 24).contiguous()
    assert assert_encodes(torch.randn(9, 24, generator=g), [same]).unique().tolist() == [0]


@pytest.mark.parametrize(("dim", "mean"), [(32, 0.0), (256, 0.0), (256, 30.0), (1024, 0.0)])
def test_the_window_is_narrow(dim: int, mean: float) -> None:
    """Most rows have one candidate and need no exact score: their codes are right even if exact scores are all NaN."""
    g = torch.Generator().manual_seed(7)
    x_TD, book_KD = torch.randn(64, dim, generator=g) + mean, torch.randn(512, dim, generator=g) + mean
    packed = emulated.pack(book_KD)
    HalfLayout(512, dim).sections()["norm"].of(packed).fill_(torch.nan)
    codes_T = emulated.rvq_encode(x_TD, [book_KD], [packed], None, None, torch.float32)[3][:, 0]
    assert (codes_T == spec.nearest(x_TD, book_KD)).float().mean() > 0.85


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-13, 1e-6, 1e6, 1e13, 1e18, 1e30])
def test_rows_and_codebooks_of_any_size(scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    x_TD, book_KD = torch.randn(20, 16, generator=g), torch.randn(60, 16, generator=g)
    assert_encodes(x_TD * scale, [book_KD * scale])
    assert_encodes(x_TD * scale, [book_KD])
    assert_encodes(x_TD, [book_KD * scale])


def test_codewords_that_a_packer_leaves_to_exact_scores() -> None:
    """Another packer may find other codewords too long, or choose another exponent."""
    g = torch.Generator().manual_seed(8)
    x_TD, book_KD = torch.randn(40, 16, generator=g), torch.randn(300, 16, generator=g)
    packed, sections = emulated.pack(book_KD), HalfLayout(300, 16).sections()
    left = torch.rand(300, generator=g) < 0.3
    for name in ("half", "length", "error"):
        sections[name].of(packed)[:300][left] = torch.inf
    sections["words"].of(packed)[:300][left] = 0
    assert left[assert_encodes(x_TD, [book_KD], packed=[packed])[:, 0]].any()
    sections["exponent"].of(packed).fill_(100)
    assert_encodes(x_TD, [book_KD], packed=[packed])


def test_a_mean_far_from_zero_costs_no_code() -> None:
    g = torch.Generator().manual_seed(4)
    x_TD, book_KD = torch.randn(30, 20, generator=g), torch.randn(300, 20, generator=g)
    for mean in (1e2, 1e4, 1e6):
        assert_encodes(x_TD + mean, [book_KD + mean])


def test_rows_and_codewords_that_are_not_finite() -> None:
    g = torch.Generator().manual_seed(5)
    x_TD, book_KD = torch.randn(12, 9, generator=g), torch.randn(40, 9, generator=g)
    x_TD[1, 3], x_TD[4, 0], x_TD[7, 8] = torch.nan, torch.inf, -torch.inf
    book_KD[0, 2], book_KD[17, 5], book_KD[23, 0] = torch.inf, torch.nan, -torch.inf
    assert_encodes(x_TD, [book_KD, book_KD[1:9].contiguous()])
    assert_encodes(x_TD, [torch.full((5, 9), torch.nan), book_KD])


@pytest.mark.parametrize("dim", [1, 2, 31, 32, 33, 255, 256, 257, 513, 1500])
def test_sums_are_in_the_defined_order_at_any_width(dim: int) -> None:
    """Norms decide to the last bit, so their order of summation must be the definition's."""
    book_KD = torch.randn(7, dim, generator=torch.Generator().manual_seed(dim))
    norm_K = HalfLayout(7, dim).sections()["norm"].of(emulated.pack(book_KD))
    assert torch.equal(norm_K[:7], spec._tree_sum(book_KD.double().square()))
    assert norm_K[7:].isinf().all()


def test_packs_what_the_layout_says() -> None:
    g = torch.Generator().manual_seed(6)
    book_KD = torch.randn(300, 70, generator=g) + 5
    book_KD[11, 3] = torch.nan
    layout = HalfLayout(300, 70)
    part = {name: section.of(emulated.pack(book_KD)) for name, section in layout.sections().items()}
    usable = torch.arange(300) != 11
    exact = book_KD.double()[usable]
    torch.testing.assert_close(part["centre"].double(), exact.mean(0), rtol=1e-6, atol=0)
    centred, unit = exact - part["centre"].double(), 2.0 ** -part["exponent"].item()
    words = part["words"][:300, :70].double()[usable] * unit
    assert part["words"].isfinite().all() and not part["words"][11].any() and not part["words"][:, 70:].any()
    assert part["words"].abs().max() > 2**10  # the range of float16 is used
    length, error = centred.square().sum(1).sqrt(), (centred - words).square().sum(1).sqrt()
    for name, truth in (("length", length), ("error", error)):
        bound = part[name][:300].double()[usable]
        assert (bound >= truth).all() and (bound <= truth * (1 + 1e-5)).all()
    torch.testing.assert_close(part["half"][:300].double()[usable], length.square() / 2, rtol=1e-7, atol=0)
    assert part["half"][11].isinf() and part["half"][300:].isinf().all() and part["norm"][11].isinf()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rvq_encode_backward_is_the_gradient(dtype: torch.dtype) -> None:
    case = spec.Case((3, 11), 300, (40, 17, 9), dtype, masked=True, strided=False)
    x_TD, codebooks, _, _, mask_T, residual_dtype = arguments("rvq_encode", case)
    codes_TL = spec.rvq_encode(x_TD, codebooks, [], None, mask_T, residual_dtype)[3]
    grad_TD = torch.randn(300, 33).to(dtype).T  # strides of its own
    grad_L = torch.tensor([500.0, -2000.0, 3000.0])  # no gradient is subnormal in float16
    scales_L = 2 * grad_L / (mask_T.sum() * 300)
    for scales, grad in ((scales_L, grad_TD), (None, grad_TD), (scales_L, None)):
        got_TD = emulated.rvq_encode_backward(grad, scales, x_TD, codes_TL, codebooks, residual_dtype)
        leaf_TD = x_TD.double().requires_grad_()
        quantized_TD, _, losses_L, _ = spec.rvq_encode(leaf_TD, codebooks, [], None, mask_T, residual_dtype)
        loss = (quantized_TD.double() * grad.double()).sum() if grad is not None else 0.0
        loss = loss + ((losses_L * grad_L).sum() if scales is not None else 0.0)
        assert_close(got_TD, torch.autograd.grad(loss, leaf_TD)[0])


@pytest.mark.parametrize("case", decode_spec.EDGE)
def test_rvq_decode_and_its_gradient(case: Any) -> None:
    codes_TL, codebooks = arguments("rvq_decode", case)
    out_TD = emulated.rvq_decode(codes_TL, codebooks)
    assert torch.equal(out_TD, decode_spec.rvq_decode(codes_TL, codebooks)[0])
    grad_TD = torch.randn(out_TD.shape[0], out_TD.shape[1] + 3)[:, : out_TD.shape[1]]
    got = emulated.rvq_decode_backward(grad_TD, codes_TL, [book_KD.shape[0] for book_KD in codebooks])
    for level, grad_KD in enumerate(got):
        kept_T = codes_TL[:, level] >= 0
        truth_KD = torch.zeros(grad_KD.shape, dtype=torch.float64)
        truth_KD.index_add_(0, codes_TL[kept_T, level], grad_TD[kept_T].double())
        assert_close(grad_KD, truth_KD, 0.25)


def test_a_code_out_of_range_touches_no_memory() -> None:
    codes_TL = torch.tensor([[3], [4], [2**40], [-(2**40)]])
    book_KD = torch.ones(4, 5)
    assert emulated.rvq_decode(codes_TL, [book_KD]).sum(1).tolist() == [5, 0, 0, 0]
    (grad_KD,) = emulated.rvq_decode_backward(torch.ones(4, 5), codes_TL, [4])
    assert grad_KD.sum(1).tolist() == [0, 0, 0, 5]


SORTED = (
    ema_spec.Case(5000, 3, 700, seed=3),  # three blocks of rows, two digits
    ema_spec.Case(4100, 2, 70_000, used=0.3, ignored=0.2, seed=2**50 + 1),  # three digits, most entries restart
    ema_spec.Case(3000, 600, 2, decay=0.9),  # long sums, two blocks of columns
)


@pytest.mark.parametrize("case", (*ema_spec.EDGE, *SORTED))
def test_ema_update_is_the_definition(case: Any) -> None:
    got, want = arguments("ema_update", case), arguments("ema_update", case)
    restarted = emulated.ema_update(*got)
    assert torch.equal(restarted, ema_spec.ema_update(*want)[0])
    for actual, truth in zip(got[:3], want[:3], strict=True):
        assert_close(actual, truth.double())


def test_ema_update_refreshes_the_packed_codebook() -> None:
    got = arguments("ema_update", ema_spec.Case(300, 16, 40, used=0.5, seed=7))
    layout = HalfLayout(40, 16)
    packed = torch.full((layout.bytes + 256,), 255, dtype=torch.uint8)
    got[3] = packed[-packed.data_ptr() % 256 :][: layout.bytes]
    emulated.ema_update(*got)
    fresh = emulated.pack(got[0])
    for section in layout.sections().values():
        assert torch.equal(section.of(got[3]), section.of(fresh))


def test_the_two_layouts_agree() -> None:
    for entries, dim in ((1, 1), (256, 64), (257, 65), (16384, 3584)):
        layout, found = HalfLayout(entries, dim), emulated.longs([0] * 8)
        emulated.library().layout_offsets(entries, dim, found)
        assert list(found) == [*(section.offset for section in layout.sections().values()), layout.bytes]


def test_under_sanitizers() -> None:
    """A few calls in a process of its own, every kernel once: no wild access, no undefined behaviour."""
    emulated.assert_clean(
        "test_cuda_emulated",
        "t.test_rvq_encode_is_the_definition(t.spec.EDGE[3])",
        "t.test_rvq_encode_is_the_definition(t.spec.EDGE[6])",
        "t.test_rvq_encode_backward_is_the_gradient(t.torch.bfloat16)",
        "t.test_rvq_decode_and_its_gradient(t.decode_spec.EDGE[3])",
        "t.test_ema_update_is_the_definition(t.ema_spec.EDGE[3])",
        "t.test_ema_update_refreshes_the_packed_codebook()",
    )
