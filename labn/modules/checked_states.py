"""A check, before anything is restored, that a checkpoint's states have the form that this training's states have.

Lightning and PyTorch take the states of loops, callbacks, optimisers and schedules as they are: a wrong value ends the
training later, with an error that names no file, or never, as a negative count of epochs does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from labn.errors import InputError

LARGEST_COUNT = 2**53
"""Counts of epochs, steps and batches above it are no counts."""
STAGES = ("ready", "started", "processed", "completed")
"""Counts of a loop's progress, in the order in which an epoch, batch or step passes them."""
IMPLEMENTATION = ("capturable", "differentiable", "foreign", "fused")
"""Settings of an optimiser that say how a step is computed, not what: those of this run's device hold."""
SCORES = ("score", "value")
"""Ends of the names of fields that are None until there is a number."""


class _WrongError(Exception):
    """The first difference: where, and what would be right."""


def check_states(path: Any, checkpoint: Mapping[str, Any], module: pl.LightningModule) -> None:
    """Compare the states in a checkpoint with those of a trainer that starts afresh.

    The settings `IMPLEMENTATION` of the optimisers are replaced by this run's.

    Args:
        path: the file, for the message.
        checkpoint: its content.
        module: the module, attached to its trainer.

    Raises:
        InputError: a value is of another kind; the message names the first one.
    """
    trainer = module.trainer
    own: dict[str, Any] = {"epoch": 0, "global_step": 0}
    own["callbacks"] = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
    try:
        if trainer.state.fn == "fit":
            own["loops"] = {"fit_loop": trainer.fit_loop.state_dict()}
            _check_optimisation(module, checkpoint)
        for name, value in own.items():
            if name in checkpoint:
                _check_like(value, checkpoint[name], name)
    except _WrongError as wrong:
        raise InputError(f"{path} cannot be restored: {wrong}; give another checkpoint.") from None


