"""Parameter randomisation, and the similarity that it is measured with."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from labn import evaluate
from labn.explainers import ConstantMap, Gradient, RandomMap, explainer_by_name
from labn.inference.randomised_copy import randomised_copies
from labn.metrics import EfficientRandomisation, LayerRandomisation, Randomisation, SmoothRandomisation
from labn.metrics.functional import correlation, histogram_entropy, midranks, rank_correlation, relative_rise

TARGETS, INDICES = torch.tensor([0, 2]), torch.arange(2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).double()
    model[1].running_mean.normal_()
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def similarity(explainer, model=None, **options):
    model = network() if model is None else model
    maps = explainer(model, images(), TARGETS, INDICES)
    metric = Randomisation(**options)
    return metric.score(model, images(), maps, TARGETS, INDICES, explainer=explainer)["randomisation"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_rank_correlation_equals_scipys_spearman(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(-4, 4, (2, 5, 6), generator=generator).float() for _ in range(2))
    for value, a, b in zip(rank_correlation(first, second), first, second):
        assert value.item() == pytest.approx(stats.spearmanr(a.flatten(), b.flatten()).statistic, abs=1e-12)
        assert midranks(a.reshape(1, -1))[0].tolist() == stats.rankdata(a.flatten()).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_correlation_equals_pearsons(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    for value, a, b in zip(correlation(first, second), first, second):
        assert value.item() == pytest.approx(stats.pearsonr(a.flatten(), b.flatten()).statistic, abs=1e-9)
    tenth = torch.full((1, 7, 9), 0.1, dtype=torch.float64)  # whose mean is another number
    assert correlation(tenth, 3 * tenth).item() == 1
    assert correlation(tenth, torch.rand(1, 7, 9, generator=generator)).item() == 0
    assert correlation(tenth, tenth / 0).isnan().item()


def test_rank_correlation_of_constant_and_non_finite_maps():
    flat, other = torch.ones(1, 2, 2), torch.arange(4.0).view(1, 2, 2)
    assert rank_correlation(flat, 2 * flat).item() == 1
    assert rank_correlation(flat, other).item() == 0
    assert rank_correlation(other, -other).item() == -1
    assert rank_correlation(other, other / 0).isnan().item()
    with pytest.raises(ValueError, match="must have one size"):
        rank_correlation(flat, flat[:, :1])


def test_maps_that_use_the_model_change_and_others_do_not():
    assert similarity(RandomMap()).tolist() == [1, 1]
    assert similarity(ConstantMap()).tolist() == [1, 1]
    changed = similarity(Gradient())
    assert (changed.abs() < 0.5).all()


def test_randomisation_is_the_mean_over_the_stages():
    model, explainer = network(), Gradient()
    maps = explainer(model, images(), TARGETS)
    expected = [rank_correlation(maps, explainer(other, images(), TARGETS)) for other in randomised_copies(model, 5, 3)]
    assert torch.allclose(similarity(explainer, model, seed=5, n_stages=3), torch.stack(expected).mean(0))
    absolute = [
        rank_correlation(maps.abs(), explainer(other, images(), TARGETS).abs()) for other in randomised_copies(model, 5)
    ]
    assert torch.equal(similarity(explainer, model, seed=5, absolute=True), absolute[0])


def test_randomisation_depends_on_the_seed_and_leaves_the_model_alone():
    model = network().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = similarity(Gradient(), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, similarity(Gradient(), copy.deepcopy(model)))
    assert not torch.equal(first, similarity(Gradient(), model, seed=1))


def test_copies_are_randomised_from_the_output_on():
    model = network()
    last, both, everything = randomised_copies(model, n_stages=3)
    changed = [
        [name for name, value in other.named_parameters() if not torch.equal(value, model.get_parameter(name))]
        for other in (last, both, everything)
    ]
    assert [sorted({name.split(".")[0] for name in names}) for names in changed] == [["7"], ["3", "7"], ["0", "3", "7"]]
    assert torch.equal(everything[7].weight, last[7].weight)
    assert everything[1].running_mean.eq(0).all()
    assert not last[1].running_mean.eq(0).any()
    assert torch.equal(randomised_copies(model)[0][0].weight, everything[0].weight)
    for layer in (everything[0], everything[7]):
        bound = layer.weight[0].numel() ** -0.5
        assert layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


def test_randomised_copies_are_cached_until_the_weights_change():
    model = network()
    first = randomised_copies(model)[0]
    assert randomised_copies(model)[0] is first
    with torch.no_grad():
        model[0].weight += 1
    assert randomised_copies(model)[0] is not first


def test_parameters_outside_layers_are_permuted():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.arange(8.0))

    model = Scaled()
    gain = randomised_copies(model)[0].gain
    assert sorted(gain.tolist()) == model.gain.tolist()
    assert gain.tolist() != model.gain.tolist()


def test_a_copy_that_runs_modules_of_the_model_is_refused():
    """`copy.deepcopy` keeps functions: every copy would explain the trained layers, with a similarity of 1."""
    model = network()
    forward = model.forward
    model.forward = lambda x: forward(x)
    with pytest.raises(ValueError, match="a copy of Sequential runs the model's own Conv2d"):
        similarity(Gradient(), model)


def test_randomisation_refuses_wrong_arguments():
    model = network()
    maps = images()[:, 0]
    with pytest.raises(ValueError, match="'randomisation' explains a randomised copy of the model: it needs"):
        evaluate(model, images(), maps, TARGETS, ["id", "randomisation"])
    with pytest.raises(ValueError, match="n_stages must be from 1 to 4, the layers of Sequential; got 9"):
        similarity(Gradient(), n_stages=9)
    with pytest.raises(ValueError, match="n_stages must be at least 1"):
        Randomisation(n_stages=0)
    by_name, ready = (
        evaluate(model, images(), maps, TARGETS, ["randomisation"], explainer=explainer)["randomisation"]
        for explainer in ("-gradcam", explainer_by_name("-gradcam"))
    )
    assert torch.equal(by_name, ready)
    assert not Randomisation.higher_is_better


def value_of(metric, explainer, model=None, pictures=None):
    model, pictures = network() if model is None else model, images() if pictures is None else pictures
    maps = explainer(model, pictures, TARGETS, INDICES)
    return metric.score(model, pictures, maps, TARGETS, INDICES, explainer=explainer)[metric.names[0]]


def test_mprt_layers_is_the_area_under_the_curve_of_the_cascade():
    model, explainer = network(), Gradient()
    maps = explainer(model, images(), TARGETS)
    points = [torch.ones(2).double()]
    points += [rank_correlation(maps, explainer(c, images(), TARGETS)) for c in randomised_copies(model, 5, 3)]
    metric, arguments = LayerRandomisation(3, seed=5), (model, images(), maps, TARGETS, INDICES)
    assert torch.equal(metric.curve(*arguments, explainer=explainer), torch.stack(points, 1))
    area = sum((a + b) / 2 for a, b in itertools.pairwise(points)) / 3
    assert torch.allclose(metric.score(*arguments, explainer=explainer)["mprt_layers"], area, atol=1e-12)


def test_mprt_layers_takes_every_layer_of_a_small_network():
    for n_stages in (None, 8):
        arguments = (network(), images(), Gradient()(network(), images(), TARGETS), TARGETS, INDICES)
        assert LayerRandomisation(n_stages).curve(*arguments, explainer=Gradient()).shape == (2, 5)


def test_maps_that_do_not_depend_on_the_weights_have_the_worst_values():
    for explainer in (ConstantMap(), RandomMap()):
        assert value_of(LayerRandomisation(2), explainer).tolist() == [1, 1]
        assert value_of(SmoothRandomisation(2), explainer).tolist() == pytest.approx([1, 1], abs=1e-12)
        assert value_of(EfficientRandomisation(), explainer).tolist() == [0, 0]


def test_smprt_without_noise_is_the_randomisation_of_the_map():
    expected = similarity(Gradient(), seed=3)
    assert torch.allclose(value_of(SmoothRandomisation(2, 0.0, seed=3), Gradient()), expected, atol=1e-12)
    assert not torch.allclose(value_of(SmoothRandomisation(2, 0.3, seed=3), Gradient()), expected, atol=1e-3)


def test_smprt_depends_neither_on_the_batch_nor_on_the_range_of_the_images():
    """Noise is in units of each image's own range, and gradients of a ReLU network without biases have no scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(600, 4, bias=False))
    model = model.double()
    whole = value_of(SmoothRandomisation(3), Gradient(), model)
    assert torch.allclose(value_of(SmoothRandomisation(3), Gradient(), model, 2 * images()), whole, atol=1e-12)
    maps = Gradient()(model, images(), TARGETS, INDICES)
    one = SmoothRandomisation(3).score(
        model, images()[1:], maps[1:], TARGETS[1:], INDICES[1:], explainer=Gradient()
    )  # fmt: skip
    assert torch.allclose(one["smprt"], whole[1:], atol=1e-9)


