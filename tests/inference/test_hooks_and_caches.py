"""Temporary hooks, and the cache of values that were made from a model."""

import gc
import weakref

import pytest
import torch
from torch import nn

from labn.inference.fast_copy import FastCopy, FastForm
from labn.inference.fingerprint import ModelCache, state_key
from labn.inference.hooks import temporary_hooks
from labn.perturbation.engine import PerturbationEngine


def test_temporary_hooks_are_removed_after_an_error():
    layer = nn.Linear(2, 2)
    hooks = {layer: lambda *_: None}
    with pytest.raises(RuntimeError, match="shapes"), temporary_hooks(before=hooks, after=hooks):
        layer(torch.zeros(3))
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_temporary_hooks_leave_the_hooks_of_others():
    layer, order = nn.ReLU(), []
    layer.register_forward_pre_hook(lambda *_: order.append("theirs"))
    with temporary_hooks(before={layer: lambda *_: order.append("ours")}, prepend=True):
        layer(torch.zeros(1))
    layer(torch.zeros(1))
    assert order == ["ours", "theirs", "theirs"]


def test_a_cached_value_is_made_again_for_another_model_state_name_or_condition():
    cache, layer, calls = ModelCache(), nn.Linear(1, 1), []

    def build():
        calls.append(len(calls))
        return calls[-1]

    assert [cache.get(layer, "a", build), cache.get(layer, "a", build)] == [0, 0]
    assert cache.get(layer, "b", build) == 1
    assert cache.get(layer, "a", build, valid_for=(3, 3)) == 2
    nn.init.zeros_(layer.weight)
    assert cache.get(layer, "a", build, valid_for=(3, 3)) == 3
    assert cache.get(nn.Linear(1, 1), "a", build) == 4


def test_a_cached_value_is_freed_with_its_model():
    cache, layer = ModelCache(), nn.Linear(1, 1)
    value = weakref.ref(cache.get(layer, "copy", lambda: nn.Linear(1, 1)))
    assert value() is not None
    del layer
    gc.collect()
    assert value() is None


def test_the_engine_refuses_a_fast_copy_without_a_module():
    with pytest.raises(ValueError, match="make it by runnable_copy"):
        PerturbationEngine(FastCopy(FastForm()), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_that_are_views_of_one_vector_have_a_key(dtype):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(130, 130)).to(dtype)  # the matrix begins at an odd offset
    values = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(torch.cat([values[:1], values])[1:], model.parameters())
    assert model[1].weight.storage_offset() % 2
    before = state_key(model)
    assert state_key(model) == before
    model[1].weight.data[7, 7] += 1
    assert state_key(model) != before
