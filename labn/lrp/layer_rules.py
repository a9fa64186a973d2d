"""Rules by layer, as data: an ordered list of conditions and rules, and four composites of the literature."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from labn.errors import InputError

Kind = Literal["conv", "depthwise", "linear", "attention", "product"]

KINDS = get_args(Kind)
RULE_NAMES = ("lrp0", "epsilon", "zplus", "alphabeta", "gamma", "flat", "ones", "zbox", "alpha1beta0", "wsquare")
PARAMETERS = ("eps", "eps_mode", "alpha", "beta", "gamma", "biases")


@dataclass(frozen=True)
class LayerRule:
    """A rule for the layers that meet all of its conditions; the first rule of a list whose conditions hold is taken.

    Attributes:
        rule: name of a rule of `labn.lrp.Config`, of `rule` or of `first_layer`.
        kind: `conv` (depthwise ones included), `depthwise`, `linear` (attention projections included), `attention` (a
            linear layer that makes queries, keys or values, or reads what attention has collected), or `product` (a
            product of values with constant weights, such as attention); None: any.
        position: `first` (no layer with weights lies between the images and this one) or `last` (the logits); None:
            any.
        depth: lowest and highest fraction of the layers with weights before this one: 0 at the images, 1 at the logits.
        name: regular expression that the qualified module name contains.
        eps, eps_mode, alpha, beta, gamma, biases: parameters of the rule; None: those of the configuration.

    Raises:
        InputError: an unknown rule, kind or position, a depth outside of 0..1, or a name that is no regular expression.

    Example:
        >>> from labn.lrp import Config, LayerRule
        >>> Config(composite=(LayerRule("zplus", kind="conv"), LayerRule("epsilon", kind="linear"))).composite[0].kind
        'conv'
    """

    rule: str
    kind: Kind | None = None
    position: Literal["first", "last"] | None = None
    depth: tuple[float, float] | None = None
    name: str | None = None
    eps: float | None = None
    eps_mode: Literal["relative", "absolute"] | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    biases: bool | None = None

    def __post_init__(self) -> None:
        choices = (("rule", RULE_NAMES), ("kind", (None, *KINDS)), ("position", (None, "first", "last")))
        for field, allowed in choices:
            if getattr(self, field) not in allowed:
                raise InputError(f"{field}={getattr(self, field)!r} of a layer rule is not one of {allowed}.")
        if self.depth is not None:
            object.__setattr__(self, "depth", tuple(self.depth))  # YAML gives a list
            if len(self.depth) != 2 or not 0 <= self.depth[0] <= self.depth[1] <= 1:
                raise InputError(f"depth={self.depth} of a layer rule is not two fractions, the lower one first.")
        try:
            re.compile(self.name or "")
        except re.error as error:
            raise InputError(f"name={self.name!r} of a layer rule is not a regular expression: {error}.") from None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that are set."""
        given = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in given.items() if value is not None}

    def fits(self, kinds: set[str], first: bool, depth: float, name: str) -> bool:
        """Whether a layer of these kinds, at this depth and of this name, meets all conditions."""
        positions = {"first": first, "last": depth == 1}
        return (
            (self.kind is None or self.kind in kinds)
            and (self.position is None or positions[self.position])
            and (self.depth is None or self.depth[0] <= depth <= self.depth[1])
            and (self.name is None or re.search(self.name, name) is not None)
        )


_ABSOLUTE: dict[str, Any] = {"eps": 1e-6, "eps_mode": "absolute", "biases": True}
_DENSE = (LayerRule("epsilon", kind="linear", **_ABSOLUTE), LayerRule("epsilon", kind="product", **_ABSOLUTE))

COMPOSITES: dict[str, tuple[LayerRule, ...]] = {
    "epsilon_plus": (LayerRule("zplus", kind="conv", **_ABSOLUTE), *_DENSE),
    "epsilon_gamma_box": (
        LayerRule("zbox", position="first", **_ABSOLUTE),
        LayerRule("gamma", kind="conv", gamma=0.25, **_ABSOLUTE),
        *_DENSE,
    ),
    "alpha2beta1_flat": (
        LayerRule("flat", position="first", **_ABSOLUTE),
        LayerRule("alphabeta", kind="conv", alpha=2.0, beta=1.0, **_ABSOLUTE),
        *_DENSE,
    ),
    "attnlrp_vit": (
        LayerRule("gamma", kind="conv", gamma=0.25),
        LayerRule("gamma", kind="linear", gamma=0.05),
        LayerRule("epsilon", kind="product"),
    ),
}
"""Name -> rules. The first three are those of zennit (Anders et al., 2021) and of Montavon et al. (2019), with biases;
the last one has the gammas of AttnLRP (Achtibat et al., ICML 2024) for vision transformers."""


def composite_of(given: str | Sequence[LayerRule | Mapping[str, Any]] | None) -> tuple[LayerRule, ...]:
    """The layer rules of a composite's name, or of a list of rules, which may be mappings as in YAML.

    Raises:
        InputError: an unknown name, or a rule with an unknown field.
    """
    if given is None:
        return ()
    if isinstance(given, str):
        if given not in COMPOSITES:
            raise InputError(f"composite={given!r} is not one of {', '.join(COMPOSITES)}, nor a list of layer rules.")
        return COMPOSITES[given]
    known = {field.name for field in fields(LayerRule)}
    rules = []
    for rule in given:
        if not isinstance(rule, LayerRule):
            unknown = set(rule) - known
            if unknown or "rule" not in rule:
                raise InputError(
                    f"a layer rule has the fields {', '.join(sorted(known))} and needs rule; got {dict(rule)}."
                )
            rule = LayerRule(**rule)
        rules.append(rule)
    return tuple(rules)
