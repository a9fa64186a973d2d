"""Attention branch networks on networks that are no ResNets: cut behind a module, whatever the layout of features."""

import pytest
import torch
from torch import nn

from labn.errors import InputError
from labn.explainers.registry import explainer_by_name
from labn.models import AttentionBranchNetwork, build_network
from labn.models.cut import block_names, find_cut, own_blocks
from labn.modules.labn import LABN

SMALL = {
    "timm/vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "timm/swin_tiny_patch4_window7_224": {
        "img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4,
    },
    "timm/convnext_atto": {"depths": (1, 1, 2, 1), "dims": (4, 8, 16, 16)},
    "timm/lambda_resnet26t": {},
    "timm/efficientnet_lite0": {},
}  # fmt: skip
PLACES = {
    "timm/vit_tiny_patch16_224": "blocks.1",
    "timm/swin_tiny_patch4_window7_224": "layers.0.blocks.1",
    "timm/convnext_atto": "stages.2.blocks.0",
    "timm/lambda_resnet26t": "stages.2.1",
    "timm/efficientnet_lite0": "blocks.4.1",
}
FAST = [name for name in SMALL if name != "timm/lambda_resnet26t"]


def labn(name, split=None, **options):
    torch.manual_seed(0)
    network = AttentionBranchNetwork(
        name, split=split or PLACES[name], backbone_options=SMALL[name], branch_options={"planes": 4}, **options
    ).eval()
    for parameter in network.parameters():  # heads and scales that start at 0 would hide a difference
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAST)
def test_a_closed_residual_gate_leaves_the_network_as_it_is(name):
    network = labn(name, gate="residual", theta=1.0)
    assert torch.equal(network(images()).logits, network.network(images()))


@pytest.mark.parametrize("name", FAST)
def test_nothing_of_the_image_passes_a_closed_gate(name):
    network = labn(name, theta=1.0)
    first, second = network(images()).logits
    torch.testing.assert_close(first, second)
    assert not torch.allclose(*labn(name, theta=0.0)(images()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_half_and_the_branch_learn(name):
    network = labn(name, theta=0.0)
    output = network(images())
    assert output.attention.shape[1] == 1
    assert min(output.attention.shape[2:]) > 1
    (output.logits.square().sum() + output.branch_logits.square().sum()).backward()
    extractor = {id(parameter) for parameter in network.extractor_parameters()}
    branch = {id(parameter) for parameter in network.attention_branch.parameters()}
    assert 0 < len(extractor) < len(list(network.network.parameters()))
    assert not extractor & branch
    missing = [n for n, p in network.named_parameters() if p.grad is None]
    assert not missing


def test_the_cut_of_a_resnet_gives_what_its_two_halves_give():
    halves = AttentionBranchNetwork("resnet18", split=6, branch_options={"planes": 8}).eval()
    cut = AttentionBranchNetwork("resnet18", split="layer3.1", branch_options={"planes": 8}).eval()
    state = {f"network.{k.partition('.')[2]}": v for k, v in halves.state_dict().items() if "attention" not in k}
    state |= {k: v for k, v in halves.state_dict().items() if k.startswith("attention_branch")}
    cut.load_state_dict(state)
    mine, theirs = cut(images(64)), halves(images(64))
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.attention, theirs.attention)
    assert {n.partition(".")[2] for n, p in halves.feature_extractor.named_parameters(prefix="x")} == set(
        cut._cut.before
    )


def test_tokens_before_the_cut_belong_to_the_feature_extractor():
    cut = find_cut(build_network("timm/vit_tiny_patch16_224", **SMALL["timm/vit_tiny_patch16_224"]), "blocks.1")
    assert {"cls_token", "pos_embed", "blocks.1.mlp.fc2.bias"} <= set(cut.before)
    assert not any(name.startswith(("blocks.2", "norm", "head")) for name in cut.before)
    assert "blocks.1" in cut.modules_before
    assert "blocks.2" not in cut.modules_before
    assert "blocks" not in cut.modules_before


def test_the_class_token_is_zero_behind_the_gate():
    network = labn("timm/vit_tiny_patch16_224", theta=0.0)
    seen = []
    network.network.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(images())
    assert not seen[0][:, 0].any()
    assert seen[0][:, 1:].all()


def test_maps_follow_the_size_of_the_image():
    network = labn("timm/convnext_atto")
    assert network(torch.zeros(1, 3, 64, 96)).attention.shape[2:] == (4, 6)
    options = SMALL["timm/vit_tiny_patch16_224"] | {"dynamic_img_size": True}
    vit = AttentionBranchNetwork("timm/vit_tiny_patch16_224", split="blocks.1", backbone_options=options).eval()
    assert vit(torch.zeros(1, 3, 32, 48)).attention.shape[2:] == (4, 6)


@pytest.mark.parametrize(
    ("name", "split", "reason"),
    [
        ("timm/vit_tiny_patch16_224", "blocks.2", "the prediction does not depend on the feature maps"),
        ("timm/vit_tiny_patch16_224", "blocks.7", "is no module"),
        ("timm/vit_tiny_patch16_224", 4, "this backbone has 3 blocks"),
        ("timm/vit_tiny_patch16_224", "blocks.1.norm1", "also passes beside this module"),
        ("timm/vit_tiny_patch16_224", "norm_pre.missing", "is no module"),
        ("timm/convnext_atto", "head.fc", "not known to be feature maps"),
    ],
)
def test_a_place_where_no_gate_can_stand_is_refused_with_the_reason(name, split, reason):
    with pytest.raises(InputError, match=reason):
        labn(name, split=split)


def test_a_module_that_runs_twice_is_refused_with_the_count():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.act(self.conv(self.act(self.conv(x)))).mean((2, 3)))

    with pytest.raises(InputError, match="runs 2 times"):
        find_cut(Twice(), "act")


