"""Every value has one definition, which reports print and README agrees with."""

import re
from pathlib import Path

import pytest

from labn.metrics import MetricEntry, Sparseness, ValueDescription, describe_value, metric_by_name, register_metric
from labn.metrics.registry import REGISTRY
from labn.models.detectors import COORDINATES

NAMES = sorted({value for entry in REGISTRY for name in entry.examples for value in metric_by_name(name).names})


def test_every_value_of_every_metric_and_of_detectors_has_a_meaning():
    detections = ("similarity", "mass", "confidence", *(f"shift_{name}" for name in COORDINATES))
    undescribed = [name for name in (*NAMES, *detections) if not describe_value(name).meaning]
    assert undescribed == []
    assert describe_value("nonsense") == ValueDescription("")


def test_the_names_of_variants_say_what_differs():
    texts = {name: describe_value(name).meaning for name in ("pid16", "pid8", "id", "pid16@stable", "pid16@official")}
    assert len(set(texts.values())) == 5
    assert "gets 0" in texts["pid16"]
    assert "gets 0" not in texts["pid16@official"]


@pytest.mark.parametrize("name", ["pid16", "insertion1@stable", "fill_probability"])
def test_logits_have_no_range(name):
    probability, logit = (describe_value(name, quantity) for quantity in ("probability", "logit"))
    assert probability.range
    assert not logit.range
    assert logit.better == probability.better
    assert "{" not in probability.meaning + logit.meaning
    assert "probability" not in logit.meaning


def test_a_metric_of_ones_own_is_described_by_itself_or_by_its_class():
    own = ValueDescription("evenness", "[0, 1]", "low")
    register_metric(MetricEntry("even", Sparseness, lambda match: {}, ("even",), {"even": own}))
    register_metric(MetricEntry("gini", Sparseness, lambda match: {}, ("gini",)))
    try:
        assert describe_value("even") == own
        assert describe_value("gini").meaning == Sparseness.__doc__.partition("\n")[0].rstrip(".")
    finally:
        del REGISTRY[-2:]


def test_readme_agrees_about_ranges_and_directions():
    text = (Path(__file__).parents[2] / "labn" / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| name | meaning | range | better |") :].partition("\n\n")[0]
    told = {}
    for line in table.splitlines()[2:]:
        names, _, limits, better = (cell.strip() for cell in line.strip("|").split("|"))
        told |= {name: (limits, better) for name in re.findall(r"`([\w@]+)`", names) if name != "errors"}
    assert len(told) > 15
    assert told == {name: (describe_value(name).range, describe_value(name).better) for name in told}
