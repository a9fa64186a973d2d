"""What identifies an explainer in results."""

from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.session import describe
from labn.store import digest


class Own:
    """An explainer's arguments, of whatever kind its author likes."""

    def __init__(self, thing):
        self.thing = thing


class Slotted:
    __slots__ = ("x",)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Path("a"), Path("b")),
        (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
        (torch.float32, torch.float64),
        ({1, 2}, {1, 3}),
        (np.float32(1), np.float32(2)),
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2), torch.ones(2, dtype=torch.bfloat16)),
        (torch.tensor(True), torch.tensor(False)),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_any_argument_is_described_and_told_from_another(one, other):
    assert digest(describe(Own(one))) == digest(describe(Own(one)))
    assert digest(describe(Own(one))) != digest(describe(Own(other)))


def test_a_tensor_is_described_alike_by_any_number_of_threads():
    thing, threads = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4, 8):
            torch.set_num_threads(count)
            found.append(describe(thing))
    finally:
        torch.set_num_threads(threads)
    assert found == found[:1] * 4
    assert describe(thing.transpose(1, 2).contiguous().transpose(1, 2)) == found[0]


def test_no_address_enters_which_would_differ_in_every_run():
    assert describe(Own(Slotted())) == describe(Own(Slotted()))
