"""The bound of a masked denoiser is the mean of its exact likelihoods over all orders, whole or cut into bands."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.evals.bound import Edges, diffusion_bound
from stackwise_jax.evals.orders import order_likelihood, order_nll
from stackwise_jax.generate.reveal import Denoiser
from tests.evals.tables import BYTES, MASK, T, exact_bound, rows_of, table
from tests.generate import reading

WHOLE: tuple[Edges, ...] = ((1e-3, 1.0),)
TEXT = np.array([0, 2, 1, 1, 0, 2], np.int32)
ALL = np.ones(T, bool)
CASES = {
    "one denoiser": (WHOLE, ALL),
    "one place is given": (WHOLE, np.arange(T) != 3),
    "two bands": (((0.5, 1.0), (1e-3, 0.5)), ALL),
    "an edge between counts": (((0.3, 1.0), (1e-3, 0.3)), ALL),
    "the lightest leftmost": (((0.0, 0.4), (0.4, 1.0)), ALL),
}
Z = 4.0  # standard errors; the seeds are fixed


def mean_over_orders(denoisers: Sequence[Denoiser], bands: Sequence[Edges], eligible: np.ndarray) -> float:
    """Of `order_nll` over all 720 orders of six places; the turn of a given place changes nothing."""
    orders = np.array(list(itertools.permutations(range(T))), np.int32)
    rows = rows_of(TEXT, eligible, len(orders))
    nats = order_nll(denoisers, rows, jax.numpy.array(orders), bands=bands, mask_id=MASK)
    return float(np.asarray(nats, np.float64).sum(1).mean())


@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_every_order_is_the_sum_over_every_mask(case: str):
    bands, eligible = CASES[case]
    denoisers = [table(seed) for seed in range(len(bands))]
    mean = mean_over_orders(denoisers, bands, eligible)
    assert mean == pytest.approx(exact_bound(denoisers, bands, TEXT, eligible), rel=1e-5)
    for weight in (0, 0.5):  # of r, instead of 1 / r
        assert mean != pytest.approx(exact_bound(denoisers, bands, TEXT, eligible, weight=weight), rel=0.05)
    if len(bands) > 1:
        assert mean != pytest.approx(exact_bound(denoisers[::-1], bands, TEXT, eligible), rel=0.001)
        moved = [(low + 0.2 * (low > 0.01), high + 0.2 * (high < 1)) for low, high in bands]
        assert mean != pytest.approx(exact_bound(denoisers, moved, TEXT, eligible), rel=0.001)


@pytest.mark.parametrize("case", CASES)
def test_drawn_masks_estimate_the_bound_within_their_error(case: str):
    bands, eligible = CASES[case]
    denoisers = [table(seed) for seed in range(len(bands))]
    options = {"mask_id": MASK, "key": jax.random.key(0), "draws": 3}
    pieces = [(rows_of(TEXT, eligible, 1500), denoisers)]
    found = diffusion_bound(pieces, bands, piece_bytes=BYTES, **options)
    exact = exact_bound(denoisers, bands, TEXT, eligible) / eligible.sum()
    assert 0 < found.standard_error < 0.03 * exact
    assert abs(found.loss - exact) < Z * found.standard_error
    # Without 1 / r: what a place costs on average where it is masked, times how often it is.
    nats = [level.masked_cross_entropy * level.tokens / (1500 * 3 * eligible.sum()) for level in found.bands]
    unweighted = sum(nats) / len(bands)
    assert abs(unweighted - exact) > 3 * Z * found.standard_error


RACK = dataclasses.replace(
    reading.rack_denoiser(),
    rack={**reading.rack_of(reading.MODEL), "stacks": reading.rack_of(reading.MODEL)["stacks"][:1]},
)
OF_RACK: dict[str, Any] = {
    "mask_id": reading.MASK,
    "piece_bytes": np.ones(reading.VOCAB, np.int32),
    "key": jax.random.key(1),
}
# Ten places, of which eight are eligible: id 16 is given, as the first place is.
SENTENCE = np.array([1, 3, 9, 16, 4, 12, 7, 3, 3, 15], np.int32)
EIGHT = (SENTENCE < 16) & (np.arange(10) > 0)


def test_the_bound_of_a_rack_is_the_mean_of_its_likelihoods_over_random_orders():
    """128 rows of one text: the spread over rows is that of the draws alone, so |difference| < 4 standard errors."""
    pieces = [(rows_of(SENTENCE, EIGHT, 128), [RACK])]
    bound = diffusion_bound(pieces, WHOLE, draws=2, **OF_RACK)
    orders = order_likelihood(pieces, "random", bands=WHOLE, **OF_RACK)
    error = math.hypot(bound.standard_error, orders.standard_error)
    assert bound.tokens == orders.tokens == 8 * 128
    assert error < 0.03 * orders.loss
    assert abs(bound.loss - orders.loss) < Z * error
    (band,) = bound.bands
    unweighted = band.masked_cross_entropy * band.tokens / (2 * bound.tokens)  # 1 instead of 1 / r
    assert abs(unweighted - orders.loss) > 3 * Z * error


def test_bands_of_one_denoiser_add_up_to_the_whole_with_the_same_masks():
    """Eight eligible places and edges at quarters: two draws a band are the eight of the whole, mask by mask."""
    rows = rows_of(SENTENCE, EIGHT, 128)
    tokens = np.random.default_rng(0).integers(1, 16, rows.tokens.shape).astype(np.int32)
    rows = dataclasses.replace(rows, tokens=tokens)
    quarters = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (1e-3, 0.25))
    cut = diffusion_bound([(rows, [RACK] * 4)], quarters, draws=2, **OF_RACK)
    whole = diffusion_bound([(rows, [RACK])], WHOLE, draws=8, **OF_RACK)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.standard_error == pytest.approx(whole.standard_error, rel=1e-4)
    assert sum(band.loss or 0.0 for band in cut.bands) == pytest.approx(whole.loss, rel=1e-5)
    assert sum(band.tokens for band in cut.bands) == whole.bands[0].tokens
    without_widths = sum((band.loss or 0.0) / 0.25 for band in cut.bands)
    assert without_widths != pytest.approx(whole.loss, rel=0.5)
    anew: dict[str, Any] = {**OF_RACK, "key": jax.random.key(3)}
    other = diffusion_bound([(rows, [RACK] * 4)], quarters, draws=2, **anew)
    assert other.loss != pytest.approx(whole.loss, rel=1e-5)
