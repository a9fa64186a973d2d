"""Models that are not pure functions from images to logits: named, refused, or run so that it does not matter."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from labn import evaluate, explain
from labn.explainers import EXPLAINERS
from labn.inference.fast_copy import fast_copy
from labn.inference.fingerprint import COLUMNS, state_key
from labn.inference.model_traits import are_probabilities, traits_of

METHODS = ["gradcam", "gradcam++", "xgradcam", "smoothgradcam++", "scorecam", "ablationcam", "amg", "gradient"]
METHODS += ["gradxinput", "integrated_gradients", "smoothgrad", "occlusion", "lrp"]
X, TARGETS = torch.rand(2, 1, 32, 32), torch.tensor([1, 0])


class Normalising(nn.Module):
    """Normalises its input, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place, self.conv, self.head = in_place, nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25
        return self.head(self.conv(x).relu().mean((2, 3)))


class Dropping(nn.Module):
    """Drops features in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(nn.functional.dropout(self.conv(x).relu().mean((2, 3)), 0.5))


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_writes_on_its_input_is_explained_like_one_that_does_not(method):
    images = X.clone()
    maps = explain(Normalising(True).eval(), images, method, TARGETS).maps
    assert torch.equal(images, X)
    expected = explain(Normalising(False).eval(), X, method, TARGETS).maps
    assert torch.allclose(maps, expected, atol=1e-6 * float(expected.abs().max()))


def test_scores_of_a_model_that_writes_on_its_input_are_those_of_one_that_does_not(caplog):
    images, maps = X.clone(), torch.rand(2, 32, 32)
    settings = {"metrics": ["pid4", "fill_probability", "average_drop"], "mean": None, "std": None}
    scores = evaluate(Normalising(True).eval(), images, maps, TARGETS, **settings)
    assert torch.equal(images, X)
    expected = evaluate(Normalising(False).eval(), X, maps, TARGETS, **settings)
    for name, values in expected.items():
        assert torch.allclose(scores[name], values, atol=1e-6), name
    assert "changes the answer" not in caplog.text


@pytest.mark.parametrize("method", ["gradcam", "gradient", "occlusion"])
def test_a_model_whose_equal_calls_differ_is_named(method):
    with pytest.warns(UserWarning, match="Dropping gives other logits at every call for the same images in eval mode"):
        explain(Dropping().eval(), X, method, TARGETS)


def test_scores_of_a_model_whose_equal_calls_differ_are_warned_about():
    with pytest.warns(UserWarning, match=r"Dropping .* such as F\.dropout"):
        evaluate(Dropping().eval(), X, torch.rand(2, 32, 32), TARGETS, ["pid4"], mean=None, std=None)


@pytest.mark.filterwarnings("ignore:Dropping gives other logits")
def test_relevance_refuses_a_model_whose_equal_calls_differ_with_the_reason():
    with pytest.raises(ValueError, match=r"Dropping gives other logits .* Relevance cannot be propagated"):
        explain(Dropping().eval(), X, "lrp", TARGETS)


def test_a_softmax_at_the_end_is_recognised():
    soft = nn.Sequential(*base(), nn.Softmax(1)).eval()
    maps = torch.rand(2, 32, 32)
    with pytest.raises(ValueError, match=r"Sequential returns probabilities \(its rows sum to one\)"):
        evaluate(soft, X, maps, TARGETS, ["pid4"], mean=None, std=None)
    with pytest.raises(ValueError, match="Relevance starts at logits"):
        explain(soft, X, "lrp", TARGETS)
    with pytest.warns(UserWarning, match="The probability is explained, not the logit"):
        explain(soft, X, "gradcam", TARGETS)


def test_probabilities_are_read_as_given_when_asked_for():
    soft, maps = nn.Sequential(*base(), nn.Softmax(1)).eval(), torch.rand(2, 32, 32)
    settings = {"metrics": ["pid4", "insertion4", "fill_probability"], "mean": None, "std": None}
    given = evaluate(soft, X, maps, TARGETS, probability="identity", **settings)
    expected = evaluate(base(), X, maps, TARGETS, **settings)
    for name, values in expected.items():
        assert torch.allclose(given[name], values, atol=1e-6), name


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([[0.25, 0.75], [1.0, 0.0]], True),
        ([[0.5, 0.5], [0.5, 0.5]], False),  # zero weights give this, too
        ([[1.5, -0.5], [0.5, 0.5]], False),
        ([[0.25, 0.7], [1.0, 0.0]], False),
        ([[1.0], [1.0]], False),
    ],
)
def test_distributions_are_told_from_logits(logits, expected):
    assert are_probabilities(torch.tensor(logits)) is expected


@pytest.mark.parametrize("call", ["explain", "evaluate"])
def test_one_number_per_image_is_answered_with_what_is_needed(call):
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base()

        def forward(self, x):
            return self.base(x)[:, 0]

    calls = {
        "explain": lambda model: explain(model, X, "gradcam"),
        "evaluate": lambda model: evaluate(model, X, torch.rand(2, 32, 32), metrics=["pid4"], mean=None, std=None),
    }
    with pytest.raises(TypeError, match=r"returned \(2,\), one number per image; logits \(B, num_classes\) are needed"):
        calls[call](Squeezed().eval())


def test_a_backbone_without_gradients_is_named():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = base()[:2], base()[2:]

        def forward(self, x):
            with torch.no_grad():
                features = self.backbone(x)
            return self.head(features)

    with pytest.raises(ValueError, match=r"Frozen runs 'backbone', .* under torch\.no_grad\(\)"):
        explain(Frozen().eval(), X, "gradcam", TARGETS)
    with pytest.raises(ValueError, match=r"reaches target_layer: .* or runs under torch\.no_grad\(\)"):
        explain(Frozen().eval(), X, "gradcam", TARGETS, target_layer="backbone.1")


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.normal_(generator=torch.Generator().manual_seed(1)),
        lambda weight: weight.data[3].mul_(-1),
        lambda weight: weight.detach().numpy().__setitem__((2, 1, 1, 1), 9.0),
        lambda weight: weight.data.copy_(weight.data.flip(0)),
    ],
    ids=["all", "one filter", "one number through NumPy", "exchanged filters"],
)
def test_copies_follow_weights_that_change_without_a_version(write):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model, maps = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval(), torch.rand(2, 32, 32)

    def everything(net):
        settings = {"metrics": ["pid4", "fill_probability"], "mean": None, "std": None}
        scores = evaluate(net, X, maps, TARGETS, **settings)
        of_methods = [explain(net, X, m, TARGETS, **o).maps for m, o in (("lrp", {}), ("scorecam", {}))]
        return [*scores.values(), *of_methods, explain(net, X, "rise", TARGETS, n_masks=8).maps]

    everything(model)
    versions = [p._version for p in model.parameters()]
    write(model[3].weight)
    assert [p._version for p in model.parameters()] == versions
    for changed, fresh in zip(everything(model), everything(copy.deepcopy(model))):
        assert torch.equal(changed, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_signs_of_a_large_matrix_change_its_key(dtype):
    """Sums over rows of 4093 integers alone would not tell exchanged rows, nor an even number of changed signs."""
    layer = nn.Linear(COLUMNS * 8 // dtype.itemsize, 40, bias=False, dtype=dtype)
    keys = [state_key(layer)]
    weight = layer.weight.data
    weight[[0, 39]] = weight[[39, 0]]
    keys.append(state_key(layer))
    weight[::20] = -weight[::20]
    keys.append(state_key(layer))
    assert keys[0] != keys[1] != keys[2]


def test_a_copy_is_kept_while_nothing_changes():
    model = base()
    assert fast_copy(model, X).copy is fast_copy(model, X).copy
    assert traits_of(model, X) is traits_of(model, X)
    assert "gradcam" in EXPLAINERS


class Scaled(nn.Module):
    """Logits times a factor, which lies in an attribute of some kind."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        self.base, self.forwards, self.last = base(), 0, None
        for name, value in attributes.items():
            setattr(self, name, value)

    def factor(self):
        return self.scale

    def forward(self, x):
        self.forwards += 1
        self.last = self.base(x)
        return self.last * float(self.factor())


