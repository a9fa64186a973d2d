"""Fast copies with BatchNorm folded: exactness, choice of the form, and when a copy is made again."""

import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from labn.explainers import Gradient
from labn.inference.fast_copy import fast_copy
from labn.inference.folding import fold_batchnorm
from labn.models.lambda_networks.layer import LambdaLayer
from labn.perturbation.engine import PerturbationEngine


def settle(model: nn.Module) -> nn.Module:
    """Random statistics and affine weights for every BatchNorm."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 2, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


class Block(nn.Module):
    """Two convolutions with BatchNorm, the second behind Python control flow and in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.last = nn.BatchNorm2d(5)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu_()
        if x.mean() > -1:
            x = self.norm2(self.second(x))
        return self.last(x.relu()).mean((2, 3))


class Behind(nn.Module):
    """A BatchNorm after `between(conv(x))`, and `after(norm, conv)` on top."""

    def __init__(self, between=lambda c: c, after=lambda n, c: n) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.between, self.after = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between, after

    def forward(self, x):
        conv = self.conv(x)
        return self.after(self.norm(self.between(conv)), conv).mean((2, 3))


@pytest.fixture
def probe():
    return torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def test_folding_is_exact_and_leaves_only_batchnorms_without_a_convolution_before_them(probe):
    model = settle(Block().double())
    with torch.no_grad():
        folded = fold_batchnorm(model, probe)
        other = torch.randn(4, 3, 9, 9, dtype=torch.float64)
        assert torch.allclose(folded(other), model(other), atol=1e-12)
    assert norms(folded) == 1
    assert norms(model) == 3


def test_timm_batchnorm_with_activation_keeps_its_activation(probe):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    model = settle(
        nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4, act_layer=nn.GELU), nn.Flatten()).double()
    )
    with torch.no_grad():
        folded = fold_batchnorm(model, probe)
        assert norms(folded) == 0
        assert torch.allclose(folded(probe), model(probe), atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_batchnorms_of_a_lambda_layer_are_folded_into_their_channels(probe, stride):
    """Each reads a part of the output of one convolution, so that no BatchNorm has a convolution's output as input."""
    torch.manual_seed(0)
    layer = LambdaLayer(8, dim_k=4, dim_u=2, heads=2, r=5, stride=stride)
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Flatten()).double())
    with torch.no_grad():
        folded = fold_batchnorm(model, probe)
        assert (norms(model), norms(folded)) == (2, 0)
        assert torch.allclose(folded(probe), model(probe), atol=1e-12)
    assert model[1].to_qkv.bias is None


def test_a_shared_lambda_layer_is_folded_once_and_a_hooked_one_is_not(probe):
    layer = LambdaLayer(3, dim_k=4, heads=1, r=3)
    model = settle(nn.Sequential(layer, layer, nn.Flatten()).double())
    with torch.no_grad():
        assert torch.allclose(fold_batchnorm(model, probe)(probe), model(probe), atol=1e-12)
        other = settle(LambdaLayer(3, dim_k=4, heads=1, r=3).double())
        other.to_qkv = layer.to_qkv
        assert fold_batchnorm(nn.Sequential(layer, other), probe) is None
        layer.norm_q.register_forward_hook(lambda *_: None)
        assert norms(fold_batchnorm(model, probe)) == 1
        layer.to_qkv.register_forward_hook(lambda *_: None)
        assert fold_batchnorm(model, probe) is None


@pytest.mark.parametrize("between", [torch.relu, torch.relu_, lambda c: c * 2])
def test_a_batchnorm_behind_anything_else_is_not_folded(probe, between):
    with torch.no_grad():
        assert fold_batchnorm(settle(Behind(between).double()), probe) is None


def test_a_convolution_used_twice_is_not_folded(probe):
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = settle(nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3), nn.Flatten()).double())
    with torch.no_grad():
        assert fold_batchnorm(model, probe) is None


def test_a_convolution_whose_output_is_also_read_elsewhere_stays_unfolded_with_a_warning(probe, caplog):
    model = settle(Behind(after=lambda norm, conv: norm + 3 * conv).double())
    with caplog.at_level(logging.WARNING):
        assert not fast_copy(model, probe).form.folded
    assert "another form is taken" in caplog.text


@pytest.mark.parametrize(("channels", "offset"), [(1, 0.0), (4, 80.0)])
def test_probabilities_that_are_all_one_do_not_hide_a_wrong_copy(probe, channels, offset):
    """With one logit, or saturated ones, the softmax does not show what folding has changed."""
    model = settle(Behind(after=lambda norm, conv: (norm + 3 * conv)[:, :channels]).double())
    head = nn.Linear(channels, channels, bias=True, dtype=torch.float64)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    head.bias.data[0] = offset
    with torch.no_grad():
        assert not fast_copy(nn.Sequential(model, head).eval(), probe).form.folded


def test_a_model_that_needs_the_default_memory_format_gets_it(probe):
    class Viewing(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)[:, :3]

    prepared = fast_copy(Viewing(), probe)
    assert prepared.form.memory_format == torch.contiguous_format
    assert not prepared.form.folded


