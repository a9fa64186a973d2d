"""Rows of several ranks, repeated or out of order, must give the digits of one process."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scoring_models import Wavy

from labn.metrics import PatchInsertionDeletion, RelevanceMass

N = 13
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(N, 1, 4, 4, generator=GENERATOR, dtype=torch.float64)
MAPS = torch.rand(N, 4, 4, generator=GENERATOR)
LABELS = torch.arange(N) % 3
MASKS = torch.rand(N, 4, 4, generator=GENERATOR) < 0.1


def updated(metric, samples, batch_size=4):
    """`metric` after the samples, in their order, batch by batch."""
    for start in range(0, len(samples), batch_size):
        i = torch.tensor(samples[start : start + batch_size])
        metric.update(Wavy(16), IMAGES[i], MAPS[i], LABELS[i], i, masks=MASKS[i])
    return metric


def make(kind):
    return RelevanceMass() if kind == "mass" else PatchInsertionDeletion(1, step=3, positives_only=True, chunk_size=1)


@pytest.mark.parametrize("kind", ["pid", "mass"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_merged_states_of_several_ranks_give_the_same_digits(kind, ranks):
    whole = updated(make(kind), list(range(N))).compute()
    merged = make(kind)
    for rank in range(ranks):
        shard = [(rank + ranks * k) % N for k in range(-(-N // ranks))]  # repeats samples, as padded samplers do
        merged.rows.extend(updated(make(kind), shard, batch_size=2).rows)
    merged._update_count = 1
    assert {name: value.item() for name, value in merged.compute().items()} == {k: v.item() for k, v in whole.items()}


def test_per_sample_values_are_sorted_and_unique():
    metric = updated(PatchInsertionDeletion(1, step=3, positives_only=True), [5, 3, 12, 3, 0])
    indices, values = metric.per_sample()
    assert indices.tolist() == [0, 3, 5, 12]
    assert values["id"].isnan().tolist() == [True, True, False, True]
    assert metric.compute()["pid"].item() == values["id"][2].item()


def test_appended_scores_equal_update():
    one, two = (PatchInsertionDeletion(1, step=3) for _ in range(2))
    updated(one, [0, 1, 2])
    i = torch.arange(3)
    scores = two.score(Wavy(16), IMAGES[:3], MAPS[:3], LABELS[:3], i)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.append(i[:2], {name: value[:2] for name, value in scores.items()})
        two.compute()
        two.append(i[2:], {name: value[2:] for name, value in scores.items()})
        assert two.compute()["pid"].item() == pytest.approx(one.compute()["pid"].item(), abs=1e-14)


def test_score_does_not_change_the_state_and_reset_empties_it():
    metric = make("mass")
    metric.score(Wavy(16), IMAGES, MAPS, LABELS, torch.arange(N), masks=MASKS)
    assert len(metric.rows) == 0
    updated(metric, [1, 2]).reset()
    assert len(metric.per_sample()[0]) == 0


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    shard = list(range(N)) if rank == 0 else []
    metric = make("pid").to("cpu")  # as a trainer moves it, after which torchmetrics has forgotten the states' dtype
    torch.save(updated(metric, shard).compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_sample_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    whole = updated(make("pid"), list(range(N))).compute()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert {k: v.item() for k, v in result.items()} == {k: v.item() for k, v in whole.items()}
