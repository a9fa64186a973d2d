"""The teacher of the attention map: closed forms of its loss, which images teach, and what it trains."""

import pytest
import torch
from test_labn import batch, module
from torch import nn

from labn.errors import UserError
from labn.explainers import FinerCAM
from labn.modules import MapTeacher
from labn.modules.map_teacher import map_distance
from labn.modules.restore import restore


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_above_the_contrast_the_loss_is_one_minus_the_correlation():
    maps, evidence = drawn(0, 3, 4, 5), drawn(1, 3, 4, 5)
    pairs = [torch.corrcoef(torch.stack([a.flatten(), e.flatten()]))[0, 1] for a, e in zip(maps, evidence)]
    expected = 1 - torch.stack(pairs).mean()
    for scaled in (maps, 7 * maps + 3):
        assert map_distance(scaled, evidence, 1e-3).item() == pytest.approx(expected.item(), abs=1e-6)
    assert map_distance(-maps, evidence, 1e-3).item() == pytest.approx(2 - expected.item(), abs=1e-6)


def test_below_the_contrast_the_loss_falls_linearly_with_the_deviation_of_the_map():
    evidence = drawn(0, 1, 4, 4)
    unit = evidence / evidence.std(correction=0)
    for deviation in (0.0, 0.02, 0.05, 0.1, 0.4):
        expected = 1 - min(deviation / 0.1, 1)
        assert map_distance(0.7 + deviation * unit, evidence, 0.1).item() == pytest.approx(expected, abs=1e-6)


def test_a_constant_map_gets_a_finite_gradient_towards_the_evidence():
    maps, evidence = torch.full((2, 3, 3), 0.7, requires_grad=True), drawn(0, 2, 3, 3).float()
    (gradient,) = torch.autograd.grad(map_distance(maps, evidence, 0.1), maps)
    centred = evidence - evidence.mean((1, 2), keepdim=True)
    expected = -centred / (0.1 * centred.flatten(1).std(1, correction=0)[:, None, None] * 9 * 2)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_constant_evidence_teaches_nothing():
    maps = drawn(0, 2, 3, 3).requires_grad_()
    loss = map_distance(maps, torch.ones(2, 3, 3), 0.1)
    assert loss.item() == 1
    assert not torch.autograd.grad(loss, maps)[0].any()


def test_evidence_of_images_is_averaged_over_the_positions_of_the_map():
    fine = drawn(0, 1, 6, 9)
    coarse = fine.unfold(1, 3, 3).unfold(2, 3, 3).mean((-1, -2))
    assert map_distance(coarse, fine, 1e-3).item() == pytest.approx(0, abs=1e-6)


def test_images_of_the_absence_class_teach_nothing():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images, labels, indices = torch.rand(3, 3, 8, 8), torch.tensor([1, 0, 1]), torch.arange(3)
    attention = torch.rand(3, 1, 6, 6, requires_grad=True)
    loss = MapTeacher(absence_class=0).loss(network, attention, images, labels, indices)
    (gradient,) = torch.autograd.grad(loss, attention)
    assert gradient.flatten(1).any(1).tolist() == [True, False, True]
    # Without that class the mean runs over all images.
    evidence = FinerCAM(relu=False)(network, images, labels, indices)
    every = MapTeacher().loss(network, attention, images, labels, indices)
    assert every.item() == pytest.approx(map_distance(attention.squeeze(1), evidence, 0.1).item(), abs=1e-6)
    chosen = torch.tensor([0, 2])
    assert loss.item() == pytest.approx(
        map_distance(attention.squeeze(1)[chosen], evidence[chosen], 0.1).item(), abs=1e-6
    )


def test_the_teacher_trains_the_map_alone_and_leaves_modes_and_statistics():
    built = module(map_teacher=MapTeacher(weight=2.0, absence_class=0))
    terms, _ = built.losses(batch(), "train")
    assert torch.allclose(terms["loss"], terms["main_loss"] + 3 * terms["branch_loss"] + 2 * terms["map_distance"])
    named = dict(built.network.named_parameters())
    gradients = torch.autograd.grad(terms["map_distance"], list(named.values()), allow_unused=True)
    reached = {name for name, gradient in zip(named, gradients) if gradient is not None and gradient.any()}
    assert reached
    # The evidence is a constant: no gradient reaches what stands behind the map.
    assert all(name.startswith(("feature_extractor.", "attention_branch.")) for name in reached)
    assert built.network.perception_branch.training
    plain = module()
    plain.losses(batch(), "train")
    for (name, buffer), (_, other) in zip(built.network.named_buffers(), plain.network.named_buffers()):
        assert torch.equal(buffer, other), name
    assert "map_distance" not in built.losses(batch(), "val")[0]


def test_the_map_learns_what_its_teacher_shows():
    torch.manual_seed(0)
    built = module(map_teacher=MapTeacher(weight=20.0), gate_margin=1.0)
    optimizer, distances = torch.optim.Adam(built.network.attention_branch.parameters(), 0.02), []
    for _ in range(15):
        terms, _ = built.losses(batch(), "train")
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        distances.append(terms["map_distance"].item())
    assert distances[0] == pytest.approx(1, abs=1e-5), "the map starts constant"
    assert distances[-1] < 0.6


def test_a_checkpoint_holds_the_settings_and_is_restored(tmp_path):
    built = module(map_teacher=MapTeacher("lrp", weight=2.0))
    arguments = {**built.hparams, "_class_path": "labn.modules.LABN"}
    torch.save({"state_dict": built.state_dict(), "hyper_parameters": arguments}, tmp_path / "a.ckpt")
    network, _ = restore(tmp_path / "a.ckpt")
    for name, parameter in built.network.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter)
    with torch.serialization.safe_globals([MapTeacher]):
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["map_teacher"]
    assert saved == MapTeacher("lrp", weight=2.0)


def test_any_method_can_teach():
    for name in ("gradcam", "lrp", "occlusion"):
        assert 0 <= module(map_teacher=MapTeacher(name)).losses(batch(2), "train")[0]["map_distance"] <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "map_teacher.weight is -1.0"),
        ({"contrast": 0.0}, "map_teacher.contrast is 0.0"),
        ({"absence_class": -1}, "map_teacher.absence_class is -1"),
        ({"explainer": "gradcan"}, "gradcan"),
        ({"options": {"rely": False}}, "rely"),
    ],
)
def test_wrong_options_raise_an_error_that_names_them(arguments, message):
    with pytest.raises(UserError, match=message):
        MapTeacher(**arguments)
