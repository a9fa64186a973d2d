"""Networks and arguments of kinds that users bring: the answer of an equal network, or one sentence."""

import copy
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from labn import evaluate, explain
from labn.metrics.functional import patch_insertion_deletion

GENERATOR = torch.Generator().manual_seed(0)
X, MAPS = torch.randn(2, 3, 16, 16, generator=GENERATOR), torch.rand(2, 16, 16, generator=GENERATOR)
TARGETS = torch.tensor([0, 1])
METHODS = {"gradxinput": {}, "gradcam": {}, "ablationcam": {}, "lrp": {}, "rise": {"n_masks": 4}}

Output = namedtuple("Output", "logits features")
pytestmark = pytest.mark.filterwarnings("ignore")


def net(classes=4):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(6, classes)).eval()


class Ending(nn.Module):
    """The network with something done to its logits."""

    def __init__(self, end):
        super().__init__()
        self.body, self.end = net(), end

    def forward(self, x):
        return self.end(self.body(x))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * F.relu(x)


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model[3])
    return model


def with_hook(model):
    model[2].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def with_doubled(model):
    model[2] = Doubled()
    return model


TWINS = {
    "parametrised weight": (with_weight_norm, net),
    "hook that changes an output": (lambda model: with_hook(model), lambda: with_doubled(net())),
    "named tuple": (lambda model: Ending(lambda y: Output(y, y)), net),
    "training mode": (lambda model: model.train(), net),
    "frozen parameters": (lambda model: model.requires_grad_(False), net),
    "data parallel": (lambda model: nn.DataParallel(model), net),
    "compiled": (lambda model: torch.compile(model, backend="eager"), net),
}


@pytest.mark.parametrize("name", TWINS)
def test_equal_networks_have_equal_answers(name):
    change, twin = TWINS[name]
    model, twin = change(net()), twin()
    for method, options in METHODS.items():
        got, expected = (explain(m, X, method, TARGETS, **options).maps for m in (model, twin))
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max())), method
    scores = [patch_insertion_deletion(m, X, MAPS, TARGETS, patch_size=4)["pid"] for m in (model, twin)]
    assert torch.allclose(*scores, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        X[:1].expand(2, -1, -1, -1),
        torch.randn(4, 3, 32, 32)[::2, :, ::2, 1::2],
        X.mT.contiguous().mT,
        X.clone().requires_grad_(),
        1 * X.clone().requires_grad_(),
    ],
    ids=["expanded", "strided", "transposed", "leaf", "inside a graph"],
)
def test_memory_and_graph_of_the_images_do_not_matter(images):
    plain = images.detach().clone(memory_format=torch.contiguous_format)
    for method, options in METHODS.items():
        got, expected = (explain(net(), x, method, TARGETS, **options).maps for x in (images, plain))
        assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max())), method
    assert images.grad is None if images.is_leaf else True


CALLS = [
    lambda model: explain(model, X, "gradcam"),
    lambda model: explain(model, X, "lrp", TARGETS),
    lambda model: explain(model, X, "rise", TARGETS, n_masks=4),
    lambda model: patch_insertion_deletion(model, X, MAPS, TARGETS, patch_size=4),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda y: {"logits": y}, "returned dict; a tensor of logits"),
        (lambda y: [y], "returned list; a tensor of logits"),
        (lambda y: y[:, :, None, None], r"logits of shape \(\d, 4, 1, 1\); \(B, num_classes\) is needed"),
        (lambda y: y[:, 0], "one number per image"),
    ],
)
def test_other_outputs_are_answered_with_what_is_needed(call, end, words):
    with pytest.raises(TypeError, match=words):
        call(Ending(end).eval())


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_torchscript_is_explained_where_no_layer_is_looked_at(make):
    model = make(net())
    for method in ("gradxinput", "rise"):
        got, expected = (explain(m, X, method, TARGETS, **METHODS[method]).maps for m in (model, net()))
        assert torch.allclose(got, expected, atol=1e-5)
    for method in ("gradcam", "lrp"):
        with pytest.raises(ValueError, match="is TorchScript, whose layers cannot be watched"):
            explain(model, X, method, TARGETS)


@pytest.mark.parametrize(
    ("method", "words"),
    [("gradxinput", "a layer passes no gradient"), ("gradcam", "no gradient of its logits reaches them")],
)
def test_layers_without_gradients_are_named_as_the_reason(method, words):
    class ThroughNumpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return torch.from_numpy(self.body(x).detach().numpy())

    with pytest.raises(ValueError, match=words):
        explain(ThroughNumpy().eval(), X, method, TARGETS)


def test_arrays_that_are_read_backwards_are_taken():
    maps = MAPS.numpy()[:, ::-1]
    got = evaluate(net(), X, maps, 1, ["pid4"], mean=None, std=None)["pid4"]
    assert torch.equal(got, evaluate(net(), X, MAPS.flip(1), 1, ["pid4"], mean=None, std=None)["pid4"])
    assert explain(net(), X, "gradcam", np.array([0, 1])[::-1]).targets.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("images", "maps", "targets", "words"),
    [
        (X[:0], MAPS[:0], TARGETS[:0], "B >= 1"),
        (X * torch.nan, MAPS, TARGETS, "images must be finite"),
        (X, MAPS.numpy(), TARGETS, "maps must be a tensor"),
        (X, MAPS[:, None], TARGETS, r"maps must be \(2, 16, 16\)"),
        (X, MAPS, [0, 1], "targets must be a tensor .* got list"),
        (X, MAPS, TARGETS.float(), "class indices, got .* torch.float32"),
        (X, MAPS, TARGETS[:1], r"targets must be a tensor \(2,\)"),
    ],
)
def test_the_functional_score_names_a_wrong_argument(images, maps, targets, words):
    with pytest.raises(ValueError, match=words):
        patch_insertion_deletion(net(), images, maps, targets, patch_size=4)


def test_the_functional_score_refuses_a_softmax_unless_it_is_asked_for():
    soft = nn.Sequential(net(), nn.Softmax(1)).eval()
    expected = patch_insertion_deletion(net(), X, MAPS, TARGETS, patch_size=4)["pid"]
    with pytest.raises(ValueError, match="returns probabilities"):
        patch_insertion_deletion(soft, X, MAPS, TARGETS, patch_size=4)
    got = patch_insertion_deletion(soft, X, MAPS, TARGETS, patch_size=4, probability="identity")["pid"]
    assert torch.allclose(got, expected, atol=1e-6)


def test_explanations_leave_the_model_as_it_was():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    for method, options in METHODS.items():
        explain(model, X, method, TARGETS, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class OneByOne(nn.Module):
    """Runs its network once per image."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return torch.cat([self.body(image[None]) for image in x])


def test_a_model_that_divides_the_batch_is_explained_alone_and_refused_in_a_batch():
    model = OneByOne().eval()
    for method in ("gradxinput", "lrp"):
        got, expected = (explain(m, X, method, TARGETS).maps for m in (model, net()))
        assert torch.allclose(got, expected, atol=1e-5)
    for method in ("gradcam", "scorecam", "smoothgradcam++"):
        got, expected = (explain(m, X[:1], method, 0).maps for m in (model, net()))
        assert torch.allclose(got, expected, atol=1e-5), method
        with pytest.raises(ValueError, match="the model divides the batch; explain the images one by one"):
            explain(model, X, method, TARGETS)
