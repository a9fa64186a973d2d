"""Layers that run several times in one forward pass: the call that an explanation weighs, or a refusal."""

import pytest
import torch
from torch import nn

from labn import explain

METHODS = ["gradcam", "gradcam++", "xgradcam", "smoothgradcam++", "scorecam", "ablationcam", "amg"]
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class SharedAndHead(nn.Module):
    """One ReLU, or three, after two convolutions and within the head."""

    def __init__(self, shared: bool, head: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.relu2, self.relu3 = (self.relu, self.relu) if shared else (nn.ReLU(), nn.ReLU())
        self.pool, self.head = nn.MaxPool2d(2), head
        wide = nn.Linear(512, 12) if head == "linear" else nn.Conv2d(8, 12, 1)
        self.hidden, self.out = wide, nn.Linear(12, 4) if head == "linear" else nn.Conv2d(12, 4, 1)
        self.gap = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.pool(self.relu2(self.second(self.pool(self.relu(self.first(x))))))
        x = x.flatten(1) if self.head == "linear" else self.gap(x)
        return self.out(self.relu3(self.hidden(x))).flatten(1)


@pytest.mark.parametrize("head", ["linear", "convolution"])
@pytest.mark.parametrize("method", METHODS)
def test_a_shared_activation_gives_the_map_of_separate_ones(method, head):
    shared, separate = SharedAndHead(True, head).eval(), SharedAndHead(False, head).eval()
    assert torch.equal(shared(X), separate(X))
    expected = explain(separate, X, method, 1).maps
    assert torch.equal(explain(shared, X, method, 1).maps, expected)
    assert torch.equal(explain(shared, X, method, 1, target_layer="relu").maps, expected)


def test_residual_blocks_with_one_activation_are_explained():
    class Residual(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.act, self.out = (
                nn.Conv2d(3, 6, 3, padding=1),
                nn.Conv2d(6, 6, 3, padding=1),
                nn.ReLU(),
                nn.Linear(6, 4),
            )
            self.act2 = self.act if shared else nn.ReLU()

        def forward(self, x):
            x = self.act(self.a(x))
            return self.out(self.act2(self.b(x) + x).mean((2, 3)))

    assert torch.equal(
        explain(Residual(True).eval(), X, "gradcam", 1).maps, explain(Residual(False).eval(), X, "gradcam", 1).maps
    )


class Augmented(nn.Module):
    """The mean of the logits of an image and of its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x):
        return (self.network(x) + self.network(x.flip(-1))) / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"target_layer": "network.1"}])
def test_a_layer_that_runs_twice_side_by_side_is_refused_with_the_count(method, options):
    with pytest.raises(ValueError, match=r"target_layer 'network\.\d' runs 2 times in one forward pass of Augmented"):
        explain(Augmented().eval(), X, method, 1, **options)


def test_a_layer_itself_can_be_the_target():
    model = SharedAndHead(False, "linear").eval()
    by_name = explain(model, X, "gradcam", 1, target_layer="relu2").maps
    assert torch.equal(explain(model, X, "gradcam", 1, target_layer=model.relu2).maps, by_name)
    with pytest.raises(ValueError, match="target_layer is a ReLU that is not a layer of SharedAndHead"):
        explain(model, X, "gradcam", 1, target_layer=nn.ReLU())


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "xgradcam", "smoothgradcam++"])
def test_large_half_precision_maps_keep_their_sums(method):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model, images = nn.Sequential(*layers).eval(), torch.randn(2, 3, 128, 128).half()
    with torch.no_grad():
        model[0].weight.mul_(30)
    expected = explain(model, images.float(), method, 1).maps
    maps = explain(model.half(), images, method, 1).maps
    assert torch.allclose(maps, expected, atol=5e-3 * float(expected.abs().max()))
