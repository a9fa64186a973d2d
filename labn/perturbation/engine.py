"""The engine that streams perturbed inputs through a model: insertion, deletion, masks, weights.

One engine serves one batch of images. Inputs are made on the device chunk by chunk, so memory grows with the chunk and
not with the number of steps, and equal inputs run once, whichever metric or explainer asks for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.fast_copy import FastCopy, FastForm, cpu_chunk, fast_copy
from labn.inference.modes import evaluating, logits_of, matching
from labn.perturbation.stateless_random import sample_integers

GPU_CHUNKS = (32, 256)  # first size, doubled up to the second

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}

KEEP = {"first": torch.lt, "rest": torch.ge}


def check_precision(name: str) -> None:
    """Raise ValueError unless `name` is a precision of `PerturbationEngine`."""
    if name not in PRECISIONS:
        raise InputError(f"precision must be one of {sorted(PRECISIONS)}, got {name!r}.")


def check_chunk_size(size: int | None) -> None:
    """Raise ValueError unless `size` is a number of inputs, or None, which lets the engine choose."""
    if size is not None and size < 1:
        raise InputError(f"chunk_size must be at least 1, got {size}.")


class ChunkSize:
    """How many inputs go through the model at once: doubled while that works, halved on out-of-memory."""

    def __init__(self, size: int | None, images: Tensor) -> None:
        check_chunk_size(size)
        automatic = (cpu_chunk(images),) * 2 if images.device.type == "cpu" else GPU_CHUNKS
        self.size, self._largest = automatic if size is None else (size, size)

    def succeeded(self, size: int) -> None:
        """Try twice as many next time, if `size` was a full chunk."""
        if size == self.size:
            self.size = min(2 * size, self._largest)

    def failed(self, size: int) -> None:
        """Go on with half of `size`, for good."""
        self.size = self._largest = size // 2


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error says that memory has run out, on an accelerator or in the CPU's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def take(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor[rows]`; a view (1, ...) that broadcasts to it where all rows are the same and finding out is free."""
    if len(tensor) == 1:
        return tensor
    same = rows.device.type == "cpu" and bool((rows == rows[0]).all())
    return tensor[int(rows[0]), None] if same else tensor[rows]


