"""Layer-wise relevance propagation of a classifier in one call, or in two steps for several sweeps over one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.chunk_size import check_chunk_size, cpu_chunk
from labn.inference.modes import explaining, logits_of, matching
from labn.lrp.backward import sweep
from labn.lrp.config import Config
from labn.lrp.forward import ForwardTrace, run_forward
from labn.lrp.initial import Initial, initial_relevance
from labn.lrp.plan import TOLERANCES, ReadLogits, check, plan_for
from labn.lrp.rules.conservation import ConservationReport, Entry, joined


@dataclass(frozen=True)
class Relevance:
    """What a propagation gives back.

    Attributes:
        relevance: (B, C, H, W) per pixel and channel.
        logits: (B, K) of the forward pass.
        initial: (B,) float64 sum of the relevance at the start.
        entries: accounts of the layers, output first; empty unless asked for.
    """

    relevance: Tensor
    logits: Tensor
    initial: Tensor
    entries: tuple[Entry, ...] = ()

    @property
    def arrived(self) -> Tensor:
        """(B,) float64 sum of the relevance at the pixels."""
        return self.relevance.flatten(1).sum(1, dtype=torch.float64)

    @property
    def leaked(self) -> Tensor:
        """(B,) sum of all leaks that the layers booked; initial = arrived + leaked up to rounding."""
        return sum((entry.leaks for entry in self.entries), torch.zeros_like(self.initial))


def propagated(images: Tensor) -> Tensor:
    """The images as relevance can be propagated for them: in single precision where they are in half.

    In half precision the shares of a large layer lie below the smallest number, or add up to anything but one.
    """
    return images if images.dtype in TOLERANCES else images.float()


def forward(
    model: nn.Module, images: Tensor, config: Config | None = None, read_logits: ReadLogits = logits_of
) -> ForwardTrace:
    """Run a model for later sweeps.

    Args:
        model: in eval mode, of the images' device and dtype (see `labn.inference.modes`).
        images: (B, C, H, W).
        config: the rules; defaults of `Config`.
        rows: what of the model's output relevance starts from, (B, K); its logits.

    Raises:
        ValueError: the model cannot be recorded, or the images are in half precision (see `propagated`).
    """
    config = config or Config()
    if images.dtype not in TOLERANCES:
        raise InputError(f"images are {images.dtype}; relevance is propagated in float32 or float64.")
    plan = plan_for(model, images, read_logits)
    if images.device.type == "cpu" and images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return run_forward(plan.for_config(config), plan.residual_sums, config, images)


def backward(
    trace: ForwardTrace,
    seeds: dict[str, Tensor] | dict[int, Tensor] | Tensor,
    until: str | int | None = None,
    conservation: ConservationReport | None = None,
) -> Tensor:
    """Send relevance down from the logits (a tensor (T, K)) or from inner values, by module or by index in the graph.

    Args:
        trace: from `forward`; may be swept repeatedly. T is its batch size, or any number if that is 1.
        seeds: where relevance starts.
        until: qualified name of the module at whose output to stop, or index of a value; None: the images.
        conservation: filled with the account of every layer passed.

    Raises:
        ValueError: T does not fit, or nothing reaches `until`.
        KeyError: a module whose output is no longer visible (it does not exist, was joined to another step, or was
            taken apart).
        NotImplementedError: a layer on the way has no rule.
    """
    graph = trace.graph
    starts = {graph.logits: seeds} if isinstance(seeds, Tensor) else {_index(trace, n): r for n, r in seeds.items()}
    check(graph, trace.config, set(starts))
    counts, batch = {len(seed) for seed in starts.values()}, len(trace.logits)
    if len(counts) != 1 or (batch != 1 and counts != {batch}):
        given = ", ".join(map(str, sorted(counts)))
        raise InputError(f"{given} relevance maps for {batch} images: give one per image, or many for a single image.")
    with torch.no_grad():
        return sweep(trace, starts, 0 if until is None else _index(trace, until), conservation)


def relevance(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    config: Config | None = None,
    init: str | Initial = "probability",
    report: bool = False,
    chunk_size: int | None = None,
) -> Relevance:
    """Relevance of the pixels for one class per image; nothing about the model changes.

    Args:
        model: any network whose layers have rules.
        images: (B, C, H, W), normalised as the model expects; device and dtype of the arithmetic are theirs, but for
            half precision, which is propagated in float32.
        targets: (B,) int64 class indices.
        config: the rules; defaults of `Config`.
        init: relevance at the target's logit, see `initial_relevance`; or a function of logits and targets that gives
            the relevance (B, K) of all logits, such as `labn.lrp.Contrast`.
        report: add the account of every layer: what arrived, what went on, what eps, dead units and biases kept.
        chunk_size: images per pass; the result does not depend on it. None: by their size on a CPU (`cpu_chunk`), whose
            allocator hands larger activations back to the system each time, else all.

    Raises:
        NotImplementedError: a layer has no rule; the message names it.
        ValueError: `chunk_size` is below 1.
    """
    check_chunk_size(chunk_size)
    size = chunk_size or (cpu_chunk(images) if images.device.type == "cpu" else len(images))
    images, targets = propagated(images), targets.to(images.device)
    with explaining(model, images.device.type):
        model = matching(model, images)
        pairs = zip(images.detach().split(size), targets.split(size))
        return _joined([_one_pass(model, part, chosen, config, init, report) for part, chosen in pairs])


def _one_pass(
    model: nn.Module, images: Tensor, targets: Tensor, config: Config | None, init: str | Initial, report: bool
) -> Relevance:
    conservation = ConservationReport() if report else None
    trace = forward(model, images, config)
    start = initial_relevance(trace.logits, targets, init) if isinstance(init, str) else init(trace.logits, targets)
    pixels = backward(trace, start, conservation=conservation)
    return Relevance(
        pixels, trace.logits, start.sum(1, dtype=torch.float64), tuple(conservation.entries) if conservation else ()
    )


def _joined(parts: list[Relevance]) -> Relevance:
    if len(parts) == 1:
        return parts[0]
    entries = tuple(joined(rows) for rows in zip(*(part.entries for part in parts)))
    pixels, logits = torch.cat([part.relevance for part in parts]), torch.cat([part.logits for part in parts])
    return Relevance(pixels, logits, torch.cat([part.initial for part in parts]), entries)


def _index(trace: ForwardTrace, name: str | int) -> int:
    index = name if isinstance(name, int) else trace.graph.outputs.get(name)
    if index == 0:
        return index
    if index is None or index not in trace.graph.nodes:
        raise KeyError(f"No module output named '{name}' is left in the recorded network.")
    return index
