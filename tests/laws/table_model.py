"""A model small enough to know everything about: six places, three tokens, a table of all it can see.

Its predictions are arbitrary, so nothing that holds for it holds because a model is consistent with itself. All in
float64, by enumeration of masks and of orders, with analytic integrals over rates.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Polynomial

from stackwise_jax.types import Batch, Vocabulary

T, V, MASK = 6, 3, 3
VOCABULARY = Vocabulary(size=V, mask_id=MASK, special_ids=(MASK,))
ROW = np.array([0, 2, 1, 1, 0, 2])
SUBSETS = np.array(list(itertools.product([False, True], repeat=T)))
ALL = np.ones(T, bool)

_LOGITS = np.random.default_rng(0).normal(0.0, 2.0, ((V + 1) ** T, T, V))
_LOG_P = _LOGITS - np.log(np.exp(_LOGITS).sum(axis=-1, keepdims=True))


def nats(shown: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p(targets_i | shown) at every place i; [B T] each, MASK is what cannot be seen."""
    pattern = shown @ (V + 1) ** np.arange(T)
    return -_LOG_P[pattern[:, None], np.arange(T)[None], targets]


def masked_losses(eligible: np.ndarray = ALL) -> dict[tuple[int, ...], float]:
    """{M: sum over i in M of -log p(x_i | all but M)} for every set M of eligible places."""
    masks = SUBSETS[~SUBSETS[:, ~eligible].any(axis=1)]
    losses = (masks * nats(np.where(masks, MASK, ROW), ROW[None].repeat(len(masks), 0))).sum(axis=1)
    return {tuple(np.flatnonzero(mask).tolist()): float(loss) for mask, loss in zip(masks, losses, strict=True)}


def integral(losses: dict[tuple[int, ...], float], low: float, high: float, *, power: int = -1) -> float:
    """The integral over r from low to high of r**power * E over M(r) of the loss; the bound has power -1."""
    n = max(map(len, losses))
    total = 0.0
    for mask, loss in losses.items():
        if mask:
            density = Polynomial([0.0, 1.0]) ** (len(mask) + power) * Polynomial([1.0, -1.0]) ** (n - len(mask))
            total += loss * float(density.integ()(high) - density.integ()(low))
    return total


def integral_by_count(losses: dict[tuple[int, ...], float], low: float, high: float) -> float:
    """The same for the count form: m = ceil(r n) of n places, every set of m as likely, weight n/m."""
    n = max(map(len, losses))
    total = 0.0
    for m in range(1, n + 1):
        share = max(min(high, m / n) - max(low, (m - 1) / n), 0.0)
        total += share * n / m * float(np.mean([loss for mask, loss in losses.items() if len(mask) == m]))
    return total


def mean_over_orders() -> float:
    """Mean over all T! orders of the row's negative log-likelihood when its places are revealed in that order."""
    orders = np.array(list(itertools.permutations(range(T))))
    total = 0.0
    for revealed in range(T):
        hidden = np.zeros((len(orders), T), bool)
        np.put_along_axis(hidden, orders[:, revealed:], True, axis=1)
        losses = nats(np.where(hidden, MASK, ROW), ROW[None].repeat(len(orders), 0))
        total += float(losses[np.arange(len(orders)), orders[:, revealed]].sum())
    return total / math.factorial(T)


def copies_of_the_row(n: int, bands: list[tuple[float, float]] | None = None) -> Batch:
    """A batch of `n` rows that say the same and differ in their numbers; the bands are dealt out in turn."""
    ones = np.ones((n, T), np.int32)
    dealt = None if bands is None else jnp.array(np.resize(np.array(bands, np.float32), (n, 2)))
    arrays = (ROW[None] * ones, ones, np.arange(T)[None] * ones, np.arange(n), np.zeros(n))
    return Batch(*(jnp.array(array, jnp.int32) for array in arrays), bands=dealt)
