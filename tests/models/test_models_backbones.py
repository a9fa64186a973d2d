import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet18

from labn.models import backbone_of, build_network, lambda_resnet26, lambda_resnet38, lambda_resnet50, magnetogram_net
from labn.models.backbones import final_linear, input_channels
from labn.models.cbam import CBAM
from labn.models.checkpoints import load_backbone
from labn.models.lambda_networks.resnet import LambdaBottleneck
from labn.modules import Classifier


def depths(network: nn.Module) -> list[int]:
    return [len(stage) for name, stage in network.named_children() if name.startswith("layer")]


def test_lambda_resnets_have_the_published_depths_and_size():
    assert depths(lambda_resnet26(2)) == [2, 2, 2, 2]
    assert depths(lambda_resnet38(2)) == [2, 3, 5, 2]
    network = lambda_resnet50()
    assert depths(network) == [3, 4, 6, 3]
    assert sum(p.numel() for p in network.parameters()) == 14_995_848


def test_every_convolution_of_a_lambda_resnet_is_1x1_but_the_stem():
    kernels = [m.kernel_size for m in lambda_resnet26(2).modules() if isinstance(m, nn.Conv2d)]
    assert kernels[0] == (7, 7)
    assert set(kernels[1:]) == {(1, 1)}


def test_lambda_resnets_have_the_published_initialisation():
    torch.manual_seed(0)
    network = lambda_resnet26(2)
    blocks = [m for m in network.modules() if isinstance(m, LambdaBottleneck)]
    assert all((b.bn3.weight == 0).all() and (b.bn2.weight == 1).all() for b in blocks)
    weight = network.layer4[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    window = blocks[0].conv2.position_weight
    assert window.abs().max() <= 1 / 23
    assert window.std().item() == pytest.approx(1 / 23 / 3**0.5, rel=0.05)


def test_the_magnetogram_network_has_the_published_shapes():
    network = magnetogram_net()
    assert (network.conv1.in_channels, network.conv1.out_channels) == (1, 16)
    assert depths(network) == [1]
    assert (network.layer1[0].conv2.channels, network.layer1[0].conv2.dim_v) == (8, 2)
    assert (network.fc.in_features, network.fc.out_features) == (32, 2)
    assert network.maxpool(network.conv1(torch.zeros(1, 1, 512, 512))).shape[-2:] == (128, 128)


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 8)), (2, (3, 4))])
def test_bottlenecks_have_the_expected_shapes(stride, size):
    block = LambdaBottleneck(6, 4, stride, heads=2, r=3)
    assert block(torch.randn(2, 6, 5, 8)).shape == (2, 16, *size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "timm/resnet18", "timm/resnet26d", "timm/seresnet50", "lambda_resnet26"]
)
def test_both_halves_in_sequence_equal_the_network_for_every_split(name):
    torch.manual_seed(0)
    network = build_network(name, 3).eval()
    backbone = backbone_of(network)
    image = torch.randn(1, 3, 64, 64)
    wanted = network(image)
    with torch.no_grad():
        for after in (0, 1, len(backbone.blocks) // 2, len(backbone.blocks)):
            front, back = backbone.split(after)
            torch.testing.assert_close(back(front(image)), wanted, rtol=1e-4, atol=1e-4)
            assert front(image).shape[1] == input_channels(back)


@pytest.mark.parametrize(
    ("split", "stages"), [(3, ["layer1"]), (7, ["layer1", "layer2"]), (13, ["layer1", "layer2", "layer3"])]
)
def test_the_splits_of_the_papers_follow_complete_stages(split, stages):
    front, back = backbone_of(build_network("lambda_resnet50")).split(split)
    names = [name for name, _ in front.named_children() if name.startswith("layer")]
    assert names == stages
    assert not set(names) & {name for name, _ in back.named_children()}


def test_a_split_inside_a_stage_keeps_the_tensor_names():
    network = build_network("resnet50")
    front, back = backbone_of(network).split(5)
    assert sorted([*front.state_dict(), *back.state_dict()]) == sorted(network.state_dict())


def test_dropout_before_the_classifier_is_kept():
    network = build_network("timm/resnet18", 2, drop_rate=0.5)
    _, back = backbone_of(network).split(8)
    assert [m.p for m in back if isinstance(m, nn.Dropout)] == [0.5]


def test_networks_accept_other_numbers_of_input_channels():
    for name in ("resnet18", "timm/resnet18", "lambda_resnet26", "vgg11"):
        network = build_network(name, 2, in_channels=5)
        assert next(m for m in network.modules() if isinstance(m, nn.Conv2d)).weight.shape[1] == 5
    assert build_network("resnet18", 7, in_channels=5).eval()(torch.randn(1, 5, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 75)])
