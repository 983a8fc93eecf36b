"""The bound's sums: counts of every band, bytes, errors, and what a row's numbers do not depend on."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.evals.bound import Edges, Rows, diffusion_bound, is_whole, level_losses
from tests.evals.tables import BYTES, MASK, Counting, table

N = 7
LOSSES = np.array([0.0, 0.1, 0.5, 0.7, 1.1, 1.2, 1.9, 3.0], np.float32)
COUNTING = Counting(jnp.array(LOSSES))
OPTIONS: dict[str, Any] = {
    "mask_id": MASK,
    "key": jax.random.key(0),
    "draws": 420,
}  # which every number of counts in a band divides
WHOLE = ((1e-3, 1.0),)


def rows_of_every_length() -> Rows:
    """Rows of 1 to 7 eligible places, at the end of the row, and one of none; every token is 0."""
    eligible = np.arange(N)[None, :] >= N - np.array([1, 2, 3, 4, 5, 6, 7, 0])[:, None]
    return Rows(np.zeros((8, N), np.int32), eligible, np.arange(8, dtype=np.int32))


@pytest.mark.parametrize(
    "bands",
    [
        WHOLE,
        ((0.5, 1.0), (0.0, 0.5)),
        ((2 / 3, 1.0), (1 / 3, 2 / 3), (1e-3, 1 / 3)),
        ((0.9, 1.0), (0.1, 0.9), (0.05, 0.1), (1e-4, 0.05)),
        ((0.0, 0.3), (0.3, 1.0)),
    ],
)
def test_every_count_is_in_one_band(bands: tuple[Edges, ...]):
    """m places of n cost 1/m of m losses, so a row costs the sum of `LOSSES` to n, wherever the bands are cut."""
    rows = rows_of_every_length()
    found = diffusion_bound([(rows, [COUNTING] * len(bands))], bands, piece_bytes=BYTES, **OPTIONS)
    assert found.tokens == 28
    assert found.loss * 28 == pytest.approx(sum(LOSSES[1 : n + 1].sum() for n in range(N + 1)), rel=1e-5)
    assert sum(band.loss or 0.0 for band in found.bands) == pytest.approx(found.loss, rel=1e-6)
    for band, (low, high) in zip(found.bands, bands, strict=True):
        held = [m for n in range(1, N + 1) for m in range(1, n + 1) if (low > 1e-3) * low < m / n <= high + 1e-9]
        assert (band.loss or 0.0) * 28 == pytest.approx(float(LOSSES[held].sum()), rel=1e-5, abs=1e-6)


def test_an_edge_belongs_to_the_band_below():
    """The law of counts sees on which side of 1/2 the half lies."""
    rows, bands = rows_of_every_length(), ((0.5, 1.0), (0.0, 0.5))
    found = diffusion_bound([(rows, [COUNTING] * 2)], bands, piece_bytes=BYTES, **OPTIONS)
    halves = float(LOSSES[[m for n in range(1, N + 1) for m in range(1, n + 1) if 2 * m == n]].sum())
    above = float(LOSSES[[m for n in range(1, N + 1) for m in range(1, n + 1) if 2 * m >= n]].sum())
    assert halves > 1.0
    assert (found.bands[0].loss or 0.0) * 28 == pytest.approx(above - halves, rel=1e-5)


def test_each_band_has_its_own_denoiser():
    rows, bands = rows_of_every_length(), ((0.5, 1.0), (0.0, 0.5))
    doubled = Counting(2 * COUNTING.losses)
    one, other = (
        diffusion_bound([(rows, pair)], bands, piece_bytes=BYTES, **OPTIONS)
        for pair in ([COUNTING, doubled], [doubled, COUNTING])
    )
    plain = diffusion_bound([(rows, [COUNTING] * 2)], bands, piece_bytes=BYTES, **OPTIONS)
    heavy, light = (band.loss or 0.0 for band in plain.bands)
    assert one.loss == pytest.approx(heavy + 2 * light, rel=1e-5)
    assert other.loss == pytest.approx(2 * heavy + light, rel=1e-5)
    reordered = diffusion_bound([(rows, [doubled, COUNTING])], bands[::-1], piece_bytes=BYTES, **OPTIONS)
    assert reordered.loss == pytest.approx(one.loss, rel=1e-6)


def test_bits_are_counted_over_the_bytes_of_eligible_tokens():
    rows = rows_of_every_length()
    found = diffusion_bound([(rows, [COUNTING])], WHOLE, piece_bytes=np.array([5, 1, 1, 1], np.int32), **OPTIONS)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 5)
    assert found.bits_per_byte_error == pytest.approx(found.standard_error / math.log(2) / 5)
    nothing = diffusion_bound([(rows, [COUNTING])], WHOLE, piece_bytes=np.zeros(4, np.int32), **OPTIONS)
    assert math.isnan(nothing.bits_per_byte)


def drawn_rows(n_rows: int) -> Rows:
    tokens = np.random.default_rng(0).integers(0, 3, (n_rows, 6)).astype(np.int32)
    return Rows(tokens, np.ones((n_rows, 6), bool), np.arange(n_rows, dtype=np.int32))


def take(rows: Rows, which: list[int]) -> Rows:
    return Rows(rows.tokens[which], rows.eligible[which], rows.row_ids[which])


def test_a_row_is_measured_alike_in_any_company():
    rows, options = drawn_rows(6), {**OPTIONS, "draws": 3, "piece_bytes": BYTES}
    together = diffusion_bound([(rows, [table(0)])], WHOLE, **options)
    apart = diffusion_bound(
        [(take(rows, [3, 5, 0]), [table(0)]), (take(rows, [4, 1, 2]), [table(0)])], WHOLE, **options
    )
    assert apart.loss == pytest.approx(together.loss, rel=1e-6)
    assert apart.standard_error == pytest.approx(together.standard_error, rel=1e-5)
    renumbered = dataclasses.replace(rows, row_ids=rows.row_ids + 6)
    assert diffusion_bound([(renumbered, [table(0)])], WHOLE, **options).loss != pytest.approx(together.loss, rel=1e-4)


def test_the_standard_error_is_the_spread_over_draws_and_rows():
    """Over other rows and other masks of them; a row's text does not come twice."""
    rows, denoiser = drawn_rows(1500), table(0)
    options = {**OPTIONS, "draws": 2, "piece_bytes": BYTES}
    found = [
        diffusion_bound([(take(rows, list(range(at, at + 50))), [denoiser])], WHOLE, **options)
        for at in range(0, 1500, 50)
    ]
    spread = np.std([one.loss for one in found], ddof=1)
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.35)


