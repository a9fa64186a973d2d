"""Postprocessing steps by their names, as in `postprocess=["c3", "hq8"]`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor

from labn.errors import InputError
from labn.postprocess.levels import normalise, quantise, with_sign
from labn.postprocess.region_choice import c1c, c3
from labn.postprocess.regions import Options

STEPS: dict[str, Callable[..., Tensor]] = {
    "c1c": c1c,
    "c3": c3,
    "normalise": normalise,
    **{sign: partial(with_sign, sign=sign) for sign in ("positive", "negative", "absolute")},  # type: ignore[arg-type]
}

_PROBE = torch.zeros(1, 2, 2)

_REGION = tuple(field.name for field in fields(Options))

OPTIONS: dict[str, tuple[str, ...]] = {
    "c1c": tuple(name for name in _REGION if name != "contour"),
    "c3": _REGION,
    "normalise": ("sign", "percentile"),
    "hq": ("mode",),
}


def _step(text: str) -> Callable[[Tensor], Tensor]:
    """The step with a name such as `c3`, `hq8` or `c1c:resolution=28,gain=3`.

    Raises:
        InputError: an unknown name or option.
    """
    name, _, options = text.partition(":")
    quantised = name.startswith("hq") and name[2:].isdigit()
    if name not in STEPS and not quantised:
        raise InputError(f"postprocess {name!r} is not one of {', '.join(STEPS)} or hq<levels>, such as hq8.")
    step = partial(quantise, levels=int(name[2:])) if quantised else STEPS[name]
    return partial(step, **_values(text, options, OPTIONS.get("hq" if quantised else name, ())))


def _values(text: str, options: str, names: Iterable[str]) -> dict[str, Any]:
    """The options `key=value,...` of a step, with values read as YAML."""
    values = {}
    for pair in filter(None, options.split(",")):
        key, equals, value = (text.strip() for text in pair.partition("="))
        if not equals or key not in names:
            allowed = ", ".join(names) or "none"
            raise InputError(
                f"postprocess {text!r} has the option {pair.strip()!r}; options are key=value of {allowed}."
            )
        values[key] = yaml.safe_load(value)
    return values


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of steps, their options and the values of these, and return the names as a tuple.

    Raises:
        InputError: an unknown name, option or value.

    Example:
        >>> from labn.postprocess import check_names
        >>> check_names(["c3", "hq8"])
        ('c3', 'hq8')
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _step(name)(_PROBE)  # running the step checks the values of its options
    return names


def apply(maps: Tensor, names: Sequence[str]) -> Tensor:
    """Maps (B, H, W) after the named steps, applied in this order.

    Args:
        maps: (B, H, W).
        names: keys of `STEPS`, or `hq<levels>` such as `hq8`. Options follow a colon: `c1c:resolution=28,gain=3` (as
            C1C was published), `c3:outside=min` (pixels outside of the region rank last in a signed map),
            `hq8:mode=round`, `normalise:sign=positive`. The options of regions are the fields of
            `labn.postprocess.Options`.

    Raises:
        InputError: an unknown name, option or value.

    Example:
        >>> from labn.postprocess import apply
        >>> apply(torch.tensor([[[9.0, 8.0, 0.0, 7.0]]]), ["c3", "hq2"])
        tensor([[[9., 0., 0., 0.]]])
    """
    for name in check_names(names):
        maps = _step(name)(maps)
    return maps
