"""Copies of models that keep tensors of their last forward with gradients."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from labn import evaluate, explain
from labn.inference.deep_copy import deep_copy
from labn.inference.fast_copy import fast_copy
from labn.inference.modes import matching
from labn.inference.randomised_copy import randomised_copies

X = torch.rand(2, 3, 16, 16)


class Keeping(nn.Module):
    """Keeps its feature maps, alone and in containers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.last, self.seen = None, {}

    def forward(self, x):
        maps = self.norm(self.conv(x)).relu()
        self.last, self.seen = maps, {"list": [maps * 2], "object": SimpleNamespace(maps=(maps * 3,))}
        return self.head(maps.mean((2, 3)))


def trained():
    model = Keeping().eval()
    model(X).sum().backward()
    assert not model.last.is_leaf
    return model


def test_a_copy_has_the_values_without_the_graph_and_shares_nothing():
    model = trained()
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(model)
    copied = deep_copy(model)
    kept = model.seen["list"][0], model.seen["object"].maps[0], model.last
    for tensor, twin in zip(kept, (copied.seen["list"][0], copied.seen["object"].maps[0], copied.last)):
        assert torch.equal(tensor, twin)
        assert not twin.requires_grad
        assert twin.data_ptr() != tensor.data_ptr()
    assert copied.conv.weight is not model.conv.weight
    assert model.last.grad_fn is not None


def test_a_weight_that_every_forward_computes_is_copied():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    old = nn.utils.spectral_norm(nn.Linear(2, 2))
    for module in (layer, old):
        module(torch.ones(1, 2)).sum().backward()
        module.eval()
        assert torch.allclose(deep_copy(module)(torch.ones(1, 2)), module(torch.ones(1, 2)))


USES = {
    "float64 images": lambda model: matching(model, X.double()),
    "half precision": lambda model: matching(model.half(), X),
    "randomised": lambda model: randomised_copies(model, n_stages=2),
    "relevance": lambda model: explain(model, X.double(), "lrp", 1),
    "tail": lambda model: explain(model, X, "ablationcam", 1, closed_form=False),
    "scores": lambda model: evaluate(model, X, X[:, 0], 1, ["pid4", "randomisation"], explainer="gradcam"),
}


@pytest.mark.filterwarnings("ignore:images lie between")
@pytest.mark.parametrize("use", USES)
def test_a_model_that_keeps_its_feature_maps_is_used_after_a_forward_with_gradients(use):
    USES[use](trained())


def test_a_model_that_keeps_its_feature_maps_runs_as_a_folded_copy():
    assert fast_copy(trained(), X).form.folded