def test_emprt_is_the_relative_rise_of_the_entropy():
    model, explainer = network(), Gradient()
    (copied,) = randomised_copies(model, 2)
    entropies = [histogram_entropy(explainer(m, images(), TARGETS), 20) for m in (model, copied)]
    found = value_of(EfficientRandomisation(20, seed=2), explainer, model)
    assert torch.equal(found, (entropies[1] - entropies[0]) / entropies[0])
    assert (found.abs() > 1e-4).all()
    assert relative_rise(torch.zeros(1), torch.ones(1)).isnan().item()


def test_entropy_of_histograms_in_closed_form():
    even = torch.arange(8.0).view(1, 2, 4)
    assert histogram_entropy(even, 8).item() == pytest.approx(torch.tensor(8.0).log().item())
    assert histogram_entropy(even, 2).item() == pytest.approx(torch.tensor(2.0).log().item())
    assert histogram_entropy(3 * even - 5, 8).item() == pytest.approx(histogram_entropy(even, 8).item())
    assert histogram_entropy(torch.full((1, 2, 4), 0.1), 8).item() == 0
    spike = torch.zeros(1, 4, 4)
    spike[0, 0, 0] = 1
    assert histogram_entropy(spike).item() == pytest.approx(-(15 / 16) * np.log(15 / 16) - np.log(1 / 16) / 16)


@pytest.mark.parametrize("metric", [LayerRandomisation(), SmoothRandomisation(), EfficientRandomisation()])
def test_without_an_explainer_the_message_says_what_is_missing(metric):
    maps = torch.zeros(2, 12, 12)
    with pytest.raises(ValueError, match=f"metric '{metric.names[0]}' explains .*: it needs explainer="):
        metric.score(network(), images(), maps, TARGETS, INDICES)
