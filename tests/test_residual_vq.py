"""ResidualVQ: fits data, repeats itself exactly, keeps the released names, agrees with vector-quantize-pytorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ as TheirResidualVQ

from longcat_kernels import rvq_encode
from longcat_kernels.modules import ResidualVQ


def clusters(rows: int, seed: int = 0) -> Tensor:
    """Rows around 24 centres of width 8."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(24, 8, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(24, (rows,), generator=g)] + 0.1 * torch.randn(rows, 8, generator=g)


def trained(shared: bool = False, batches: int = 12) -> ResidualVQ:
    torch.manual_seed(0)
    module = ResidualVQ([32, 32, 32], 8, shared=shared, decay=0.9)
    for seed in range(batches):
        module(clusters(400, seed))
    return module


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_without_rows_is_a_batch(shared: bool) -> None:
    for module in (ResidualVQ([4, 4], 8, shared=shared), trained(shared, batches=1)):
        assert module(torch.zeros(0, 8)).codes.shape == (0, len(module.sizes))


def test_a_refused_mask_leaves_the_module_as_it_was() -> None:
    module = ResidualVQ([4, 4], 8)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"mask must be torch.bool \[2, 3\], got torch.bool \[3\]"):
        module(torch.randn(2, 3, 8), torch.ones(3, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("shared", [False, True])
def test_fits_unseen_data_better_with_every_level(shared: bool) -> None:
    x = clusters(300, seed=1000)
    encoding = trained(shared).encode(x)
    losses = encoding.losses.tolist()
    assert losses[0] < 0.1 * x.square().mean() and losses[2] < losses[1] < losses[0]


def test_uses_its_entries() -> None:
    module = trained()
    assert min(module.usage()) > 0.9 and min(module.perplexity()) > 16


def test_training_twice_from_one_state_gives_the_same_bits() -> None:
    a = trained(batches=3)
    b = copy.deepcopy(a)
    for seed in (50, 51):
        assert torch.equal(a(clusters(100, seed)).codes, b(clusters(100, seed)).codes)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_resumed_module_continues_to_the_bit() -> None:
    a = trained(batches=3)
    b = ResidualVQ([32, 32, 32], 8, decay=0.9)
    b.load_state_dict(a.state_dict())
    a(clusters(100, 7)), b(clusters(100, 7))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_eval_changes_nothing() -> None:
    module = trained().eval()
    before = copy.deepcopy(module.state_dict())
    module(clusters(50))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_gradients_belong_to_the_codewords_chosen_before_the_update() -> None:
    module, x = trained(batches=2), clusters(64, 5).requires_grad_()
    entries = [e.clone() for e in module.entries()]
    encoding = module(x)
    assert not torch.equal(entries[0], module.entries()[0])
    (grad,) = torch.autograd.grad(encoding.losses.sum(), x)
    cumulative = torch.stack([entries[level][encoding.codes[:, level]] for level in range(3)]).cumsum(0)
    torch.testing.assert_close(grad, 2 * (x - cumulative).sum(0) / x.numel())


def test_the_padding_row_stays_zero_and_is_never_chosen() -> None:
    module = trained()
    assert module.codebooks[0].embed.shape == (33, 8) and not module.codebooks[0].embed[-1].any()
    assert module.encode(torch.zeros(5, 8)).codes.max() < 32


def test_masked_and_bad_rows_move_no_codebook() -> None:
    x = clusters(100, 3)
    a, b = trained(batches=2), trained(batches=2)
    bad = torch.cat([x, torch.full((3, 8), torch.nan), torch.full((3, 8), 50.0)])
    a(x), b(bad, mask=torch.arange(106) < 103)
    for level in range(3):
        torch.testing.assert_close(a.entries()[level], b.entries()[level])


def test_a_first_batch_without_a_usable_row_leaves_initialisation_to_the_next() -> None:
    module = ResidualVQ([4], 8)
    module(torch.full((5, 8), torch.nan))
    assert not module.initialized
    module(clusters(50))
    assert module.initialized and module.step == 2


def test_a_shared_codebook_is_one_codebook_named_once_a_level() -> None:
    module = trained(shared=True)
    assert module.codebooks[0] is module.codebooks[2]
    names = {k for k in module.state_dict() if k.startswith("codebooks")}
    assert names == {f"codebooks.{i}.{n}" for i in range(3) for n in ("embed", "embed_ema", "cluster_size_ema")}


def test_a_shared_codebook_counts_the_rows_of_all_levels() -> None:
    module = trained(shared=True, batches=1)
    before = module.codebooks[0].cluster_size_ema.sum().item()
    module(clusters(200, 9))
    after = module.codebooks[0].cluster_size_ema.sum().item()
    assert after == pytest.approx(0.9 * before + 0.1 * 3 * 200, abs=5)  # a restart sets a count to 1


def test_loads_a_checkpoint_of_codebooks_alone_as_initialised() -> None:
    state = {k: v for k, v in trained().state_dict().items() if k.startswith("codebooks")}
    module = ResidualVQ([32, 32, 32], 8)
    module.load_state_dict(state)
    assert module.initialized


def test_codes_and_rows_equal_those_of_vector_quantize_pytorch_for_the_same_codebooks() -> None:
    ours = trained().eval()
    theirs = TheirResidualVQ(dim=8, num_quantizers=3, codebook_size=32).eval()
    for layer, entries in zip(theirs.layers, ours.entries(), strict=True):
        layer._codebook.embed.copy_(entries[None])
    x = clusters(500, 77)
    quantized, codes, _ = theirs(x[None])
    got = ours(x)
    assert torch.equal(got.codes, codes[0])
    torch.testing.assert_close(got.quantized, quantized[0])


def test_the_first_batch_is_fitted_as_well_as_k_means_can() -> None:
    x = clusters(400)
    module = ResidualVQ([24], 8)
    module(x)
    random = rvq_encode(x, [x[:24]]).losses.item()
    assert module.encode(x).losses.item() < 0.5 * random


def test_decode_of_some_levels() -> None:
    module = trained()
    codes = module.encode(clusters(20)).codes
    torch.testing.assert_close(module.decode(codes, levels=2), module.encode(clusters(20), levels=2).quantized)
    assert torch.equal(module.decode(torch.full((2, 3), -1)), torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("sizes", "dim", "shared", "message"),
    [
        ([], 8, False, "sizes must be 1 to 256 numbers of at least 1, got []"),
        ([4, 0], 8, False, "sizes must be 1 to 256 numbers of at least 1, got [4, 0]"),
        ([4, 5], 8, True, "sizes must be equal with a shared codebook, got [4, 5]"),
        ([4], 0, False, "dim must be at least 1, got 0"),
    ],
)
def test_refuses(sizes: list[int], dim: int, shared: bool, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ResidualVQ(sizes, dim, shared=shared)
    assert str(caught.value) == f"ResidualVQ: {message}"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_kept_levels_sum_the_codewords_that_were_chosen(shared: bool, training: bool) -> None:
    torch.manual_seed(0)
    quantizer = ResidualVQ([8] * 3, 4, shared=shared, decay=0.5)
    quantizer(torch.randn(64, 4))
    quantizer.train(training)
    before = [entries.clone() for entries in quantizer.entries()]
    x = torch.randn(5, 6, 4, requires_grad=True)
    mask, kept = torch.rand(5, 6) < 0.8, torch.randint(1, 4, (5,))
    encoding = quantizer(x, mask=mask, kept=kept[:, None])
    assert training != all(torch.equal(a, b) for a, b in zip(before, quantizer.entries(), strict=True))
    want = torch.zeros(5, 6, 4)
    for row in range(5):
        for level in range(int(kept[row])):
            want[row] += before[level][encoding.codes[row, :, level].clamp(min=0)]
    torch.testing.assert_close(encoding.quantized, want * mask[..., None])
    (gradient,) = torch.autograd.grad(encoding.quantized.sum(), x)
    assert torch.equal(gradient, mask[..., None].float().expand_as(x))


def test_refuses_kept_levels_that_are_no_integers() -> None:
    quantizer = ResidualVQ([8], 4).eval()
    with pytest.raises(ValueError, match=r"kept must hold integers, got torch\.float32"):
        quantizer(torch.randn(2, 4), kept=torch.ones(2))
