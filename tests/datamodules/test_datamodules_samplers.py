from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from datamodules.io.samplers import BalancedSampler, SampleKey, ShuffledSampler, UnrepeatedDistributedSampler


@pytest.mark.parametrize("world", range(1, 9))
def test_evaluation_gives_every_sample_to_exactly_one_rank(world: int) -> None:
    for n in range(40):
        shares = [list(UnrepeatedDistributedSampler(range(n), world, rank)) for rank in range(world)]
        assert sorted(chain.from_iterable(shares)) == list(range(n))
        assert [len(UnrepeatedDistributedSampler(range(n), world, r)) for r in range(world)] == [*map(len, shares)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_lightning_does_not_replace_the_samplers() -> None:
    samplers = [
        UnrepeatedDistributedSampler(range(3)),
        ShuffledSampler(range(3)),
        BalancedSampler([0, 1], 2, 2),
    ]
    assert all(isinstance(sampler, DistributedSampler) for sampler in samplers)


@given(n=st.integers(1, 60), world=st.integers(1, 8), seed=st.integers(0, 50), epoch=st.integers(0, 5))
def test_shuffled_ranks_cover_all_samples_with_equal_counts(n: int, world: int, seed: int, epoch: int) -> None:
    drawn = []
    for rank in range(world):
        sampler = ShuffledSampler(range(n), world, rank, seed)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == -(-n // world)
        assert {key.epoch for key in keys} == {epoch}
        drawn += [key.sample for key in keys]
    counts = Counter(drawn)
    assert set(counts) == set(range(n))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_one_process_shuffles_without_repetition_and_differently_each_epoch() -> None:
    sampler = ShuffledSampler(range(50), seed=1)
    first = list(sampler)
    assert sorted(key.sample for key in first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert [key.sample for key in sampler] != [key.sample for key in first]
    assert all(key.epoch == 1 for key in sampler)


def test_the_second_epoch_of_a_seed_differs_from_the_first_of_the_next_seed() -> None:
    sampler, neighbour = ShuffledSampler(range(50), seed=38), ShuffledSampler(range(50), seed=39)
    sampler.set_epoch(1)
    assert [key.sample for key in sampler] != [key.sample for key in neighbour]


@given(
    counts=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    share=st.integers(1, 4),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_batch_on_every_rank_is_balanced(counts: list[int], share: int, world: int, epoch: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    batch = share * len(counts)
    lengths = set()
    for rank in range(world):
        sampler = BalancedSampler(labels.tolist(), batch, len(counts), world, rank)
        sampler.set_epoch(epoch)
        drawn = labels[[key.sample for key in sampler]].reshape(-1, batch)
        lengths.add(len(drawn))
        assert all(np.bincount(row, minlength=len(counts)).tolist() == [share] * len(counts) for row in drawn)
        assert len(sampler) == drawn.size
    assert len(lengths) == 1


def test_balanced_ranks_repeat_a_sample_only_after_all_of_its_class() -> None:
    labels = [0] * 40 + [1] * 8
    drawn = [key.sample for rank in range(2) for key in BalancedSampler(labels, 8, 2, 2, rank, seed=3)]
    assert len(drawn) == 2 * 3 * 8
    assert max(Counter(i for i in drawn if i < 40).values()) == 1
    assert Counter(i for i in drawn if i >= 40) == dict.fromkeys(range(40, 48), 3)


def test_a_loader_makes_balanced_batches_from_the_balanced_sampler() -> None:
    labels = [0] * 30 + [1] * 6
    sampler = BalancedSampler(labels, 6, 2)
    loader = DataLoader(_Keys(labels), batch_size=6, sampler=sampler, drop_last=True)
    assert [batch.tolist().count(1) for batch in loader] == [3] * 6


class _Keys:
    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: SampleKey) -> int:
        return self.labels[key[0]]


def test_balancing_raises_for_a_wrong_batch_size_or_an_empty_class() -> None:
    with pytest.raises(ValueError, match="batch_size=7 cannot be balanced: it must be a multiple of the 2 classes"):
        BalancedSampler([0, 1], 7, 2)
    with pytest.raises(ValueError, match="class 1 has no image"):
        BalancedSampler([0, 0, 2], 3, 3)
