"""The steps after an explainer by their names, as `postprocess=["c3", "hq8"]` gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from labn.postprocess.choice import c1c, c3
from labn.postprocess.levels import normalise, quantise, with_sign

STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "c1c": c1c,
    "c3": c3,
    "normalise": normalise,
    **{sign: partial(with_sign, sign=sign) for sign in ("positive", "negative", "absolute")},  # type: ignore[arg-type]
}


def _step(name: str) -> Callable[[Tensor], Tensor] | None:
    if name.startswith("hq") and name[2:].isdigit():
        return partial(quantise, levels=int(name[2:]))
    return STEPS.get(name)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, after checking that each is known.

    Raises:
        ValueError: an unknown name.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if _step(name) is None:
            raise ValueError(f"postprocess {name!r} is not one of {', '.join(STEPS)} or hq<levels>, such as hq8.")
    return names


def apply(maps: Tensor, names: Sequence[str]) -> Tensor:
    """Maps (B, H, W) after the named steps, in the order given: `c1c`, `c3`, `hq8` (any number of levels), ..."""
    for name in check_names(names):
        step = _step(name)
        maps = maps if step is None else step(maps)
    return maps
