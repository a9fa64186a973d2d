"""What counts as a setting of a model in the keys of stored results, and what copies keep alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from labn import evaluate, explain
from labn.explainers import EXPLAINERS, GradCAM
from labn.inference.fast_copy import fast_copy
from labn.inference.fingerprint import overwritten, settings_digest
from labn.inference.randomised_copy import randomised_copies
from labn.metrics.functional import patch_insertion_deletion
from labn.metrics.functional.class_probability import class_probability
from labn.metrics.functional.insertion_deletion import InsertionDeletionCurves, patch_counts

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).eval()


class Counting(nn.Module):
    """Counts its calls, keeps its last size, fills in a default, and has a setting that every call reads."""

    def __init__(self):
        super().__init__()
        self.body, self.calls, self.size, self.factor, self.shift = base(), 0, None, None, 1.0

    def forward(self, x):
        self.calls += 1
        self.size = tuple(x.shape)
        if self.factor is None:
            self.factor = 2.0
        shift, self.shift = self.shift, 1.0
        return self.factor * self.body(x) + shift


def test_results_of_a_forward_are_no_settings_and_defaults_that_it_fills_in_are():
    model = Counting()
    assert overwritten(Counting.forward) == {"calls", "size"}
    assert overwritten(nn.Conv2d.forward) == overwritten(len) == frozenset()
    model.factor = 2.0
    before = settings_digest(model)
    model(X)
    assert settings_digest(model) == before
    model.factor = 3.0
    changed = settings_digest(model)
    model.shift = 0.5
    assert len({before, changed, settings_digest(model)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lambda", "hook", "default"])
def test_a_model_that_a_function_of_its_own_holds_is_not_kept_alive(way):
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.factor = base(), 2.0
            if way == "lambda":
                self.scale = lambda y: y * self.factor
            elif way == "default":
                self.scale = self._scaling()
            else:
                self.body.register_forward_hook(lambda _module, _args, y: y * self.factor)

        def _scaling(self):
            def scale(y, me=self):
                return y * me.factor

            return scale

        def forward(self, x):
            y = self.body(x)
            return y if way == "hook" else self.scale(y)

    model = Held().eval()
    prepared = fast_copy(model, X)
    randomised_copies(model)
    assert prepared.copy is None
    explain(model, X, "lrp", 1)
    gone = weakref.ref(model)
    del model, prepared
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("method", ["gradient", "gradcam", "scorecam", "lrp", "rise"])
def test_models_made_in_inference_mode_are_explained(method):
    options = {"n_masks": 4} if method == "rise" else {}
    expected = explain(base(), X, method, 1, **options).maps
    with torch.inference_mode():
        model, images = base(), X.clone()
        maps = explain(model, images, method, 1, **options).maps
    assert torch.allclose(maps, expected, atol=1e-6)
    assert all(parameter.is_inference() for parameter in model.parameters())
    assert torch.allclose(explain(model, images, method, 1, **options).maps, expected, atol=1e-6)
    assert method in EXPLAINERS


def test_randomisation_takes_a_target_layer_that_is_given_as_a_module():
    model = base()
    maps = explain(model, X, "gradcam", 1, target_layer="0").maps
    scores = [
        evaluate(model, X, maps, 1, ["randomisation"], explainer=GradCAM(target_layer=layer), mean=None, std=None)
        for layer in ("0", model[0])
    ]
    assert torch.equal(scores[0]["randomisation"], scores[1]["randomisation"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: patch_counts((8, 8), 4, protocol="papers"), "protocol must be one of"),
        (lambda: patch_counts((8, 8), 4, step=0), "step must be at least 1"),
        (lambda: patch_counts((8, 8), 0), "patch_size must be at least 1"),
        (lambda: class_probability(torch.zeros(1, 1, 3), torch.tensor([0]), "soft"), "probability must be one of"),
        (lambda: class_probability(torch.zeros(1, 3), torch.tensor([0])), r"logits must be \(S, K, num_classes\)"),
        (lambda: InsertionDeletionCurves(*[torch.zeros(1, 2)] * 7).areas("simpson"), "area must be one of"),
    ],
)
def test_public_helpers_name_the_wrong_argument(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_maps_of_bool_and_of_integers_are_scored_as_numbers():
    masks, targets = X.mean(1) > 0, torch.tensor([0, 1])
    expected = patch_insertion_deletion(base(), X, masks.float(), targets, patch_size=4)["pid"]
    for maps in (masks, masks.int(), masks.double()):
        assert torch.equal(patch_insertion_deletion(base(), X, maps, targets, patch_size=4)["pid"], expected)
