"""Samplers that are exact under several processes and carry the epoch to the augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from labn.errors import InputError


class SampleKey(NamedTuple):
    """What a training sampler hands to the dataset: `sample` (a position in the split) in `epoch`.

    The epoch travels with the index because persistent workers hold their own copy of the dataset, which a
    `set_epoch` in the main process would not reach.
    """

    sample: int
    epoch: int


class UnrepeatedDistributedSampler(DistributedSampler):
    """Evaluation order 0, 1, ... N-1 dealt to the ranks in turn, every index exactly once over all ranks.

    The stock `DistributedSampler` repeats leading samples up to a multiple of the number of ranks, which biases
    every mean. Ranks get `ceil` or `floor` of N / ranks samples, none at all where N < ranks. Being a
    `DistributedSampler`, it is left alone by Lightning whatever `use_distributed_sampler` says.

    Args:
        dataset: anything with a length.
        num_replicas: number of ranks.
        rank: this rank, 0 <= rank < num_replicas.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.total_size = len(dataset)
        self.num_samples = len(range(rank, self.total_size, num_replicas))

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(range(self.rank, self.total_size, self.num_replicas))


class _SeededSampler(DistributedSampler):
    """Common part of the training samplers: a global order drawn from (seed, epoch), sharded by rank."""

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def _rng(self) -> np.random.Generator:
        # A sequence, not seed + epoch: seed 38 at epoch 1 must not repeat seed 39 at epoch 0.
        return np.random.default_rng([self.seed, self.epoch])

    def _order(self) -> np.ndarray[Any, Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        return (SampleKey(int(i), self.epoch) for i in self._order())


class ShuffledSampler(_SeededSampler):
    """A permutation of the samples drawn from (seed, epoch), dealt to the ranks in turn.

    Training needs the same number of batches on every rank, so the permutation's head is repeated up to a multiple
    of `num_replicas` (never with one process).

    Args:
        dataset: anything with a length.
        num_replicas: number of ranks.
        rank: this rank.
        seed: first half of the seed; the epoch of `set_epoch` is the other.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, seed)

    def _order(self) -> np.ndarray[Any, Any]:
        order = self._rng().permutation(len(self.dataset))  # type: ignore[arg-type]
        return np.resize(order, self.total_size)[self.rank :: self.num_replicas]


class BalancedSampler(_SeededSampler):
    """Every `batch_size` consecutive samples of a rank hold batch_size / classes samples of each class.

    A plain sampler rather than a batch sampler, so that Lightning's own batching (and its `set_epoch`) stays in
    charge; pair it with `DataLoader(batch_size=batch_size, drop_last=True)`. An epoch is floor(N / (batch_size *
    ranks)) batches per rank, at least one; a class is gone through without repetition before it starts again.
    Only labels are read, no image.

    Args:
        labels: class of every sample, values 0 .. num_classes - 1.
        batch_size: samples per batch and rank, a multiple of `num_classes`.
        num_classes: number of classes; every one needs a sample.
        num_replicas: number of ranks.
        rank: this rank.
        seed: first half of the seed; the epoch of `set_epoch` is the other.

    Raises:
        ValueError: `batch_size` is no multiple of `num_classes`, or a class has no sample.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        num_classes: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        if batch_size % num_classes:
            raise InputError(
                f"batch_size={batch_size} cannot be balanced: it must be a multiple of the {num_classes} classes."
            )
        self._members = [np.flatnonzero(np.asarray(labels) == c) for c in range(num_classes)]
        if empty := [c for c, members in enumerate(self._members) if not len(members)]:
            raise InputError(f"balanced_sampler needs every class in training; class {empty[0]} has no image.")
        super().__init__(labels, num_replicas, rank, seed)
        self.batch_size = batch_size
        self.batches = max(1, len(labels) // (batch_size * num_replicas))
        self.num_samples = self.batches * batch_size

    def _order(self) -> np.ndarray[Any, Any]:
        rng = self._rng()
        rounds = self.batches * self.num_replicas
        share = self.batch_size // len(self._members)
        columns = [_repeat_shuffled(rng, members, rounds * share).reshape(rounds, share) for members in self._members]
        batches = np.concatenate(columns, axis=1)
        return rng.permuted(batches, axis=1)[self.rank :: self.num_replicas].ravel()


def _repeat_shuffled(rng: np.random.Generator, members: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """`count` members, in a new random order each time all of them have been used."""
    rounds = -(-count // len(members))
    return np.concatenate([rng.permutation(members) for _ in range(rounds)])[:count]


class EvaluationLoader(DataLoader[Any]):
    """A loader that announces on every rank the number of batches of the rank that has most.

    Where there are fewer samples than ranks, some ranks have no batch at all. Lightning leaves out the whole loop, its
    hooks included, on a rank whose loader announces nothing, and the other ranks then wait forever at the first
    barrier of an epoch's end. With this length that rank goes through an epoch without batches: iteration ends where
    the rank's samples do. It also makes every rank see the same number where batches are limited to a share.

    The sampler is a `DistributedSampler` over the whole split, such as `UnrepeatedDistributedSampler`; another one, as
    Lightning puts in its place for `overfit_batches`, gives every rank the same batches.
    """

    def __len__(self) -> int:
        """Batches of rank zero, which has ceil(N / ranks) of the N samples."""
        if not isinstance(self.sampler, DistributedSampler):
            return super().__len__()
        assert self.batch_size is not None
        samples = -(-len(self.sampler.dataset) // self.sampler.num_replicas)  # type: ignore[arg-type]
        return -(-samples // self.batch_size)