class WritingOnce(Scaled):
    """Fills in the factor that is missing."""

    def factor(self):
        if self.scale is None:
            self.scale = 1.0
        return self.scale


class Configured(Scaled):
    """Reads the factor from an object."""

    def factor(self):
        return self.cfg.scale


class WithArray(Scaled):
    """Reads the factor from an array."""

    def factor(self):
        return self.array[0]


class WithObjects(Scaled):
    """Reads the factor from an object inside an object that also knows itself."""

    def factor(self):
        return self.cfg.parts["head"][0].scale


@dataclass
class Config:
    """A configuration."""

    scale: float = 1.0


@dataclass
class Slotted:
    """A configuration without a dictionary."""

    __slots__ = ("scale",)
    scale: float


class Nested:
    """A plain object that refers to itself."""

    def __init__(self) -> None:
        self.parts, self.parent = {"head": [Config()]}, self


def set_scale(model):
    model.scale = 5.0


def set_missing(model):
    model.scale = None
    model(X)  # as a training step does between two explanations
    model.scale = 5.0


def set_in_config(model):
    model.cfg.scale = 5.0


def set_in_array(model):
    model.array[0] = 5.0


def set_in_nested(model):
    model.cfg.parts["head"][0].scale = 5.0


CHANGES = {
    "written once": (lambda: WritingOnce(scale=None), set_scale),
    "written twice": (lambda: WritingOnce(scale=None), set_missing),
    "namespace": (lambda: Configured(cfg=SimpleNamespace(scale=1.0)), set_in_config),
    "dataclass": (lambda: Configured(cfg=Config()), set_in_config),
    "slots": (lambda: Configured(cfg=Slotted(1.0)), set_in_config),
    "array": (lambda: WithArray(array=np.ones(2)), set_in_array),
    "nested": (lambda: WithObjects(cfg=Nested()), set_in_nested),
}


