import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from labn.models import AttentionBranchNetwork, build_network, load_backbone
from labn.models.checkpoints import LoadReport, canonical, read_tensors

RESNET50 = Path(os.environ.get("LABN_DATA", "../shared/data")) / "imagenet" / "resnet50.safetensors"
TINY = {"width": 4, "layers": (1, 2), "r": 3, "heads": 2, "dim_k": 3}
needs_resnet50 = pytest.mark.skipif(not RESNET50.is_file(), reason=f"{RESNET50} is not there; set LABN_DATA.")


def tiny(num_classes: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_network("lambda_resnet", num_classes, **TINY)


def branched(split: int, seed: int, **arguments) -> AttentionBranchNetwork:
    torch.manual_seed(seed)
    return AttentionBranchNetwork("lambda_resnet", split=split, backbone_options=TINY, **arguments)


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_all_tensors_of_own_weights_are_loaded(tmp_path, suffix):
    source, target, path = tiny(seed=1), tiny(seed=2), tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    report = load_backbone(target, path)
    assert same(source, target)
    assert (len(report.taken), report.fresh, report.unused) == (len(source.state_dict()), (), ())


def test_weights_load_between_splits_and_from_lightning_checkpoints(tmp_path):
    source, target, path = branched(1, 1), branched(2, 2), tmp_path / "last.ckpt"
    state = {f"network.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(2)}, "epoch": 3}, path)
    report = load_backbone(target, path)
    canonical_source = {canonical(n): v for n, v in source.state_dict().items()}
    taken = {canonical(n): v for n, v in target.state_dict().items() if n in report.taken}
    backbone = {n for n in canonical_source if not n.startswith("attention_branch")}
    assert backbone <= set(taken)
    assert all(torch.equal(value, canonical_source[name]) for name, value in taken.items())
    assert "criterion.weight" in report.unused


def test_weights_load_from_a_classifier_into_a_branch_network_and_back(tmp_path):
    source, path = tiny(seed=1), tmp_path / "plain.pt"
    torch.save(source.state_dict(), path)
    target = branched(1, 2, weights=str(path))
    x = torch.randn(1, 3, 32, 32)
    source.eval()
    target.eval()
    assert torch.equal(target.perception_branch(target.feature_extractor(x)), source(x))
    torch.save(target.state_dict(), path)
    back = tiny(seed=3)
    report = load_backbone(back, path)
    assert report.fresh == ()
    assert all(name.startswith("attention_branch") for name in report.unused)
    assert same(back, source)


def test_a_classifier_layer_of_another_size_is_not_loaded(tmp_path):
    path, target = tmp_path / "w.pt", tiny(5, seed=2)
    torch.save(tiny(2, seed=1).state_dict(), path)
    fresh = target.fc.weight.clone()
    report = load_backbone(target, path)
    assert report.fresh == ("fc.weight", "fc.bias")
    assert torch.equal(target.fc.weight, fresh)
    assert any("fc.weight (2, 32)" in text and "(5, 32)" in text for text in report.unused)
    assert str(report).splitlines()[0].endswith("2 fresh, 2 unused")
    assert "  fresh: fc.*\n" in str(report)


def test_the_report_abbreviates_whole_modules():
    report = LoadReport(
        "w.pt", ("a.conv.weight", "a.conv.bias", "b.x.weight", "c.weight"), ("a.norm.weight", "c.bias"), ()
    )
    assert str(report).splitlines()[1:] == ["  taken: a.conv.*, b.*, c.weight", "  fresh: a.norm.*, c.bias"]


def test_released_lambda_layer_names_and_float16_are_loaded(tmp_path):
    source, target, path = tiny(seed=1), tiny(seed=2), tmp_path / "released.pt"
    state = {}
    for name, value in source.state_dict().items():
        name = name.replace("to_qkv", "conv_qkv").replace("position_", "lambda_conv.")
        value = value.unsqueeze(2) if name.endswith("lambda_conv.weight") else value
        state[f"module.{name}"] = value.half() if value.is_floating_point() else value
    torch.save(state, path)
    report = load_backbone(target, path)
    assert (report.fresh, report.unused) == ((), ())
    weight = target.layer1[0].conv2.position_weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, source.layer1[0].conv2.position_weight.half().float())


def test_weights_of_a_resnet_load_into_a_lambda_resnet(tmp_path):
    path = tmp_path / "resnet26.pt"
    plain = build_network("timm/resnet26", 2)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.weight)
    torch.save(plain.state_dict(), path)
    target = build_network("lambda_resnet26", 2)
    report = load_backbone(target, path)
    block, source = target.layer2[1], plain.layer2[1]
    for name in ("conv1.weight", "conv3.weight", "bn1.running_mean", "bn2.weight", "bn3.running_mean", "bn3.weight"):
        assert torch.equal(
            block.get_parameter(name) if "running" not in name else block.get_buffer(name), source.state_dict()[name]
        )
    assert (block.bn2.running_mean == 0).all()
    assert (block.bn2.running_var == 1).all()
    assert "layer2.1.bn2.running_mean" in report.fresh
    assert "layer2.1.conv2.to_qkv.weight" in report.fresh
    assert any(name.startswith("layer2.1.conv2.weight") for name in report.unused)


