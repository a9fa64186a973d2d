"""The LABN module: parameter groups, losses, guidance, frozen parts."""

import lightning.pytorch as pl
import pytest
import torch

from datamodules import SyntheticFundus
from labn.errors import InputError
from labn.inference.modes import to_channels_last
from labn.modules import LABN, Classifier, GateSchedule, SaliencyGuidance
from labn.modules.restore import restore

BACKBONE = {"backbone_options": {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}}


def module(**options):
    torch.manual_seed(0)
    built = LABN("lambda_resnet", split=1, theta=0.3, network_options=BACKBONE, **options)
    built.log = lambda *args, **kwargs: None
    return built


def batch(size=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return {"image": images, "label": torch.arange(size) % 2, "index": torch.arange(size)}


@pytest.mark.parametrize("train_lfe", [True, False])
def test_every_trainable_parameter_is_in_exactly_one_group(train_lfe):
    built = module(train_lfe=train_lfe)
    groups = built.configure_optimizers()["optimizer"].param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in built.network.parameters() if p.requires_grad}
    frozen = {id(p) for p in built.network.feature_extractor.parameters()}
    assert bool(frozen & set(ids)) is train_lfe
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"base": 1e-4, "fast": 1e-3}
    fast = {id(p) for group in groups if group["name"] == "fast" for p in group["params"]}
    expected = [*built.network.attention_branch.parameters(), *built.network.head.parameters()]
    assert fast == {id(p) for p in expected}


def test_the_loss_is_the_sum_of_its_terms():
    built = module(branch_weight=3.0, guidance=SaliencyGuidance(fill="black", kl_weight=0.5))
    terms, _ = built.losses(batch(), "train")
    expected = terms["main_loss"] + 3 * terms["branch_loss"] + 0.5 * terms["kl"]
    assert torch.allclose(terms["loss"], expected)
    plain, _ = module(branch_weight=3.0).losses(batch(), "train")
    assert torch.allclose(plain["main_loss"], terms["main_loss"])
    assert torch.allclose(plain["branch_loss"], terms["branch_loss"])


def test_the_validation_loss_has_no_guidance_term():
    terms, _ = module(guidance=SaliencyGuidance(fill="black")).losses(batch(), "val")
    assert set(terms) == {"loss", "main_loss", "branch_loss"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_grad": "detached"},
        {"mask_grad": "soft", "map_weight": 0.3},
        {"source": "gradient", "mask_grad": "detached"},
        {"fill": "blur"},
        {"fill": "uniform"},
        {"fill": "mean"},
        {"masked_bn": "frozen"},
        {"branch_loss_on": "masked"},
        {"deletion_share": 1.0},
        {"deletion_share": 0.5, "deletion_by": "image"},
        {"deletion_share": 0.5, "deletion_by": "image", "deletion_class": 0, "target": "label"},
        {"keep_ratio": [0.1, 0.3], "patch_size": [1, 4]},
    ],
    ids=str,
)
def test_kl_weight_changes_the_gradient_under_every_option(options):
    gradients = []
    for weight in (0.0, 0.5):
        built = module(guidance=SaliencyGuidance(kl_weight=weight, **{"fill": "black", **options}))
        terms, _ = built.losses(batch(), "train")
        parameters = list(built.network.feature_extractor.parameters())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(terms["loss"], parameters)]))
        assert terms["kl"] >= 0
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


@pytest.mark.parametrize(("share", "expected"), [(0.0, "masked"), (1.0, "original")])
def test_the_branch_loss_never_uses_images_with_deleted_evidence(share, expected):
    options = {"fill": "black", "branch_loss_on": "masked", "deletion_share": share, "mask_grad": "detached"}
    built = module(guidance=SaliencyGuidance(keep_ratio=0.5, **options))
    made = []
    built.network.register_forward_hook(lambda net, args, output: made.append(output.branch_logits))
    terms, _ = built.losses(batch(), "train")
    by_image = {"original": made[0], "masked": made[1][:4]}
    losses = {name: float(built.criterion(logits.detach(), batch()["label"])) for name, logits in by_image.items()}
    assert losses["original"] != pytest.approx(losses["masked"], abs=1e-4)
    assert float(terms["branch_loss"]) == pytest.approx(losses[expected], abs=1e-6)


def test_keep_ratio_one_gives_no_divergence():
    terms, _ = module(guidance=SaliencyGuidance(fill="black", keep_ratio=1.0)).losses(batch(), "train")
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("called", [False, True])
def test_a_frozen_feature_extractor_keeps_its_statistics(called):
    built = module(train_lfe=False)
    if called:
        built.eval()
        built.train()
    assert not any(m.training for m in built.network.feature_extractor.modules())
    assert built.network.perception_branch.training


def test_without_train_bn_only_the_branch_is_normalised_by_the_batch():
    built = module(train_bn=False)
    backbone = [*built.network.feature_extractor.modules(), *built.network.perception_branch.modules()]
    normalising = [m for m in backbone if isinstance(m, torch.nn.BatchNorm2d)]
    assert normalising
    assert not any(m.training for m in normalising)
    assert all(m.training for m in built.network.attention_branch.modules())
    before = {name: buffer.clone() for name, buffer in built.network.named_buffers()}
    built.losses(batch(), "train")
    moved = {n for n, b in built.network.named_buffers() if not torch.equal(b, before[n])}
    assert moved
    assert all(name.startswith("attention_branch.") for name in moved)
    assert not any(m.training for m in built.eval().modules())