def test_a_module_on_both_sides_of_the_cut_does_not_belong_to_the_feature_extractor():
    drop = nn.Dropout(0.5)
    layers = [
        nn.Conv2d(3, 4, 3),
        drop,
        nn.Conv2d(4, 4, 3),
        drop,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ]
    assert find_cut(nn.Sequential(*layers), "2").modules_before == ("0", "2")


def test_blocks_are_counted_in_the_order_in_which_they_run():
    network = build_network("timm/efficientnet_lite0", **SMALL["timm/efficientnet_lite0"])
    names = block_names(network)
    assert len(names) == 16
    assert names[:3] == ["blocks.0.0", "blocks.1.0", "blocks.1.1"]
    order = []
    for name in names:
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    network.eval()(images())
    assert order == names


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "timm/vit_tiny_patch16_224",
        "timm/swin_tiny_patch4_window7_224",
        "timm/convnext_atto",
        "timm/efficientnet_lite0",
    ],
)
@pytest.mark.parametrize("branch", ["labn", "abn"])
def test_a_branch_can_have_blocks_of_the_backbones_kind(name, branch):
    torch.manual_seed(0)
    network = AttentionBranchNetwork(
        name, split=PLACES[name], backbone_options=SMALL[name], branch=branch, lab_block="own"
    ).eval()
    first = network.attention_branch.blocks[0].block
    cut = type(network.network.get_submodule(PLACES[name]))
    assert isinstance(first, cut)
    owned = {id(p) for p in network.network.parameters()}
    assert not any(id(p) in owned for p in network.attention_branch.parameters())
    assert network(images()).attention.shape[0] == 2


@pytest.mark.slow
def test_own_blocks_behind_a_change_of_channels_are_those_of_the_next_block():
    network = build_network("timm/lambda_resnet26t")
    (block,) = own_blocks(network, find_cut(network, "stages.2.0"), 1)
    assert type(block.block) is type(network.stages[2][1])


def test_own_blocks_of_a_resnet_are_its_blocks_with_new_weights():
    network = build_network("resnet18")
    (block,) = own_blocks(network, find_cut(network, "layer3.1"), 1)
    assert type(block.block).__name__ == "BasicBlock"
    assert not torch.equal(block.block.conv1.weight, network.layer3[1].conv1.weight)
    halves = AttentionBranchNetwork("resnet18", split=6, lab_block="own")
    assert [type(b.block).__name__ for b in halves.attention_branch.blocks] == ["BasicBlock"] * 2


def test_frozen_halves_stay_in_eval_mode_and_get_no_gradient():
    module = LABN(
        "timm/convnext_atto",
        split="stages.2.blocks.0",
        train_lfe=False,
        network_options={"backbone_options": SMALL["timm/convnext_atto"], "branch_options": {"planes": 4}},
    )
    network = module.train().network
    assert not network.network.stem.training
    assert network.network.stages[3].training
    assert not any(p.requires_grad for p in network.network.stages[1].parameters())
    assert all(p.requires_grad for p in network.network.stages[3].parameters())
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["name"] for group in groups] == ["base", "fast"]


@pytest.mark.parametrize("method", ["labn", "gradcam", "gradxinput", "lrp"])
def test_maps_of_a_cut_network_do_not_depend_on_the_batch(method):
    network = labn("timm/convnext_atto", theta=0.0).double()
    explainer = explainer_by_name(method)
    both = explainer(network, images().double(), torch.tensor([0, 1]))
    one = explainer(network, images()[1:].double(), torch.tensor([1]))
    torch.testing.assert_close(both[1:], one, rtol=1e-9, atol=1e-12)
