"""The chunked loss against float64 and the plain formula, and what it must never hold."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.ops.loss import cross_entropy, token_losses

M, V, D = 60, 128, 8
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def inputs(key: jax.Array, places: int = M, dtype: jnp.dtype = jnp.float32) -> Arrays:
    """Returns hidden, table, targets, weights; a third of the weights is 0."""
    keys = jax.random.split(key, 4)
    weights = jax.random.uniform(keys[3], (places,)) * (jnp.arange(places) % 3 != 1)
    return (
        jax.random.normal(keys[0], (places, D), dtype),
        jax.random.normal(keys[1], (V, D), dtype),
        jax.random.randint(keys[2], (places,), 0, V),
        weights,
    )


def losses_in_numpy(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> np.ndarray:
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), np.asarray(targets)]


def plain(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    losses = -jax.nn.log_softmax(hidden @ table.T, axis=1)
    return (weights * jnp.take_along_axis(losses, targets[:, None], axis=1)[:, 0]).sum()


def chunked(chunk_tokens: int, *, asks_everywhere: bool = True) -> Callable[..., jax.Array]:
    return lambda *arrays: cross_entropy(*arrays, chunk_tokens=chunk_tokens, asks_everywhere=asks_everywhere)


@pytest.mark.parametrize("asks_everywhere", [True, False])
@pytest.mark.parametrize("chunk_tokens", [20, 7, 1000])
def test_loss_is_the_formula_in_float64(key: jax.Array, tolerance: dict, chunk_tokens: int, asks_everywhere: bool):
    hidden, table, targets, weights = inputs(key)
    expected = losses_in_numpy(hidden, table, targets)
    each = token_losses(hidden, table, targets, chunk_tokens=chunk_tokens)
    total = chunked(chunk_tokens, asks_everywhere=asks_everywhere)(hidden, table, targets, weights)
    np.testing.assert_allclose(each, expected, **tolerance["float32"])
    np.testing.assert_allclose(total, expected @ np.asarray(weights, np.float64), **tolerance["float32"])
    assert total.dtype == each.dtype == jnp.float32


@pytest.mark.parametrize("rows", [1, 63, 65, 127])
def test_any_number_of_rows_of_the_table(key: jax.Array, tolerance: dict, rows: int):
    hidden, table, targets, weights = inputs(key)
    arrays = (hidden, table[:rows], targets % rows, weights)
    (value, got), (exact, expected) = (
        jax.value_and_grad(loss, argnums=(0, 1))(*arrays) for loss in (chunked(20), plain)
    )
    np.testing.assert_allclose(value, exact, **tolerance["float32"])
    np.testing.assert_allclose(chunked(20)(*arrays), exact, **tolerance["float32"])
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, **tolerance["float32"])


@pytest.mark.parametrize("asks_everywhere", [True, False])
@pytest.mark.parametrize("chunk_tokens", [20, 7, 1000])
@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)])
def test_gradients_are_those_of_the_plain_formula(
    key: jax.Array, tolerance: dict, chunk_tokens: int, argnums: tuple[int, ...], asks_everywhere: bool
):
    arrays = inputs(key)
    # Scaled by a cotangent other than 1, as a mean or a second loss term would.
    got, expected = (
        jax.jit(jax.grad(lambda *a, loss=loss: 0.3 * loss(*a), argnums=argnums))(*arrays)
        for loss in (chunked(chunk_tokens, asks_everywhere=asks_everywhere), plain)
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, **tolerance["float32"])


def test_the_value_does_not_change_when_it_is_differentiated(key: jax.Array, tolerance: dict):
    arrays = inputs(key)
    value, _ = jax.value_and_grad(chunked(20), argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(value, chunked(20)(*arrays), **tolerance["float32"])


def test_places_of_weight_zero_give_no_gradient(key: jax.Array):
    hidden, table, targets, weights = inputs(key)
    gradient = jax.grad(chunked(7))(hidden, table, targets, weights)
    unasked = weights == 0
    assert bool((gradient[unasked] == 0).all())
    assert bool((gradient[~unasked] != 0).any(axis=1).all())
    d_table = jax.grad(chunked(7), argnums=1)
    other_places = (hidden + 5.0 * unasked[:, None], table, jnp.where(unasked, 0, targets), weights)
    np.testing.assert_array_equal(d_table(*other_places), d_table(hidden, table, targets, weights))


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 30), st.integers(1, 11), st.integers(0, 99), st.sampled_from([0.0, 0.2, 0.9, 1.0]))
def test_leaving_places_out_changes_nothing(places: int, chunk_tokens: int, seed: int, share: float):
    hidden, table, targets, weights = inputs(jax.random.key(seed), places)
    weights = jnp.where(jax.random.uniform(jax.random.key(seed + 1), (places,)) < share, 1.0 + weights, 0.0)
    results = [
        jax.value_and_grad(chunked(chunk_tokens, asks_everywhere=own), argnums=(0, 1))(hidden, table, targets, weights)
        for own in (True, False)
    ]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_places_that_are_left_out_are_not_read(key: jax.Array):
    """0 times what is no number is no number: the twin, which computes every place, shows it."""
    hidden, table, targets, weights = inputs(key)
    spoilt = jnp.where((weights == 0)[:, None], jnp.nan, hidden)
    for asks_everywhere in (False, True):
        loss = chunked(7, asks_everywhere=asks_everywhere)
        found = jax.tree.leaves(jax.value_and_grad(loss, argnums=(0, 1))(spoilt, table, targets, weights))
        assert all(bool(jnp.isfinite(own).all()) for own in found) == (not asks_everywhere)


def test_places_of_weight_zero_detects_a_small_weight(key: jax.Array):
    hidden, table, targets, weights = inputs(key)
    gradient = jax.grad(chunked(7))(hidden, table, targets, jnp.maximum(weights, 1e-3))
    assert bool((gradient[weights == 0] != 0).any())


def test_weights_are_constants(key: jax.Array):
    np.testing.assert_array_equal(jax.grad(chunked(7), argnums=3)(*inputs(key)), jnp.zeros(M))


def plain_with_z(*arrays: jax.Array) -> jax.Array:
    hidden, table, _, weights = arrays
    return plain(*arrays) + 0.02 * (weights * jax.nn.logsumexp(hidden @ table.T, axis=1) ** 2).sum()


def with_z(z_loss: float) -> Callable[..., jax.Array]:
    return lambda *arrays: cross_entropy(*arrays, chunk_tokens=7, z_loss=z_loss)


def test_z_loss_is_the_formula_in_float64(key: jax.Array, tolerance: dict):
    hidden, table, targets, weights = inputs(key)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    z = 0.02 * np.log(np.exp(logits).sum(axis=1)) ** 2
    expected = (losses_in_numpy(hidden, table, targets) + z) @ np.asarray(weights, np.float64)
    got = with_z(0.02)(hidden, table, targets, weights)
    np.testing.assert_allclose(got, expected, **tolerance["float32"])
    assert not np.allclose(with_z(0.0)(hidden, table, targets, weights), expected, rtol=1e-3)  # the twin


def test_gradients_of_z_loss_are_those_of_the_plain_formula(key: jax.Array, tolerance: dict):
    arrays = inputs(key)
    got, expected, without = (
        jax.jit(jax.grad(lambda *a, loss=loss: 0.3 * loss(*a), argnums=(0, 1)))(*arrays)
        for loss in (with_z(0.02), plain_with_z, plain)
    )
    for one, other, lacking in zip(got, expected, without, strict=True):
        np.testing.assert_allclose(one, other, **tolerance["float32"])
        assert not np.allclose(lacking, other, rtol=1e-3, atol=1e-3)  # the twin


def test_z_loss_pulls_the_logits_back(key: jax.Array):
    """Cross-entropy does not see what is added to all logits alike; its gradient sums to nothing over them."""
    hidden, table, targets, weights = inputs(key)
    hidden, table = (jnp.concatenate([leaf, jnp.ones((len(leaf), 1))], axis=1) for leaf in (hidden, table))
    along = {z: float(jax.grad(with_z(z))(hidden, table, targets, weights)[:, -1].sum()) for z in (0.0, 0.02)}
    assert abs(along[0.0]) < 1e-4
    assert along[0.02] > 1.0


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 9), st.integers(1, 11), st.integers(0, 99))
def test_chunk_size_changes_nothing(places: int, chunk_tokens: int, seed: int):
    arrays = inputs(jax.random.key(seed), places)
    value, gradients = jax.value_and_grad(chunked(chunk_tokens), argnums=(0, 1))(*arrays)
    whole, whole_gradients = jax.value_and_grad(plain, argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(value, whole, rtol=2e-5, atol=2e-6)
    for one, other in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def results(jaxpr) -> Iterator[jax.core.ShapedArray]:
    """Yields the type of every value that a jaxpr computes, those of the jaxprs inside it included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from results(inner)