def renamed(source, path):
    tensors = source.state_dict().items()
    torch.save({f"_renamed_{n}": t for n, (key, t) in enumerate(tensors) if "num_batches" not in key}, path)


def test_a_file_with_other_names_is_read_in_order_where_all_shapes_agree(tmp_path):
    source, target, path = tiny(seed=1), tiny(seed=2), tmp_path / "weights.pt"
    renamed(source, path)
    report = load_backbone(target, path)
    assert same(source, target)
    assert report.renamed[0] == ("_renamed_0", next(iter(target.state_dict())))
    assert len(report.renamed) == len(report.taken)
    assert "by order, because the names differ but all shapes agree: _renamed_0 -> " in str(report)
    assert str(report).endswith(", ...")
    torch.save({"matrix": torch.ones(2, 2)}, path)
    assert str(load_backbone(nn.Linear(2, 2, bias=False), path)).endswith(" agree: matrix -> weight")


def test_a_file_with_other_names_is_refused_where_one_shape_differs_or_names_are_sorted(tmp_path):
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in tiny().state_dict().items() if tensor.ndim}
    torch.save({f"_renamed_{n}": tensor for n, tensor in enumerate(wide.values())}, tmp_path / "weights.pt")
    tensors = tiny().state_dict().values()
    save_file({f"_renamed_{n}": t.clone() for n, t in enumerate(tensors)}, tmp_path / "a.safetensors")
    for name in ("weights.pt", "a.safetensors"):
        with pytest.raises(ValueError, match="another architecture"):
            load_backbone(tiny(), tmp_path / name)


def test_in_order_a_classifier_of_other_classes_stays_fresh(tmp_path):
    source, target = tiny(num_classes=3, seed=1), tiny(num_classes=2, seed=2)
    tensors = source.state_dict()
    names = [name for name in tensors if "num_batches" not in name]
    torch.save({f"_renamed_{n}": tensors[name] for n, name in enumerate(names)}, tmp_path / "weights.pt")
    report = load_backbone(target, tmp_path / "weights.pt")
    head = [name for name in names if name.startswith("fc.")]
    assert [name for name in report.fresh if "num_batches" not in name] == head
    assert report.unused == tuple(f"_renamed_{names.index(name)}" for name in head)
    assert all(torch.equal(target.state_dict()[name], tensors[name]) for name in names if name not in head)


