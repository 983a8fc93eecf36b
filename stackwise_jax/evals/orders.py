"""Exact likelihoods of text under masked denoisers that reveal one place after another, in a given or a chosen order.

A sampler that chooses each place by what is visible alone, and its token by the denoiser's distribution, has the
likelihood

    -log p(x) = sum over j of -log p(x_o(j) | x_o(1) .. x_o(j - 1)),    o the order in which it reveals x

exactly, by one network evaluation a place (any-order autoregression, Uria et al., 2014; samplers that choose, DUEL,
Turok et al., 2026). The mean over all given orders is the bound of `evals/bound.py`; a single order may lie on either
side of it.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from stackwise_jax.evals.bound import Edges, Likelihood, Piece, Rows, as_likelihood, count_tokens, places_at
from stackwise_jax.evals.bound import target_losses as losses_of
from stackwise_jax.generate.reveal import Denoiser, Rule, predict
from stackwise_jax.objectives.masks import uniform_scores
from stackwise_jax.types import AnyArray, Key

CHOSEN_ORDERS = ("confidence", "margin", "entropy")
ORDERS = ("left_to_right", "right_to_left", "random", *CHOSEN_ORDERS)


def order_likelihood(
    pieces: Iterable[Piece],
    order: str,
    *,
    bands: Sequence[Edges],
    mask_id: int,
    piece_bytes: Int32[np.ndarray, "V"],
    key: Key,
) -> Likelihood:
    """Measures all rows in one order; the host waits once, at the end.

    Args:
      pieces, bands: as in `diffusion_bound`; a place is predicted by the band that holds the fraction masked before it.
      order: one of `ORDERS`; random: another one for each row, whatever its text.
      piece_bytes: UTF-8 bytes that each id stands for.
      key: of random orders.
    """
    rows, nats = [], []
    for own, denoisers in pieces:
        rows.append(own)
        chosen = order if order in CHOSEN_ORDERS else given_order(order, own, key)
        nats.append(jnp.sum(order_nll(denoisers, own, chosen, bands=bands, mask_id=mask_id), axis=1))
    return as_likelihood(np.concatenate([np.zeros(0), *map(np.float64, nats)]), *count_tokens(rows, piece_bytes))


def given_order(order: str, rows: Rows, key: Key) -> Int[Array, "B T"]:
    """When each place is revealed, the lowest first: left_to_right, right_to_left, or random by (key, row)."""
    tokens = jnp.asarray(rows.tokens)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    if order == "random":
        row_ids = jnp.asarray(rows.row_ids)
        scores = uniform_scores(key, row_ids, jnp.zeros_like(row_ids), tokens.shape[1])
        return jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
    return places if order == "left_to_right" else -places


def order_nll(
    denoisers: Sequence[Denoiser], rows: Rows, order: Int[Array, "B T"] | str, *, bands: Sequence[Edges], mask_id: int
) -> Float[Array, "B T"]:
    """-log p of every eligible place when its turn comes, in nats; 0 elsewhere. A row's sum is its likelihood.

    One compiled program that calls the denoisers once a place, for all rows together; a row that is done waits.

    Args:
      denoisers: of each band.
      order: numbers that differ within a row, of which the lowest is revealed first; or one of `CHOSEN_ORDERS`: the
        place where the largest probability, its distance to the second, or the negative entropy is largest, of equals
        the leftmost, as samplers of temperature 0 choose it (over all ids but the mask's).
      bands: masked fractions (low, high] of each denoiser, which together reach from 0, or a floor, to 1.
    """
    heaviest_first = sorted(range(len(bands)), key=lambda band: -bands[band][1])
    lows = np.array([bands[band][0] for band in heaviest_first], np.float32)
    lows[-1] = 0.0  # below the floor the lightest band goes on
    ordered = tuple(denoisers[band] for band in heaviest_first)
    chosen, ranks = (order, None) if isinstance(order, str) else (None, order)
    return _order_nll(ordered, rows, lows, ranks, chosen, mask_id)


@functools.partial(jax.jit, static_argnames=("chosen", "mask_id"))
def _order_nll(
    denoisers: tuple[Denoiser, ...],
    rows: Rows,
    lows: Float[AnyArray, "n"],
    ranks: Int[Array, "B T"] | None,
    chosen: str | None,
    mask_id: int,
) -> Float[Array, "B T"]:
    tokens, n = jnp.asarray(rows.tokens), jnp.sum(rows.eligible, axis=1)
    places = jnp.arange(tokens.shape[1])[None, :]

    def scores_of(logits: Array, shown: Array) -> Array:
        if chosen is None:
            assert ranks is not None
            return -ranks.astype(jnp.float32)
        allowed = jnp.arange(logits.shape[-1]) != mask_id
        unused = jnp.broadcast_to(jax.random.key(0), tokens.shape)  # nothing is drawn at temperature 0
        return predict(logits, shown, unused, None, allowed=allowed, rule=Rule(mask_id=mask_id, order=chosen))[2]

    masked, nats = jnp.asarray(rows.eligible), jnp.zeros(tokens.shape)
    for denoiser, low in zip(denoisers, lows, strict=True):
        left = places_at(low, n)

        def unfinished(carry: tuple[Array, Array], left: Array = left) -> Array:
            return jnp.any(jnp.sum(carry[0], axis=1) > left)

        def reveal_one(
            carry: tuple[Array, Array], denoiser: Denoiser = denoiser, left: Array = left
        ) -> tuple[Array, Array]:
            masked, nats = carry
            count = jnp.sum(masked, axis=1)
            shown = jnp.where(masked, mask_id, tokens)
            logits = denoiser(shown, count / jnp.maximum(n, 1))
            place = jnp.argmax(jnp.where(masked, scores_of(logits, shown), -jnp.inf), axis=1)
            losses = losses_of(_at(logits, place), _at(tokens, place))
            revealed = (places == place[:, None]) & (count > left)[:, None]
            return masked & ~revealed, jnp.where(revealed, losses[:, None], nats)

        masked, nats = jax.lax.while_loop(unfinished, reveal_one, (masked, nats))
    return nats


def _at(values: Array, place: Int[Array, "B"]) -> Array:
    """The entry of each row at its place."""
    return jax.vmap(lambda row, own: row[own])(values, place)
