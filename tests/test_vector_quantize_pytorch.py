"""The drop-in for vector-quantize-pytorch's ResidualVQ, held against the original."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ as Theirs
from vector_quantize_pytorch import VectorQuantize

from longcat_kernels.integrations import vector_quantize_pytorch as drop_in
from longcat_kernels.integrations.vector_quantize_pytorch import ResidualVQ

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"dim": 8, "num_quantizers": 3, "codebook_size": 16},
    "sizes": {"dim": 8, "codebook_size": (16, 8, 5)},
    "projections": {"dim": 12, "num_quantizers": 3, "codebook_size": 16, "codebook_dim": 8},
    "shared": {"dim": 8, "num_quantizers": 3, "codebook_size": 16, "shared_codebook": True},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def pair(**options: Any) -> tuple[ResidualVQ, Theirs]:
    """Both with the same state."""
    torch.manual_seed(0)
    theirs = Theirs(**options, rotation_trick=False)
    ours = ResidualVQ(**options, rotation_trick=False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_same_results(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def assert_same_state(ours: ResidualVQ, theirs: Theirs) -> None:
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@layouts
def test_state_dicts_go_both_ways_to_the_bit(layout: dict[str, Any]) -> None:
    ours, theirs = ResidualVQ(**layout), Theirs(**layout)
    theirs(torch.randn(2, 50, layout["dim"]))
    ours.load_state_dict(theirs.state_dict())
    again = Theirs(**layout)
    again.load_state_dict(ours.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in theirs.state_dict().items())


@layouts
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_evaluates_as_the_original(layout: dict[str, Any], masked: bool, zeros: bool) -> None:
    ours, theirs = pair(**layout, return_zeros_for_masked_padding=zeros)
    x, mask = torch.randn(3, 40, layout["dim"]), torch.rand(3, 40) < 0.7 if masked else None
    got, want = ours.eval()(x, mask, return_all_codes=True), theirs.eval()(x, mask, return_all_codes=True)
    assert_same_results(got, want)
    torch.testing.assert_close(ours.get_output_from_indices(got[1]), theirs.get_output_from_indices(want[1]))


@layouts
def test_single_vectors_as_the_original(layout: dict[str, Any]) -> None:
    ours, theirs = pair(**layout)
    x = torch.randn(40, layout["dim"])
    assert_same_results(ours.eval()(x), theirs.eval()(x))


@layouts
@pytest.mark.parametrize("masked", [False, True])
def test_trains_as_the_original(layout: dict[str, Any], masked: bool) -> None:
    ours, theirs = pair(**layout, decay=0.7, commitment_weight=0.25)
    for seed in range(4):
        torch.manual_seed(seed)
        x, mask = torch.randn(3, 40, layout["dim"]), torch.rand(3, 40) < 0.7 if masked else None
        assert_same_results(ours(x, mask), theirs(x, mask))
        assert_same_state(ours, theirs)


@layouts
def test_losses_have_the_gradient_of_the_original_and_quantized_has_one(layout: dict[str, Any]) -> None:
    ours, theirs = pair(**layout, commitment_weight=0.5)
    x = torch.randn(3, 40, layout["dim"], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0])
    quantized, _, losses = ours(x)
    (got,) = torch.autograd.grad(losses @ weights, x, retain_graph=True)
    (want,) = torch.autograd.grad(theirs(x)[2] @ weights, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    if not ours.has_projections:
        (one,) = torch.autograd.grad(quantized.sum(), x)
        assert torch.equal(one, torch.ones_like(x))


def test_images_as_the_original_and_of_any_size() -> None:
    ours, theirs = pair(dim=8, num_quantizers=2, codebook_size=16, accept_image_fmap=True)
    x = torch.randn(2, 8, 8, 8)  # the original takes images with as many rows and columns as channels
    assert_same_results(ours(x), theirs(x))
    assert_same_state(ours, theirs)
    quantized, codes, _ = ours.eval()(torch.randn(2, 8, 5, 3))
    assert quantized.shape == (2, 8, 5, 3) and codes.shape == (2, 5, 3, 2)
    torch.testing.assert_close(ours.get_output_from_indices(codes).movedim(-1, 1), quantized)


@pytest.mark.parametrize("option", [{"channel_last": False}, {"accept_3d_fmap": True}])
def test_channels_first(option: dict[str, bool]) -> None:
    shape = (4, 5, 6) if "accept_3d_fmap" in option else (9,)
    first, last = ResidualVQ(**LAYOUTS["projections"], **option), ResidualVQ(**LAYOUTS["projections"])
    first.load_state_dict(last.state_dict())
    x = torch.randn(2, *shape, 12)
    got, want = first.eval()(x.movedim(-1, 1)), last.eval()(x)
    assert torch.equal(got[0].movedim(1, -1), want[0]) and torch.equal(got[1], want[1])


@layouts
@pytest.mark.parametrize("multiple", [1, 2])
def test_quantizer_dropout_as_the_original(layout: dict[str, Any], multiple: int) -> None:
    dropout = {"quantize_dropout": True, "quantize_dropout_cutoff_index": 0, "quantize_dropout_multiple_of": multiple}
    ours, theirs = pair(**layout, **dropout)
    for seed in range(6):
        x = torch.randn(2, 30, layout["dim"])
        options = {"rand_quantize_dropout_fixed_seed": seed}
        got, want = ours(x, **options), theirs(x, **options)
        assert_same_results(got, want)
        assert_same_state(ours, theirs)
        coarse = want[1][..., :2]
        torch.testing.assert_close(ours.get_codes_from_indices(coarse), theirs.get_codes_from_indices(coarse))


def test_dropout_without_a_seed_varies_and_repeats_itself() -> None:
    kept = []
    for _ in range(2):
        module = ResidualVQ(**LAYOUTS["plain"], quantize_dropout=True)
        kept.append([int((module(torch.randn(1, 20, 8))[1][0, 0] >= 0).sum()) for _ in range(20)])
    assert kept[0] == kept[1] and set(kept[0]) == {1, 2, 3}


@pytest.mark.parametrize("layout", ["plain", "shared"])
def test_rare_entries_restart_from_what_their_level_was_given(layout: str) -> None:
    threshold = 2.75  # which no count reaches by itself
    ours, theirs = pair(**LAYOUTS[layout], decay=0.5, threshold_ema_dead_code=threshold)
    x = torch.randn(2, 30, 8)
    codes = ours(x)[1].reshape(-1, 3)
    theirs(x)
    given = [x.reshape(-1, 8)]
    _, original = pair(**LAYOUTS[layout])
    for level in range(2):
        given.append(given[-1] - original.layers[level]._codebook.embed[0][codes[:, level]])
    restarts = 0
    for level in range(3):
        mine, other = ours.layers[level]._codebook, theirs.layers[level]._codebook
        rows = torch.cat(given) if layout == "shared" else given[level]
        restarted = (mine.embed[0][:, None] == rows).all(-1).any(1)
        assert (mine.cluster_size[0][restarted] == threshold).all() and (mine.cluster_size >= threshold).all()
        torch.testing.assert_close(mine.embed_avg[0][restarted], threshold * mine.embed[0][restarted])
        if layout == "plain":
            assert torch.equal(restarted, other.cluster_size[0] == threshold)
            torch.testing.assert_close(mine.embed[0][~restarted], other.embed[0][~restarted])
        restarts += int(restarted.sum())
    assert restarts > 0


@layouts
@pytest.mark.parametrize("training", [False, True])
def test_k_means_of_the_first_batch(layout: dict[str, Any], training: bool) -> None:
    module = ResidualVQ(**layout, kmeans_init=True).train(training)
    x = torch.randn(4, 100, layout["dim"])
    assert not module.layers[0]._codebook.initted
    module(x)
    assert all(layer._codebook.initted for layer in module.layers)
    fitted = (module.eval()(x)[0] - x).square().mean()
    assert module.has_projections or fitted < 0.5 * x.square().mean()


@pytest.mark.parametrize(("call", "options"), [({"freeze_codebook": True}, {}), ({}, {"ema_update": False})])
def test_codebooks_that_must_not_move_stay(call: dict[str, bool], options: dict[str, bool]) -> None:
    module = ResidualVQ(**LAYOUTS["plain"], **options)
    before = copy.deepcopy(module.state_dict())
    losses = module(torch.randn(2, 20, 8), **call)[2]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert losses.gt(0).all()


def test_all_codes_are_those_that_were_chosen() -> None:
    module = ResidualVQ(**LAYOUTS["plain"])
    quantized, _, _, all_codes = module(torch.randn(2, 20, 8), return_all_codes=True)
    torch.testing.assert_close(all_codes.sum(0), quantized)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_codes_of_any_integers_are_decoded(dtype: torch.dtype) -> None:
    module = ResidualVQ(**LAYOUTS["plain"])
    indices = torch.randint(16, (2, 5, 3))
    assert torch.equal(module.get_output_from_indices(indices.to(dtype)), module.get_output_from_indices(indices))
    assert torch.equal(module.get_codes_from_indices(indices.to(dtype)), module.get_codes_from_indices(indices))


@pytest.mark.parametrize("indices", [torch.zeros(2, 4), torch.zeros(2, 4).long(), torch.zeros(2, 0).long()])
def test_codes_that_no_level_has_are_refused(indices: Tensor) -> None:
    module = ResidualVQ(**LAYOUTS["plain"])
    want = f"ResidualVQ: indices must be integers [..., at least 1 and at most 3], got {indices.dtype} "
    for decode in (module.get_codes_from_indices, module.get_output_from_indices):
        with pytest.raises(ValueError) as caught:
            decode(indices)
        assert str(caught.value) == want + str(list(indices.shape))


@layouts
@pytest.mark.parametrize("training", [False, True])
def test_a_model_of_bfloat16_keeps_its_codebooks(layout: dict[str, Any], training: bool) -> None:
    module = ResidualVQ(**layout).train(training).bfloat16()
    quantized, _, losses = module(torch.randn(2, 30, layout["dim"], dtype=torch.bfloat16))
    assert quantized.dtype == torch.bfloat16 and losses.isfinite().all()
    assert all(book.dtype == torch.float32 for book in module.codebooks)


def test_lens_stand_for_a_mask() -> None:
    a, b = ResidualVQ(**LAYOUTS["plain"]), ResidualVQ(**LAYOUTS["plain"])
    b.load_state_dict(a.state_dict())
    x, lens = torch.randn(3, 7, 8), torch.tensor([7, 0, 4])
    got, want = a(x, lens=lens), b(x, torch.arange(7) < lens[:, None])
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_knows_every_option_of_the_original_with_its_default() -> None:
    options = {
        name: parameter.default
        for owner in (VectorQuantize, Theirs)
        for name, parameter in inspect.signature(owner.__init__).parameters.items()
        if name not in ("self", "vq_kwargs")
    }
    own = inspect.signature(ResidualVQ.__init__).parameters
    for name, default in options.items():
        found = own[name].default if name in own else drop_in._FIXED[name][0]
        assert found == default, name
    assert set(drop_in._FIXED) <= set(options) and set(own) - {"self", "others"} <= set(options)
    assert set(drop_in._SUPPORTED.split(", ")) == set(own) - {"self", "others"}


@pytest.mark.parametrize("name", drop_in._FIXED)
def test_refuses_options_it_does_not_have(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        ResidualVQ(**LAYOUTS["plain"], **{name: "other"})
    want = f"ResidualVQ: {name} must be {drop_in._FIXED[name][0]}, got other: supported options are dim, num_quantizers"
    assert str(caught.value).startswith(want)
    ResidualVQ(**LAYOUTS["plain"], **{name: drop_in._FIXED[name][-1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_quantizers": None}, "num_quantizers must be given unless codebook_size is a tuple, got None"),
        ({"codebook_size": (4, 4)}, "codebook_size must be 3 sizes of at least 1, got (4, 4)"),
        ({"codebook_size": 0}, "codebook_size must be 3 sizes of at least 1, got 0"),
        (
            {"codebook_size": (4, 4, 5), "shared_codebook": True},
            "codebook_size must be one size with a shared codebook, got (4, 4, 5)",
        ),
        (
            {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
            "quantize_dropout_cutoff_index must be between 0 and 2, got 3",
        ),
        ({"quantize_dropout_multiple_of": 0}, "quantize_dropout_multiple_of must be at least 1, got 0"),
        (
            {"ema_update": False, "threshold_ema_dead_code": 2},
            "ema_update must be True with threshold_ema_dead_code 2, got False",
        ),
    ],
)
def test_refuses_what_does_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ResidualVQ(**{**LAYOUTS["plain"], **options})
    assert str(caught.value) == f"ResidualVQ: {message}"


def test_refuses_an_option_nobody_has() -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'codebok_size'"):
        ResidualVQ(**LAYOUTS["plain"], codebok_size=3)


@pytest.mark.parametrize("name", ["indices", "sample_codebook_temp", "beam_size"])
def test_refuses_arguments_it_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match=f"ResidualVQ: {name} must be None, got a tensor"):
        ResidualVQ(**LAYOUTS["plain"])(torch.randn(1, 2, 8), **{name: torch.zeros(1)})
