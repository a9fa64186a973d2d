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
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_any_argument_is_described_and_told_from_another(one, other):
    assert digest(describe(Own(one))) == digest(describe(Own(one)))
    assert digest(describe(Own(one))) != digest(describe(Own(other)))


def test_no_address_enters_which_would_differ_in_every_run():
    assert describe(Own(Slotted())) == describe(Own(Slotted()))
