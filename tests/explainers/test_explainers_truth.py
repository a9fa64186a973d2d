"""The ground-truth map: mask, dilation and blur."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, gaussian_filter
from torch import nn

from labn.explainers import GroundTruthMap
from labn.explainers.baseline import disc
from labn.results.fingerprints import describe

IMAGES, TARGETS = torch.zeros(3, 2, 20, 24), torch.zeros(3, dtype=torch.long)


def masks():
    return torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)) > 0.97


def truth(given, **options):
    return GroundTruthMap(**options).with_masks(given)(nn.Identity(), IMAGES, TARGETS)


def test_the_map_without_options_is_the_mask():
    assert torch.equal(truth(masks()), masks().float())


def test_the_mask_is_dilated_by_a_disc():
    expected = np.stack([binary_dilation(mask, disc(3).numpy() > 0) for mask in masks().numpy()])
    assert torch.equal(truth(masks(), dilation=3), torch.from_numpy(expected).float())


def test_the_mask_is_blurred_by_a_gaussian():
    blurred = [gaussian_filter(mask, 2.0, mode="constant", truncate=4.0) for mask in masks().double().numpy()]
    torch.testing.assert_close(
        truth(masks(), blur=2.0).double(), torch.from_numpy(np.stack(blurred)), atol=1e-6, rtol=0
    )


def test_missing_masks_are_refused_and_masks_are_no_settings():
    with pytest.raises(ValueError, match="GroundTruthMap needs the ground-truth masks of these images"):
        GroundTruthMap()(nn.Identity(), IMAGES, TARGETS)
    with pytest.raises(ValueError, match="GroundTruthMap needs the ground-truth masks"):
        truth(masks()[:2])
    with pytest.raises(ValueError, match="must not be negative"):
        GroundTruthMap(dilation=-1)
    assert describe(GroundTruthMap(2).with_masks(masks())) == describe(GroundTruthMap(2))