def test_the_head_of_a_classifier_is_in_the_fast_group():
    torch.manual_seed(0)
    built = Classifier("resnet18", class_weights=[2.0, 1.0])
    groups = built.configure_optimizers()["optimizer"].param_groups
    assert {g["name"]: len(g["params"]) for g in groups}["fast"] == 2
    with pytest.raises(ValueError, match="class_weights has 3 numbers"):
        Classifier("resnet18", class_weights=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_random_weights_raise_until_weights_are_loaded(stage):
    built, runner = module(), pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    del built.log
    data = SyntheticFundus(n_train=4, n_val=4, n_test=4, image_size=48, batch_size=4)
    with pytest.raises(ValueError, match=r"weights of lambda_resnet \(first: .* are random: give --ckpt_path"):
        getattr(runner, stage)(built, data, verbose=False)
    weights = module().state_dict()
    some = {name: tensor for name, tensor in weights.items() if "head" not in name}
    built.load_state_dict(some, strict=False)
    assert built.random_weights
    assert all("head" in name for name in built.random_weights)
    built.load_state_dict(weights)
    assert built.random_weights == ()


def test_the_gate_closes_by_the_epoch():
    schedule = GateSchedule(share=0.2, begin=1, end=5)
    assert [schedule.at(epoch) for epoch in range(8)] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    for wrong in ({"share": 0.0}, {"share": 1.1}, {"begin": -1}, {"begin": 3, "end": 3}):
        with pytest.raises(ValueError, match="gate_schedule"):
            GateSchedule(**wrong)


def fit(folder, epochs, ckpt=None, **options):
    torch.manual_seed(3)
    options = {"gate_schedule": GateSchedule(0.5, 0, 2), "gate_margin": 0.2, **options}
    built = LABN("lambda_resnet", split=1, theta=0.5, network_options=BACKBONE, **options)
    runner = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = SyntheticFundus(n_train=8, n_val=4, n_test=4, image_size=48, batch_size=4)
    runner.fit(built, data, ckpt_path=ckpt, weights_only=False)
    runner.save_checkpoint(folder / f"{epochs}.ckpt")
    return built, runner


@pytest.mark.slow
def test_a_resumed_schedule_goes_on_and_the_checkpoint_carries_its_share(tmp_path):
    first, _ = fit(tmp_path, 2, bn_epochs=1)
    assert float(first.network.open_share) == pytest.approx(0.75)
    second, runner = fit(tmp_path, 3, tmp_path / "2.ckpt", bn_epochs=1)
    assert float(second.network.open_share) == pytest.approx(0.5)
    assert float(runner.callback_metrics["gate/val_open"]) == pytest.approx(0.5, abs=0.01)
    whole, _ = fit(tmp_path, 3, bn_epochs=1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    content = torch.load(tmp_path / "3.ckpt", weights_only=False)
    content["hyper_parameters"]["_class_path"] = "labn.modules.LABN"
    content["hyper_parameters"]["gate_schedule"] = {"share": 0.5, "begin": 0, "end": 2}  # as the command line saves it
    torch.save(content, tmp_path / "named.ckpt")
    restored, _ = restore(tmp_path / "named.ckpt")
    assert float(restored.open_share) == pytest.approx(0.5)


def test_the_network_keeps_its_statistics_after_its_epochs(tmp_path):
    statistics = []
    for epochs in (1, 2, 3):
        built, _ = fit(tmp_path, epochs, bn_epochs=2)
        statistics.append({name: b for name, b in built.network.named_buffers() if "running" in name})
    assert not all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])
    assert all(torch.equal(statistics[1][name], statistics[2][name]) for name in statistics[0])
    assert not any(m.training for m in built.network.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_a_cosine_ends_at_its_floor(tmp_path):
    _, runner = fit(tmp_path, 2, lr_schedule="cosine", lr=1e-2, head_lr=1e-1, min_lr=1e-3)
    assert [group["lr"] for group in runner.optimizers[0].param_groups] == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr_schedule": "step"}, "lr_schedule is 'step'"), ({"bn_epochs": 0}, "bn_epochs is 0")],
)
def test_options_that_no_training_can_follow_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_network_with_3d_convolutions_is_laid_out_for_training():
    module = LABN("timm/lambda_resnet26t", split="stages.1.1", network_options={"branch_options": {"planes": 8}})
    module.setup("fit")
    formats = {p.is_contiguous(memory_format=torch.channels_last) for p in module.parameters() if p.ndim == 4}
    assert formats == {True}
    assert any(parameter.ndim == 5 for parameter in module.parameters())


def test_network_options_that_the_module_has_itself_are_named():
    with pytest.raises(InputError, match="network_options has lab_block, split, given by the module's own arguments"):
        LABN("resnet18", split=6, network_options={"lab_block": "own", "split": 5})


def test_weights_are_laid_out_as_torch_lays_them_out():
    ours, torchs = (torch.nn.Sequential(torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(1, 8, 3)) for _ in range(2))
    to_channels_last(ours)
    torchs.to(memory_format=torch.channels_last)
    assert [p.stride() for p in ours.parameters()] == [p.stride() for p in torchs.parameters()]
