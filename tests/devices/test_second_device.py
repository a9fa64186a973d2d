"""The stand-in keeps a GPU's rules, so that what passes on it moves every tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from torch import nn


@pytest.fixture
def pair():
    """A tensor there and one here."""
    with Elsewhere():
        yield torch.ones(2, 3).to(DEVICE), torch.ones(2, 3)


@pytest.mark.parametrize(
    "mix",
    [torch.add, torch.matmul, torch.equal, torch.where, lambda a, b: torch.cat([a, b]), lambda a, b: a.add_(b)],
)
def test_tensors_of_two_devices_do_not_meet(pair, mix):
    a, b = pair
    arguments = (a > 0, a, b) if mix is torch.where else (a, b.T) if mix is torch.matmul else (a, b)
    with pytest.raises(RuntimeError, match=r"on cuda:0, but found .* on cpu"):
        mix(*arguments)


def test_numbers_and_indices_of_the_cpu_may_meet_them(pair):
    a, _ = pair
    assert (a * torch.tensor(2.0)).device == DEVICE
    assert a[torch.tensor([1])].device == DEVICE
    a[0] = torch.zeros(3)
    assert a.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert a.sum().item() == 3


def test_moving_copies_and_the_type_does_not_move(pair):
    a, b = pair
    back = a.cpu()
    back += 1
    assert a.sum() == 6
    assert (back.device.type, a.double().device, b.to(a).device, a.to(b).device.type) == ("cpu", DEVICE, DEVICE, "cpu")
    assert a.to(DEVICE) is a
    assert torch.zeros(2, device=a.device).is_cuda


def test_what_reads_the_memory_is_refused(pair):
    a, _ = pair
    with pytest.raises(TypeError, match="to numpy"):
        a.numpy()
    with pytest.raises(RuntimeError, match="for generator"):
        a.uniform_(generator=torch.Generator())


def test_modules_and_gradients_are_there(pair):
    a, b = pair
    layer = nn.Linear(3, 2).to(DEVICE)
    layer(a).sum().backward()
    (gradient,) = torch.autograd.grad(layer(a).sum(), layer.weight)
    tensors = [layer.weight, layer.weight.grad, gradient, copy.deepcopy(layer).weight, layer.state_dict()["bias"]]
    assert {tensor.device for tensor in tensors} == {DEVICE}
    with pytest.raises(RuntimeError, match="linear"):
        layer(b)


def test_nothing_stays_behind(pair, tmp_path):
    torch.save(pair[0], tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True).device.type == "cpu"


def test_the_mode_ends():
    with Elsewhere():
        tensor = torch.ones(2).to(DEVICE)
    assert tensor.device.type == "cpu"
    assert nn.Parameter(torch.ones(2)).device.type == "cpu"