def test_a_copy_is_made_once_and_again_after_any_training_step(probe):
    model = settle(Block().double())
    first = fast_copy(model, probe)
    assert first.form.folded
    assert fast_copy(model, torch.randn_like(probe)).copy is first.copy
    for change in (_optimiser_step, _statistics_step, _load):
        before = fast_copy(model, probe)
        change(model)
        after = fast_copy(model.eval(), probe)
        assert after.copy is not before.copy
        with torch.no_grad():
            assert torch.allclose(after.copy(probe), model(probe), atol=1e-12)


class Scaled(nn.Module):
    """A module that reads settings of every kind and writes its last input on itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.activation, self.scale = nn.Conv2d(3, 4, 3), nn.ReLU(), 1.0
        self.scales, self.by_name, self._temperature = [1.0, [1.0]], {"last": 1.0}, 1.0
        self.tensor, self.function = torch.ones((), dtype=torch.float64), torch.abs
        self.calls, self.last = 0, None

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x.mean()
        scale = self.scale * self.scales[1][0] * self.by_name["last"] * self.tensor / self._temperature
        return self.function(self.activation(self.conv(x)).mean((2, 3)) - 0.2) * scale


def _replace_forward(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x: 20 * forward(x)


def test_a_copy_is_made_again_after_edits_of_settings_modules_and_hooks(probe):
    edits = {
        "setting": lambda model: setattr(model, "scale", 10.0),
        "setting of a layer": lambda model: setattr(model.conv, "padding", (2, 2)),
        "module": lambda model: setattr(model, "activation", nn.Sigmoid()),
        "hook": lambda model: model.activation.register_forward_hook(lambda *arguments: arguments[-1] * 0.5),
        "list in a list": lambda model: model.scales[1].__setitem__(0, 5.0),
        "dictionary": lambda model: model.by_name.update(last=5.0),
        "tensor": lambda model: model.tensor.mul_(5),
        "another tensor": lambda model: setattr(model, "tensor", torch.full((), 5.0, dtype=torch.float64)),
        "private number": lambda model: setattr(model, "_temperature", 0.1),
        "function": lambda model: setattr(model, "function", torch.square),
        "pre-hook": lambda model: model.conv.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    }
    for name, edit in edits.items():
        model = Scaled().double()
        before = fast_copy(model, probe)
        edit(model)
        after = fast_copy(model, probe)
        assert after.copy is not before.copy, name
        with torch.no_grad():
            assert torch.allclose(after.copy(probe), model(probe), atol=1e-12), name
            assert not torch.allclose(before.copy(probe), model(probe), atol=1e-3), name


def test_attributes_written_in_a_forward_pass_do_not_cause_a_new_copy(probe):
    model = Scaled().double()
    first = fast_copy(model, probe)
    model(probe)
    assert fast_copy(model, probe) is first


def test_attributes_written_in_a_backward_pass_do_not_cause_a_new_copy_per_batch(probe):
    class Remembering(Scaled):
        """Keeps the gradient of its features, as explanations of transformers do."""

        def forward(self, x):
            features = self.conv(x)
            if features.requires_grad:
                features.register_hook(lambda gradient: setattr(self, "gradient", gradient))
            return features.mean((2, 3))

    model, explainer = Remembering().double(), Gradient()
    copies = []
    for _ in range(4):
        explainer(model, probe, torch.tensor([0]))
        copies.append(fast_copy(model, probe).copy)
    assert copies[1] is copies[2] is copies[3]


def test_a_setting_that_contains_itself_is_fingerprinted(probe):
    model = Scaled().double()
    model.by_name["self"] = model.by_name
    first = fast_copy(model, probe)
    assert fast_copy(model, probe) is first


def test_a_forward_set_on_the_instance_is_run(probe):
    """The function is bound to the layers of the model itself, which a copy would run too."""
    model = Scaled().double()
    before = fast_copy(model, probe)
    _replace_forward(model)
    after = fast_copy(model, probe)
    assert before.form.copied
    assert not after.form.copied


def test_layers_held_by_a_function_run_in_eval_mode_and_are_not_changed(probe):
    """`copy.deepcopy` keeps functions, so that a copy would run, and train, the model's own layers."""
    model = settle(Block().double())
    forward = model.forward
    model.forward = lambda x: (forward(x),)[0]
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = PerturbationEngine.for_model(model.train(), images).original()
    assert torch.allclose(found, expected, atol=1e-12)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def _optimiser_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def _statistics_step(model: nn.Module) -> None:
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 9, 9, dtype=torch.float64))


def _load(model: nn.Module) -> None:
    state = model.state_dict()
    model.load_state_dict({name: value + 0.1 if value.is_floating_point() else value for name, value in state.items()})


def test_the_copy_is_freed_with_its_model(probe):
    model = settle(Block().double())
    copy = weakref.ref(fast_copy(model, probe).copy)
    plain = weakref.ref(model)
    fast_copy(model, probe, fold=False)
    del model
    gc.collect()
    assert plain() is None
    assert copy() is None


def test_the_choice_depends_on_no_image_content(probe):
    model = settle(Block().double())
    assert fast_copy(model, torch.full_like(probe, torch.nan)).form.folded


def test_parametrized_weights_are_not_folded(probe):
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double())
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        assert fold_batchnorm(model, probe) is None