class PerturbationEngine:
    """Perturbed forwards of one batch of images, streamed and remembered.

    Args:
        model: any module that returns logits or an object with `.logits`; run in eval mode and never changed.
        images: (B, C, H, W), normalised; they decide device and dtype.
        indices: (B,) int64 positions in the data set, kept for those who need per-sample randomness; None: 0..B-1.
        chunk_size: inputs per forward; None: by the images' size on the CPU, found by doubling on a GPU. Halved on
            out-of-memory. The logits do not depend on it (up to rounding).
        fold: whether the BatchNorm-folded copy of `labn.inference.fast_copy` may be used.
        precision: "fp32" (the images' own dtype) or "bf16" (autocast).
        forward: `images (k, C, H, W) -> logits` called in place of the model, which is then neither copied nor folded.

    Attributes:
        forwards: inputs that went through the model so far.
        reused: inputs that were asked for and already known.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        indices: Tensor | None = None,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
        forward: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise InputError(f"images must be floating (B, C, H, W), got {tuple(images.shape)} {images.dtype}.")
        check_precision(precision)
        if precision == "bf16" and images.dtype == torch.float64:
            raise InputError("precision='bf16' is autocast, which leaves float64 alone: give float32 images, or fp32.")
        self.images = images.detach()
        self.indices = torch.arange(len(images)) if indices is None else indices
        self.forwards = self.reused = 0
        self._chunk = ChunkSize(chunk_size, images)
        self._autocast = PRECISIONS[precision]
        self._prepared = FastCopy(FastForm())
        if forward is None:
            self._prepared = fast_copy(model, images, fold=fold, dtype=self._autocast)
        # `is None` throughout: a compiled module has no truth value.
        unprepared = matching(model, images) if forward is None and self._prepared.copy is None else model
        self._module = unprepared if self._prepared.copy is None else self._prepared.copy
        self._forward = self._module if forward is None else forward
        self._memo: dict[Hashable, int] = {}
        self._logits: list[Tensor] = []
        self._fills: list[Tensor] = []
        pixels = images.shape[-2] * images.shape[-1]
        self._pixel_keys = sample_integers(0, torch.zeros(1, dtype=torch.long, device=images.device), pixels)[0]
        self._all_pixels = int(self._pixel_keys.sum())

    @property
    def folded(self) -> bool:
        """Whether the forwards run on the BatchNorm-folded copy."""
        return self._prepared.form.folded

    def run(self, make_batch: Callable[[Tensor], Tensor], n: int) -> Tensor:
        """Stream `n` inputs through the model, a chunk at a time; nothing is remembered.

        Args:
            make_batch: positions (k,) int64 on the images' device -> inputs (k, C, H, W). It may be asked for the same
                positions again, after an out-of-memory error.
            n: number of inputs, at least 1.

        Returns:
            (n, num_classes) logits in the images' dtype.
        """
        logits: list[Tensor] = []
        start = 0
        device, reduced = self.images.device.type, self._autocast
        with torch.no_grad(), evaluating(self._module, device), torch.autocast(device, reduced, reduced is not None):
            while start < n:
                size = min(self._chunk.size, n - start)
                result = self._attempt(make_batch, start, size)
                if result is not None:
                    logits.append(result)
                    start += size
        self.forwards += n
        return self._told(torch.cat(logits))

    def _told(self, logits: Tensor) -> Tensor:
        """The logits, after a warning where some are NaN: no metric has a value for what rests on them."""
        broken = int(logits.isnan().any(1).sum())
        if broken:
            warnings.warn(
                f"{type(self._module).__name__} gives NaN for {broken} of {len(logits)} inputs made of the samples "
                f"{self.indices.tolist()}; scores that rest on them are left out (see n in the tables).",
                stacklevel=2,
            )
        return logits

    def _attempt(self, make_batch: Callable[[Tensor], Tensor], start: int, size: int) -> Tensor | None:
        """Logits of one chunk, or None where memory ran out and the chunk was halved."""
        try:
            logits = self._chunk_logits(make_batch, start, size)
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        else:
            self._chunk.succeeded(size)
            return logits
        self._chunk.failed(size)
        if self.images.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _chunk_logits(self, make_batch: Callable[[Tensor], Tensor], start: int, size: int) -> Tensor:
        batch = make_batch(torch.arange(start, start + size, device=self.images.device))
        batch = batch.contiguous(memory_format=self._prepared.form.memory_format)
        return logits_of(self._forward(batch)).to(self.images.dtype)

    def original(self, samples: Tensor | None = None) -> Tensor:
        """Logits (S, num_classes) of the images themselves; `samples` (S,) int64 picks some, None takes all."""
        chosen = self._samples(samples)
        return self._evaluate([(b,) for b in chosen.tolist()], lambda position: self.images[chosen[position]])

    def filled(self, fill: Tensor | float) -> Tensor:
        """Logits (B, num_classes) of the bare fill, once for all images where it does not depend on them.

        Args:
            fill: broadcastable to the images.
        """
        fill, name = self._register(fill)
        keys = [self._fill_key(name, b) for b in range(len(self.images))]
        shape = self.images.shape[1:]
        return self._evaluate(keys, lambda position: take(fill, position).expand(len(position), *shape))

    def masked(
        self,
        pixel_ranks: Tensor,
        counts: Tensor,
        fill: Tensor | float,
        keep: str = "first",
        samples: Tensor | None = None,
    ) -> Tensor:
        """Logits of images of which only some pixels are kept, the others showing the fill.

        Args:
            pixel_ranks: (S, H, W) integer, as from `labn.perturbation.patches.ranks_to_pixels`.
            counts: (K,) or (S, K) integer: a pixel is among the first n where its rank < n.
            fill: broadcastable to the images.
            keep: "first" keeps those pixels (insertion), "rest" all others (deletion).
            samples: (S,) int64, which images of the batch the ranks belong to; None: all, in order.

        Returns:
            (S, K, num_classes).
        """
        compare = KEEP[keep]
        samples, counts = self._samples(samples), counts.to(self.images.device).expand(len(pixel_ranks), -1)
        fill, name = self._register(fill)
        steps = counts.shape[1]

        def batch(position: Tensor) -> Tensor:
            row, column = position // steps, position % steps
            inside = compare(take(pixel_ranks, row), counts[row, column][:, None, None]).unsqueeze(1)
            # With weights 0 and 1 `lerp` is an exact choice, vectorised where `where` is not.
            return torch.lerp(take(fill, samples[row]), take(self.images, samples[row]), inside.to(fill.dtype))

        hashes = self._set_hashes(pixel_ranks, counts, keep)
        keys = [self._set_key(b, h, name) for b, row in zip(samples.tolist(), hashes.tolist()) for h in row]
        return self._evaluate(keys, batch).unflatten(0, (len(pixel_ranks), steps))

    def soft(self, weights: Tensor, fill: Tensor | float = 0.0, samples: Tensor | None = None) -> Tensor:
        """Logits (S, num_classes) of `weights * image + (1 - weights) * fill`.

        Args:
            weights: (S, H, W), usually in [0, 1].
            fill: broadcastable to the images; 0 is the mean colour after normalisation.
            samples: (S,) int64, which images of the batch the weights belong to; None: all, in order.
        """
        weights, chosen = weights.to(self.images), self._samples(samples)
        fill, name = self._register(fill)

        def batch(position: Tensor) -> Tensor:
            rows = chosen[position]
            return torch.lerp(take(fill, rows), self.images[rows], weights[position].unsqueeze(1))

        hashes = self._content_hashes(weights).tolist()
        return self._evaluate([("soft", name, b, *pair) for b, pair in zip(chosen.tolist(), hashes)], batch)

    def _samples(self, samples: Tensor | None) -> Tensor:
        """Positions in the batch on the images' device; None is all of them."""
        positions = torch.arange(len(self.images)) if samples is None else samples
        return positions.to(self.images.device)

    def _evaluate(self, keys: list[Hashable], make_batch: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (len(keys), num_classes): known ones from the memo, the others run, each once."""
        fresh: dict[Hashable, int] = {}
        for place, key in enumerate(keys):
            if key not in self._memo:
                fresh.setdefault(key, place)
        if fresh:
            places = torch.tensor(list(fresh.values()), device=self.images.device)
            logits = self.run(lambda position: make_batch(places[position]), len(fresh))
            self._memo.update({key: len(self._memo) + i for i, key in enumerate(fresh)})
            self._logits = [torch.cat([*self._logits, logits])]
        self.reused += len(keys) - len(fresh)
        return self._logits[0][torch.tensor([self._memo[key] for key in keys], device=self.images.device)]

    def _register(self, fill: Tensor | float) -> tuple[Tensor, int]:
        """The fill as (1 or B, C, H, W) (H and W may be 1) and its number; equal fills have the same one."""
        fill = torch.as_tensor(fill).to(self.images)
        fill = fill.reshape(*[1] * (4 - fill.ndim), *fill.shape)
        if fill.ndim > 4 or any(side not in (1, full) for side, full in zip(fill.shape, self.images.shape)):
            raise InputError(f"fill must be broadcastable to {tuple(self.images.shape)}, got {tuple(fill.shape)}.")
        for name, known in enumerate(self._fills):
            if known.shape == fill.shape and torch.equal(known, fill):
                return known, name
        self._fills.append(fill)
        return fill, len(self._fills) - 1

    def _fill_key(self, name: int, sample: int) -> Hashable:
        return ("fill", name, sample if len(self._fills[name]) > 1 else 0)

    def _set_key(self, sample: int, set_hash: int, name: int) -> Hashable:
        """All pixels: the image, whatever the fill; none: the fill, maybe whatever the image."""
        if set_hash == self._all_pixels:
            return (sample,)
        return (sample, set_hash, name) if set_hash else self._fill_key(name, sample)

    def _set_hashes(self, pixel_ranks: Tensor, counts: Tensor, keep: str) -> Tensor:
        """Zobrist hash (S, K) of every kept pixel set: the sum of its pixels' random keys, modulo 2**64."""
        ranks = pixel_ranks.flatten(1).long()
        size = int(max(ranks.max(), counts.max())) + 2
        keys = self._pixel_keys.expand_as(ranks)
        below = torch.zeros(len(ranks), size, dtype=torch.long, device=ranks.device).scatter_add_(1, ranks + 1, keys)
        first = below.cumsum(1).gather(1, counts.clamp(min=0).long())
        return first if keep == "first" else self._all_pixels - first

    def _content_hashes(self, weights: Tensor) -> Tensor:
        """Two independent linear hashes (B, 2) of the weights' bits.

        Of round numbers, such as 0 and 1, only the highest bits are set; they are copied down first, as a product
        modulo 2**64 would keep no more than 12 bits of them.
        """
        bits = weights.double().contiguous().view(torch.int64).flatten(1)
        bits = bits ^ (bits >> 40)
        return torch.stack([(bits * keys).sum(1) for keys in (self._pixel_keys, self._pixel_keys.roll(1))], 1)