@pytest.mark.parametrize("case", CHANGES)
def test_scores_follow_an_attribute_that_the_user_changes(case):
    build, change = CHANGES[case]
    model, maps = build().eval(), torch.rand(2, 32, 32)

    def scores(net):
        return evaluate(net, X, maps, TARGETS, ["pid4"], mean=None, std=None)["pid4"]

    before = scores(model)
    assert torch.equal(scores(model), before)
    change(model)
    fresh = build().eval()
    change(fresh)
    expected = scores(fresh)
    assert torch.equal(scores(model), expected)
    assert not torch.equal(expected, before)


def test_a_missing_attribute_that_is_written_from_the_images_is_no_old_one():
    class Calibrated(Scaled):
        def factor(self):
            if self.scale is None:
                self.scale = float(self.last.abs().max())
            return self.scale

    model, maps = Calibrated(scale=None).eval(), torch.rand(2, 32, 32)
    settings = {"metrics": ["pid4"], "mean": None, "std": None}
    for images in (X, 3 * X):
        for fold in (True, False):
            model.scale = None
            scores = evaluate(model, images, maps, TARGETS, fold=fold, **settings)["pid4"]
            fresh = evaluate(Calibrated(scale=model.scale).eval(), images, maps, TARGETS, fold=fold, **settings)["pid4"]
            assert torch.equal(scores, fresh)


def test_a_copy_is_kept_of_a_model_that_keeps_its_last_output():
    model = Scaled(scale=1.0).eval()
    for _ in range(2):
        explain(model, X, "scorecam", TARGETS)
    copied = fast_copy(model, X).copy
    explain(model, X, "scorecam", TARGETS)
    assert fast_copy(model, X).copy is copied
    model.last = torch.zeros(1)
    assert fast_copy(model, X).copy is copied
    model.scale = 2.0
    assert fast_copy(model, X).copy is not copied


def zero_head(soft):
    soft[4].weight.data.zero_(), soft[4].bias.data.zero_()


def test_a_softmax_that_was_first_seen_with_a_head_of_zeros_is_recognised_later():
    soft = nn.Sequential(*base(), nn.Softmax(1)).eval()
    weights = copy.deepcopy(soft.state_dict())
    zero_head(soft)
    assert not traits_of(soft, X).probabilities
    soft.load_state_dict(weights)
    assert traits_of(soft, X).probabilities


def test_a_softmax_that_was_first_seen_on_images_without_content_is_recognised_later():
    soft = nn.Sequential(*base(), nn.Softmax(1)).eval()
    soft[0].bias.data.zero_(), soft[4].bias.data.zero_()
    assert not traits_of(soft, torch.zeros_like(X)).probabilities
    assert traits_of(soft, X).probabilities


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_softmax_that_was_first_seen_in_half_precision_is_recognised_in_single(dtype):
    soft = nn.Sequential(*base(), nn.Softmax(1)).eval()
    assert not traits_of(soft, X.to(dtype)).probabilities
    assert traits_of(soft, X).probabilities


def test_a_random_model_that_was_first_seen_with_a_head_of_zeros_is_named_later():
    model = Dropping().eval()
    weight = model.head.weight.detach().clone()
    model.head.weight.data.zero_()
    assert traits_of(model, X).repeats
    model.head.weight.data.copy_(weight)
    assert not traits_of(model, X).repeats


def test_two_equal_calls_decide_once_for_all_images():
    model, calls = base(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    traits_of(model, X)
    traits_of(model, 2 * X)
    assert len(calls) == 2
