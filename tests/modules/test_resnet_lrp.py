"""ResNetLRP: the optimiser set-up, weights that fit and weights that do not, and its network explained."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from labn.explainers import explainer_by_name
from labn.models import load_classifier
from labn.modules import ResNetLRP


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    net = torchvision.models.resnet18(num_classes=7)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, path)
    return path, net


def test_one_optimiser_over_all_layers_and_the_plateau_schedule():
    module = ResNetLRP("resnet18", num_classes=3)
    built = module.configure_optimizers()
    (group,) = built["optimizer"].param_groups
    assert isinstance(built["optimizer"], torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-3, 0.9, 1e-4)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.network.parameters()}
    plateau = built["lr_scheduler"]["scheduler"]
    assert (plateau.factor, plateau.patience, plateau.mode) == (0.333, 1, "min")
    assert built["lr_scheduler"]["monitor"] == "val/loss"


def test_weights_are_loaded_except_for_the_classifier(weights, monkeypatch, capsys):
    path, source = weights
    monkeypatch.setenv("WEIGHTS", str(path.parent))
    module = ResNetLRP("resnet18", num_classes=3, backbone_ckpt="$WEIGHTS/resnet18.safetensors")
    state, own = source.state_dict(), module.network.state_dict()
    taken = [name for name in own if not name.startswith("fc.")]
    assert all(torch.equal(own[name], state[name].half().to(own[name].dtype)) for name in taken)
    assert own["fc.weight"].shape == (3, 512)
    assert "2 fresh" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"2 weights of resnet18 \(first: fc.weight\) are random: give --ckpt_path"):
        module.on_test_start()
    module.on_fit_start()
    module.on_test_start()


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            "resnet34",
            r"resnet18\.safetensors has no tensor for layer1\.2\.conv1\.weight; give weights of this ResNet's",
        ),
        ("timm/resnet18d", r"resnet18\.safetensors has no tensor for conv1\.0\.weight"),
    ],
)
def test_weights_of_another_depth_raise(weights, backbone, message):
    with pytest.raises(ValueError, match=message):
        ResNetLRP(backbone, backbone_ckpt=str(weights[0]))


@pytest.mark.slow
def test_weights_of_another_width_raise_an_error_with_both_shapes(tmp_path):
    path = tmp_path / "wide.pt"
    torch.save(torchvision.models.wide_resnet50_2(num_classes=2).state_dict(), path)
    shapes = r"layer1\.0\.conv1\.weight is \(128, 64, 1, 1\), this ResNet needs \(64, 64, 1, 1\)"
    with pytest.raises(ValueError, match=rf"wide\.pt holds weights of another width: {shapes}; set backbone to"):
        ResNetLRP("resnet50", backbone_ckpt=str(path))


def test_counters_of_batches_may_be_missing_in_the_file(weights, tmp_path):
    net = torchvision.models.resnet18(num_classes=7)
    kept = {k: v for k, v in weights[1].state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "bare.safetensors")
    assert len(load_classifier(net, tmp_path / "bare.safetensors").taken) == len(kept)


def test_a_checkpoint_of_the_module_can_be_loaded_as_weights(weights, tmp_path):
    module = ResNetLRP("resnet18", num_classes=4, backbone_ckpt=str(weights[0]))
    torch.save({"state_dict": module.state_dict(), "epoch": 2}, tmp_path / "best.ckpt")
    again = ResNetLRP("resnet18", num_classes=4, backbone_ckpt=str(tmp_path / "best.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(module.network.parameters(), again.network.parameters()))


def test_a_step_lowers_the_loss_and_lrp_explains_the_network():
    torch.manual_seed(0)
    module = ResNetLRP("resnet18", num_classes=2, lr=0.05)
    module.log = lambda *args, **kwargs: None
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(4, 3, 33, 33, generator=generator), "label": torch.tensor([0, 1, 0, 1])}
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for step in range(4):
        loss = module.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    module.eval()
    maps = explainer_by_name("lrp")(module.network, batch["image"], batch["label"])
    probability = module(batch["image"]).softmax(1).gather(1, batch["label"][:, None])[:, 0]
    assert torch.allclose(maps.sum((1, 2)), probability, rtol=1e-2)
