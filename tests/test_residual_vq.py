"""ResidualVQ: fits data, repeats itself exactly, keeps the released names, agrees with vector-quantize-pytorch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_without_rows_is_a_batch(shared: bool) -> None:
    for module in (ResidualVQ([4, 4], 8, shared=shared), trained(shared, batches=1)):
        assert module(torch.zeros(0, 8)).codes.shape == (0, len(module.sizes))


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
    assert same_state(a, b)


def test_a_resumed_module_continues_to_the_bit() -> None:
    a = trained(batches=3)
    b = ResidualVQ([32, 32, 32], 8, decay=0.9)
    b.load_state_dict(a.state_dict())
    a(clusters(100, 7)), b(clusters(100, 7))
    assert same_state(a, b)


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
    assert same_state(a, b)


def test_masked_and_bad_rows_do_not_enter_k_means() -> None:
    x = clusters(60, 3)
    bad = torch.cat([torch.full((3, 8), torch.inf), x, torch.full((3, 8), 50.0)])
    a, b = (ResidualVQ([32, 32], 8) for _ in range(2))
    a(x), b(bad, mask=torch.arange(66) < 63)
    assert a.initialized and same_state(a, b)


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


def of_codebooks(module: ResidualVQ) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if name.startswith("codebooks")}


def as_audio(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes of the released audio tokenizer."""
    names = {"embed": "embed", "embed_ema": "embed_avg", "cluster_size_ema": "cluster_size"}
    renamed = {}
    for name, value in state.items():
        _, level, last = name.split(".")
        renamed[f"{level}.codebook.{names[last]}"] = value[:-1] if last == "embed" else value
    return renamed


def as_rq_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".embed", ".weight") if name.endswith(".embed") else name: v for name, v in state.items()}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", [dict, as_audio, as_rq_vae])
def test_loads_three_layouts_of_codebooks_as_initialised_to_the_bit(layout: Any, shared: bool) -> None:
    state = of_codebooks(trained(shared))
    outer = nn.Sequential(nn.Identity(), ResidualVQ([32, 32, 32], 8, shared=shared))
    given = {f"1.{name}": value for name, value in layout(state).items()}
    before = dict(given)
    outer.load_state_dict(given)
    assert given == before and outer[1].initialized
    loaded = of_codebooks(outer[1])
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("layout", [dict, as_audio, as_rq_vae])
@pytest.mark.parametrize("bad", [torch.zeros(7, 8), torch.zeros(5)])
def test_a_wrong_shape_is_refused_as_torch_does(layout: Any, bad: Tensor) -> None:
    state = layout(of_codebooks(trained()))
    with pytest.raises(RuntimeError, match=r"size mismatch for codebooks\.0\.embed:"):
        ResidualVQ([32, 32, 32], 8).load_state_dict({**state, next(iter(state)): bad})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "3\.codebook\.embed"'):
        ResidualVQ([32, 32, 32], 8).load_state_dict({**state, "3.codebook.embed": torch.zeros(32, 8)})


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
    ("options", "message"),
    [
        ({"sizes": []}, "sizes must be 1 to 256 numbers of at least 1, got []"),
        ({"sizes": [4, 0]}, "sizes must be 1 to 256 numbers of at least 1, got [4, 0]"),
        ({"sizes": [4, 5], "shared": True}, "sizes must be equal with a shared codebook, got [4, 5]"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"gram": True}, "gram must be False unless the codebook is shared, got True"),
        ({"kmeans_steps": 255}, "kmeans_steps must be between 0 and 254, got 255"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ResidualVQ(**{"sizes": [4], "dim": 8, **options})
    assert str(caught.value) == f"ResidualVQ: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"x": torch.ones(2, 3, 7)},
            r"ResidualVQ: x must be float32, bfloat16 or float16 \[..., 8\], got torch.float32",
        ),
        ({"x": torch.ones(2, 3, 8).long()}, r"ResidualVQ: x must be float32, .* got torch.int64 \[2, 3, 8\]"),
        ({"kept": torch.ones(2)}, r"ResidualVQ: kept must hold integers, got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must be torch.bool \[2, 3\], got torch.bool \[3\]"),
        ({"lengths": torch.ones(3).long()}, r"lengths must be integers \[B\] with x \[B, S, D\], got"),
        (
            {"lengths": torch.ones(2).long(), "mask": torch.ones(2, 3, dtype=torch.bool)},
            "mask and lengths must not both be given",
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_refused_call_leaves_the_module_as_it_was(arguments: dict[str, Tensor], message: str, training: bool) -> None:
    module = ResidualVQ([4, 4], 8).train(training)
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match=message):
        module(**{"x": torch.randn(2, 3, 8), **arguments})
    assert same_state(module, before)


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


