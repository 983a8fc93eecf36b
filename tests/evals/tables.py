"""Denoisers that are tables, small enough to enumerate every mask and every order; and the same sums in NumPy."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.evals.bound import Edges, Rows

T, V, MASK = 6, 4, 3  # three ordinary ids and the mask's
BYTES = np.array([1, 2, 3, 0], np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Logits [4**6, 6, 4] for every row of visible and masked tokens."""

    logits: jax.Array

    def __call__(self, tokens: jax.Array, rate: jax.Array) -> jax.Array:
        del rate
        return self.logits[jnp.sum(tokens * (V ** jnp.arange(T))[None, :], axis=1)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counting:
    """A denoiser whose loss at any place is `losses[m]` nats when m places are masked, whatever they hold."""

    losses: jax.Array

    def __call__(self, tokens: jax.Array, rate: jax.Array) -> jax.Array:
        del rate
        right = jnp.exp(-self.losses[jnp.sum(tokens == MASK, axis=1)])[:, None, None]
        # Ordinary id 0 is right everywhere and has this probability, the other three share the rest.
        return jnp.log(jnp.where(jnp.arange(V) == 0, right, (1 - right) / (V - 1)) * jnp.ones((*tokens.shape, 1)))


def table(seed: int) -> Table:
    return Table(jnp.array(np.random.default_rng(seed).normal(0.0, 1.5, (V**T, T, V)), jnp.float32))


def rows_of(text: np.ndarray, eligible: np.ndarray, n_rows: int, first_row: int = 0) -> Rows:
    """One text, so many times, each time a row of its own."""
    ids = np.arange(first_row, first_row + n_rows, dtype=np.int32)
    return Rows(np.tile(text, (n_rows, 1)).astype(np.int32), np.tile(eligible, (n_rows, 1)), ids)


def masked_nats(denoiser: Callable, text: np.ndarray, masked: Sequence[int]) -> float:
    """Summed loss of the masked places, in float64."""
    shown = text.copy()
    shown[list(masked)] = MASK
    logits = np.asarray(denoiser(jnp.array(shown[None]), jnp.zeros(1)), np.float64)[0]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(text)), text]
    return float(losses[list(masked)].sum())


def exact_bound(
    denoisers: Sequence[Callable], bands: Sequence[Edges], text: np.ndarray, eligible: np.ndarray, *, weight: float = 1
) -> float:
    """The integral over r of r**-weight times the expected loss of a Bernoulli mask, by every mask: the bound at 1.

    With n - 1 other places, the integral of r**(m - weight) (1 - r)**(n - m) is a beta function. A mask belongs to the
    band that holds the fraction it masks.
    """
    places = np.flatnonzero(eligible).tolist()
    n, total = len(places), 0.0
    for m in range(1, n + 1):
        own = next(
            d for d, (low, high) in zip(denoisers, bands, strict=True) if (low if low > 1e-3 else 0) < m / n <= high
        )
        share = math.gamma(m - weight + 1) * math.gamma(n - m + 1) / math.gamma(n - weight + 2)
        total += share * sum(masked_nats(own, text, masked) for masked in itertools.combinations(places, m))
    return total
