"""The engine that streams perturbed inputs through a model: insertion, deletion, masks, weights.

One engine serves one batch of images. Inputs are made on the device chunk by chunk, so memory grows with the chunk and
not with the number of inputs. Equal inputs run once, whichever metric or explainer asks for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.chunk_size import check_chunk_size, cpu_chunk
from labn.inference.fast_copy import FastCopy, FastForm, runnable_copy
from labn.inference.modes import evaluating, run_model
from labn.perturbation.stateless_random import sample_integers

GPU_CHUNKS = (32, 256)  # inputs per forward: the first size and the one up to which it is doubled

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}

REDUCED_REVISION = 1
"""Version of the logits in reduced precision; version 0 also reduced layers that a model keeps outside of autocast."""

KEEP = {"first": torch.lt, "rest": torch.ge}  # comparison of a pixel's rank with the count


def check_precision(name: str) -> None:
    """Check that `name` is a precision of `PerturbationEngine`.

    Raises:
        InputError: the name is unknown.
    """
    if name not in PRECISIONS:
        raise InputError(f"precision must be one of {sorted(PRECISIONS)}, got {name!r}.")


class ChunkSize:
    """The number of inputs per forward: doubled after every full chunk on a GPU, halved on out-of-memory."""

    def __init__(self, size: int | None, images: Tensor) -> None:
        automatic = (cpu_chunk(images),) * 2 if images.device.type == "cpu" else GPU_CHUNKS
        self.size, self._largest = automatic if size is None else (size, size)

    def succeeded(self, size: int) -> None:
        """Double the next chunk, up to the largest size, if `size` was a full chunk."""
        if size == self.size:
            self.size = min(2 * size, self._largest)

    def failed(self, size: int) -> None:
        """Halve the chunk for the rest of the engine's life; doubling would run out of memory again."""
        self.size = self._largest = size // 2


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory has run out, on an accelerator or in the CPU's allocator, which has no exception class."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def take(tensor: Tensor, positions: Tensor) -> Tensor:
    """`tensor[positions]`, or without a copy a view (1, ...) that broadcasts to it, where all positions are equal."""
    if len(tensor) == 1:
        return tensor
    # Only on the CPU: on a GPU the comparison would wait for the device.
    same = positions.device.type == "cpu" and bool((positions == positions[0]).all())
    return tensor[int(positions[0]), None] if same else tensor[positions]


def _check(images: Tensor, chunk_size: int | None, precision: str) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images must be floating (B, C, H, W), got {tuple(images.shape)} {images.dtype}.")
    check_precision(precision)
    if precision == "bf16" and images.dtype == torch.float64:
        raise InputError("precision='bf16' is autocast, which leaves float64 alone: give float32 images, or fp32.")
    check_chunk_size(chunk_size)


