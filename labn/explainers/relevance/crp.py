"""Contrastive Relevance Propagation for single-shot detectors (CRP, IJCNN 2019)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.explainers.base import Explainer, Targets, check_targets, resolve_targets
from labn.explainers.relevance.detection_trace import DetectionTrace, Start
from labn.explainers.relevance.losses import is_loss, loss_sentence
from labn.inference.chunk_size import check_chunk_size
from labn.inference.fingerprint import ModelCache, structure_key
from labn.inference.modes import explaining, matching
from labn.lrp.config import Config, FirstName
from labn.lrp.engine import propagated
from labn.lrp.initial import check_others, rivals
from labn.models.detectors import COORDINATES, Detections, Detector, Thresholds, detector_of


def share(contributions: Tensor) -> Tensor:
    """Shares c+ / sum c+ of the positive contributions along the last axis: the w+ rule for one unit of relevance.

    The shares are all zero where there is no positive contribution.
    """
    positive = contributions.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    return torch.where(total > 0, positive / torch.where(total > 0, total, 1), 0)


def class_shares(c: Tensor, target: int, rivals: Tensor) -> Tensor:
    """The contrast R_i = R_i[k*] - mean over the rivals k of R_i[k], with R_i[k] = c+_ki / sum c+_k; it sums to 0.

    Args:
        c: (K, I) contributions.
        target: k*.
        rivals: (K,) bool.
    """
    shares = share(c)
    return shares[target] - shares[rivals].mean(0)


def class_output(c: Tensor, target: int, rivals: Tensor) -> Tensor:
    """The contrast at the output: one unit z_k* - mean z_k with the weights w_k* - mean w_k (cf. CLRP, 2018).

    The result is its positive shares minus its negative shares, in which classes with larger weights count more.
    Arguments as for `class_shares`.
    """
    return opposite(c[target] - c[rivals].mean(0))


def class_alone(c: Tensor, target: int, rivals: Tensor) -> Tensor:
    """No contrast: plain alpha1-beta0 propagation R_i = R_i[k*], which sums to 1. Arguments as for `class_shares`."""
    return share(c[target])


def opposite(c: Tensor) -> Tensor:
    """R_i = c+_i / sum c+ - c-_i / sum c-: the shares of positive minus those of negative contributions.

    This is the rule for classes, applied to two classes with the weights w and -w, because the only rival of a
    coordinate is the opposite movement. It sums to 0 where both signs occur.
    """
    return share(c) - share(-c)


CLASS_RULES: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "source": class_shares,
    "output": class_output,
    "none": class_alone,
}

# (contributions (4, I) of cx, cy, w, h; number of the coordinate) -> (I,)
COORDINATE_RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "opposite": lambda c, t: opposite(c[t]),
    "others": lambda c, t: share(c[t]) - share(torch.cat([c[:t], c[t + 1 :]])).mean(0),
    "none": lambda c, t: share(c[t]),
    "eps": lambda c, t: c[t] / _stable(c[t].sum(), c[t]),
    "alpha2beta1": lambda c, t: 2 * share(c[t]) - share(-c[t]),
}


def _stable(z: Tensor, c: Tensor) -> Tensor:
    """z, moved away from zero by 1e-9 times the mean |c|."""
    # 1e-30 keeps a window without any contribution from 0 / 0.
    size = (1e-9 * c.abs().mean()).clamp(min=1e-30)
    return z + torch.copysign(size, z)


_HELPS = (
    "The rule w+ has no other shares for units without positive contributions; pooling and batchnorm change which "
    "units these are, and Answers.arrived tells how much arrives of every answer"
)

# Heads, by the value that they read, whose losses have been looked at.
_checked: ModelCache[set[int]] = ModelCache(structure_key)


Task = Literal["class", "cx", "cy", "w", "h"]

TASKS: tuple[Task, ...] = ("class", "cx", "cy", "w", "h")

DIRECTIONS = ("positive", "negative", "predicted")


@dataclass(frozen=True)
class Question:
    """A question about one default box.

    Attributes:
        prior: index of the default box, an integer or a tensor of one, for example `Detections.priors[0]`.
        task: `class`, or the coordinate `cx`, `cy`, `w` or `h`.
        label: class channel or name, which need not be the predicted one; None: the most probable object class.
    """

    prior: int | Tensor
    task: Task = "class"
    label: int | str | None = None


@dataclass(frozen=True)
class Answers:
    """The maps for T questions about one image.

    Attributes:
        maps: (T, H, W) signed: positive for pixels that support the statement, negative for those that contradict it.
        sums: (T,) float64 sums of the relevance at the head's input: 0 for a contrast, 1 without one.
        questions: the T questions.
        arrived: (T,) float64 sums of the relevance at the pixels. Where they differ from `sums`, layers have kept
            relevance; of a contrast more of one sign than of the other.
    """

    maps: Tensor
    sums: Tensor
    questions: tuple[Question, ...]
    arrived: Tensor


class CRP(Explainer):
    """Contrastive Relevance Propagation (CRP, IJCNN 2019): pixels that support a detection's class or coordinate.

    Relevance starts at the unit of the default box. For a class k*, every class k divides one unit of relevance among
    the inputs of its 3 x 3 window by the w+ rule, R_i[k] = x_i w+_ik / sum_j x_j w+_jk, and the contrast is
    R_i = R_i[k*] - mean over k != k* of R_i[k]. For a coordinate, whose rival is the opposite movement, the contrast is
    the shares of positive minus those of negative contributions (derived here; the published rule is not available).
    The layers below propagate signed relevance by w+; max pools give it to the winner, and the L2 norm of conv4_3
    counts as a constant.

    Called as `maps = CRP()(detector, images, classes)`, the method explains each image's best detection of the given
    class, by a map of zeros where there is none. `ask` answers any questions about any default boxes.

    Args:
        task: output that the call explains: `class`, `cx`, `cy`, `w` or `h`.
        contrast_at: `source` (the published contrast), `output` (contrast of the raw weights) or `none` (plain
            alpha1-beta0).
        others: the rivals of a class: `all`, a number of most probable ones, or a list of class channels.
        background: whether the background class may be a rival.
        initial: relevance at a class: `one`, or its `score`.
        localisation: rule for a coordinate: `opposite`, `others` (the mean of the other coordinates is the rival),
            `none` (w+ only), `eps` or `alpha2beta1`.
        direction: explained movement: right/down/wider/taller (`positive`), the opposite (`negative`), or the
            `predicted` one.
        first_layer: rule at the pixels: `alpha1beta0` (for pixels of both signs), `zbox`, `wsquare`, `flat`, `ones` or
            `epsilon`.
        pooling: at a max pooling, the `winner` takes all, or relevance is divided as at an `average` pooling.
        batchnorm: `fold` it into the convolutions, or `pass` relevance through.
        eps, eps_mode, low, high: see `labn.lrp.Config`.
        score_threshold, nms_threshold, top_k: which boxes are detections, see `Thresholds`.
        chunk_size: maps per backward sweep; None: 4 on a CPU, else all. The maps do not depend on it.

    Raises:
        InputError: an argument has another value.

    Example:
        >>> import torch
        >>> from labn.explainers import CRP
        >>> from labn.models.detectors import ssd300
        >>> detector = ssd300(num_classes=3, width=1 / 64).eval()
        >>> CRP(score_threshold=0.0)(detector, torch.rand(1, 3, 300, 300), torch.tensor([1])).shape
        torch.Size([1, 300, 300])
    """

    runs_model = False  # a detector returns no logits

    def __init__(
        self,
        task: Task = "class",
        contrast_at: Literal["source", "output", "none"] = "source",
        others: Literal["all"] | int | Sequence[int] = "all",
        background: bool = True,
        initial: Literal["one", "score"] = "one",
        localisation: Literal["opposite", "others", "none", "eps", "alpha2beta1"] = "opposite",
        direction: Literal["positive", "negative", "predicted"] = "positive",
        first_layer: FirstName = "alpha1beta0",
        pooling: Literal["winner", "average"] = "winner",
        batchnorm: Literal["pass", "fold"] = "fold",
        eps: float = 1e-9,
        eps_mode: Literal["relative", "absolute"] = "relative",
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        top_k: int = 200,
        chunk_size: int | None = None,
    ) -> None:
        _among("task", task, TASKS)
        _among("contrast_at", contrast_at, CLASS_RULES)
        _among("initial", initial, ("one", "score"))
        _among("localisation", localisation, COORDINATE_RULES)
        _among("direction", direction, DIRECTIONS)
        check_others(others)
        check_chunk_size(chunk_size)
        self.task, self.contrast_at, self.others, self.background = task, contrast_at, others, background
        self.initial, self.localisation, self.direction = initial, localisation, direction
        self.config = Config(
            first_layer=first_layer,
            pooling=pooling,
            batchnorm=batchnorm,
            eps=eps,
            eps_mode=eps_mode,
            low=None if low is None else tuple(low),
            high=None if high is None else tuple(high),
        )
        self.thresholds = Thresholds(score_threshold, nms_threshold, top_k=top_k)
        self.chunk_size = chunk_size

    def trace(self, detector: nn.Module, image: Tensor) -> DetectionTrace:
        """The forward pass of one image (C, H, W) or (1, C, H, W), for any number of calls of `ask`.

        Raises:
            InputTypeError: the model is not a detector.
        """
        image = propagated(image.detach()[None] if image.ndim == 3 else image.detach())
        matched = matching(detector_of(detector), image)
        assert isinstance(matched, Detector)
        with explaining(matched, image.device.type):
            return DetectionTrace(matched, image.clone(), self.config)

    def passage(self, detector: nn.Module, image: Tensor) -> DetectionTrace:
        """The earlier name of `trace`, kept for one version."""
        return self.trace(detector, image)

    def ask(self, trace: DetectionTrace, questions: Sequence[Question]) -> Answers:
        """Maps for any questions about the image of `trace`, several per backward sweep.

        Raises:
            InputError: a class that the detector does not have, or an unknown task.
            IndexError: a default box that does not exist.
            UnsupportedError: a layer without a rule; the message names it.
        """
        with explaining(trace.detector, trace.image.device.type):
            starts = [self.start(trace, question) for question in questions]
            maps = trace.maps(starts, chunk_size=self.chunk_size).sum(1)
            self._warn_of_losses(trace, starts)
        sums = torch.tensor([float(s.relevance.sum(dtype=torch.float64)) for s in starts], dtype=torch.float64)
        return Answers(maps, sums, tuple(questions), maps.flatten(1).sum(1, dtype=torch.float64))

    def _warn_of_losses(self, trace: DetectionTrace, starts: Sequence[Start]) -> None:
        """Warn once per detector where less than 95 % or more than 105 % of the relevance from a head arrives.

        The first question at each head is propagated again, its positive and its negative relevance apart: in a
        contrast their losses cancel.
        """
        heads = {start.window.value: start for start in reversed(starts)}
        # A wrapper of torchvision's detectors is made at every call; what it wraps, its first part, stays the same.
        network = next(trace.detector.children(), trace.detector)
        checked = _checked.get(network, self.config, set)
        for value in [value for value in sorted(heads) if value not in checked]:
            checked.add(value)
            shares, entries = trace.losses(heads[value])
            if any(is_loss(share) for share in shares):
                said = f"{shares[0]:.0%} of the positive and {shares[1]:.0%} of the negative relevance"
                warnings.warn(loss_sentence(trace.detector, said, entries, _HELPS), stacklevel=4)
                checked.update(node.inputs[0] for node in trace.head_nodes)  # told once is enough

    def start(self, trace: DetectionTrace, question: Question) -> Start:
        """The relevance at the head's input for one question."""
        _among("task", question.task, TASKS)
        rule = self._class_start if question.task == "class" else self._coordinate_start
        return rule(trace, question)

    def _class_start(self, trace: DetectionTrace, question: Question) -> Start:
        detector, target = trace.detector, self.label_of(trace, question)
        logits = trace.predictions.classes[:, question.prior]
        excluded = None if self.background else detector.background
        others = rivals(logits, torch.tensor([target], device=logits.device), self.others, excluded)[0]
        window = trace.window(question.prior, localisation=False)
        relevance = CLASS_RULES[self.contrast_at](window.contributions, target, others)
        if self.initial == "score":
            relevance = relevance * logits[0].softmax(0)[target]
        return Start(window, relevance.view_as(window.inputs))

    def _coordinate_start(self, trace: DetectionTrace, question: Question) -> Start:
        number = COORDINATES.index(question.task)
        window = trace.window(question.prior, localisation=True)
        relevance = COORDINATE_RULES[self.localisation](window.contributions, number)
        predicted = float(trace.predictions.offsets[0, question.prior, number])
        # The opposite movement is the same statement with the other sign, so its map is the negated one.
        backwards = self.direction == "negative" or (self.direction == "predicted" and predicted < 0)
        return Start(window, (-relevance if backwards else relevance).view_as(window.inputs))

    def label_of(self, trace: DetectionTrace, question: Question) -> int:
        """The class channel of a question; the most probable object class if the question names none."""
        trace.layout.unit(question.prior)
        if question.label is not None:
            return trace.detector.class_index(question.label)
        # The background is the most probable class of nearly every default box and explains no object.
        logits = trace.predictions.classes[0, question.prior].clone()
        if trace.detector.background is not None:
            logits[trace.detector.background] = -torch.inf
        return int(logits.argmax())

    @property
    def revision(self) -> int:
        """As for `LRP`."""
        return int(self.config.first_layer == "zbox") + 2 * self.config.folded

    def choose_targets(self, model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
        """Class channels (B,): the given ones, or that of each image's best detection (background if there is none).

        Raises:
            InputError: a class (channel or name) that the detector does not have, or another number than of images.
        """
        detector = detector_of(model)
        if targets is None:
            detections = [self.trace(detector, image).detections(self.thresholds) for image in images]
            return torch.tensor([int(d.labels[0]) if len(d) else detector.background or 0 for d in detections])
        if isinstance(targets, str):
            targets = detector.class_index(targets)
        classes = resolve_targets(detector, images, targets)
        check_targets(classes, detector.num_classes)
        return classes

    def attribute(self, model: nn.Module, images: Tensor, targets: Tensor, indices: Tensor | None) -> Tensor:
        """Maps (B, H, W) for the best detection of each image's target class."""
        detector = detector_of(model)
        check_targets(targets, detector.num_classes)
        return torch.cat([self._best(detector, image, int(k)) for image, k in zip(images, targets)])

    def _best(self, detector: Detector, image: Tensor, label: int) -> Tensor:
        trace = self.trace(detector, image)
        prior = best_prior(trace.detections(self.thresholds), label)
        if prior is None:
            return image.new_zeros(1, *image.shape[1:])
        return self.ask(trace, [Question(prior, self.task, label)]).maps


def best_prior(detections: Detections, label: int) -> int | None:
    """The default box of the best detection of a class; None without such a detection."""
    of_class = detections.priors[detections.labels == label]
    return int(of_class[0]) if len(of_class) else None


def _among(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
