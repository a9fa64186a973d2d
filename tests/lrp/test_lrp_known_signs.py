"""Signs and losses that are known and not assumed: coefficients of resizing, constants among values, what arrives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from labn import explain
from labn.explainers import LambdaAttention
from labn.lrp import Config, relevance
from labn.models.lambda_networks.layer import LambdaLayer

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1])


class Joined(nn.Module):
    """A convolution that reads non-negative features beside a constant plane."""

    def __init__(self, plane: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(5, 6, 3), nn.Linear(6, 2)
        self.plane = plane

    def forward(self, x):
        features = self.first(x).relu()
        plane = torch.full((len(x), 1, 14, 14), self.plane, dtype=x.dtype)
        return self.head(self.second(torch.cat([features, plane], 1)).relu().mean((2, 3)))


@pytest.mark.parametrize("plane", [1.0, -1.0])
def test_the_sign_of_a_constant_among_the_values_is_read_off_it(plane, monkeypatch):
    config = Config(rule="zplus", first_layer="alpha1beta0")
    maps = relevance(Joined(plane).double().eval(), X, TARGETS, config).relevance
    # The way for values of unknown sign is right for values of every sign.
    monkeypatch.setattr("labn.lrp.tracing.graph._is_non_negative", lambda node, graph: False)
    expected = relevance(Joined(plane).double().eval(), X, TARGETS, config).relevance
    assert torch.allclose(maps, expected, atol=1e-12)


def test_bicubic_resizing_has_no_rule_because_its_coefficients_have_both_signs():
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.interpolate(self.conv(x).relu(), scale_factor=2, mode="bicubic").mean((2, 3)))

    assert float(F.interpolate(torch.eye(4)[None, None], scale_factor=2, mode="bicubic").min()) < 0
    with pytest.raises(NotImplementedError, match=r"no rule for .*interpolate"):
        explain(Resized().double().eval(), X, "lrp", TARGETS)


def test_losses_are_named_once_per_network_with_the_layers_that_keep_most():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        model[2].weight.abs_().neg_()  # no positive contribution: z+ keeps everything
        model[2].bias.fill_(5.0)
    with pytest.warns(UserWarning, match=r"^0% of the relevance arrives .*; most is kept by '2'"):
        explain(model, X, "lrp", TARGETS)
    report = relevance(model, X, TARGETS, report=True)
    assert torch.allclose(report.arrived + report.leaked, report.initial)


def test_nothing_is_said_where_relevance_arrives(recwarn):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        model[4].weight.abs_()
    explain(model, X, "lrp", TARGETS)
    explain(model, X, "c3lrp", TARGETS)
    assert not [w for w in recwarn if "of the relevance arrives" in str(w.message)]


def test_lambda_maps_are_the_same_for_any_batch():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), LambdaLayer(8, dim_k=4, heads=2, r=3), nn.AdaptiveAvgPool2d(1)]
    model, images = nn.Sequential(*layers, nn.Flatten()).eval(), torch.randn(7, 3, 33, 33)
    targets = torch.zeros(7, dtype=torch.long)
    together = LambdaAttention()(model, images, targets)
    for size in (1, 2, 3):
        maps = [LambdaAttention()(model, *pair) for pair in zip(images.split(size), targets.split(size))]
        assert torch.equal(torch.cat(maps), together)


def test_losses_of_a_contrast_are_told_although_its_signs_cancel():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        model[2].weight.abs_().neg_()
        model[2].bias.fill_(5.0)
    with pytest.warns(UserWarning, match=r"^0% of the relevance arrives .*; most is kept by '2'"):
        explain(model, X, "contrastive_lrp", TARGETS)


def test_nothing_is_said_of_a_contrast_that_arrives(recwarn):
    """The start of a contrast sums to zero up to rounding, which is no measure of what arrives."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12)]
    model = nn.Sequential(*layers).eval()
    explain(model, X.float(), "contrastive_lrp", TARGETS)
    assert not [w for w in recwarn if "of the relevance arrives" in str(w.message)]


def test_relevance_of_filled_channels_is_told_with_the_rule_that_avoids_it():
    """Option A shortcuts: half of the sum's channels are filled with zeros on one side."""

    class OptionA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.deep, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2, 1), nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x).relu()
            skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            return self.head((self.deep(x) + skip).relu().mean((2, 3)))

    model = OptionA().double().eval()
    with torch.no_grad():
        model.head.weight.abs_()
    with pytest.warns(UserWarning, match=r"most is kept by .*pad\) .*residual='ratio' gives"):
        explain(model, X, "lrp", TARGETS, residual="symmetric")