def largest(function: Callable[..., object], arrays: Arrays) -> int:
    return max(result.size for result in results(jax.make_jaxpr(function)(*arrays).jaxpr))


def table_sized(function: Callable[..., object], arrays: Arrays) -> int:
    """Counts the float values of the table's shape that are computed."""
    types = results(jax.make_jaxpr(function)(*arrays).jaxpr)
    return sum(sorted(t.shape) == sorted((V, D)) and jnp.issubdtype(t.dtype, jnp.floating) for t in types)


CHUNK = 12


@pytest.mark.parametrize("differentiate", [lambda f: f, lambda f: jax.value_and_grad(f, argnums=(0, 1))])
def test_the_logits_of_all_places_never_exist(key: jax.Array, differentiate: Callable):
    arrays = inputs(key)
    assert largest(differentiate(chunked(CHUNK)), arrays) == CHUNK * V
    assert largest(differentiate(plain), arrays) >= M * V, "the plain formula must be noticed"


def test_evaluation_never_holds_the_logits_of_all_places(key: jax.Array):
    hidden, table, targets, _ = inputs(key)
    each = lambda *arrays: token_losses(*arrays, chunk_tokens=CHUNK)  # noqa: E731
    assert largest(each, (hidden, table, targets)) == CHUNK * V


