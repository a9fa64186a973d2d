import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from labn.models import (
    AttentionBranchNetwork,
    BranchOutput,
    build_network,
    gate_attention,
    gate_health,
    share_threshold,
)

TINY = {"width": 4, "layers": (1, 2, 1), "r": 3, "heads": 2, "dim_k": 3}


def tiny(**arguments) -> AttentionBranchNetwork:
    torch.manual_seed(0)
    given = {"backbone": "lambda_resnet", "backbone_options": TINY, "split": 2, **arguments}
    return AttentionBranchNetwork(**given)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_networks_have_the_parameter_counts_of_the_papers():
    idrid = AttentionBranchNetwork()
    assert count(idrid.attention_branch) == 9_216_152
    assert count(idrid) == 22_167_098
    assert count(AttentionBranchNetwork("magnetogram_net", in_channels=1, split=0, theta=0.5)) == 21_598


@pytest.mark.parametrize("split", range(5))
def test_an_open_gate_reproduces_the_backbone_exactly(split):
    backbone = build_network("lambda_resnet", 3, **TINY).double().eval()
    network = AttentionBranchNetwork(backbone, num_classes=3, split=split).double().eval()
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    assert torch.equal(network.perception_branch(network.feature_extractor(x)), backbone(x))


def test_theta_zero_keeps_the_map_and_theta_one_makes_the_prediction_independent_of_the_image():
    network = tiny(theta=0.0).eval()
    images = torch.randn(2, 3, 32, 32)
    output = network(images)
    features = network.feature_extractor(images)
    assert torch.equal(output.logits, network.perception_branch(output.attention * features))
    network.theta = 1.0
    first, second = network(images).logits
    assert torch.equal(first, second)


def test_the_gate_is_strict_and_only_open_positions_have_a_gradient():
    attention = torch.tensor([0.2, 0.75, 0.7500001, 0.9], requires_grad=True)
    gated = gate_attention(attention, 0.75)
    assert gated.tolist() == [0.0, 0.0, attention[2].item(), attention[3].item()]
    (gradient,) = torch.autograd.grad(gated.sum(), attention)
    assert gradient.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert gate_attention(torch.tensor([float("nan")]), 0.5).isnan().all()


def test_features_are_zero_exactly_where_the_gate_is_closed():
    network = tiny(theta=0.5).train()
    seen = []
    network.perception_branch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = network(torch.randn(4, 3, 64, 64))
    closed = (output.attention <= 0.5).expand_as(seen[0])
    assert closed.any()
    assert (~closed).any()
    assert (seen[0][closed] == 0).all()


def test_gate_health_counts_open_positions_and_images_without_any():
    attention = torch.zeros(4, 1, 2, 2)
    attention[0] = 1.0
    attention[1, 0, 0, 0] = 0.9
    attention[2] = 0.5
    open_fraction, empty = gate_health(attention, 0.5)
    assert (open_fraction.item(), empty.item()) == (5 / 16, 0.5)


@pytest.mark.parametrize("branch", ["labn", "abn"])
def test_heads_of_the_branch_are_independent(branch):
    network = tiny(branch=branch)
    output = network(torch.randn(2, 3, 32, 32))
    heads = network.attention_branch.attention_head, network.attention_branch.class_head
    by_attention, by_class = (list(head.parameters()) for head in heads)
    for result, foreign, own in (
        (output.branch_logits, by_attention, by_class),
        (output.attention, by_class, by_attention),
    ):
        weights = torch.randn_like(result)
        gradients = torch.autograd.grad(
            (result * weights).sum(), [*foreign, *own], allow_unused=True, retain_graph=True
        )
        assert all(g is None for g in gradients[: len(foreign)])
        assert all(g is not None for g in gradients[len(foreign) :])