def _check_optimisation(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Compare the states of optimisers and schedules, where the module makes one of each as Lightning's dictionary."""
    made = module.configure_optimizers()
    if not isinstance(made, dict) or not isinstance(made.get("optimizer"), Optimizer):
        return
    optimizer, schedule = made["optimizer"], made.get("lr_scheduler")
    _check_like([{"state": {}}], states := checkpoint.get("optimizer_states"), "optimizer_states")
    assert isinstance(states, list)
    _check_optimizer(optimizer, states[0])
    scheduler = schedule.get("scheduler") if isinstance(schedule, dict) else schedule
    if isinstance(scheduler, LRScheduler):
        own = dict(scheduler.state_dict())
        _check_like([own], stored := checkpoint.get("lr_schedulers"), "lr_schedulers")
        assert isinstance(stored, list)
        # The state replaces attributes: foreign names would replace methods, or the optimiser itself.
        for name in stored[0]:
            _require(isinstance(name, str) and _may_hold(scheduler, own, name), "lr_schedulers[0]", name)


def _may_hold(scheduler: LRScheduler, own: Mapping[str, Any], name: str) -> bool:
    """Whether the state of a schedule may hold a name: its own, or one of another version that is no attribute here."""
    return name in own or not hasattr(scheduler, name)


def _require(right: bool, where: str, value: Any, wanted: str = "a state of this schedule") -> None:
    if not right:
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
        raise _WrongError(f"{where} is {shown} and must be {wanted}")


def _check_optimizer(optimizer: Optimizer, stored: Mapping[str, Any]) -> None:
    where, own = "optimizer_states[0]", optimizer.state_dict()["param_groups"]
    wanted = "a dictionary with param_groups and state"
    complete = isinstance(stored.get("state"), dict) and "param_groups" in stored
    _require(complete, where, sorted(map(str, stored)), wanted)
    _check_like(own, stored["param_groups"], f"{where}.param_groups")
    for number, (ours, group) in enumerate(zip(own, stored["param_groups"], strict=True)):
        _check_group(optimizer, ours, group, f"{where}.param_groups[{number}]")
        group.update({name: ours[name] for name in IMPLEMENTATION if name in ours})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fresh = _fresh_state(optimizer)
    for key, state in stored["state"].items():
        of = f"{where}.state[{str(key)[:20]}]"
        known = isinstance(key, int) and 0 <= key < len(parameters)
        _require(known, of, key, f"the state of one of {len(parameters)} parameters")
        _check_parameter_state(fresh, parameters[key].shape, state, of)


def _check_group(optimizer: Optimizer, own: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
    """Compare one group: the numbers of its parameters, and its settings, which the constructor checks."""
    # The numbers say to which parameter each state belongs.
    _require(stored.get("params") == own["params"], f"{where}.params", stored.get("params"), "in order")
    # PyTorch fills in flags that earlier versions did not have, and no numbers.
    numbers = [name for name, value in own.items() if isinstance(value, (float, tuple))]
    wanted = f"settings with {', '.join(numbers)}"
    _require(set(numbers) <= stored.keys(), where, sorted(map(str, stored)), wanted)
    try:
        _alike(optimizer, stored)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _WrongError(f"{where} has settings that {type(optimizer).__name__} refuses ({error})") from error


def _check_parameter_state(fresh: Mapping[str, Any], shape: torch.Size, stored: Any, where: str) -> None:
    """Compare the state of one parameter with that of a first step."""
    known = isinstance(stored, dict) and fresh.keys() <= stored.keys()
    _require(known, where, stored, f"a dictionary of {', '.join(fresh)}")
    for name, value in stored.items():
        if name == "step":
            counted = _is_number(value) and 1 <= float(value) <= LARGEST_COUNT
            _require(counted, f"{where}.step", value, "a number from 1")
        else:
            fits = isinstance(value, Tensor) and value.shape == shape
            fits |= value is None and fresh.get(name) is None
            _require(fits, f"{where}.{name}", value, f"a tensor {tuple(shape)}")


def _fresh_state(optimizer: Optimizer) -> dict[str, Any]:
    """What the optimiser keeps per parameter, from one step of another one of its kind on a single number."""
    other = _alike(optimizer, optimizer.defaults)
    (number,) = other.param_groups[0]["params"]
    number.grad = torch.zeros(1)
    other.step()
    return dict(other.state[number])


def _alike(optimizer: Optimizer, settings: Mapping[str, Any]) -> Optimizer:
    """An optimiser of the same class with some settings, for a single number."""
    known = inspect.signature(type(optimizer)).parameters.keys() & optimizer.defaults.keys() & settings.keys()
    return type(optimizer)([torch.zeros(1, requires_grad=True)], **{name: settings[name] for name in known})


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


def _check_like(own: Any, stored: Any, where: str) -> None:
    """Raise `_WrongError` unless the stored value is of the kind of our own."""
    check = _check_of(own, where.rpartition(".")[2])
    if check is not None:
        check(own, stored, where)


def _check_of(own: Any, name: str) -> Callable[[Any, Any, str], None] | None:
    """The comparison for a value of our own; None where any value will do."""
    if isinstance(own, dict):
        return _check_dict
    if isinstance(own, (list, tuple)):
        return _check_list
    if own is None:
        return _check_score if name.endswith(SCORES) else None
    for kind, check in ((bool, _check_bool), (int, _check_count), (float, _check_real), (str, _check_text)):
        if isinstance(own, kind):
            return check
    return _check_scalar if isinstance(own, Tensor) and own.ndim == 0 else None


def _check_dict(own: Any, stored: Any, where: str) -> None:
    _require(isinstance(stored, dict), where, stored, "a dictionary")
    for name, value in own.items():
        if name in stored:
            _check_like(value, stored[name], f"{where}.{name}")
    if "ready" in own:
        _require(own.keys() <= stored.keys(), where, stored, f"counts of {', '.join(own)}")
        counts = [stored[name] for name in STAGES if name in own]
        # What is completed has been processed, started and made ready before. Of the current ones all but the last one
        # are complete; the total also counts those of earlier processes that were killed.
        most = 1 if where.endswith("current") else LARGEST_COUNT
        ordered = sorted(counts, reverse=True) == counts and counts[0] - counts[-1] <= most
        _require(ordered, where, stored, "counts that fall from ready to completed, the current ones by one at most")


def _check_list(own: Any, stored: Any, where: str) -> None:
    right = isinstance(stored, (list, tuple)) and (not own or len(stored) == len(own))
    _require(right, where, stored, f"a list of {len(own)}")
    for number, (value, other) in enumerate(zip(own, stored)):
        _check_like(value, other, f"{where}[{number}]")


def _check_bool(own: Any, stored: Any, where: str) -> None:
    _require(isinstance(stored, (bool, int)) and stored in (0, 1), where, stored, "true or false")


def _check_count(own: Any, stored: Any, where: str) -> None:
    is_count = isinstance(stored, int) and 0 <= stored <= LARGEST_COUNT
    _require(is_count, where, stored, "a whole number from 0")


def _check_real(own: Any, stored: Any, where: str) -> None:
    # Infinity is the best value before the first epoch; other numbers beyond the counts overflow somewhere.
    right = _is_number(stored) and (math.isinf(float(stored)) or abs(stored) <= LARGEST_COUNT)
    _require(right, where, stored, "a number")


def _check_text(own: Any, stored: Any, where: str) -> None:
    _require(isinstance(stored, str), where, stored, "a text")


def _check_score(own: Any, stored: Any, where: str) -> None:
    _require(stored is None or _is_number(stored), where, stored, "a number or nothing")


def _check_scalar(own: Any, stored: Any, where: str) -> None:
    _require(isinstance(stored, Tensor) and stored.ndim == 0, where, stored, "a tensor of one number")
