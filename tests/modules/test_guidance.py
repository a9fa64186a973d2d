import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from labn.metrics import PatchInsertionDeletion
from labn.modules.guidance import SaliencyGuidance, frozen_batchnorm, hard_mask, masked_images
from labn.perturbation.engine import PerturbationEngine
from labn.perturbation.patches import patch_grid


def maps(seed=0, size=(8, 8), count=3):
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hard_mask_keeps_the_highest_pixels():
    values = torch.arange(16.0).reshape(1, 4, 4)
    kept = hard_mask(values, patch_size=1, keep_ratio=0.25)
    assert kept.sum() == 4
    assert values[kept].min() > values[~kept].max()


def test_hard_mask_keeps_whole_patches():
    kept = hard_mask(maps(), patch_size=4, keep_ratio=0.25)
    blocks = kept.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).double().mean(-1)
    assert ((blocks == 0) | (blocks == 1)).all()
    assert (blocks.sum((1, 2)) == 1).all()


def test_keep_ratio_one_leaves_the_image_and_kl_zero():
    guidance = SaliencyGuidance(keep_ratio=1.0)
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    mask = guidance.mask(maps(), step=0)
    same = masked_images(images, mask, torch.zeros(1, 2, 1, 1, dtype=torch.float64))
    assert torch.equal(same, images)
    logits = torch.randn(3, 2, dtype=torch.float64)
    assert guidance.divergence(logits, logits).item() == 0


def test_only_differentiable_masks_pass_a_gradient_to_the_map():
    images, fill = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for name in ("straight_through", "soft", "detached"):
        values = maps().requires_grad_()
        masked = masked_images(images, SaliencyGuidance(mask_grad=name).mask(values, step=0), fill)
        if name == "detached":
            assert not masked.requires_grad
        else:
            (gradient,) = torch.autograd.grad(masked.sum(), values)
            assert torch.allclose(gradient, images[:, 0])


def test_the_straight_through_mask_is_hard_in_the_forward_pass():
    hard = SaliencyGuidance(mask_grad="detached").mask(maps(), step=0)
    through = SaliencyGuidance(mask_grad="straight_through").mask(maps(), step=0)
    assert torch.allclose(hard, through, atol=1e-15)
    assert set(hard.unique().tolist()) == {0.0, 1.0}


def test_drawn_keep_ratios_depend_on_the_step_alone():
    guidance = SaliencyGuidance(keep_ratio=[0.1, 0.5], keep_probabilities=[0.5, 0.5], patch_size=[1, 4])
    shares = [guidance.mask(maps(), step).mean().item() for step in range(30)]
    assert shares == [guidance.mask(maps(), step).mean().item() for step in range(30)]
    assert len({round(s, 3) for s in shares}) >= 2


def test_direction_and_detached_target_change_the_divergence():
    a = torch.tensor([[0.9, 0.1]]).double().log().requires_grad_()
    b = torch.tensor([[0.5, 0.5]]).double().log().requires_grad_()
    assert SaliencyGuidance().divergence(a, b).item() == pytest.approx(0.3681, abs=5e-5)
    assert SaliencyGuidance(direction="masked_original").divergence(a, b).item() == pytest.approx(0.5108, abs=5e-5)
    value = SaliencyGuidance(detach_target=True).divergence(a, b)
    assert torch.autograd.grad(value, a, allow_unused=True)[0] is None


def test_frozen_batchnorm_restores_flags_and_statistics():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = net[1].running_mean.clone()
    with frozen_batchnorm(net, frozen=True):
        net(torch.randn(4, 1, 8, 8))
    assert net[1].training
    assert torch.equal(net[1].running_mean, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_grad": "none"}, "mask_grad"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"source": "gradient"}, "detached"),
        ({"direction": "up"}, "direction"),
        ({"keep_ratio": []}, r"keep_ratio is \[\]"),
        ({"keep_ratio": 0.1, "keep_probabilities": [0.2, 0.8]}, "keep_probabilities has 2 and .*keep_ratio 1 values"),
        ({"patch_size": float("inf")}, "patch_size is inf"),
        ({"keep_ratio": [0.1, 0.2], "keep_probabilities": [1.0]}, "keep_probabilities has 1 and .*keep_ratio 2 values"),
        ({"keep_ratio": [0.1, 0.2], "keep_probabilities": [1.5, -0.5]}, r"keep_probabilities is \[1.5, -0.5\]"),
        ({"keep_ratio": [0.1, 0.2], "keep_probabilities": [0.0, 0.0]}, "keep_probabilities is"),
        ({"patch_probabilities": [1, 2, 3]}, "patch_probabilities has 3 and .*patch_size 1 values"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": []}, r"patch_size is \[\]"),
        ({"patch_size": [4, -1]}, "patch_size is"),
        ({"fill": "white"}, "guidance.fill is 'white'; it must be one of black"),
        ({"deletion_share": 2.0}, "deletion_share is 2.0"),
        ({"deletion_share": -0.1}, "deletion_share is -0.1"),
        ({"deletion_by": "pixel"}, "deletion_by is 'pixel'"),
        ({"deletion_class": -1}, "deletion_class is -1"),
        ({"target": "class"}, "guidance.target is 'class'"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"map_weight": float("nan")}, "map_weight is nan"),
    ],
)
def test_wrong_guidance_options_raise_an_error_that_names_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        SaliencyGuidance(**arguments)


