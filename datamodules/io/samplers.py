"""Samplers that are exact with several processes and pass the epoch to the augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from labn.errors import InputError


class SampleKey(NamedTuple):
    """The key that a training sampler passes to the dataset: position of the sample in its split, and epoch.

    The epoch is passed with every sample because persistent workers have their own copies of the dataset, which
    `set_epoch` in the main process does not reach.
    """

    sample: int
    epoch: int


class UnrepeatedDistributedSampler(DistributedSampler):
    """Deals the indices 0, 1, ..., N-1 to the ranks in turn; every index belongs to exactly one rank.

    PyTorch's `DistributedSampler` repeats the first samples until all ranks have equally many, which biases every mean.
    Here, ranks get floor(N / ranks) or ceil(N / ranks) samples, and some get none where N < ranks. Lightning does not
    replace subclasses of `DistributedSampler`, whatever `use_distributed_sampler` is.

    Args:
        dataset: any object with a length.
        num_replicas: number of ranks.
        rank: this rank, 0 <= rank < num_replicas.

    Example:
        >>> [list(UnrepeatedDistributedSampler(range(5), num_replicas=2, rank=rank)) for rank in (0, 1)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.total_size = len(dataset)
        self.num_samples = len(range(rank, self.total_size, num_replicas))

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(range(self.rank, self.total_size, self.num_replicas))


class _SeededSampler(DistributedSampler):
    """Base of the training samplers: a global order drawn from (seed, epoch), of which each rank takes its share."""

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def _rng(self) -> np.random.Generator:
        # A pair and not the sum: seed 38 in epoch 1 must differ from seed 39 in epoch 0.
        return np.random.default_rng([self.seed, self.epoch])

    def _order(self) -> np.ndarray[Any, Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[SampleKey]:  # type: ignore[override]
        return (SampleKey(int(i), self.epoch) for i in self._order())


class ShuffledSampler(_SeededSampler):
    """Deals a permutation of the samples, drawn from (seed, epoch), to the ranks in turn.

    Training needs the same number of batches on every rank, so the first samples of the permutation are repeated up to
    a multiple of `num_replicas`; a single process repeats none.

    Args:
        dataset: any object with a length.
        num_replicas: number of ranks.
        rank: this rank.
        seed: seed of the permutations, together with the epoch of `set_epoch`.

    Example:
        >>> sampler = ShuffledSampler(range(4), seed=1)
        >>> sampler.set_epoch(2)
        >>> keys = list(sampler)
        >>> sorted(key.sample for key in keys), keys[0].epoch
        ([0, 1, 2, 3], 2)
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, seed)

    def _order(self) -> np.ndarray[Any, Any]:
        order = self._rng().permutation(len(self.dataset))  # type: ignore[arg-type]
        return np.resize(order, self.total_size)[self.rank :: self.num_replicas]


class BalancedSampler(_SeededSampler):
    """Yields samples so that every batch of a rank has batch_size / num_classes samples of each class.

    It is a sampler of samples and not of batches, because Lightning calls `set_epoch` on the former only; use it with
    `DataLoader(batch_size=batch_size, drop_last=True)`. An epoch has floor(N / (batch_size * ranks)) batches per rank,
    at least one. The samples of a class repeat only after all of them have been used. Only labels are read.

    Args:
        labels: class of every sample, from 0 to num_classes - 1.
        batch_size: samples per batch and rank, a multiple of `num_classes`.
        num_classes: number of classes; each needs a sample.
        num_replicas: number of ranks.
        rank: this rank.
        seed: seed of the order, together with the epoch of `set_epoch`.

    Raises:
        InputError: `batch_size` is not a multiple of `num_classes`, or a class has no sample.

    Example:
        >>> labels = [0, 0, 0, 0, 0, 1]
        >>> sampler = BalancedSampler(labels, batch_size=2, num_classes=2)
        >>> [labels[key.sample] for key in sampler].count(1), len(sampler)
        (3, 6)
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
    """`count` of the members, shuffled anew whenever all of them have been used."""
    rounds = -(-count // len(members))
    return np.concatenate([rng.permutation(members) for _ in range(rounds)])[:count]


class EvaluationLoader(DataLoader[Any]):
    """A loader whose length on every rank is the number of batches of the rank with the most samples.

    With fewer samples than ranks, some ranks have no batch. On a rank whose loader has length 0, Lightning skips the
    whole loop with all its hooks, and the other ranks wait forever at the first collective at the end of the epoch.
    With the common length, such a rank runs an epoch without batches: iteration ends with the rank's samples. The
    common length also makes `limit_val_batches` as a fraction mean the same number on every rank.

    The length is computed from a `DistributedSampler` over the whole split, such as `UnrepeatedDistributedSampler`.
    With any other sampler, as Lightning uses for `overfit_batches`, every rank has the same batches.
    """

    def __len__(self) -> int:
        """Number of batches of rank zero, which has ceil(N / ranks) of the N samples."""
        if not isinstance(self.sampler, DistributedSampler):
            return super().__len__()
        assert self.batch_size is not None
        samples = -(-len(self.sampler.dataset) // self.sampler.num_replicas)  # type: ignore[arg-type]
        return -(-samples // self.batch_size)