def test_every_parameter_of_a_network_with_auxiliary_classifiers_trains(name, side, tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name, weights=None, num_classes=3, init_weights=False, aux_logits=True)
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    network = build_network(name, num_classes=3, weights=str(tmp_path / "weights.pt"), init_weights=False).train()
    logits = network(torch.randn(2, 3, side, side))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    own, given = network.state_dict(), whole.state_dict()
    assert all(torch.equal(own[key], given[key]) for key in own if "running" not in key and "num_batches" not in key)
    report = load_backbone(network, tmp_path / "weights.pt")
    assert not report.fresh
    assert {key.partition(".")[0] for key in report.unused} <= {"aux1", "aux2", "AuxLogits"}


def test_checkpoints_with_auxiliary_classifiers_can_be_loaded():
    module = Classifier("googlenet", 2)
    state = {**module.state_dict(), "network.aux1.fc1.weight": torch.zeros(1)}
    module.on_load_checkpoint({"state_dict": state})
    module.load_state_dict(state)
    assert not module.random_weights


def test_unknown_network_names_raise():
    with pytest.raises(ValueError, match=r"'resnet51'; did you mean resnet50, .*; known are lambda_resnet26"):
        build_network("resnet51")
    with pytest.raises(ValueError, match=r"'timm/resnet10x', .*; did you mean resnet10t,"):
        build_network("timm/resnet10x")


def test_a_network_object_with_other_classes_raises():
    network = resnet18(num_classes=4)
    assert build_network(network, 4) is network
    with pytest.raises(ValueError, match="backbone is a network with 4 classes"):
        build_network(network, 2)


class Skipping(nn.Module):
    """Children of a ResNet, another forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(2 * self.layer1(self.conv1(x))).flatten(1))


def test_networks_that_are_not_a_chain_raise():
    with pytest.raises(ValueError, match=r"Skipping\.forward does more"):
        backbone_of(Skipping())
    with pytest.raises(ValueError, match="VGG has no blocks that can be counted"):
        backbone_of(build_network("vgg11"))
    with pytest.raises(ValueError, match="Conv2d has no linear layer"):
        final_linear(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "lambda_resnet26"])
def test_cbam_is_inserted_behind_the_last_feature_maps_and_keeps_tensor_names(name, tmp_path):
    torch.manual_seed(0)
    plain = build_network(name, num_classes=3)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    network = build_network(f"cbam/{name}", num_classes=3, weights=str(tmp_path / "plain.pt"))
    (block,) = [m for m in network.modules() if isinstance(m, CBAM)]
    own = network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    images = torch.randn(2, 3, 64, 64)
    seen = []
    block.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        logits, expected = network.eval()(images), plain.eval()(images)
    ((before, after),) = seen
    head = final_linear(plain)
    with torch.no_grad():
        assert torch.allclose(head(before.mean((2, 3))), expected, atol=1e-5)
        assert torch.allclose(head(after.mean((2, 3))), logits, atol=1e-5)
    assert not torch.allclose(logits, expected, atol=1e-3)