def test_deletion_steps_depend_on_step_and_share():
    guidance = SaliencyGuidance(deletion_share=0.5)
    drawn = [bool(guidance.deletes(step, 4)[0]) for step in range(200)]
    assert drawn == [bool(guidance.deletes(step, 4).all()) for step in range(200)]
    assert 70 < sum(drawn) < 130
    assert not any(SaliencyGuidance().deletes(step, 4).any() for step in range(50))


def test_every_step_asks_both_halves_where_images_are_drawn():
    guidance = SaliencyGuidance(deletion_share=0.5, deletion_by="image")
    drawn = [guidance.deletes(step, 6) for step in range(50)]
    assert all(int(d.sum()) == 3 for d in drawn)
    assert all(torch.equal(d, guidance.deletes(step, 6)) for step, d in enumerate(drawn))
    assert (torch.stack(drawn).double().mean(0) - 0.5).abs().max() < 0.3
    assert len({tuple(d.tolist()) for d in drawn}) > 10


def test_the_loss_of_both_halves_is_the_mean_over_images():
    logits = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]).double().log()
    masked = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.4, 0.6]]).double().log()
    deletes, labels = torch.tensor([False, False, True]), torch.tensor([0, 1, 1])
    first = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    bare = torch.tensor([[0.4, 0.6]]).double().log().expand(3, 2)
    assert float(SaliencyGuidance().loss(logits, masked, deletes, bare, labels)) == pytest.approx(first / 3)
    asked = SaliencyGuidance(target="label", deletion_class=0).loss(logits, masked, deletes, None, labels)
    assert float(asked) == pytest.approx((2 * math.log(2) - math.log(0.4)) / 3)
    none, every = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    kept = SaliencyGuidance().loss(logits, masked, none, None, labels)
    assert torch.allclose(kept, SaliencyGuidance().divergence(logits, masked))
    gone = SaliencyGuidance(deletion_class=1).loss(logits, masked, every, None, labels)
    assert float(gone) == pytest.approx((2 * math.log(2) - math.log(0.6)) / 3)


def test_both_halves_raise_the_map_on_the_evidence():
    """p(1) rises with the pixel at the left; the kept half asks label 1 of it, the complement class 0."""
    guidance = SaliencyGuidance(
        keep_ratio=0.5, deletion_share=0.5, deletion_by="image", deletion_class=0, target="label"
    )
    images, values = torch.ones(2, 1, 1, 2, dtype=torch.float64), torch.full((2, 1, 2), 0.5, dtype=torch.float64)
    values.requires_grad_()
    for deletes in (torch.tensor([True, False]), torch.tensor([False, True])):
        mask = guidance.mask(values, step=0)
        shown = masked_images(
            images, torch.where(deletes[:, None, None], 1 - mask, mask), torch.zeros(1, 1, 1, 1).double()
        )
        evidence = shown[:, 0, 0, 0]
        logits = torch.stack([torch.zeros_like(evidence), evidence], dim=1)
        loss = guidance.loss(logits, logits, deletes, None, torch.ones(2, dtype=torch.long))
        (gradient,) = torch.autograd.grad(loss, values)
        assert (gradient[:, 0, 0] < 0).all()
        assert (gradient[:, 0, 1] == 0).all()


@given(
    size=st.sampled_from([(16, 16), (12, 20)]),
    patch=st.sampled_from([1, 2, 4, 5]),
    ratio=st.floats(0.01, 1.0),
    levels=st.sampled_from([3, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_the_mask_is_the_insertion_metrics_mask_for_the_same_map_and_count(size, patch, ratio, levels, seed):
    """What training keeps is what the metric shows at that count, ties and edge patches included."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (2, *size), generator=generator).double()
    kept = hard_mask(values, patch, ratio)
    patches = patch_grid(size, patch)[0] * patch_grid(size, patch)[1]
    count = max(1, round(ratio * patches))
    shown = []

    def watching(images):
        shown.append(images[:, 0] > 0)
        return torch.zeros(len(images), 2, dtype=torch.float64)

    metric = PatchInsertionDeletion(patch, step=count, ties="stable", fill="mean")
    images = torch.ones(2, 1, *size, dtype=torch.float64)
    engine = PerturbationEngine(watching, images)
    metric.score(nn.Identity(), images, values, torch.zeros(2, dtype=torch.long), torch.arange(2), cache=engine)
    inputs = {tuple(mask.flatten().tolist()) for mask in torch.cat(shown)}
    assert all(tuple(mask.flatten().tolist()) in inputs for mask in kept)
