"""When each patch moves: what the report's player shows must be what was scored."""

import pytest
import torch

from labn.metrics import PatchInsertionDeletion
from labn.metrics.functional.insertion_deletion import kept_fractions
from labn.perturbation.patches import patch_pool, patch_ranks


@pytest.mark.parametrize("options", [{"step": 3}, {"ties": "stable", "step": 4}, {"protocol": "official", "step": 2}])
def test_steps_equal_the_moved_patches_of_the_curve(options):
    maps = torch.randint(0, 6, (3, 16, 16), generator=torch.Generator().manual_seed(0)).double()
    metric = PatchInsertionDeletion(4, **options)
    steps = metric.steps(maps, torch.arange(3))
    counts = metric.counts((16, 16))
    ranks = patch_ranks(patch_pool(maps, 4, "max"), options.get("ties", "fraction"))
    moved = torch.stack([(steps <= point).flatten(1).double().mean(1) for point in range(len(counts))], dim=1)
    assert steps.shape == (3, 4, 4)
    assert torch.equal(moved, kept_fractions(ranks, counts))


def test_tied_patches_move_at_the_same_step():
    steps = PatchInsertionDeletion(4, step=3).steps(torch.ones(1, 16, 16), torch.zeros(1, dtype=torch.long))
    assert (steps == 1).all()


def test_steps_include_smaller_patches_at_the_edge():
    assert PatchInsertionDeletion(4, step=1).steps(torch.rand(2, 10, 14), torch.arange(2)).shape == (2, 3, 4)
