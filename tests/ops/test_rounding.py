"""Stochastic rounding over all of its random bits: the mean is the number, exactly, and the neighbours are numpy's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.ops import rounding

ALL_BITS = np.arange(65536, dtype=np.uint16)
TO_BF16 = jax.jit(rounding.to_bf16)


def in_each_way(x: np.ndarray) -> np.ndarray:
    """Every number rounded with each of the 65536 values of the bits, [65536, n], in float64."""
    shape = (65536, len(x))
    bits = np.broadcast_to(ALL_BITS[:, None], shape)
    rounded = TO_BF16(jnp.broadcast_to(jnp.asarray(x, jnp.float32)[None], shape), jnp.asarray(bits))
    return np.asarray(rounded.astype(jnp.float32), np.float64)


NUMBERS = np.array([1.001, -1.001, 3.14159, -0.3, 1e-20, 7e7, 1.0 + 2.0**-16, 2.0**-7, 0.0], np.float32)


def test_bf16_is_unbiased_and_goes_to_a_neighbour():
    ways = in_each_way(NUMBERS)
    np.testing.assert_allclose(ways.mean(axis=0), NUMBERS.astype(np.float64), rtol=1e-12)
    down = (NUMBERS.view(np.uint32) & 0xFFFF0000).view(np.float32)  # towards zero
    up = ((NUMBERS.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    is_neighbour = (ways == down) | (ways == up)
    assert is_neighbour.all()
    assert (ways[:, -2:] == NUMBERS[-2:]).all()  # what is a bfloat16 stays


def test_bf16_detects_rounding_to_nearest():
    nearest = np.asarray(jnp.asarray(NUMBERS).astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    assert not np.allclose(nearest, NUMBERS, rtol=1e-4)


def test_a_small_change_is_kept_on_average_and_lost_to_the_nearest():
    change = np.float32(2.0**-12)  # a sixteenth of what tells one from its next
    moved = np.array([1.0, 1.0], np.float32) + change
    assert in_each_way(moved).mean() == 1.0 + change
    assert float(jnp.float32(moved[0]).astype(jnp.bfloat16)) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32), min_size=3, max_size=3), st.lists(st.integers(0, 65535), min_size=3, max_size=3))
def test_any_float32_becomes_a_bf16_of_its_kind(numbers: list[float], bits: list[int]):
    x = np.array(numbers, np.float32)
    got = np.asarray(TO_BF16(jnp.asarray(x), jnp.asarray(bits, jnp.uint16)).astype(jnp.float32), np.float64)
    largest = float(jnp.finfo(jnp.bfloat16).max)
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wide))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(wide))
    is_normal = np.isfinite(wide) & (np.abs(wide) > 1e-30)
    near = np.clip(wide, -largest, largest)
    assert (np.abs(got - near) <= np.abs(near) * 2.0**-7)[is_normal].all()


# Eight bits.

WIDE = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
WIDE[0, 7], WIDE[1, 280] = 1000.0, 0.0  # a giant in the first block of the first row


def scales_by_numpy(x: np.ndarray) -> np.ndarray:
    return np.stack([np.abs(x[:, :256]).max(axis=1), np.abs(x[:, 256:]).max(axis=1)], axis=1).astype(np.float64)


def spread(scales: np.ndarray) -> np.ndarray:
    return np.repeat(scales, 256, axis=1)[:, :300]


@jax.jit
def int8_in_each_way(x: jax.Array) -> jax.Array:
    """Numbers through 8 bits with a sixteenth of all random bits, evenly spread, [4096, 3, 300]."""
    ways = jnp.arange(8, 65536, 16, dtype=jnp.uint16)
    once = lambda bits: rounding.from_int8(*rounding.to_int8(x, jnp.broadcast_to(bits, x.shape)))  # noqa: E731
    return jax.lax.map(once, ways[:, None, None])


@jax.jit
def log8_in_each_way(x: jax.Array) -> jax.Array:
    ways = jnp.arange(8, 65536, 16, dtype=jnp.uint16)
    once = lambda bits: rounding.from_log8(*rounding.to_log8(x, jnp.broadcast_to(bits, x.shape)))  # noqa: E731
    return jax.lax.map(once, ways[:, None, None])


def test_int8_is_unbiased_and_scaled_by_block():
    codes, scales = rounding.to_int8(jnp.asarray(WIDE), jnp.zeros(WIDE.shape, jnp.uint16))
    assert (codes.dtype, codes.shape, scales.shape) == (jnp.int8, WIDE.shape, (3, 2))
    steps = scales_by_numpy(WIDE) / 127
    np.testing.assert_allclose(scales, steps, rtol=1e-6)
    ways = np.asarray(int8_in_each_way(jnp.asarray(WIDE)), np.float64)
    assert (np.abs(ways - WIDE).max(axis=0) <= spread(steps) * (1 + 1e-4)).all()
    # The bits are 4096 here: half of the distance between two of them, and float32.
    assert (np.abs(ways.mean(axis=0) - WIDE) <= spread(steps) * 2e-4).all()
    nearest = np.round(WIDE / spread(steps)) * spread(steps)
    assert (np.abs(nearest - WIDE) / spread(steps)).max() > 0.4  # the twin


def test_a_giant_takes_no_precision_from_other_blocks():
    codes, scales = rounding.to_int8(jnp.asarray(WIDE), jnp.full(WIDE.shape, 32768, jnp.uint16))
    error = np.abs(np.asarray(rounding.from_int8(codes, scales)) - WIDE)
    assert error[0, 256:].max() < 0.05 < 0.3 < error[0, :256].max()


def test_log8_is_unbiased_and_keeps_what_is_small():
    x = np.concatenate([WIDE**2, 10.0 ** np.linspace(-8, 0, 300, dtype=np.float32)[None]])
    x[0] = WIDE[1] ** 2
    codes, scales = rounding.to_log8(jnp.asarray(x), jnp.zeros(x.shape, jnp.uint16))
    assert (codes.dtype, codes.shape) == (jnp.uint8, x.shape)
    np.testing.assert_allclose(scales, scales_by_numpy(x), rtol=1e-6)
    by_hand = spread(scales_by_numpy(x)) * 2.0 ** (-(255.0 - np.asarray(codes)) * 32 / 254)
    by_hand[np.asarray(codes) == 0] = 0.0
    np.testing.assert_allclose(rounding.from_log8(codes, scales), by_hand, rtol=1e-5)

    ways = np.asarray(log8_in_each_way(jnp.asarray(x)), np.float64)
    relative = (np.abs(ways - x) / np.maximum(x, 1e-30)).max(axis=0)
    assert relative.max() < 0.092  # neighbours differ by 2**(32/254)
    np.testing.assert_allclose(ways.mean(axis=0), x, rtol=5e-5)
    assert (ways[:, x == 0] == 0).all()

    linear = rounding.from_int8(*rounding.to_int8(jnp.asarray(x), jnp.zeros(x.shape, jnp.uint16)))
    assert np.mean(np.asarray(linear)[3, :100] == 0) > 0.9  # the twin: a division by nothing


@pytest.mark.parametrize("pair", [(rounding.to_int8, rounding.from_int8), (rounding.to_log8, rounding.from_log8)])
def test_zeros_stay_and_no_number_is_hidden(pair: tuple[Callable[..., Any], Callable[..., Any]]):
    to, back = pair
    bits = jnp.full((2, 4), 65535, jnp.uint16)
    np.testing.assert_array_equal(back(*to(jnp.zeros((2, 4)), bits)), 0.0)
    broken = to(jnp.array([[1.0, 2.0, jnp.nan, 0.5], [1.0, jnp.inf, 2.0, 0.5]]), bits)
    assert not np.isfinite(broken[1]).any()  # what is about to be stored is refused by its scale


def test_a_mean_square_below_the_codes_is_not_nothing():
    x = jnp.array([[1.0, 1e-12, 1e-30]])
    for bits in (0, 65535):
        got = rounding.from_log8(*rounding.to_log8(x, jnp.full(x.shape, bits, jnp.uint16)))
        np.testing.assert_allclose(got[0, 1:], 2.0 ** (-254 * 32 / 254), rtol=1e-5)
