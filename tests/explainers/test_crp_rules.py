"""CRP in closed form, float64, on a tiny detector and on SSD300: properties that do not depend on the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_detectors import picture, slim, tiny

from labn.explainers.relevance.crp import (
    COORDINATE_RULES,
    CRP,
    Question,
    class_alone,
    class_output,
    class_shares,
    opposite,
    share,
)
from labn.models.detectors import COORDINATES

few = settings(max_examples=25, deadline=None)
contributions = st.integers(0, 10_000).map(
    lambda seed: torch.randn(4, 18, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
)


def rivals_of(target: int, classes: int = 4) -> torch.Tensor:
    return torch.arange(classes) != target


@few
@given(contributions, st.integers(0, 3))
def test_shares_of_a_class_sum_to_one_and_the_contrast_to_zero(c, target):
    assert share(c).sum(-1).tolist() == pytest.approx([1.0] * 4, abs=1e-14)
    assert float(class_shares(c, target, rivals_of(target)).sum()) == pytest.approx(0, abs=1e-14)
    assert float(class_output(c, target, rivals_of(target)).sum()) == pytest.approx(0, abs=1e-14)
    assert float(class_alone(c, target, rivals_of(target)).sum()) == pytest.approx(1, abs=1e-14)


@few
@given(contributions)
def test_the_contrasts_of_all_classes_cancel(c):
    total = sum(class_shares(c, k, rivals_of(k)) for k in range(4))
    assert float(total.abs().max()) < 1e-14


@few
@given(contributions, st.integers(1, 3), st.floats(0.01, 100))
def test_the_scale_of_class_weights_matters_for_the_contrast_at_the_output_only(c, scaled, factor):
    changed = c.clone()
    changed[scaled] *= factor
    torch.testing.assert_close(class_shares(changed, 0, rivals_of(0)), class_shares(c, 0, rivals_of(0)))
    if not 0.5 < factor < 2:
        assert not torch.allclose(class_output(changed, 0, rivals_of(0)), class_output(c, 0, rivals_of(0)))


@few
@given(contributions, st.permutations([1, 2, 3]))
def test_the_order_of_the_rivals_does_not_matter(c, order):
    torch.testing.assert_close(class_shares(c[[0, *order]], 0, rivals_of(0)), class_shares(c, 0, rivals_of(0)))


@few
@given(contributions)
def test_swapping_two_classes_flips_the_sign(c):
    pair = c[:2]
    torch.testing.assert_close(class_shares(pair, 0, rivals_of(0, 2)), -class_shares(pair, 1, rivals_of(1, 2)))


@few
@given(contributions)
def test_the_coordinate_rule_is_the_class_rule_for_two_opposite_classes(c):
    pair = torch.stack([c[0], -c[0]])
    torch.testing.assert_close(opposite(c[0]), class_shares(pair, 0, rivals_of(0, 2)))
    torch.testing.assert_close(opposite(-c[0]), -opposite(c[0]))
    assert not bool(((share(c[0]) > 0) & (share(-c[0]) > 0)).any())


def test_rules_for_contributions_of_one_sign_sum_to_their_constants():
    c = torch.rand(4, 5, dtype=torch.float64)
    assert float(opposite(c[1]).sum()) == pytest.approx(1)
    assert float(share(-c[1]).abs().sum()) == 0
    sums = {name: float(rule(c, 1).sum()) for name, rule in COORDINATE_RULES.items()}
    assert sums == pytest.approx({"opposite": 1, "others": 0, "none": 1, "eps": 1, "alpha2beta1": 2})


def test_the_coordinate_rules_equal_values_computed_by_hand():
    c = torch.tensor([[2.0, -1.0, 0.0], [1.0, 1.0, 2.0], [0.0, 4.0, 0.0], [3.0, 0.0, 1.0]], dtype=torch.float64)
    others = (torch.tensor([1 / 4, 1 / 4, 2 / 4]) + torch.tensor([0, 1, 0]) + torch.tensor([3 / 4, 0, 1 / 4])) / 3
    expected = {
        "opposite": [1.0, -1.0, 0.0],
        "others": (torch.tensor([1.0, 0.0, 0.0]) - others).tolist(),
        "none": [1.0, 0.0, 0.0],
        "eps": [2.0, -1.0, 0.0],
        "alpha2beta1": [2.0, -1.0, 0.0],
    }
    for name, rule in COORDINATE_RULES.items():
        assert rule(c, 0).tolist() == pytest.approx(expected[name], abs=1e-7), name


PRIORS = {"tiny": [0, 77, 128, 150], "slim": [2310, 6000, 8000, 8550, 8700, 8731]}
DETECTORS = {"tiny": tiny, "slim": slim}


@pytest.fixture(scope="module", params=list(DETECTORS))
def scene(request):
    detector = DETECTORS[request.param]()
    crp = CRP()
    return crp, crp.trace(detector, picture(detector)), PRIORS[request.param]


@pytest.mark.slow
def test_relevance_sums_to_zero_at_the_head_and_at_the_pixels(scene):
    crp, trace, priors = scene
    answers = crp.ask(trace, [Question(p, task, 1) for p in priors for task in ("class", *COORDINATES)])
    size = answers.maps.abs().flatten(1).sum(1)
    assert float(answers.sums.abs().max()) < 1e-12
    # Nothing is lost below, because no unit of this network is active through its bias alone.
    assert float((answers.maps.flatten(1).sum(1) / size).abs().max()) < 1e-7
    assert float(size.min()) > 1e-3


def test_without_contrast_all_relevance_arrives_at_the_pixels(scene):
    _, trace, priors = scene
    plain = CRP(contrast_at="none")
    answers = plain.ask(trace, [Question(p, "class", k) for p in priors for k in (0, 2)])
    assert answers.sums.tolist() == pytest.approx([1.0] * len(answers.sums))
    assert answers.maps.flatten(1).sum(1).tolist() == pytest.approx([1.0] * len(answers.sums), abs=1e-7)
    assert float(answers.maps.min()) >= 0


def test_the_maps_of_all_classes_cancel(scene):
    crp, trace, priors = scene
    maps = crp.ask(trace, [Question(priors[1], "class", k) for k in range(4)]).maps
    assert float(maps.sum(0).abs().max()) < 1e-10 * float(maps.abs().max())


def test_relevance_of_the_window_equals_propagation_from_the_output(scene):
    """z+ from relevance 1 at the target and -1/(K - 1) at the others is the contrast, by linearity."""
    from labn.lrp import backward

    crp, trace, priors = scene
    for prior in priors[:2]:
        seed = torch.zeros_like(trace.trace.logits)
        start = prior * 4
        seed[0, start : start + 4] = torch.tensor([-1 / 3, -1 / 3, 1.0, -1 / 3], dtype=torch.float64)
        expected = backward(trace.trace, seed).sum(1)
        got = crp.ask(trace, [Question(prior, "class", 2)]).maps
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


def test_the_direction_sets_the_sign_of_a_coordinate_map():
    detector = tiny()
    image = picture(detector)
    positive, negative, predicted = (CRP(direction=d) for d in ("positive", "negative", "predicted"))
    trace = positive.trace(detector, image)
    questions = [Question(p, t) for p in (5, 90, 140) for t in COORDINATES]
    maps = positive.ask(trace, questions).maps
    torch.testing.assert_close(negative.ask(trace, questions).maps, -maps)
    signs = torch.stack([trace.predictions.offsets[0, p] for p in (5, 90, 140)]).flatten().sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(predicted.ask(trace, questions).maps, maps * signs[:, None, None])


def test_relevance_stays_inside_the_receptive_field():
    detector = slim()
    crp = CRP()
    trace = crp.trace(detector, picture(detector))
    row, column = 9, 25
    prior = (row * 38 + column) * 4
    for task in ("class", "cx"):
        heat = crp.ask(trace, [Question(prior, task, 1)]).maps[0]
        # conv4_3 sees 92 pixels around 8 * cell + 3.5, and the head's window is one cell wider on each side.
        y, x = 8 * row + 3.5, 8 * column + 3.5
        rows = (torch.arange(300) - y).abs() < 54
        columns = (torch.arange(300) - x).abs() < 54
        inside = rows[:, None] & columns
        assert float(heat[~inside].abs().max()) == 0
        assert float(heat[inside].abs().max()) > 0


def changed(detector, change):
    with torch.no_grad():
        for head in detector.classify:
            change(head.weight.view(2, detector.num_classes, *head.weight.shape[1:]))
    return detector


def class_map(detector, label=1, prior=70, **settings):
    crp = CRP(**settings)
    return crp.ask(crp.trace(detector, picture(detector)), [Question(prior, "class", label)]).maps


def test_maps_do_not_change_for_scaled_permuted_or_biased_classes():
    expected = class_map(tiny())
    torch.testing.assert_close(class_map(changed(tiny(), lambda w: w[:, 2].mul_(7.0))), expected)
    torch.testing.assert_close(class_map(changed(tiny(), lambda w: w[:, 1].mul_(0.3))), expected)
    torch.testing.assert_close(class_map(changed(tiny(), lambda w: w.copy_(w[:, [3, 1, 0, 2]]))), expected)
    biased = tiny()
    for head in biased.classify:
        head.bias = torch.nn.Parameter(torch.randn(8, dtype=torch.float64))
    torch.testing.assert_close(class_map(biased), expected)
    at_output = class_map(tiny(), contrast_at="output")
    assert not torch.allclose(class_map(changed(tiny(), lambda w: w[:, 2].mul_(7.0)), contrast_at="output"), at_output)


def test_a_flipped_regression_weight_flips_the_map():
    detector, flipped = tiny(), tiny()
    with torch.no_grad():
        for head in flipped.locate:
            head.weight.neg_()
    crp = CRP()
    maps = [crp.ask(crp.trace(d, picture(d)), [Question(70, "w")]).maps for d in (detector, flipped)]
    torch.testing.assert_close(maps[0], -maps[1])


@pytest.mark.parametrize(("prior", "label"), [(3, 1), (100, 3), (159, 2)])
def test_chosen_rivals_change_the_contrast(prior, label):
    trace = CRP().trace(tiny(), picture(tiny()))

    def heat(**settings):
        return CRP(**settings).ask(trace, [Question(prior, "class", label)]).maps

    logits = trace.predictions.classes[0, prior]
    order = [k for k in logits.argsort(descending=True).tolist() if k != label]
    torch.testing.assert_close(heat(others=2), heat(others=order[:2]))
    assert not torch.allclose(heat(others=2), heat(others=order[1:]))
    objects = [k for k in (1, 2, 3) if k != label]
    torch.testing.assert_close(heat(background=False), heat(others=objects))


def test_the_score_scales_the_map():
    detector = tiny()
    p = detector(picture(detector)).classes[0, 70].softmax(0)[1].detach()
    torch.testing.assert_close(class_map(detector, initial="score"), p * class_map(detector))


@pytest.mark.slow
def test_contrast_distinguishes_classes_that_plain_propagation_does_not():
    detector = slim()
    priors = PRIORS["slim"]

    def cosine(contrast_at):
        crp = CRP(contrast_at=contrast_at)
        trace = crp.trace(detector, picture(detector))
        first, second = (crp.ask(trace, [Question(p, "class", k) for p in priors]).maps.flatten(1) for k in (1, 2))
        return torch.cosine_similarity(first, second)

    plain, contrastive = cosine("none"), cosine("source")
    assert float(plain.min()) > 0.9
    # Maps of the last sources cover the picture whatever is asked; on average the contrast turns the map around.
    assert float(contrastive.mean()) < 0
    assert float(contrastive.median()) < 0
