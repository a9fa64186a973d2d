"""The loader of validation and test data, which every rank goes through to the end."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


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
