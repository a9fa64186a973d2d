"""Relevance propagation as explainers: LRP by ratio splitting (ECCV 2024) and C3-LRP (JSAI 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from labn.explainers.base import Explainer
from labn.lrp.config import Config, FirstName, ResidualName, RuleName
from labn.lrp.engine import relevance
from labn.lrp.initial import INITIAL
from labn.postprocess import apply, check_names


class LRP(Explainer):
    """Layer-wise relevance propagation, summed over the colour channels; signed.

    Args:
        residual, rule, linear_rule, batchnorm, pooling, first_layer, eps, eps_mode, alpha, beta, gamma, low, high: see
            `labn.lrp.Config`.
        init: relevance at the target's logit: its softmax `probability`, the `logit`, or `one`.
        chunk_size: images per pass; None: 8 on a CPU, else the whole batch. The maps do not depend on it.
        postprocess: names of `labn.postprocess` applied to the map in the order given: `c1c`, `c3`, `hq8`, ...
    """

    def __init__(
        self,
        residual: ResidualName = "ratio",
        rule: RuleName = "zplus",
        batchnorm: Literal["pass", "fold"] = "pass",
        init: Literal["probability", "logit", "one"] = "probability",
        first_layer: FirstName = "ones",
        postprocess: Sequence[str] = (),
        linear_rule: RuleName | None = None,
        pooling: Literal["winner", "average"] = "winner",
        eps: float = 1e-9,
        eps_mode: Literal["relative", "absolute"] = "relative",
        alpha: float = 2.0,
        beta: float = 1.0,
        gamma: float = 0.25,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if init not in INITIAL:
            raise ValueError(f"init={init!r} is not one of {', '.join(map(repr, INITIAL))}.")
        self.config = Config(
            rule=rule,
            linear_rule=linear_rule,
            residual=residual,
            batchnorm=batchnorm,
            pooling=pooling,
            first_layer=first_layer,
            eps=eps,
            eps_mode=eps_mode,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            low=None if low is None else tuple(low),
            high=None if high is None else tuple(high),
        )
        self.init = init
        self.chunk_size = chunk_size
        self.postprocess = check_names(postprocess)

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W)."""
        result = relevance(model, images, targets, self.config, self.init, chunk_size=self.chunk_size)
        return apply(result.relevance.sum(1), self.postprocess)


class C3LRP(LRP):
    """C3-LRP: residual blocks as one layer each, then contour and component of the map; `postprocess` is appended.

    `postprocess=["hq8"]` gives the paper's quantised variant; other arguments are those of `LRP`.
    """

    def __init__(
        self,
        rule: RuleName = "zplus",
        init: Literal["probability", "logit", "one"] = "probability",
        first_layer: FirstName = "ones",
        postprocess: Sequence[str] = (),
        linear_rule: RuleName | None = None,
        pooling: Literal["winner", "average"] = "winner",
        eps: float = 1e-9,
        eps_mode: Literal["relative", "absolute"] = "relative",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(
            residual="block",
            rule=rule,
            init=init,
            first_layer=first_layer,
            postprocess=["c3", *postprocess],
            linear_rule=linear_rule,
            pooling=pooling,
            eps=eps,
            eps_mode=eps_mode,
            chunk_size=chunk_size,
        )
