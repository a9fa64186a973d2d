"""Which of n objects or patches are shown together, and the importances that follow: removal, Shapley, KernelSHAP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labn.errors import InputError
from labn.perturbation.stateless_random import sample_integers, sample_uniform

MAX_EXACT = 8
"""Largest number of objects whose Shapley values are computed from all subsets."""


@dataclass(frozen=True)
class Design:
    """The scenes that are drawn for the importances of n objects; importances = weights @ outputs of the scenes.

    Attributes:
        kept: (K, n) bool, the objects of every scene.
        weights: (n, K) float64.

    Example:
        >>> design = removal_design(2)
        >>> design.kept.int().tolist(), design.weights.tolist()
        ([[1, 1], [0, 1], [1, 0]], [[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
    """

    kept: Tensor
    weights: Tensor


def removal_design(n: int, permutations: int = 0, seed: int = 0, index: int = 0) -> Design:
    """Single removal, D_o = f(x) - f(x without o): n + 1 scenes.

    Args:
        n: number of objects.
        permutations: not used; all functions of `DESIGNS` have the same arguments.
        seed: not used.
        index: not used.

    Example:
        >>> removal_design(3).kept.shape
        torch.Size([4, 3])
    """
    kept = torch.cat([torch.ones(1, n, dtype=torch.bool), ~torch.eye(n, dtype=torch.bool)])
    return Design(kept, torch.cat([torch.ones(n, 1), 0 - torch.eye(n)], 1).double())


def shapley_design(n: int, permutations: int = 256, seed: int = 0, index: int = 0) -> Design:
    """Shapley values (Shapley 1953): exact up to 8 objects, which takes 2^n scenes, else over random orders of removal.

    Equal scenes of several orders are drawn once, so that K is at most permutations * (n - 1) + 2, and at most 2^n.

    Args:
        n: number of objects, at most 62.
        permutations: number of random orders.
        seed: seed of the orders.
        index: position of the sample in its data set; the orders depend on (seed, index) alone.

    Raises:
        InputError: more than 62 objects, or no permutation.

    Example:
        >>> design = shapley_design(2)
        >>> outputs = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)  # of nothing, first, second, both
        >>> design.weights @ outputs
        tensor([2., 3.], dtype=torch.float64)
    """
    if n > 62 or permutations < 1:
        raise InputError(f"Shapley values need at most 62 objects and a permutation; got {n} and {permutations}.")
    return _all_subsets(n) if n <= MAX_EXACT else _random_orders(n, permutations, seed, index)


def _all_subsets(n: int) -> Design:
    kept = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1 == 1
    sizes = kept.sum(1)
    # The share of the orders in which exactly the other members of a subset come before (after) an object.
    before = torch.tensor([1 / (n * math.comb(n - 1, size)) for size in range(n)] or [1.0], dtype=torch.float64)
    joins = before[(sizes - 1).clamp(min=0)]
    leaves = -before[sizes.clamp(max=max(n - 1, 0))]
    return Design(kept, torch.where(kept, joins[:, None], leaves[:, None]).T.contiguous())


def _random_orders(n: int, permutations: int, seed: int, index: int) -> Design:
    numbers = sample_integers(seed, torch.tensor([index]), permutations * n)
    orders = numbers.view(permutations, n).argsort(1)
    bits = torch.cat([torch.zeros(permutations, 1, dtype=torch.long), (1 << orders).cumsum(1)], 1)
    subsets, place = bits.unique(return_inverse=True)
    weights = torch.zeros(n, len(subsets), dtype=torch.float64)
    for side, sign in ((place[:, 1:], 1.0), (place[:, :-1], -1.0)):
        share = torch.full_like(side, sign, dtype=torch.float64) / permutations
        weights.index_put_((orders.flatten(), side.flatten()), share.flatten(), accumulate=True)
    return Design((subsets[:, None] >> torch.arange(n)) & 1 == 1, weights)


DESIGNS: dict[str, Callable[[int, int, int, int], Design]] = {"removal": removal_design, "shapley": shapley_design}


def kernel_design(n: int, coalitions: int = 1024, seed: int = 0) -> Design:
    """Shapley values by weighted least squares: KernelSHAP (Lundberg and Lee, NeurIPS 2017, theorem 2).

        min_phi sum_z k(z) (f(z) - f(none) - z . phi)^2  with  sum phi = f(all) - f(none),
        k(z) = (n - 1) / (C(n, |z|) |z| (n - |z|))

    The solution is linear in f. All 2^n - 2 coalitions z are taken where there are no more than `coalitions`: the
    values are then Shapley's. Else pairs of a coalition and its complement are drawn with probabilities in proportion
    to k (Covert and Lee, AISTATS 2021). What too few coalitions leave undetermined is shared evenly.

    Args:
        n: number of objects, at least 1.
        coalitions: largest number of coalitions besides none and all.
        seed: seed of the drawn coalitions.

    Raises:
        InputError: n below 1, or fewer than 2 coalitions.

    Example:
        >>> design = kernel_design(2)
        >>> outputs = torch.tensor([0.0, 5.0, 1.0, 2.0], dtype=torch.float64)  # of none, all, first, second
        >>> design.weights @ outputs
        tensor([2., 3.], dtype=torch.float64)
    """
    if n < 1 or coalitions < 2:
        raise InputError(f"KernelSHAP needs at least 1 object and 2 coalitions; got {n} and {coalitions}.")
    every = n <= 62 and 2**n - 2 <= coalitions
    shown = _proper_subsets(n) if every else _drawn_pairs(n, coalitions // 2, seed)
    kept = torch.cat([torch.zeros(1, n, dtype=torch.bool), torch.ones(1, n, dtype=torch.bool), shown])
    sizes = shown.sum(1)
    # Drawn coalitions come as often as their kernel says.
    kernel = _kernel(n)[sizes - 1] / _binomials(n)[sizes - 1] if every else torch.ones(len(shown), dtype=torch.float64)
    return Design(kept, _least_squares(shown.double(), kernel.sqrt()))


def _proper_subsets(n: int) -> Tensor:
    return (torch.arange(1, 2**n - 1)[:, None] >> torch.arange(n)) & 1 == 1


def _kernel(n: int) -> Tensor:
    """The kernel of all coalitions of the sizes 1 to n - 1 together, but for a factor."""
    return torch.tensor([1 / (size * (n - size)) for size in range(1, n)], dtype=torch.float64)


def _binomials(n: int) -> Tensor:
    return torch.tensor([math.comb(n, size) for size in range(1, n)], dtype=torch.float64)


def _drawn_pairs(n: int, pairs: int, seed: int) -> Tensor:
    """Coalitions (2 * pairs, n), each of the first half with its complement in the second."""
    numbers = sample_uniform(seed, torch.arange(pairs), n + 1, torch.float64)
    bounds = _kernel(n).cumsum(0)
    sizes = 1 + torch.searchsorted(bounds[:-1], numbers[:, 0] * bounds[-1], right=True)
    first = numbers[:, 1:].argsort(dim=1, stable=True).argsort(dim=1) < sizes[:, None]
    return torch.cat([first, ~first])


def _least_squares(shown: Tensor, scale: Tensor) -> Tensor:
    """The weights (n, 2 + K) of f(none), f(all) and f(z) in the solution; `scale` is the root of the kernel."""
    n = shown.shape[1]
    sizes = shown.sum(1)
    # phi = (f(all) - f(none)) / n + psi, where psi sums to 0: what remains is an ordinary least squares problem.
    centred = shown - sizes[:, None] / n
    solve = torch.linalg.pinv(scale[:, None] * centred) * scale
    lifted = (1 - solve @ sizes) / n
    return torch.cat([(-lifted - solve.sum(1))[:, None], lifted[:, None], solve], 1)