@pytest.mark.parametrize("training", [False, True])
def test_lengths_stand_for_a_mask(training: bool) -> None:
    a, b = (trained(batches=1).train(training) for _ in range(2))
    x, lengths = clusters(60).view(3, 20, 8), torch.tensor([20, 0, 7])
    got, want = a(x, lengths=lengths), b(x, torch.arange(20) < lengths[:, None])
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True)) and same_state(a, b)
    again = a.encode(x, lengths=lengths)
    assert torch.equal(again.codes[1], torch.full((20, 3), -1))


def test_starts_without_k_means_if_so_asked() -> None:
    torch.manual_seed(0)
    module = ResidualVQ([32, 32], 8, kmeans_init=False, decay=1.0, eps=0.0, restart_threshold=0.0)
    before = [entries.clone() for entries in module.entries()]
    module(clusters(100))
    assert module.initialized and all(map(torch.equal, before, module.entries()))


def test_more_steps_of_k_means_fit_better() -> None:
    x, losses = clusters(400), []
    for steps in (0, 1, 8):
        module = ResidualVQ([24], 8, kmeans_steps=steps)
        module(x)
        losses.append(module.encode(x).losses.item())
    assert losses[0] > losses[1] > losses[2]


def test_restarts_by_a_fraction_of_the_mean_with_the_mean_as_count() -> None:
    module = ResidualVQ([16], 8, decay=0.5, restart_threshold=0.0, restart_fraction=0.9, restart_count=0.0)
    module(clusters(200))
    module.codebooks[0].cluster_size_ema[:4] = 0
    module.codebooks[0].entries[:4] = 1e6  # so that no row is nearest
    module(clusters(200, 1))
    counts = module.codebooks[0].cluster_size_ema
    assert len(set(counts[:4].tolist())) == 1 and counts[0] > 1 and module.entries()[0].abs().max() < 100
    least = 0.9 * counts.double().mean()
    assert module.usage() == [(counts.double() >= least).double().mean().item()]


def test_a_prepared_codebook_is_kept_and_shared() -> None:
    module = trained(batches=1)
    first = module.codebooks[0].prepared()
    module(clusters(50)), module.encode(clusters(50))
    assert module.codebooks[0].prepared() is first and not any("prepared" in name for name in module.state_dict())
    shared = ResidualVQ([8, 8], 4, shared=True, gram=True)
    assert shared.codebooks[0].prepared() is shared.codebooks[1].prepared()


def moved_on(module: ResidualVQ) -> ResidualVQ:
    """A module whose codebooks are prepared, then trained further."""
    module.encode(clusters(9))
    module(clusters(100, 60))
    return module


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: module.double().float(),
        lambda module: load(module, trained(batches=4).state_dict(), assign=False),
        lambda module: load(module, trained(batches=4).state_dict(), assign=True),
        moved_on,
    ],
    ids=["deepcopy", "pickle", "to", "load", "load by assignment", "train"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_encodes_by_the_codewords_as_they_are_now(change: Any, shared: bool) -> None:
    module = trained(shared, batches=1)
    module.encode(clusters(9))
    changed = change(module)
    want = rvq_encode(clusters(80), [entries.clone() for entries in changed.entries()])
    assert torch.equal(changed.encode(clusters(80)).codes, want.codes)
    for book in changed.codebooks:
        assert book.prepared().words.data_ptr() == book.entries.data_ptr()


def load(module: ResidualVQ, state: dict[str, Tensor], assign: bool) -> ResidualVQ:
    module.load_state_dict(state, assign=assign)
    return module


def test_a_model_of_bfloat16_keeps_its_codebooks_to_the_bit() -> None:
    module = trained(batches=1)
    model = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(module)).bfloat16()
    assert model[0].weight.dtype == torch.bfloat16 and same_state(model[1], module)
    x = clusters(50).bfloat16()
    assert torch.equal(model[1](x).codes, module(x).codes) and same_state(model[1], module)
    there = model.to("meta")[1]
    assert all(value.device.type == "meta" for value in there.state_dict().values())
    assert all(book.dtype == torch.float32 for book in there.entries())


def test_a_copy_trains_by_itself() -> None:
    module = trained(batches=1)
    copied, before = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    copied(clusters(100, 5))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module(clusters(100, 5))
    assert same_state(module, copied)


def test_encodes_in_one_graph_and_in_inference_mode() -> None:
    module, x = trained(batches=1).eval(), clusters(30)
    want = module.encode(x).codes
    compiled = torch.compile(module.encode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x).codes, want)
    with torch.inference_mode():
        assert torch.equal(module.encode(x).codes, want)
        made = ResidualVQ([8], 8).eval()
        assert made(x).codes.shape == (30, 1)


def test_trains_inside_a_compiled_function() -> None:
    torch.manual_seed(0)
    module = ResidualVQ([12, 9], 8, kmeans_init=False)
    alone, compiled = copy.deepcopy(module), torch.compile(module, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(60, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(x).codes, alone(x).codes) and same_state(module, alone)


def test_results_of_training_may_be_written() -> None:
    x = clusters(30).requires_grad_()
    quantized = trained(batches=1)(x).quantized
    quantized += 1
    (gradient,) = torch.autograd.grad(quantized.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