def test_abn_adds_the_gated_features_and_uses_its_own_branch():
    network = tiny(branch="abn", gate="residual", theta=0.0, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    output, features = network(images), network.feature_extractor(images)
    assert torch.equal(output.logits, network.perception_branch((1 + output.attention) * features))
    convolution = network.attention_branch.attention_head[0]
    assert (convolution.kernel_size, convolution.in_channels) == ((3, 3), 5)
    assert output.attention.shape[-2:] == features.shape[-2:]


def test_abn_on_resnet50_has_the_blocks_of_its_last_stage():
    network = AttentionBranchNetwork("resnet50", 200, split=13, branch="abn", gate="residual", theta=0.0)
    assert [block.conv2.in_channels for block in network.attention_branch.blocks] == [512] * 3
    assert network.attention_branch.project[0].num_features == 2048
    assert all(block.conv2.stride == (1, 1) for block in network.attention_branch.blocks)


def test_abn_on_basic_blocks_uses_basic_blocks_and_labn_bottlenecks():
    abn = AttentionBranchNetwork("resnet18", split=6, branch="abn").attention_branch
    labn = AttentionBranchNetwork("resnet18", split=6).attention_branch
    assert [type(b).__name__ for b in abn.blocks] == ["BasicBlock", "BasicBlock"]
    assert abn.project[0].num_features == 512
    assert [type(b).__name__ for b in labn.blocks] == ["Bottleneck", "Bottleneck"]
    assert labn.project[0].num_features == 1024


@pytest.mark.parametrize("branch", ["labn", "abn"])
def test_a_branch_can_have_lambda_blocks(branch):
    options = {"r": 3, "heads": 2}
    network = tiny(branch=branch, lab_block="lambda", branch_options=options, lab_hidden=6)
    assert {type(b).__name__ for b in network.attention_branch.blocks} == {"LambdaBottleneck"}
    output = network(torch.randn(2, 3, 32, 32))
    assert output.attention.shape == (2, 1, 4, 4)
    assert network.attention_branch.class_head[0].in_channels == 6


@pytest.mark.parametrize(("name", "split"), [("resnet18", 3), ("timm/resnet18", 4), ("timm/resnet26d", 5)])
def test_attention_branches_work_on_other_backbones(name, split):
    network = AttentionBranchNetwork(name, num_classes=4, in_channels=1, split=split)
    output = network(torch.randn(2, 1, 64, 64))
    assert output.logits.shape == output.branch_logits.shape == (2, 4)
    assert network.head.out_features == 4
    assert 0 < output.attention.min() <= output.attention.max() < 1


def test_head_is_the_classifier_of_the_backbone():
    network = resnet18(num_classes=2)
    assert AttentionBranchNetwork(network, split=4).head is network.fc


def test_every_parameter_has_a_gradient():
    network = tiny(theta=0.3)
    output = network(torch.randn(4, 3, 64, 64))
    (output.logits.square().sum() + output.branch_logits.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_output_is_frozen_and_survives_pickling():
    output = tiny().eval()(torch.randn(1, 3, 32, 32))
    with pytest.raises(FrozenInstanceError):
        output.logits = output.attention
    copy = pickle.loads(pickle.dumps(BranchOutput(*(t.detach() for t in vars(output).values()))))
    assert torch.equal(copy.attention, output.attention)


@pytest.mark.slow
def test_output_passes_through_torch_compile():
    network = tiny(split=1, backbone_options={**TINY, "layers": (1,)}).eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 32, 32)
    found, wanted = compiled(images), network(images)
    assert isinstance(found, BranchOutput)
    for name, value in vars(wanted).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains():
    network = tiny(theta=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(torch.randn(2, 3, 64, 64))
        loss = output.logits.float().square().sum() + output.branch_logits.float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": 5}, "split is 5; this backbone has 4 blocks: 0 to 4"),
        ({"split": -1}, "split is -1"),
        ({"gate": "add"}, "gate is 'add'; it must be one of mul, residual"),
        ({"branch": "cam"}, "branch is 'cam'"),
        ({"lab_block": "wide"}, "lab_block is 'wide'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize(("theta", "start"), [(0.5, 0.2), (0.75, 0.2), (0.0, 1.0)])
def test_gate_margin_starts_with_a_flat_map_above_the_threshold(theta, start):
    network = AttentionBranchNetwork("resnet18", split=2, theta=theta, gate_margin=start).double()
    expected = torch.tensor(start, dtype=torch.float64) + torch.logit(torch.tensor(theta or 0.5, dtype=torch.float64))
    for mode in (True, False):
        output = network.train(mode)(torch.randn(2, 3, 64, 64, dtype=torch.float64))
        torch.testing.assert_close(output.attention, expected.sigmoid().expand_as(output.attention))
        assert gate_health(output.attention, theta)[0] == 1
    scale = network.attention_branch.attention_head[-2].weight
    network.train()
    loss = network(torch.randn(2, 3, 64, 64, dtype=torch.float64)).logits[:, 0].sum()
    assert torch.autograd.grad(loss, scale)[0].abs() > 0


@pytest.mark.parametrize(("theta", "margin"), [(0.5, 0.0), (0.5, -1.0), (1.0, 0.2)])
def test_a_gate_margin_that_leaves_the_gate_closed_raises(theta, margin):
    with pytest.raises(ValueError, match="gate_margin is"):
        AttentionBranchNetwork("resnet18", split=2, theta=theta, gate_margin=margin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_share_of_each_image_stays_open_and_ties_with_it(dtype):
    rows = [[0.1, 0.9, 0.3, 0.7], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.25, 1.0]]
    attention = torch.tensor(rows, dtype=dtype).reshape(3, 1, 2, 2)
    opened = {s: (attention > share_threshold(attention, s)).flatten(1).sum(1).tolist() for s in (0.01, 0.5, 0.75, 1.0)}
    assert opened == {0.01: [1, 4, 1], 0.5: [2, 4, 2], 0.75: [3, 4, 4], 1.0: [4, 4, 4]}
    kept = gate_attention(attention, share_threshold(attention, torch.tensor(0.5)))
    assert torch.equal(kept[0].flatten(), torch.tensor([0, 0.9, 0, 0.7], dtype=dtype))
    assert gate_health(attention, share_threshold(attention, 0.5)) == (torch.tensor(8 / 12), torch.tensor(0.0))


def test_an_exported_gate_has_the_same_threshold(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    attention = torch.cat([torch.rand(1000, generator=generator), 2.0 ** -torch.arange(0.0, 24.0)])[:, None, None, None]
    expected = share_threshold(attention, 1.0)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(share_threshold(attention, 1.0), expected)
    assert (torch.zeros(1, 1, 1, 1) > share_threshold(torch.zeros(1, 1, 1, 1), 1.0)).all()


def test_the_open_share_of_a_network_is_a_buffer_that_its_state_carries():
    network = tiny(open_share=1.0).eval()
    images = torch.randn(3, 3, 64, 64)
    whole = network(images)
    network.set_open_share(0.25)
    attention = network(images).attention
    assert torch.equal(attention, whole.attention)
    assert gate_health(attention, network.threshold(attention))[0] == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(network(images).logits, whole.logits)
    other = tiny(open_share=0.9).eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images).logits, network(images).logits)
    fixed = tiny()
    assert "open_share" not in fixed.state_dict()
    assert fixed.threshold(attention) == fixed.theta
    with pytest.raises(ValueError, match="fixed threshold"):
        fixed.set_open_share(0.5)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"open_share is {share}"):
            tiny(open_share=share)
        with pytest.raises(ValueError, match=f"open_share is {share}"):
            network.set_open_share(share)


def test_an_images_gate_does_not_depend_on_its_batch():
    network, images = tiny(open_share=0.3).double().eval(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    alone = torch.cat([network(image[None]).logits for image in images])
    torch.testing.assert_close(alone, network(images).logits)


def test_the_width_of_the_branch_is_an_option():
    narrow = tiny(branch_options={"planes": 2})
    channels = narrow.attention_branch.blocks[0].conv1.in_channels
    assert narrow.attention_branch.blocks[1].conv3.out_channels == 8
    assert tiny().attention_branch.blocks[1].conv3.out_channels == 4 * channels


def test_under_autocast_a_flat_map_keeps_the_order_of_its_positions():
    network = tiny(gate_margin=0.2).eval()
    last = network.attention_branch.attention_head[-2]
    torch.nn.init.constant_(last.weight, 1e-3)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images)
    assert output.attention.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    assert output.attention[0].unique().numel() > output.attention[0].bfloat16().unique().numel()


def test_a_sharper_sigmoid_starts_at_the_same_map_and_moves_faster():
    plain, sharp = (tiny(gate_margin=0.2, branch_options={"sharpness": s}).double().eval() for s in (1.0, 4.0))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(sharp(images).attention, plain(images).attention)
    sharp.load_state_dict(plain.state_dict())
    for network in (plain, sharp):
        last = network.attention_branch.attention_head[-2]
        torch.nn.init.constant_(last.weight, 0.1)
        torch.nn.init.zeros_(last.bias)
    flat, steep = (torch.logit(network(images).attention) for network in (plain, sharp))
    assert flat.std() > 0
    torch.testing.assert_close(steep, 4 * flat)
    with pytest.raises(ValueError, match="sharpness is 0"):
        tiny(branch_options={"sharpness": 0.0})
