"""The LABN module: parameter groups, losses, guidance, frozen parts."""

import lightning.pytorch as pl
import pytest
import torch

from datamodules import SyntheticFundus
from labn.modules import LABN, Classifier, SaliencyGuidance

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


def test_a_frozen_feature_extractor_keeps_its_statistics():
    built = module(train_lfe=False)
    built.train()
    assert not any(m.training for m in built.network.feature_extractor.modules())
    assert built.network.perception_branch.training


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
