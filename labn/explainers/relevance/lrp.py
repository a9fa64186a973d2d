"""Explainers by relevance propagation: LRP with ratio splitting (ECCV 2024), C3-LRP (JSAI 2024), contrastive LRP."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer
from labn.explainers.relevance.losses import growth_sentence, has_grown, is_loss, keeps_by, loss_sentence
from labn.inference.chunk_size import check_chunk_size
from labn.inference.fingerprint import ModelCache, structure_key
from labn.inference.model_traits import probabilities_sentence
from labn.lrp.config import BlockWeights, Config, DeadName, FirstName, NormName, ResidualName, RuleName, SoftmaxName
from labn.lrp.engine import Relevance, relevance
from labn.lrp.initial import INITIAL, Contrast, Initial, check_others
from labn.lrp.layer_rules import LayerRule
from labn.postprocess import apply, check_names

_HELPS = {
    "dead": "rule='epsilon' with batchnorm='fold' has fewer units without contribution",
    "bias": "rule='zplus' leaves biases out",
    "eps": "a smaller eps keeps less",
    "pad": "residual='ratio' gives nothing to channels that padding has filled",
}
"""What keeps most relevance -> the option that would help."""

# Once per network: losses follow from its structure and rules, and every batch would repeat the warning.
_told: ModelCache[None] = ModelCache(structure_key)


class LRP(Explainer):
    """Layer-wise relevance propagation (LRP), summed over the colour channels; the maps are signed.

    The propagation itself is `labn.lrp.relevance`; the classifier that is trained for it is
    `labn.modules.ResNetLRP`.

    Args:
        residual, rule, linear_rule, block_weights, batchnorm, pooling, first_layer, norm, softmax, biases, dead,
            composite: see `labn.lrp.Config`. The rules `lrp0`, `epsilon` and `gamma` divide by signed sums that include
            the biases, so that a network with BatchNorm needs `batchnorm="fold"`.
        eps, eps_mode, alpha, beta, gamma, low, high: see `labn.lrp.Config`.
        init: relevance at the target's logit: its softmax `probability`, its `logit`, or `one`.
        chunk_size: images per pass; None: by their size on a CPU, else the whole batch. The maps do not depend on it.
        postprocess: names of steps of `labn.postprocess`, applied in this order: `c1c`, `c3`, `hq8`, ..., with their
            options as in `c1c:resolution=28,gain=3`.

    Raises:
        InputError: an argument has another value.
        UnsupportedError: on call, a layer of the network has no rule; the message names it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import LRP
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.constant_(model[1].weight, 0.5)
        >>> explainer = LRP(first_layer="alpha1beta0", init="one")
        >>> explainer(model, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([0]))
        tensor([[[0.1000, 0.2000],
                 [0.3000, 0.4000]]])
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
        norm: NormName = "identity",
        softmax: SoftmaxName = "constant",
        biases: bool = False,
        dead: DeadName | None = None,
        composite: str | list[LayerRule] | None = None,
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
            norm=norm,
            softmax=softmax,
            biases=biases,
            dead=dead,
            composite=composite,
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
        """Earlier versions kept the bounds of zbox before a normalisation inside the network (1), and folded no
        BatchNorm without a layer before it (2)."""
        return int(self.config.first_layer == "zbox") + 2 * self.config.folded

    @property
    def conserves(self) -> bool:
        """Whether the rules conserve relevance by definition: C3-LRP's block rule and `duplicate` do not."""
        signed_blocks = self.config.residual == "block" and self.config.block_weights == "signed"
        return not signed_blocks and self.config.residual != "duplicate"

    def _warn_of_losses(self, model: nn.Module, images: Tensor, targets: Tensor, result: Relevance) -> None:
        """Warn once per network and configuration where less than 95 % or more than 105 % of the relevance arrives."""
        initial, arrived = result.initial.abs().sum(), (result.arrived * result.initial.sign()).sum()
        share = float(arrived / initial) if float(initial) > 0 else 1.0
        if has_grown(share):
            _told.get(model, self.config, lambda: self._tell_growth(model, share))
        elif is_loss(share):
            _told.get(model, self.config, lambda: self._tell_loss(model, images, targets, share))

    def _tell_growth(self, model: nn.Module, share: float) -> None:
        rule = "the composite" if self.config.composite else f"rule={self.config.rule!r}"
        warnings.warn(growth_sentence(model, share, rule), stacklevel=7)

    def _tell_loss(self, model: nn.Module, images: Tensor, targets: Tensor, share: float) -> None:
        """Warn with the layers that keep most relevance of the first image."""
        entries = relevance(model, images[:1], targets[:1], self.config, self.init, report=True).entries
        helps = f"{_HELPS[keeps_by(entries)]}; labn.lrp.relevance(..., report=True) lists all layers"
        warnings.warn(loss_sentence(model, f"{share:.0%} of the relevance", entries, helps), stacklevel=7)

    def inspect_output(self, model: nn.Module) -> None:
        """Refuse a model that ends in a softmax, which has no rule and whose softmax the initial relevance would be."""
        raise InputError(f"{probabilities_sentence(model)} Relevance starts at logits.")

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W)."""
        result = relevance(model, images, targets, self.config, self.init, chunk_size=self.chunk_size)
        if self.conserves:
            self._warn_of_losses(model, images, targets, result)
        return apply(result.relevance.sum(1), self.postprocess)


class C3LRP(LRP):
    """C3-LRP (JSAI 2024): residual blocks as single layers, then the choice of contour and component (C3) of the map.

    C3 sets the pixels outside of its region to 0, which in a signed map lies above the negative pixels inside.
    `LRP(residual="block", postprocess=["c3:outside=min"])` ranks them last instead.

    Args:
        postprocess: further steps after C3; `["hq8"]` is the paper's quantised variant.
        kwargs: arguments of `LRP` except `residual`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import C3LRP
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> C3LRP(postprocess=["hq8"])(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(self, postprocess: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(residual="block", postprocess=["c3", *postprocess], **kwargs)


class ContrastiveLRP(LRP):
    """Relevance for a class in contrast to other classes: evidence for the target minus evidence for its rivals.

    At the input of the last layer each class k has the shares R_i[k] = a_i w+_ik / sum_j a_j w+_jk. The contrast
    R_i = R_i[k*] - mean over the rivals k of R_i[k] (CRP, IJCNN 2019) sums to zero. It is propagated by ratio splitting
    and z+; positive and negative relevance are divided by the same shares. Unlike plain z+ propagation, which hardly
    depends on the class, the map is specific to the class.

    Args:
        others: the rivals: a number of most probable other classes, `all`, `softmax` (all, each by its probability), or
            a list of classes. The 20 most probable ones told classes apart better than all did, on two trained networks
            (`labn/lrp/README.md`).
        residual, rule, batchnorm, first_layer, pooling, eps, eps_mode, chunk_size, postprocess: as for `LRP`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from labn.explainers import ContrastiveLRP
        >>> layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
        >>> ContrastiveLRP(others=1)(nn.Sequential(*layers), torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        others: Literal["all", "softmax"] | int | Sequence[int] = 20,
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
        check_others(others, ("all", "softmax"))
        # The rule of the last layer is z+ in any case: with it the contrast of logits is CRP's contrast of shares.
        self.init = Contrast(others)

    def _warn_of_losses(self, model: nn.Module, images: Tensor, targets: Tensor, result: Relevance) -> None:
        """As for `LRP`, on the first image without signs: those of a contrast cancel, so that losses do not show."""
        _told.get(model, (self.config, "contrast"), lambda: self._tell_unsigned_loss(model, images[:1], targets[:1]))

    def _tell_unsigned_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        init = self.init
        assert isinstance(init, Contrast)
        unsigned = relevance(model, images, targets, self.config, lambda y, t: init(y, t).abs())
        share = float(unsigned.arrived / unsigned.initial)
        if is_loss(share):
            self._tell_loss(model, images, targets, share)
