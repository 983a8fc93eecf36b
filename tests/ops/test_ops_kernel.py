"""Random features against exact kernels, and linear-time attention against the quadratic sum, both in float64 numpy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.ops.kernel_features import (
    FAMILIES,
    directions,
    frequencies,
    paired_features,
    positive_features,
)
from stackwise_jax.ops.linear_attention import linear_attention
from stackwise_jax.ops.mask import Mask

H, PAIRS, BANDWIDTH = 4, 256, 1.5
DISTANCES = [name for name in FAMILIES if name != "linear"]


def kernel_in_numpy(family: str, x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    """Of pairs [n H], in closed form."""
    d = (x - y) / bandwidth
    if family == "gaussian":
        return np.exp(-(d**2).sum(-1) / 2)
    if family == "laplacian":
        return np.exp(-np.abs(d).sum(-1))
    return (np.sin(d) / d).prod(-1)


def pairs() -> tuple[np.ndarray, np.ndarray]:
    x, y = np.random.default_rng(0).standard_normal((2, PAIRS, H))
    return x, x + 0.5 * y


def products(x: np.ndarray, y: np.ndarray, features: Any) -> np.ndarray:
    """Of features of pairs, all at one head."""
    a, b = (np.asarray(features(jnp.asarray(z, jnp.float32)[None, :, None]), np.float64)[0, :, 0] for z in (x, y))
    return (a * b).sum(-1)


def cosines_only(x: jax.Array, own: np.ndarray) -> jax.Array:
    """The twin: features without their sines, whose products depend on x + y too."""
    return jnp.cos(jnp.einsum("BTKH,KFH->BTKF", x, own)) * math.sqrt(1 / own.shape[1])


def error(family: str, count: int, features: Any = paired_features, seeds: int = 16) -> float:
    """Root mean square over pairs and seeds of what `count` frequencies miss of the kernel."""
    (x, y), squares = pairs(), []
    exact = kernel_in_numpy(family, x, y, BANDWIDTH)
    for seed in range(seeds):
        own = frequencies(family, 1, H, count, bandwidth=BANDWIDTH, seed=seed)
        squares.append(np.mean((products(x, y, lambda z, own=own: features(z, own)) - exact) ** 2))
    return math.sqrt(np.mean(squares))


@pytest.mark.parametrize("family", DISTANCES)
def test_the_error_of_a_kernel_falls_like_one_over_the_root_of_its_frequencies(family: str):
    errors = [error(family, count) for count in (16, 256, 4096)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.25)
    assert errors[2] < 0.015


@pytest.mark.parametrize("family", DISTANCES)
def test_convergence_detects_missing_sines_and_another_bandwidth(family: str):
    assert error(family, 4096, cosines_only, seeds=2) > 0.1
    wide = lambda x, own: paired_features(x, own / 2)  # noqa: E731
    assert error(family, 4096, wide, seeds=2) > 0.05


def test_convergence_tells_the_families_apart():
    x, y = pairs()
    exact = {family: kernel_in_numpy(family, x, y, BANDWIDTH) for family in DISTANCES}
    for family in DISTANCES:
        own = frequencies(family, 1, H, 4096, bandwidth=BANDWIDTH, seed=0)
        ours = products(x, y, lambda z, own=own: paired_features(z, own))
        gaps = {name: np.sqrt(np.mean((ours - values) ** 2)) for name, values in exact.items()}
        assert min(gaps, key=lambda name: gaps[name]) == family
        assert sorted(gaps.values())[1] > 3 * gaps[family]


def positive_error(count: int, scale: float = 0.5, wrong: float = 1.0, seeds: int = 16) -> float:
    """Relative to exp(scale u u'), in the root mean square over pairs and seeds."""
    (x, y), squares = pairs(), []
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    exact = np.exp(scale * (x * y).sum(-1))
    for seed in range(seeds):
        own = directions(1, H, count, seed=seed)
        make = lambda z, own=own: positive_features(z, own, scale=wrong * scale, of_queries=False)  # noqa: E731
        squares.append(np.mean((products(x, y, make) / exact - 1) ** 2))
    return math.sqrt(np.mean(squares))


def test_the_error_of_positive_features_falls_like_one_over_the_root_of_their_number():
    errors = [positive_error(count) for count in (16, 256, 4096)]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.25)
    assert errors[2] < 0.05
    assert positive_error(4096, wrong=2.0, seeds=2) > 0.3


def test_features_are_functions_of_the_seed_and_differ_by_head_and_stream():
    own = {"bandwidth": 1.0, "seed": 3}
    first = frequencies("gaussian", 2, H, 8, **own)
    np.testing.assert_array_equal(first, frequencies.__wrapped__("gaussian", 2, H, 8, **own))
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first, frequencies("gaussian", 2, H, 8, bandwidth=1.0, seed=4))
    assert not np.allclose(first, directions(2, H, 8, seed=3))
    np.testing.assert_allclose(2 * frequencies("gaussian", 2, H, 8, bandwidth=2.0, seed=3), first)
    with pytest.raises(ValueError, match="linear"):
        frequencies("linear", 2, H, 8, **own)