def test_levels_mask_their_share_and_are_no_bound():
    rows = rows_of_every_length()
    levels = ((0.9, 0.9), (0.5, 0.5), (0.15, 0.15))
    options: dict[str, Any] = {**OPTIONS, "draws": 2}
    found = level_losses([(rows, [COUNTING] * 3)], levels, **options)
    for level, (rate, _) in zip(found, levels, strict=True):
        counts = [math.ceil(rate * n) for n in range(1, N + 1)]
        assert level.tokens == 2 * sum(counts)
        assert level.masked_cross_entropy == pytest.approx(np.average(LOSSES[counts], weights=counts), rel=1e-5)
        assert level.loss is None
        assert level.standard_error > 0
    with pytest.raises(ValueError, match="no bound"):
        diffusion_bound([(rows, [COUNTING] * 3)], levels, piece_bytes=BYTES, **options)


def test_a_range_short_of_the_whole_is_no_bound():
    rows = rows_of_every_length()
    for bands in (((0.15, 1.0),), ((1e-3, 0.9),), ((0.5, 1.0), (1e-3, 0.4)), ((0.4, 1.0), (1e-3, 0.5)), ()):
        assert not is_whole(bands)
        with pytest.raises(ValueError, match="no bound"):
            diffusion_bound([(rows, [COUNTING] * len(bands))], bands, piece_bytes=BYTES, **OPTIONS)
    for bands in (WHOLE, ((0.0, 1.0),), ((0.5, 1.0), (1e-3, 0.5)), ((0.0, 0.2), (0.2, 1.0))):
        assert is_whole(bands)
    (short,) = level_losses([(rows, [COUNTING])], ((0.5, 1.0),), **OPTIONS)
    held = [(m, 1 / (n - n // 2)) for n in range(1, N + 1) for m in range(n // 2 + 1, n + 1)]
    weights = [m * share for m, share in held]
    assert short.masked_cross_entropy == pytest.approx(
        np.average(LOSSES[[m for m, _ in held]], weights=weights), rel=1e-5
    )


def test_no_rows_give_no_number():
    empty = diffusion_bound([], WHOLE, piece_bytes=BYTES, **OPTIONS)
    assert empty.tokens == 0
    assert math.isnan(empty.loss)
    assert math.isnan(empty.standard_error)
