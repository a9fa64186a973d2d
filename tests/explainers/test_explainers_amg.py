"""AMG: the effect of its gates, and its equivalences with Grad-CAM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from small_networks import DeepTail, GapLinear, pictures, seeded
from test_explainers_cam import TARGETS, raw
from torch import Tensor, nn

from labn.explainers import AttentionMapGuided, GradCAM
from labn.explainers.cam.attention_guided import ORDERS, ParameterFreeGates
from labn.models.cbam import CBAM, with_cbam


class ConstantGates(nn.Module):
    """Gates that are the same everywhere."""

    def __init__(self, channel: float, spatial: float) -> None:
        super().__init__()
        self.values = (channel, spatial)

    def channel_gate(self, x: Tensor) -> Tensor:
        return torch.full_like(x[:, :, :1, :1], self.values[0])

    def spatial_gate(self, x: Tensor) -> Tensor:
        return torch.full_like(x[:, :1], self.values[1])


@pytest.mark.parametrize("apply_to", ["weighted", "activation"])
def test_a_module_of_gates_is_run_in_eval_mode_and_restored(apply_to: str) -> None:
    model, images = seeded(DeepTail), pictures()
    gates = seeded(CBAM, channels=6, reduction=2).train()
    before = {name: tensor.clone() for name, tensor in gates.state_dict().items()}
    amg = AttentionMapGuided(attention=gates, apply_to=apply_to)
    together = raw(amg, model, images)
    assert gates.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in gates.state_dict().items())
    for k in range(len(images)):
        alone = raw(amg, model, images[k : k + 1], TARGETS[k : k + 1])
        assert torch.allclose(alone[0], together[k], atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("apply_to", ["weighted", "activation"])
def test_gates_that_are_one_give_gradcam(order: str, apply_to: str) -> None:
    model = seeded(DeepTail)
    amg = AttentionMapGuided(attention=ConstantGates(1, 1), order=order, apply_to=apply_to)
    assert torch.allclose(raw(amg, model, pictures()), raw(GradCAM(), model, pictures()), atol=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_constant_gates_scale_the_map(order: str) -> None:
    model = seeded(DeepTail)
    plain = raw(GradCAM(), model, pictures())
    for residual in (False, True):
        amg = AttentionMapGuided(attention=ConstantGates(0.5, 0.25), order=order, residual=residual)
        assert torch.allclose(raw(amg, model, pictures()), plain * (0.125 + residual), atol=1e-14)


def test_untrained_cbam_with_zero_weights_is_gradcam_over_four() -> None:
    gates = CBAM(6, reduction=2)
    for parameter in [*gates.mlp.parameters(), *gates.conv.parameters()]:
        nn.init.zeros_(parameter)
    model = seeded(DeepTail)
    found = raw(AttentionMapGuided(attention=gates.double().eval()), model, pictures())
    assert torch.allclose(found, raw(GradCAM(), model, pictures()) / 4, atol=1e-14)


def reference(maps: Tensor, order: str, residual: bool, box: int = 1) -> Tensor:
    """The reconstruction written out for one image (K, h, w), step by step."""

    def hat(f: Tensor) -> Tensor:
        return f / f.abs().max()

    def channel(f: Tensor) -> Tensor:
        return torch.stack([torch.sigmoid(hat(f)[k].mean() + hat(f)[k].max()) for k in range(len(f))])[:, None, None]

    def spatial(f: Tensor) -> Tensor:
        pooled = (hat(f).mean(0) + hat(f).max(0).values) / 2
        smooth = torch.empty_like(pooled)
        for i in range(pooled.shape[0]):
            for j in range(pooled.shape[1]):
                around = pooled[max(0, i - box // 2) : i + box // 2 + 1, max(0, j - box // 2) : j + box // 2 + 1]
                smooth[i, j] = around.mean()
        return torch.sigmoid(smooth)

    if order == "channel-spatial":
        first = channel(maps) * maps
        attended = spatial(first) * first
    elif order == "spatial-channel":
        first = spatial(maps) * maps
        attended = channel(first) * first
    else:
        attended = spatial(maps) * channel(maps) * maps
    return (attended + maps * residual).sum(0).relu()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("residual", "box"), [(False, 1), (True, 1), (False, 3)])
def test_parameter_free_gates_equal_their_definition(order: str, residual: bool, box: int) -> None:
    model, images = seeded(), pictures()
    activations = model.features(images).detach()
    weights = model.head.weight[TARGETS].detach() / activations[0, 0].numel()
    expected = torch.stack([reference(f, order, residual, box) for f in weights[:, :, None, None] * activations])
    found = raw(AttentionMapGuided(order=order, residual=residual, box=box), model, images)
    assert torch.allclose(found, expected, atol=1e-12)
    assert found.max() > 0


def test_the_map_does_not_depend_on_the_order_of_channels() -> None:
    maps = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    order = torch.randperm(6)
    gates = ParameterFreeGates(3)
    assert torch.allclose(gates.channel_gate(maps)[:, order], gates.channel_gate(maps[:, order]))
    assert torch.allclose(gates.spatial_gate(maps), gates.spatial_gate(maps[:, order]))


def test_the_spatial_gate_never_changes_a_sign() -> None:
    gate = ParameterFreeGates().spatial_gate(torch.randn(2, 6, 4, 5, dtype=torch.float64) * 10)
    assert gate.min() > 0
    assert gate.max() < 1


def test_normalise_makes_the_map_equivariant_to_the_scale_of_the_gradients() -> None:
    model = seeded()
    before = raw(AttentionMapGuided(), model, pictures())
    unscaled = raw(AttentionMapGuided(normalise=False), model, pictures())
    with torch.no_grad():
        model.head.weight.mul_(100)
    assert torch.allclose(raw(AttentionMapGuided(), model, pictures()), before * 100)
    assert not torch.allclose(raw(AttentionMapGuided(normalise=False), model, pictures()), unscaled * 100, rtol=1e-3)


def gated(network: nn.Module, seed: int = 3) -> nn.Module:
    """The network with a CBAM block whose gates are not constant."""
    torch.manual_seed(seed)
    model = with_cbam(network, before="pool", reduction=2).double()
    block = model.pool[0]
    block.norm.running_mean.fill_(0.3)
    block.norm.running_var.fill_(0.1)
    return model.eval()


def test_cbam_on_activations_equals_gradcam_after_the_block() -> None:
    plain, model = seeded(DeepTail), gated(seeded(DeepTail))
    behind = raw(GradCAM("pool.0"), model, pictures())
    inserted = AttentionMapGuided(attention=model.pool[0], apply_to="activation", target_layer="features")
    assert torch.allclose(raw(inserted, plain, pictures()), behind, atol=1e-14)
    assert torch.allclose(raw(GradCAM(), model, pictures()), behind)  # found without a name
    assert behind.max() > 0


def test_cbam_finds_its_block_and_reads_the_maps_before_it() -> None:
    model = gated(seeded(DeepTail))
    block, images = model.pool[0], pictures()
    maps = model.features(images).detach().requires_grad_()
    scores = model.head(model.pool(maps).flatten(1)).gather(1, TARGETS[:, None]).sum()
    (slope,) = torch.autograd.grad(scores, maps)
    weighted = (slope.mean((2, 3), keepdim=True) * maps).detach()
    channels = block.channel_gate(maps)
    gates = (block.spatial_gate(channels * maps) * channels).detach()
    assert gates.std((2, 3)).min() > 1e-3  # what the gates read tells positions apart
    found = raw(AttentionMapGuided(attention="cbam"), model, images)
    assert torch.allclose(found, (gates * weighted).sum(1).relu(), atol=1e-14)
    with pytest.raises(ValueError, match="no CBAM block"):
        AttentionMapGuided(attention="cbam")(seeded(), images, TARGETS)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_trained_gates_may_read_the_weighted_maps(normalise: bool, order: str) -> None:
    model = gated(seeded(DeepTail))
    block, images = model.pool[0], pictures()
    maps = model.features(images).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.head(model.pool(maps).flatten(1)).gather(1, TARGETS[:, None]).sum(), maps)
    weighted = (slope.mean((2, 3), keepdim=True) * maps).detach()

    def hat(f: Tensor) -> Tensor:
        return f / f.abs().amax((1, 2, 3), keepdim=True) if normalise else f

    if order == "parallel":
        expected = block.channel_gate(hat(weighted)) * block.spatial_gate(hat(weighted)) * weighted
    else:
        gates = [block.channel_gate, block.spatial_gate]
        expected = weighted
        for gate in gates if order == "channel-spatial" else gates[::-1]:
            expected = gate(hat(expected)) * expected
    amg = AttentionMapGuided(attention="cbam", normalise=normalise, order=order)
    assert torch.allclose(raw(amg, model, images), expected.sum(1).relu().detach(), atol=1e-14)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "googlenet"])
def test_with_cbam_keeps_the_names_of_the_weights(name: str) -> None:
    options: dict[str, Any] = {"init_weights": False} if name != "resnet18" else {}
    model = getattr(torchvision.models, name)(num_classes=5, **options)
    before = model.state_dict()
    after = with_cbam(model).state_dict()
    assert set(before) < set(after)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [type(m) for m in model.modules()].count(CBAM) == 1
    maps = AttentionMapGuided(attention="cbam")(model, torch.randn(1, 3, 64, 64), torch.tensor([0]))
    assert maps.shape == (1, 64, 64)


def test_cbam_equals_its_equations() -> None:
    torch.manual_seed(0)
    block, maps = CBAM(8, reduction=4, kernel_size=3).double().eval(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    first, last = block.mlp[0], block.mlp[2]

    def shared(v: Tensor) -> Tensor:
        hidden = (v @ first.weight.flatten(1).T + first.bias).relu()
        return hidden @ last.weight.flatten(1).T + last.bias

    channel = torch.sigmoid(shared(maps.mean((2, 3))) + shared(maps.flatten(2).max(2).values))
    f1 = channel[:, :, None, None] * maps
    stacked = torch.stack([f1.max(1).values, f1.mean(1)], 1)
    spatial = torch.sigmoid(nn.functional.conv2d(stacked, block.conv.weight, padding=1) / (1 + block.norm.eps) ** 0.5)
    assert torch.allclose(block(maps), spatial * f1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "trained"}, "attention must be"),
        ({"order": "both"}, "order must be one of"),
        ({"apply_to": "image"}, "apply_to must be"),
        ({"box": 2}, "box must be odd"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMapGuided(**arguments)


def test_with_cbam_names_the_missing_layer() -> None:
    with pytest.raises(ValueError, match="no pooling layer of a known name"):
        with_cbam(GapLinear())
    with pytest.raises(ValueError, match="not a layer of GapLinear"):
        with_cbam(GapLinear(), before="nothing")
    with pytest.raises(ValueError, match="whose input is not feature maps"):
        with_cbam(GapLinear(), before="head")
