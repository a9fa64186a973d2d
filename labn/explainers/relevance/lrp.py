"""Relevance propagation as explainers: LRP by ratio splitting (ECCV 2024) and C3-LRP (JSAI 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer
from labn.inference.chunk_size import check_chunk_size
from labn.lrp.config import BlockWeights, Config, FirstName, ResidualName, RuleName
from labn.lrp.engine import relevance
from labn.lrp.initial import INITIAL, Contrast, Initial, check_others
from labn.postprocess import apply, check_names


class LRP(Explainer):
    """Layer-wise relevance propagation, summed over the colour channels; signed.

    Args:
        residual, rule, linear_rule, block_weights, batchnorm, pooling, first_layer: see `labn.lrp.Config`, as for the
            next ones. `lrp0`, `epsilon` and `gamma` divide by signed sums, whose biases belong to them: with
            BatchNorm they want `batchnorm="fold"`.
        eps, eps_mode, alpha, beta, gamma, low, high: see `labn.lrp.Config`.
        init: relevance at the target's logit: its softmax `probability`, the `logit`, or `one`.
        chunk_size: images per pass; None: by their size on a CPU, else the whole batch. The maps do not depend on it.
        postprocess: names of `labn.postprocess` applied to the map in the order given: `c1c`, `c3`, `hq8`, ..., with
            their options as in `c1c:resolution=28,gain=3`.
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
        block_weights: BlockWeights = "signed",
    ) -> None:
        if init not in INITIAL:
            raise InputError(f"init={init!r} is not one of {', '.join(map(repr, INITIAL))}.")
        self.config = Config(
            rule=rule,
            linear_rule=linear_rule,
            residual=residual,
            block_weights=block_weights,
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
        check_chunk_size(chunk_size)
        self.init: str | Initial = init
        self.chunk_size = chunk_size
        self.postprocess = check_names(postprocess)

    @property
    def revision(self) -> int:
        """1 where pixel bounds pass a normalisation inside of the network, as they did not before."""
        return int(self.config.first_layer == "zbox")

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W)."""
        result = relevance(model, images, targets, self.config, self.init, chunk_size=self.chunk_size)
        return apply(result.relevance.sum(1), self.postprocess)


class C3LRP(LRP):
    """C3-LRP: residual blocks as one layer each, then contour and component of the map; `postprocess` is appended.

    `postprocess=["hq8"]` gives the paper's quantised variant; other arguments are those of `LRP`. The map is signed,
    and what C3 cuts off becomes 0, above what it keeps below 0; `LRP(residual="block",
    postprocess=["c3:outside=min"])` ranks it last.
    """

    def __init__(self, postprocess: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(residual="block", postprocess=["c3", *postprocess], **kwargs)


class ContrastiveLRP(LRP):
    """Relevance for a class against the others: what speaks for the target more than for its rivals (CRP, IJCNN 2019).

    At the input of the last layer each class k has the shares R_i[k] = a_i w+_ik / sum_j a_j w+_jk; the contrast
    R_i = R_i[k*] - mean over the rivals of R_i[k] sums to zero and goes down by ratio splitting and z+, positive and
    negative parts by the same shares. Plain z+ propagation hardly depends on the class; this does.

    Args:
        others: the rivals: `all` other classes, the `n` most probable ones, or a list of classes.
        residual, rule, batchnorm, first_layer, pooling, eps, eps_mode, chunk_size, postprocess: as for `LRP`.
    """

    def __init__(
        self,
        others: Literal["all"] | int | Sequence[int] = "all",
        residual: ResidualName = "ratio",
        rule: RuleName = "zplus",
        batchnorm: Literal["pass", "fold"] = "pass",
        first_layer: FirstName = "ones",
        postprocess: Sequence[str] = (),
        pooling: Literal["winner", "average"] = "winner",
        eps: float = 1e-9,
        eps_mode: Literal["relative", "absolute"] = "relative",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(
            residual=residual,
            rule=rule,
            linear_rule="zplus",
            batchnorm=batchnorm,
            first_layer=first_layer,
            postprocess=postprocess,
            pooling=pooling,
            eps=eps,
            eps_mode=eps_mode,
            chunk_size=chunk_size,
        )
        check_others(others)
        self.init = Contrast(others)