def _callable_of(forward: FastCopy | Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    if not isinstance(forward, FastCopy):
        return forward
    if forward.copy is None:
        raise InputError("forward is a FastCopy without a module to run; make it by runnable_copy.")
    return forward.copy


class PerturbationEngine:
    """Perturbed forwards of one batch of images, streamed in chunks and remembered.

    `PerturbationEngine.for_model` prepares a model and builds the engine for it. The constructor takes a prepared
    model, or a function of images, and runs it as it is.

    Args:
        forward: from `labn.inference.fast_copy.runnable_copy`, or a callable `images (k, C, H, W) -> logits`. A module
            is run in eval mode and full precision and is not changed.
        images: (B, C, H, W), normalised; they decide device and dtype.
        indices: (B,) int64 positions in the data set, kept for users of per-sample randomness; None: 0..B-1.
        chunk_size: inputs per forward; None: by the images' size on the CPU, found by doubling on a GPU. Halved on
            out-of-memory. The logits do not depend on it (up to rounding).
        precision: "fp32" (the images' own dtype) or "bf16" (autocast).

    Attributes:
        forwards: number of inputs that went through the model so far.
        reused: number of inputs that were asked for again and answered from memory.

    Raises:
        InputError: images of another shape or dtype, an unknown precision, or a chunk size below 1.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0]]]])
        >>> engine = PerturbationEngine(lambda x: x.flatten(1), images)
        >>> engine.masked(torch.tensor([[[1, 0]]]), torch.tensor([0, 1, 2]), fill=0.0)
        tensor([[[0., 0.],
                 [0., 2.],
                 [1., 2.]]])
        >>> engine.original(), engine.forwards, engine.reused
        (tensor([[1., 2.]]), 3, 1)
    """

    def __init__(
        self,
        forward: FastCopy | Callable[[Tensor], Any],
        images: Tensor,
        *,
        indices: Tensor | None = None,
        chunk_size: int | None = None,
        precision: str = "fp32",
    ) -> None:
        _check(images, chunk_size, precision)
        self.images = images.detach()
        self.indices = torch.arange(len(images)) if indices is None else indices
        self.forwards = self.reused = 0
        self._chunk = ChunkSize(chunk_size, images)
        self._autocast = PRECISIONS[precision]
        self._form = forward.form if isinstance(forward, FastCopy) else FastForm()
        self._forward = _callable_of(forward)
        # A plain function has no modules whose training flags would have to be set.
        self._module = self._forward if isinstance(self._forward, nn.Module) else nn.Module()
        self._memo: dict[Hashable, int] = {}
        self._logits: list[Tensor] = []
        self._fills: list[Tensor] = []
        # A random 64-bit key per pixel; the hash of a pixel set is the sum of its keys (see `_set_hashes`).
        pixels = images.shape[-2] * images.shape[-1]
        self._pixel_keys = sample_integers(0, torch.zeros(1, dtype=torch.long, device=images.device), pixels)[0]
        self._all_pixels = int(self._pixel_keys.sum())

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        images: Tensor,
        *,
        indices: Tensor | None = None,
        chunk_size: int | None = None,
        fold: bool = True,
        precision: str = "fp32",
    ) -> PerturbationEngine:
        """An engine on the fastest copy of a model.

        Args:
            model: any module that returns logits or an object with `.logits`; not changed.
            images: as for the class, and likewise `indices`, `chunk_size` and `precision`.
            indices: see above.
            chunk_size: see above.
            fold: whether the copy of `labn.inference.fast_copy` may have BatchNorm folded.
            precision: see above.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> engine = PerturbationEngine.for_model(model.eval(), torch.ones(2, 1, 4, 4))
            >>> engine.original().shape, engine.folded
            (torch.Size([2, 2]), True)
        """
        _check(images, chunk_size, precision)
        prepared = runnable_copy(model, images, fold=fold, dtype=PRECISIONS[precision])
        return cls(prepared, images, indices=indices, chunk_size=chunk_size, precision=precision)

    @property
    def folded(self) -> bool:
        """Whether the forwards run on a copy with BatchNorm folded."""
        return self._form.folded

    def run(self, make_batch: Callable[[Tensor], Tensor], n: int) -> Tensor:
        """Stream `n` inputs through the model, a chunk at a time, without remembering their logits.

        Args:
            make_batch: positions (k,) int64 on the images' device -> inputs (k, C, H, W). It may be called again with
                the same positions, after an out-of-memory error.
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
        return self._checked(torch.cat(logits))

    def _checked(self, logits: Tensor) -> Tensor:
        """The logits, after a warning if some are NaN: scores that depend on these logits are set to NaN."""
        broken = int(logits.isnan().any(1).sum())
        if broken:
            warnings.warn(
                f"{type(self._forward).__name__} gives NaN for {broken} of {len(logits)} inputs made of the samples "
                f"{self.indices.tolist()}; scores that depend on them are left out (see n in the tables).",
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
        # Outside of the `except`, whose traceback would keep the failed tensors alive.
        self._chunk.failed(size)
        if self.images.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _chunk_logits(self, make_batch: Callable[[Tensor], Tensor], start: int, size: int) -> Tensor:
        batch = make_batch(torch.arange(start, start + size, device=self.images.device))
        # Convolutions follow the memory format of their input.
        return run_model(self._forward, batch, self._form.memory_format).to(self.images.dtype)

    def original(self, samples: Tensor | None = None) -> Tensor:
        """Logits (S, num_classes) of the unperturbed images.

        Args:
            samples: (S,) int64 positions in the batch; None: all, in order.
        """
        chosen = self._samples(samples)
        return self._evaluate([(b,) for b in chosen.tolist()], lambda position: self.images[chosen[position]])

    def filled(self, fill: Tensor | float) -> Tensor:
        """Logits (B, num_classes) of the fill alone; one forward serves all images if the fill does not depend on them.

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
        """Logits of images whose pixels are kept in part; the others show the fill.

        Args:
            pixel_ranks: (S, H, W) integer, as from `labn.perturbation.patches.ranks_to_pixels`.
            counts: (K,) or (S, K) integer: a pixel is among the first n where its rank < n.
            fill: broadcastable to the images.
            keep: "first" keeps those pixels (insertion), "rest" all others (deletion).
            samples: (S,) int64 positions of the images that the ranks belong to; None: all, in order.

        Returns:
            (S, K, num_classes).
        """
        compare = KEEP[keep]
        samples, counts = self._samples(samples), counts.to(self.images.device).expand(len(pixel_ranks), -1)
        fill, name = self._register(fill)
        steps = counts.shape[1]

        def batch(position: Tensor) -> Tensor:
            row, step = position // steps, position % steps
            inside = compare(take(pixel_ranks, row), counts[row, step][:, None, None]).unsqueeze(1)
            # With weights 0 and 1 `lerp` is an exact choice, vectorised where `where` is not.
            return torch.lerp(take(fill, samples[row]), take(self.images, samples[row]), inside.to(fill.dtype))

        hashes = self._set_hashes(pixel_ranks, counts, keep)
        keys = [self._set_key(b, h, name) for b, of_steps in zip(samples.tolist(), hashes.tolist()) for h in of_steps]
        return self._evaluate(keys, batch).unflatten(0, (len(pixel_ranks), steps))

    def soft(self, weights: Tensor, fill: Tensor | float = 0.0, samples: Tensor | None = None) -> Tensor:
        """Logits (S, num_classes) of `weights * image + (1 - weights) * fill`.

        Args:
            weights: (S, H, W), usually in [0, 1].
            fill: broadcastable to the images; 0 is the mean colour after normalisation.
            samples: (S,) int64 positions of the images that the weights belong to; None: all, in order.
        """
        weights, chosen = weights.to(self.images), self._samples(samples)
        fill, name = self._register(fill)

        def batch(position: Tensor) -> Tensor:
            sample = chosen[position]
            return torch.lerp(take(fill, sample), self.images[sample], weights[position].unsqueeze(1))

        hashes = self._content_hashes(weights).tolist()
        return self._evaluate([("soft", name, b, *pair) for b, pair in zip(chosen.tolist(), hashes)], batch)

    def remembered(self, keys: list[Hashable], make_batch: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (n, num_classes) of inputs of any kind; an input whose key the engine knows does not run again.

        Args:
            keys: one key per input, equal for equal inputs alone. A tuple whose first item is a word of the caller does
                not meet the keys of other methods.
            make_batch: positions (k,) int64 in `keys` -> inputs (k, C, H, W), as for `run`.
        """
        return self._evaluate(keys, make_batch)

    def _samples(self, samples: Tensor | None) -> Tensor:
        """Positions in the batch on the images' device; None stands for all of them."""
        positions = torch.arange(len(self.images)) if samples is None else samples
        return positions.to(self.images.device)

    def _evaluate(self, keys: list[Hashable], make_batch: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (len(keys), num_classes) of inputs with these keys; an input that is not in the memo runs once."""
        # Key -> position of its first input: equal inputs of one call run once as well.
        fresh: dict[Hashable, int] = {}
        for position, key in enumerate(keys):
            if key not in self._memo:
                fresh.setdefault(key, position)
        if fresh:
            positions = torch.tensor(list(fresh.values()), device=self.images.device)
            logits = self.run(lambda chunk: make_batch(positions[chunk]), len(fresh))
            self._memo.update({key: len(self._memo) + i for i, key in enumerate(fresh)})
            # One tensor, so that a single index operation gathers the answer.
            self._logits = [torch.cat([*self._logits, logits])]
        self.reused += len(keys) - len(fresh)
        return self._logits[0][torch.tensor([self._memo[key] for key in keys], device=self.images.device)]

    def _register(self, fill: Tensor | float) -> tuple[Tensor, int]:
        """The fill as (1 or B, C, H, W), where H and W may be 1, and its number; equal fills have the same number."""
        # Numbered, because hashing a fill's content for every input would cost more than comparing the few that exist.
        fill = torch.as_tensor(fill).to(self.images)
        fill = fill.reshape(*[1] * (4 - fill.ndim), *fill.shape)
        if fill.ndim > 4 or any(side not in (1, full) for side, full in zip(fill.shape, self.images.shape)):
            raise InputError(f"fill must be broadcastable to {tuple(self.images.shape)}, got {tuple(fill.shape)}.")
        for name, earlier in enumerate(self._fills):
            if earlier.shape == fill.shape and torch.equal(earlier, fill):
                return earlier, name
        self._fills.append(fill)
        return fill, len(self._fills) - 1

    def _fill_key(self, name: int, sample: int) -> Hashable:
        return ("fill", name, sample if len(self._fills[name]) > 1 else 0)

    def _set_key(self, sample: int, set_hash: int, name: int) -> Hashable:
        """The key of an image seen through a pixel set: that of the image for all pixels, that of the fill for none."""
        if set_hash == self._all_pixels:
            return (sample,)
        return (sample, set_hash, name) if set_hash else self._fill_key(name, sample)

    def _set_hashes(self, pixel_ranks: Tensor, counts: Tensor, keep: str) -> Tensor:
        """Zobrist hash (S, K) of every set of kept pixels: the sum of the pixels' random keys, modulo 2**64."""
        ranks = pixel_ranks.flatten(1).long()
        size = int(torch.maximum(ranks.max(), counts.max())) + 2
        keys = self._pixel_keys.expand_as(ranks)
        # After the cumulative sum, entry r holds the keys of all pixels of rank < r: one pass serves all counts.
        below = torch.zeros(len(ranks), size, dtype=torch.long, device=ranks.device).scatter_add_(1, ranks + 1, keys)
        first = below.cumsum(1).gather(1, counts.clamp(min=0).long())
        return first if keep == "first" else self._all_pixels - first

    def _content_hashes(self, weights: Tensor) -> Tensor:
        """Two independent linear hashes (B, 2) of the weights' bits.

        Round numbers, such as 0 and 1, have only their highest bits set, of which a product modulo 2**64 keeps at most
        12. The high bits are therefore copied down first.
        """
        bits = weights.double().contiguous().view(torch.int64).flatten(1)
        bits = bits ^ (bits >> 40)
        return torch.stack([(bits * keys).sum(1) for keys in (self._pixel_keys, self._pixel_keys.roll(1))], 1)
