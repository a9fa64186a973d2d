"""Metrics that explain again: max- and avg-sensitivity, and the map of another class."""

import pytest
import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers import ConstantMap, Explainer, Gradient, GradientTimesInput
from labn.metrics import RandomLogit, Sensitivity
from labn.metrics.functional import rank_correlation, relative_changes

IMAGES = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS, INDICES = torch.tensor([0, 2, 1]), torch.tensor([3, 8, 5])


class Linear(nn.Module):
    """Logits w_c x with three classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight)


def score(metric, explainer: Explainer, chosen: slice = slice(None)) -> dict[str, Tensor]:
    model, images, targets, indices = Linear(), IMAGES[chosen], TARGETS[chosen], INDICES[chosen]
    maps = explainer(model, images, targets, indices)
    return metric.score(model, images, maps, targets, indices, explainer=explainer)


def test_the_gradient_of_a_linear_model_does_not_move():
    scores = score(Sensitivity(draws=3), Gradient())
    assert scores["max_sensitivity"].tolist() == scores["avg_sensitivity"].tolist() == [0, 0, 0]


def test_gradient_times_input_moves_with_the_noise():
    """The change is w d: linear in the radius, and at most radius |w|_1 per pixel."""
    small, large = (score(Sensitivity(draws=4, radius=r), GradientTimesInput()) for r in (0.1, 0.2))
    for name in ("max_sensitivity", "avg_sensitivity"):
        assert torch.allclose(2 * small[name], large[name], rtol=1e-4)
    assert (large["max_sensitivity"] > large["avg_sensitivity"]).all()
    weight = Linear().weight[TARGETS].abs().sum(1)
    bound = 0.2 * weight.flatten(1).norm(dim=1) / (IMAGES * Linear().weight[TARGETS]).sum(1).flatten(1).norm(dim=1)
    assert (large["max_sensitivity"] <= bound + 1e-6).all()


def test_noise_depends_on_seed_and_index_alone():
    whole = score(Sensitivity(draws=2), GradientTimesInput())
    alone = score(Sensitivity(draws=2), GradientTimesInput(), slice(1, 2))
    for name in whole:
        assert torch.allclose(alone[name], whole[name][1:2], atol=1e-6)
    other = score(Sensitivity(draws=2, seed=1), GradientTimesInput())
    assert not torch.allclose(other["avg_sensitivity"], whole["avg_sensitivity"])


def test_a_map_of_zeros_has_no_relative_change():
    assert relative_changes(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)).isnan().all()


def test_the_other_class_is_drawn_evenly_and_never_the_own():
    metric, targets = RandomLogit(), torch.arange(600) % 4
    others = metric.other_classes(targets, torch.arange(600), 4)
    assert (others != targets).all()
    steps = torch.bincount((others - targets) % 4, minlength=4)[1:]
    assert steps.min() > 150
    assert torch.equal(metric.other_classes(targets[7:9], torch.tensor([7, 8]), 4), others[7:9])


def test_random_logit_is_the_correlation_with_that_classs_map():
    found = score(RandomLogit(), Gradient())["random_logit"]
    others = RandomLogit().other_classes(TARGETS, INDICES, 3)
    model = Linear()
    expected = rank_correlation(Gradient()(model, IMAGES, TARGETS), Gradient()(model, IMAGES, others))
    assert torch.allclose(found, expected, atol=1e-12)
    assert score(RandomLogit(), ConstantMap())["random_logit"].tolist() == [1, 1, 1]


def test_both_need_the_method_and_a_second_class():
    maps = torch.rand(3, 6, 6)
    for metric, name in ((Sensitivity(), "max_sensitivity"), (RandomLogit(), "random_logit")):
        with pytest.raises(InputError, match=f"metric '{name}' explains .* needs explainer="):
            metric.score(Linear(), IMAGES, maps, TARGETS, INDICES)
    single = nn.Sequential(nn.Flatten(), nn.Linear(72, 1)).double()
    with pytest.raises(InputError, match="the model has one"):
        RandomLogit().score(single, IMAGES, maps, TARGETS * 0, INDICES, explainer=Gradient())