CONTAINED = {
    "trainer": lambda state: {"model_state_dict": state, "epoch": 3, "loss": torch.ones(())},
    "net": lambda state: {"net": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "unusual key": lambda state: {"epoch": 1, "my_weights": state},
    "two levels": lambda state: {"checkpoint": {"state_dict": state, "epoch": 1}},
    "wrapper": lambda state: {f"net.{name}": tensor for name, tensor in state.items()},
    "wrappers": lambda state: {"model": {f"wrapped.net.{name}": tensor for name, tensor in state.items()}},
    "metrics beside": lambda state: {
        "my_net": state,
        "metrics": {"acc": torch.ones(())},
        "opt": {"avg": torch.ones(2)},
    },
    "parameters beside": lambda state: {"params": {"lr": torch.ones(())}, "my_net": state},
    "averages beside": lambda state: {
        "model_ema": {name: tensor + 1 for name, tensor in state.items()},
        "model": state,
    },
}


@pytest.mark.parametrize("form", CONTAINED)
def test_usual_forms_of_checkpoints_are_read(tmp_path, form):
    source, target = tiny(seed=1), tiny(seed=2)
    torch.save(CONTAINED[form](dict(source.state_dict())), tmp_path / "weights.pt")
    report = load_backbone(target, tmp_path / "weights.pt")
    assert same(source, target)
    assert report.renamed == ()


def test_a_checkpoint_that_contains_itself_ends(tmp_path):
    outer, inner = {f"w{n}": torch.ones(2) for n in range(2)}, {}
    outer["model"], inner["model"], inner["weights"] = inner, outer, {"a": torch.ones(1)}
    torch.save(outer, tmp_path / "weights.pt")
    assert set(read_tensors(tmp_path / "weights.pt")) == {"w0", "w1"}


def test_several_state_dicts_without_a_usual_key_are_named(tmp_path):
    state = dict(tiny().state_dict())
    torch.save({"teacher": state, "student": state}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="several state dicts, teacher, student; save one of them alone"):
        read_tensors(tmp_path / "weights.pt")


@pytest.mark.slow
def test_another_architecture_raises_and_changes_no_weight(tmp_path):
    path = tmp_path / "resnet18.pt"
    torch.save(build_network("resnet18", 2).state_dict(), path)
    for name in ("resnet50", "vgg11", "lambda_resnet50"):
        target = build_network(name, 2)
        before = {n: v.clone() for n, v in target.state_dict().items()}
        with pytest.raises(ValueError, match=r"resnet18.pt is of another architecture"):
            load_backbone(target, path)
        assert all(torch.equal(before[n], v) for n, v in target.state_dict().items())


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_unreadable_files_raise_an_error_and_run_no_code(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"none.pt does not exist"):
        read_tensors(tmp_path / "none.pt")
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Payload()}, tmp_path / "evil.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "cut.pt").write_bytes(b"nonsense")
    for name in ("evil.ckpt", "cut.safetensors", "cut.pt"):
        with pytest.raises(ValueError, match=name):
            read_tensors(tmp_path / name)
    assert capsys.readouterr().out == ""
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds no named tensors"):
        read_tensors(tmp_path / "list.pt")


def test_canonical_names_have_no_prefix_of_a_wrapper():
    assert canonical("network.feature_extractor.layer2.3.conv1.weight") == "layer2.3.conv1.weight"
    assert canonical("_orig_mod.module.perception_branch.fc.bias") == "fc.bias"
    assert canonical("attention_branch.project.1.weight") == "attention_branch.project.1.weight"


@pytest.mark.data
@needs_resnet50
def test_all_tensors_of_the_real_resnet50_are_loaded():
    network = build_network("resnet50", 1000)
    report = load_backbone(network, RESNET50)
    assert (len(report.taken), report.fresh, report.unused) == (320, (), ())
    assert torch.equal(network.fc.weight, read_tensors(RESNET50)["fc.weight"].float())


@pytest.mark.data
@needs_resnet50
def test_the_real_resnet50_loads_into_a_lambda_network_with_branch():
    network = AttentionBranchNetwork("lambda_resnet50")
    report = load_backbone(network, RESNET50)
    file = read_tensors(RESNET50)
    shapes = {canonical(n): v.shape for n, v in network.state_dict().items()}
    wanted = {n for n, v in file.items() if shapes.get(n) == v.shape}
    wanted -= {n for n in file if ".bn2.running" in n or ".bn2.num_batches" in n}
    assert {canonical(n) for n in report.taken} == wanted
    assert len(report.taken) == 254
    assert (network.feature_extractor.layer1[0].bn2.running_var == 1).all()
    assert (network.feature_extractor.bn1.running_var == file["bn1.running_var"]).all()
