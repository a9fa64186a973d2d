"""Average precision on one process and on several with uneven shares, without starting any."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from labn.metrics.average_precision import AveragePrecision

pytest.importorskip("pycocotools")


def image(index: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two found boxes of equal score, one of them right, and one or two true boxes."""
    corner = torch.tensor([index, index, index + 10.0, index + 12.0])
    found = torch.stack([corner + index % 3, corner + 40])
    labels = torch.tensor([index % 2, 0])
    truth = torch.stack([corner, corner + 100])[: 1 + index % 2]
    number = len(truth)
    preds = {"boxes": found, "scores": torch.tensor([0.5, 0.5]), "labels": labels}
    return preds, {"boxes": truth, "labels": labels[:number], "iscrowd": torch.zeros(number, dtype=torch.long)}


def metric(indices: list[int], **options: object) -> AveragePrecision:
    made = AveragePrecision(**options)
    for index in indices:
        preds, truth = image(index)
        made.update([preds], [truth], torch.tensor([index]))
    return made


@pytest.mark.parametrize(
    "shares", [[[0, 2, 4, 6], [1, 3, 5]], [[0, 3, 6], [1, 4], [2, 5]], [[0, 1, 2, 3, 4, 5, 6], []]]
)
def test_uneven_ranks_give_the_values_of_one_process(shares: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metric(list(range(7))).compute()
    states = [{name: copy.deepcopy(getattr(rank, name)) for name in rank._reductions} for rank in map(metric, shares)]
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: len(shares))
    monkeypatch.setattr(dist, "all_gather_object", lambda out, mine, group=None: out.__setitem__(slice(None), states))
    for share in shares:
        rank = metric(share, distributed_available_fn=lambda: True)
        value = rank.compute()
        assert {k: v.tolist() for k, v in value.items()} == {k: v.tolist() for k, v in whole.items()}
        assert [int(i) for i in rank.indices] == share
    assert 0 < float(whole["map"]) < 1
