"""What a masked denoiser's losses at all masked fractions bound: the likelihood of the text, band by band.

In the count form, for a row of n eligible places (MD4, Shi et al., 2024; LLaDA, Nie et al., 2025, equation 6),

    -log p(x) <= NELBO(x) = sum over m = 1..n of (1/m) * E_{M, |M| = m} sum over i in M of -log p(x_i | x without M)

which equals the integral over masked fractions r of (1/r) times the sum over a set that holds each place with
probability r, and the mean negative log-likelihood over all orders of revealing one place after another. A band
(low, high] of fractions holds the counts m with low < m / n <= high, as the samplers have it, so the bands add up to
the bound exactly. There is no floor: a count is at least 1, so no weight diverges.

Losses are the plain cross-entropy over every id, as in training: ids that cannot occur keep their probability, and
leaving them out, as a sampler does, would only lower the bound.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from stackwise_jax.evals.likelihood import ratio_error
from stackwise_jax.generate.reveal import Denoiser
from stackwise_jax.objectives.masks import uniform_scores
from stackwise_jax.objectives.rates import low_discrepancy_units
from stackwise_jax.types import AnyArray, Key

FLOOR = 1e-3  # the lowest edge may be as high: training stops there, and below it the lightest band's denoiser serves
Edges = tuple[float, float]
"""(low, high) masked fraction of a band; equal for a level."""

# Streams of the key: where a row's draws lie inside their strata, and what each of them masks.
_PLACES, _SCORES = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Held-out rows.

    Attributes:
      tokens: ids, none of them masked.
      eligible: places that are predicted; the others are given.
      row_ids: which rows these are; what is drawn for a row depends on its number alone.
    """

    tokens: Int[AnyArray, "B T"]
    eligible: Bool[AnyArray, "B T"]
    row_ids: Int[AnyArray, "B"]


Piece = tuple[Rows, Sequence[Denoiser]]
"""Rows that are measured together, and the denoiser of each band for exactly these rows."""


