"""Parameter randomisation, and the similarity that it is measured with."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from labn import evaluate
from labn.explainers import ConstantMap, Gradient, RandomMap, explainer_by_name
from labn.inference.randomised_copy import randomised_copies
from labn.metrics import Randomisation
from labn.metrics.functional import correlation, midranks, rank_correlation

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