def test_query_heads_read_the_frequencies_of_their_key_head():
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, H))
    own = frequencies("gaussian", 2, H, 8, bandwidth=1.0, seed=0)
    grouped = paired_features(x, own)
    np.testing.assert_allclose(grouped, paired_features(x, np.repeat(own, 2, axis=0)), rtol=1e-6)
    assert not np.allclose(grouped, paired_features(x, np.tile(own, (2, 1, 1))))
    np.testing.assert_allclose(jnp.sum(grouped**2, axis=-1), 1.0, rtol=1e-5)


# --- linear time ---

B, T, N, K, M, W = 2, 11, 4, 2, 5, 3
SEGMENTS = jnp.array([[1] * 4 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 8])
PREFIXES = jnp.array([6, 5])
MASKS = {
    "causal": Mask("causal"),
    "causal packed": Mask("causal", SEGMENTS),
    "bidirectional": Mask("bidirectional"),
    "bidirectional packed": Mask("bidirectional", SEGMENTS),
    "prefix": Mask("prefix", None, PREFIXES),
    "prefix packed": Mask("prefix", SEGMENTS, PREFIXES),
}


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys, shapes = jax.random.split(jax.random.key(0), 3), [(B, T, N, M), (B, T, K, M), (B, T, K, W)]
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return jnp.exp(q), jnp.exp(k), v


def mixed_in_numpy(q: Any, k: Any, v: Any, visible: np.ndarray) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((B, T, N, W))
    for b, t, n in np.ndindex(B, T, N):
        seen, head = np.flatnonzero(visible[b, t]), n // (N // K)
        weights = k[b, seen, head] @ q[b, t, n]
        out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("name", MASKS)
def test_linear_attention_is_the_quadratic_sum(name: str, chunk: int):
    q, k, v = arrays()
    visible = np.broadcast_to(MASKS[name].as_array(T)[:, 0], (B, T, T))
    ours = linear_attention(q, k, v, MASKS[name], chunk=chunk)[0]
    np.testing.assert_allclose(ours, mixed_in_numpy(q, k, v, visible), rtol=1e-5, atol=1e-6)
    for other in set(MASKS) - {name}:  # the twins: every mask differs somewhere
        wrong = np.broadcast_to(MASKS[other].as_array(T)[:, 0], (B, T, T))
        assert not np.allclose(ours, mixed_in_numpy(q, k, v, wrong), rtol=1e-3)


def test_gradients_are_those_of_the_quadratic_sum():
    q, k, v = arrays()

    def quadratic(q: Any, k: Any, v: Any, mask: Mask) -> Any:
        weights = jnp.einsum("BTKGM,BSKM->BKGTS", q.reshape(B, T, K, N // K, M), k) * mask.as_array(T)[:, :, None]
        weights = weights / weights.sum(-1, keepdims=True)
        return jnp.einsum("BKGTS,BSKW->BTKGW", weights, v).reshape(B, T, N, W)

    def gradients(attend: Any) -> Any:
        # Uneven weights, because a plain sum has no gradient in q and k where the values are alike.
        uneven = jnp.cos(jnp.arange(B * T * N * W, dtype=jnp.float32)).reshape(B, T, N, W)
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(attend(*qkv) * uneven), argnums=(0, 1, 2)))(q, k, v)

    mask = MASKS["prefix packed"]
    ours = gradients(lambda q, k, v: linear_attention(q, k, v, mask, chunk=4)[0])
    for own, expected in zip(ours, gradients(lambda q, k, v: quadratic(q, k, v, mask)), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


def test_sums_go_on_where_reading_stopped():
    """Rows that are padded on the left, read in parts of several lengths."""
    q, k, v = arrays()
    segments = jnp.array([[0] * 3 + [1] * 8, [1] * 11])
    whole, sums = linear_attention(q, k, v, Mask("causal", segments), chunk=4)
    past, parts = None, []
    for part in (slice(0, 5), slice(5, 6), slice(6, 11)):
        own = (x[:, part] for x in (q, k, v))
        mixed, past = linear_attention(*own, Mask("causal", segments[:, part]), sums=past, chunk=4)
        parts.append(mixed)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(past, sums, rtol=1e-5)
    forgotten = linear_attention(q[:, 5:], k[:, 5:], v[:, 5:], Mask("causal", segments[:, 5:]), chunk=4)[0]
    assert not np.allclose(forgotten, whole[:, 5:], rtol=1e-3)


def test_masks_that_sums_cannot_express_are_refused():
    q, k, v = arrays()
    for mask in (Mask("causal", window=2), Mask("block_causal", block_length=2)):
        with pytest.raises(ValueError, match="linear-time attention has no mask"):
            linear_attention(q, k, v, mask)
    sums = linear_attention(q, k, v, Mask("causal"))[1]
    with pytest.raises(ValueError, match="causal rows"):
        linear_attention(q, k, v, Mask("bidirectional"), sums=sums)