@dataclasses.dataclass(frozen=True)
class Band:
    """What was measured in one band of masked fractions.

    Attributes:
      low, high: its edges; equal for a level.
      loss: what it adds to the bound, in nats per eligible token; None where there is no bound.
      standard_error: over rows, of `loss`, or of `masked_cross_entropy` where there is no bound.
      masked_cross_entropy: nats per masked token, over all that were drawn.
      tokens: masked ones that were drawn.
    """

    low: float
    high: float
    loss: float | None
    standard_error: float
    masked_cross_entropy: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A negative log-likelihood, or an upper bound on it.

    Attributes:
      loss: nats per eligible token.
      standard_error: of `loss`, over rows.
      bits_per_byte: nan where the tokens stand for no bytes.
      bits_per_byte_error: its standard error, over rows.
      tokens: eligible ones.
      bands: of a bound, in the order of its denoisers.
    """

    loss: float
    standard_error: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int
    bands: tuple[Band, ...] = ()


def is_whole(bands: Sequence[Edges]) -> bool:
    """Whether bands, in any order, follow one another from `FLOOR` or below to 1, so that their sum is a bound."""
    ordered = sorted(bands)
    meets = all(below[1] == above[0] for below, above in itertools.pairwise(ordered))
    has_width = all(low < high for low, high in ordered)
    return bool(ordered) and meets and has_width and ordered[0][0] <= FLOOR and ordered[-1][1] == 1.0


def diffusion_bound(
    pieces: Iterable[Piece],
    bands: Sequence[Edges],
    *,
    mask_id: int,
    piece_bytes: Int32[np.ndarray, "V"],
    key: Key,
    draws: int,
) -> Likelihood:
    """The bound over all rows, by `draws` masks a row and band.

    The counts of a row are stratified inside each band, their places in the strata evenly spread over rows, and each
    draw has a mask of its own. Draw d of band k is what draw k * draws + d of one whole band of K times as many draws
    would be, counted from the lightest band, wherever the edges are k / K of the row's places.

    Args:
      pieces: rows, each with a denoiser a band.
      bands: in the order of the denoisers.
      piece_bytes: UTF-8 bytes that each id stands for.

    Raises:
      ValueError: the bands do not make up the whole of the masked fractions.
    """
    if not is_whole(bands):
        raise ValueError(f"{bands} are not the whole range of masked fractions, so there is no bound")
    rows, sums = _measure(pieces, bands, mask_id=mask_id, key=key, draws=draws)
    tokens, own_bytes = count_tokens(rows, piece_bytes)
    nats = [band.bound for band in sums]
    found = [
        band.as_band(edges, float(own.sum()) / max(float(tokens.sum()), 1.0), ratio_error(own, tokens))
        for edges, band, own in zip(bands, sums, nats, strict=True)
    ]
    return as_likelihood(np.sum(nats, axis=0), tokens, own_bytes, tuple(found))


def level_losses(
    pieces: Iterable[Piece], bands: Sequence[Edges], *, mask_id: int, key: Key, draws: int
) -> tuple[Band, ...]:
    """Masked cross-entropy at levels, or in bands that are no whole range: no likelihood of anything.

    A level of r masks ceil(r n) of a row's n eligible places. The rest is as in `diffusion_bound`.
    """
    _, sums = _measure(pieces, bands, mask_id=mask_id, key=key, draws=draws)
    return tuple(
        band.as_band(edges, None, ratio_error(band.nats, band.masked)) for edges, band in zip(bands, sums, strict=True)
    )


def as_likelihood(
    nats: Float[np.ndarray, "n"],
    tokens: Float[np.ndarray, "n"],
    n_bytes: Float[np.ndarray, "n"],
    bands: tuple[Band, ...] = (),
) -> Likelihood:
    """Ratios of sums over rows: of each its nats, its tokens and the bytes that these stand for."""
    bits = nats / math.log(2)
    return Likelihood(
        loss=float(nats.sum()) / float(tokens.sum()) if tokens.any() else math.nan,
        standard_error=ratio_error(nats, tokens),
        bits_per_byte=float(bits.sum()) / float(n_bytes.sum()) if n_bytes.any() else math.nan,
        bits_per_byte_error=ratio_error(bits, n_bytes),
        tokens=int(tokens.sum()),
        bands=bands,
    )


def count_tokens(
    rows: Sequence[Rows], piece_bytes: Int32[np.ndarray, "V"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Eligible tokens of every row, and the bytes that they stand for."""
    tokens, n_bytes = [np.zeros(0)], [np.zeros(0)]
    for own in rows:
        eligible, ids = np.asarray(own.eligible), np.asarray(own.tokens)
        tokens.append(eligible.sum(1).astype(np.float64))
        n_bytes.append(np.where(eligible, piece_bytes[np.where(eligible, ids, 0)], 0).sum(1).astype(np.float64))
    return np.concatenate(tokens), np.concatenate(n_bytes)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Of every row in one band: its part of the bound, and over all draws the nats and the number of masked places."""

    bound: Float[np.ndarray, "n"]
    nats: Float[np.ndarray, "n"]
    masked: Float[np.ndarray, "n"]

    def as_band(self, edges: Edges, loss: float | None, standard_error: float) -> Band:
        masked = int(self.masked.sum())
        cross_entropy = float(self.nats.sum()) / masked if masked else math.nan
        return Band(*edges, loss, standard_error, cross_entropy, masked)


def _measure(
    pieces: Iterable[Piece], bands: Sequence[Edges], *, mask_id: int, key: Key, draws: int
) -> tuple[list[Rows], list[_Sums]]:
    """Draws every mask of every row; the host waits once, at the end."""
    lightest_first = sorted(range(len(bands)), key=lambda band: bands[band])
    all_rows: list[Rows] = []
    measured: list[list[tuple[Array, ...]]] = []
    for rows, denoisers in pieces:
        all_rows.append(rows)
        measured.append(
            [
                _band_sums(
                    denoiser, rows, 0.0 if low <= FLOOR else low, high, key, lightest_first.index(band), draws, mask_id
                )
                for band, (denoiser, (low, high)) in enumerate(zip(denoisers, bands, strict=True))
            ]
        )
    columns = [[np.zeros((3, 0)), *(np.asarray(of[band], np.float64) for of in measured)] for band in range(len(bands))]
    return all_rows, [_Sums(*np.concatenate(column, axis=1)) for column in columns]


@functools.partial(jax.jit, static_argnames=("draws", "mask_id"))
def _band_sums(
    denoiser: Denoiser,
    rows: Rows,
    low: Float[Array, ""] | float,
    high: Float[Array, ""] | float,
    key: Key,
    number: Int[Array, ""] | int,
    draws: int,
    mask_id: int,
) -> tuple[Float[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """`_Sums` of a piece in band `number`, counted from the lightest."""
    n = jnp.sum(rows.eligible, axis=1)
    below = places_at(low, n)
    held = places_at(high, n) - below  # counts that the band holds: its width, times n
    # A level, which is a band without width, masks the count just above it.
    level = jnp.clip(jnp.ceil(high * (n * (1.0 - 2.0**-22))).astype(jnp.int32), jnp.minimum(n, 1), n)
    # Where inside its strata, in (0, 1], a row draws: evenly spread over rows.
    place_key = jax.random.fold_in(key, _PLACES)
    offsets = low_discrepancy_units(place_key, rows.row_ids, jnp.zeros_like(n), n_rows=1, draws=1)[:, 0]
    tokens = jnp.asarray(rows.tokens)

    def one_draw(draw: Array) -> tuple[Array, Array, Array]:
        unit = (draw + offsets) / draws
        count = below + jnp.clip(jnp.ceil(unit * held).astype(jnp.int32), jnp.minimum(held, 1), held)
        count = jnp.where(held > 0, count, jnp.where(low < high, 0, level))
        scores = uniform_scores(
            jax.random.fold_in(key, _SCORES), rows.row_ids, jnp.full_like(n, number * draws + draw), tokens.shape[1]
        )
        rank = jnp.argsort(jnp.argsort(jnp.where(rows.eligible, scores, 2.0), axis=1), axis=1)
        masked = rows.eligible & (rank < count[:, None])
        logits = denoiser(jnp.where(masked, mask_id, tokens), count / jnp.maximum(n, 1))
        nats = jnp.sum(jnp.where(masked, target_losses(logits, tokens), 0.0), axis=1)
        return held / jnp.maximum(count, 1) * nats / draws, nats, count.astype(jnp.float32)

    bound, nats, masked = jax.lax.map(one_draw, jnp.arange(draws))
    return jnp.sum(bound, axis=0), jnp.sum(nats, axis=0), jnp.sum(masked, axis=0)


def places_at(edge: Float[Array, ""] | float, n: Int[Array, "B"]) -> Int[Array, "B"]:
    """The most of n places that may be masked at a fraction of at most `edge`; the slack is a float32's rounding."""
    return jnp.floor(edge * n * (1.0 + 1e-6)).astype(jnp.int32)


def target_losses(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[target] of every place."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
