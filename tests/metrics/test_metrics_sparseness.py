import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_models import Constant

from labn.metrics import Sparseness
from labn.metrics.functional import gini_index


def test_gini_index_of_constant_and_single_pixel_maps():
    single = torch.zeros(1, 4, 5)
    single[0, 2, 3] = -7
    assert gini_index(single).item() == pytest.approx(1 - 1 / 20)
    assert gini_index(torch.full((1, 4, 5), -2.0)).item() == pytest.approx(0, abs=1e-15)
    assert gini_index(torch.zeros(1, 4, 5)).item() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 100))
def test_gini_index_is_the_mean_absolute_difference_for_any_sign_and_scale(seed, scale):
    maps = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for value, one in zip(gini_index(-scale * maps), maps.abs().flatten(1)):
        expected = (one[:, None] - one[None]).abs().mean() / (2 * one.mean())
        assert value.item() == pytest.approx(expected.item(), abs=1e-12)


def test_sparseness_metric_averages_the_gini_index():
    maps = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    one, metric = torch.ones(2, dtype=torch.long), Sparseness()
    metric.update(Constant([0.0, 1.0]), torch.zeros(2, 1, 4, 5), maps, one, torch.arange(2))
    assert metric.compute()["sparseness"].item() == pytest.approx(gini_index(maps).mean().item())
