"""Relevance propagation in one call, or as one forward and any number of backward sweeps."""

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
    """The result of a propagation.

    Attributes:
        relevance: (B, C, H, W) per pixel and channel.
        logits: (B, K) of the forward pass.
        initial: (B,) float64, sum of the relevance at the logits.
        entries: the conservation report, one entry per layer, output first; empty without `report=True`.

    Example:
        >>> from labn.lrp import relevance
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> result = relevance(model, torch.ones(1, 1, 2, 2), torch.tensor([0]), init="one", report=True)
        >>> result.relevance.shape, bool((result.arrived + result.leaked - result.initial).abs() < 1e-5)
        (torch.Size([1, 1, 2, 2]), True)
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
        """(B,) float64 sum of the leaks in `entries`; initial = arrived + leaked up to rounding."""
        return sum((entry.leaks for entry in self.entries), torch.zeros_like(self.initial))


def propagated(images: Tensor) -> Tensor:
    """The images in a dtype that relevance can be propagated in: float32 for half precision, else their own.

    In half precision the shares of a large layer fall below the smallest number, or do not add up to one.
    """
    return images if images.dtype in TOLERANCES else images.float()


def forward(
    model: nn.Module, images: Tensor, config: Config | None = None, read_logits: ReadLogits = logits_of
) -> ForwardTrace:
    """Run a model once, for any number of backward sweeps.

    Args:
        model: in eval mode, of the images' device and dtype (see `labn.inference.modes`).
        images: (B, C, H, W).
        config: the rules; defaults of `Config`.
        read_logits: the model's output -> (B, K), the values that relevance starts from.

    Raises:
        InputError: the model cannot be recorded, or the images are in half precision (see `propagated`).

    Example:
        >>> from labn.lrp import backward, forward
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> trace = forward(model, torch.ones(1, 1, 4, 4))
        >>> backward(trace, torch.eye(3), until="0").shape
        torch.Size([3, 2, 2, 2])
    """
    config = config or Config()
    if images.dtype not in TOLERANCES:
        raise InputError(f"images are {images.dtype}; relevance is propagated in float32 or float64.")
    plan = plan_for(model, images, read_logits, config.softmax)
    # The prepared weights are in channels_last too (see `use_fastest`), in which CPU convolutions are faster.
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
    """Propagate relevance from the logits, or from the outputs of inner modules, towards the images.

    Args:
        trace: from `forward`; it may be swept repeatedly.
        seeds: relevance (T, K) at the logits, or relevance (T, ...) by module name or node index. T is the batch size
            of the forward, or any number if that is 1.
        until: qualified name of the module at whose output to stop, or a node index; None: the images.
        conservation: filled with one entry per layer that relevance passes.

    Returns:
        (T, ...) in the shape of the images, or of the output of `until`.

    Raises:
        InputError: T does not fit the forward, or no relevance reaches `until`.
        KeyError: the graph has no output of this module: it does not exist, was joined to another node, or was split.
        UnsupportedError: a layer that relevance passes has no rule.

    Example:
        >>> from labn.lrp import backward, forward
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
        >>> trace = forward(model, torch.ones(1, 1, 2, 2))
        >>> backward(trace, torch.eye(3)).shape
        torch.Size([3, 1, 2, 2])
    """
    graph = trace.graph
    starts = {graph.logits: seeds} if isinstance(seeds, Tensor) else {_index(trace, n): r for n, r in seeds.items()}
    check(graph, trace.config, set(starts))
    counts, batch = {len(seed) for seed in starts.values()}, len(trace.logits)
    if len(counts) != 1 or (batch != 1 and counts != {batch}):
        numbers = ", ".join(map(str, sorted(counts)))
        raise InputError(
            f"{numbers} relevance maps for {batch} images: give one per image, or many for a single image."
        )
    target = 0 if until is None else _index(trace, until)
    with torch.no_grad():
        if batch == 1 < max(counts) and not graph.copies_lead:
            return _one_by_one(trace, starts, target, conservation)
        if conservation is not None:
            if batch > 1 and not graph.images_lead:
                raise InputError(
                    "The network mixes the axis of the images with others, as windowed attention does; "
                    "a conservation report is made of one image at a time."
                )
            conservation.count = max(counts)
        return sweep(trace, starts, target, conservation)


def _one_by_one(
    trace: ForwardTrace, starts: dict[int, Tensor], until: int, conservation: ConservationReport | None
) -> Tensor:
    """Sweep the relevance maps of one image one after another, where values have no leading axis that counts them."""
    maps, reports = [], []
    for k in range(max(map(len, starts.values()))):
        report = None if conservation is None else ConservationReport(count=1)
        maps.append(sweep(trace, {index: seed[k : k + 1] for index, seed in starts.items()}, until, report))
        reports += [] if report is None else [report.entries]
    if conservation is not None:
        conservation.entries += [joined(of_layer) for of_layer in zip(*reports)]
    return torch.cat(maps)


def relevance(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    config: Config | None = None,
    init: str | Initial = "probability",
    report: bool = False,
    chunk_size: int | None = None,
) -> Relevance:
    """Relevance of the pixels for one class per image; the model is not changed.

    Args:
        model: any network whose layers have rules.
        images: (B, C, H, W), normalised as the model expects; they decide device and dtype of the arithmetic, except
            that half precision is propagated in float32.
        targets: (B,) int64 class indices.
        config: the rules; None: the defaults of `Config`.
        init: relevance at the target's logit, see `initial_relevance`; or a function of logits (B, K) and targets that
            returns the relevance (B, K) of all logits, such as `labn.lrp.Contrast`.
        report: also return the conservation report: for every layer the relevance that arrived, that went on, and that
            was kept by eps, by dead units and by biases.
        chunk_size: images per pass; the result does not depend on it. None: by their size on a CPU (`cpu_chunk`), whose
            allocator returns larger activations to the system every time, else all.

    Raises:
        UnsupportedError: a layer has no rule; the message names it.
        InputError: `chunk_size` is below 1, or `init` or a target is unknown.

    Example:
        >>> from labn.lrp import Config, relevance
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
        >>> images = torch.tensor([[[[2.0, 2.0]]]])
        >>> relevance(model, images, torch.tensor([0]), Config(first_layer="alpha1beta0"), init="one").relevance
        tensor([[[[0.2500, 0.7500]]]])
    """
    check_chunk_size(chunk_size)
    size = chunk_size or (cpu_chunk(images) if images.device.type == "cpu" else len(images))
    images, targets = propagated(images), targets.to(images.device)
    with explaining(model, images.device.type):
        # After `explaining`, so that a converted copy is made in eval mode.
        model = matching(model, images)
        if len(images) > 1 and size > 1:
            softmax = (config or Config()).softmax
            size = size if plan_for(model, images[:size], softmax=softmax).graph.images_lead else 1
        pairs = zip(images.detach().split(size), targets.split(size))
        return _joined([_one_pass(model, chunk, classes, config, init, report) for chunk, classes in pairs])


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


def _joined(chunks: list[Relevance]) -> Relevance:
    if len(chunks) == 1:
        return chunks[0]
    entries = tuple(joined(of_layer) for of_layer in zip(*(chunk.entries for chunk in chunks)))
    pixels, logits = torch.cat([chunk.relevance for chunk in chunks]), torch.cat([chunk.logits for chunk in chunks])
    return Relevance(pixels, logits, torch.cat([chunk.initial for chunk in chunks]), entries)


def _index(trace: ForwardTrace, name: str | int) -> int:
    index = name if isinstance(name, int) else trace.graph.outputs.get(name)
    if index == 0:
        return index
    if index is None or index not in trace.graph.nodes:
        raise KeyError(f"No module output named '{name}' is left in the recorded network.")
    return index
