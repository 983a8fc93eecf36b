"""Rotary positions against complex multiplication in float64, and the law that only distance counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.ops.rope import apply_rope, rope_frequencies

THETA = 10000.0
FREQUENCIES = rope_frequencies(8, THETA)


def rotate_complex(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.complex128) + 1j * x[..., half:]
    turn = np.exp(1j * positions[:, :, None, None] * theta ** (-np.arange(half) / half))
    return np.concatenate([(z * turn).real, (z * turn).imag], axis=-1)


def heads(key: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jax.random.normal(key, (2, 5, 3, 8), dtype)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_is_complex_multiplication(key: jax.Array, tolerance: dict, theta: float):
    x, positions = heads(key), np.array([[0, 1, 2, 3, 4], [7, 0, 63, 1, 20]])
    got = apply_rope(x, jnp.asarray(positions), rope_frequencies(8, theta))
    np.testing.assert_allclose(got, rotate_complex(np.asarray(x), positions, theta), **tolerance["float32"])


def products(key: jax.Array, shift_q: int, shift_k: int) -> jax.Array:
    q, k = heads(key), heads(jax.random.fold_in(key, 1))
    places = jnp.broadcast_to(jnp.arange(5), (2, 5))
    q, k = apply_rope(q, places + shift_q, FREQUENCIES), apply_rope(k, places + shift_k, FREQUENCIES)
    return jnp.einsum("BTNH,BSNH->BNTS", q, k)


@pytest.mark.parametrize("shift", [1, 17])
def test_products_depend_on_distance_alone(key: jax.Array, shift: int):
    np.testing.assert_allclose(products(key, shift, shift), products(key, 0, 0), rtol=2e-5, atol=2e-5)


def test_products_detects_positions_of_queries_alone(key: jax.Array):
    assert float(jnp.abs(products(key, 1, 0) - products(key, 0, 0)).max()) > 0.1


def test_rope_leaves_place_zero_alone(key: jax.Array):
    x = heads(key)
    np.testing.assert_array_equal(apply_rope(x, jnp.zeros((2, 5), jnp.int32), FREQUENCIES), x)


def test_sixteen_bits_are_rounded_once_at_the_end(key: jax.Array):
    x, positions = heads(key, jnp.bfloat16), jnp.full((2, 5), 3001)
    with jax.numpy_dtype_promotion("strict"):
        got = apply_rope(x, positions, FREQUENCIES)
    exact = apply_rope(x.astype(jnp.float32), positions, FREQUENCIES)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
    # the twin: a 16-bit place is another place
    rounded = positions.astype(jnp.bfloat16).astype(jnp.int32)
    assert not np.array_equal(apply_rope(x, rounded, FREQUENCIES), got)


def test_odd_heads_are_an_error():
    with pytest.raises(ValueError, match="d_head=7 must be even"):
        rope_frequencies(7, THETA)