def test_logits_are_computed_once(key: jax.Array):
    def matmuls(function: Callable) -> int:
        text = str(jax.make_jaxpr(function)(*inputs(key)))
        return text.count("dot_general[")

    assert matmuls(chunked(CHUNK)) == 1
    assert matmuls(jax.value_and_grad(chunked(CHUNK), argnums=(0, 1))) == 3
    assert matmuls(jax.value_and_grad(jax.checkpoint(plain), argnums=(0, 1))) == 4, "a second pass must be noticed"


def test_a_frozen_table_has_no_gradient_anywhere(key: jax.Array):
    arrays = inputs(key)
    assert table_sized(jax.value_and_grad(chunked(CHUNK)), arrays) == 0
    assert table_sized(chunked(CHUNK), arrays) == 0
    assert table_sized(jax.value_and_grad(chunked(CHUNK), argnums=(0, 1)), arrays) > 0, "a live one must be noticed"


def test_a_frozen_table_stays_frozen_inside_jit(key: jax.Array):
    """The training step differentiates a jitted function of the live part; what it closes over is frozen."""
    hidden, table, targets, weights = inputs(key)

    def step(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return jax.grad(lambda h: jax.jit(chunked(CHUNK))(h, table, targets, weights))(hidden)

    assert table_sized(step, (hidden, table)) == 0


def test_sixteen_bits_under_strict_promotion(key: jax.Array, tolerance: dict):
    hidden, table, targets, weights = inputs(key, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        value, gradients = jax.jit(jax.value_and_grad(chunked(CHUNK), argnums=(0, 1)))(hidden, table, targets, weights)
        each = token_losses(hidden, table, targets, chunk_tokens=CHUNK)
    wide = (hidden.astype(jnp.float32), table.astype(jnp.float32), targets, weights)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(*wide)
    # The inputs are 16-bit, the arithmetic is not: losses agree as float32 does.
    np.testing.assert_allclose(value, expected, **tolerance["float32"])
    np.testing.assert_allclose(each, losses_in_numpy(hidden, table, targets), **tolerance["float32"])
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, **tolerance["bfloat16"])


def test_mixed_dtypes_are_an_error(key: jax.Array):
    hidden, table, targets, weights = inputs(key)
    with pytest.raises(ValueError, match="cast the table to bfloat16"):
        cross_entropy(hidden.astype(jnp.bfloat16), table, targets, weights, chunk_tokens=CHUNK)
