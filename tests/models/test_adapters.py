"""Adapters: nothing at birth, one stack when merged, gradient to themselves alone, in training and in decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.checks.training import adapter_ranks
from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.memory.precision import from_storage, to_storage
from stackwise_jax.models.adapters import adapter_parameters, adapter_table, attach, init_adapter, merge
from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import apply_stack, decode_stack, init_stack, stack_size
from stackwise_jax.models.stores import KeyValues
from stackwise_jax.ops.lowrank import LowRank, merged
from stackwise_jax.ops.matmul import matmul
from stackwise_jax.schema import AdapterConfig

SIZES = {"vocab_size": 32, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
MODEL = resolve({"model": SIZES, "data": {"seq_len": 8}}).model
ALPHA, RANK, B, T = 6.0, 3, 2, 5
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
CONTEXT = row_context(MODEL, None, POSITIONS)


def filled(adapter: Any, seed: int) -> Any:
    """An adapter that has been trained: no part is zero."""
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


STACK = init_stack(jax.random.key(0), dataclasses.replace(MODEL, init_std=0.15), 0, 2)
BORN = init_adapter(jax.random.key(1), MODEL, 0, 2, rank=RANK, targets="all")
TRAINED = filled(BORN, 2)
X = jax.random.normal(jax.random.key(3), (B, T, 16))


@jax.jit
def run(stack: Any, x: jax.Array = X) -> jax.Array:
    return apply_stack(stack, x, CONTEXT, MODEL, dtype=jnp.float32)


def test_a_low_rank_weight_multiplies_by_the_formula():
    draw = np.random.default_rng(0)
    x, w, a, b = (draw.normal(size=shape).astype(np.float32) for shape in ((4, 6), (6, 5), (6, 2), (2, 5)))
    weight = LowRank(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), 0.7)
    wide = [part.astype(np.float64) for part in (x, w, a, b)]
    expected = wide[0] @ wide[1] + 0.7 * wide[0] @ wide[2] @ wide[3]
    np.testing.assert_allclose(matmul(jnp.asarray(x), weight, dtype=jnp.float32), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x @ np.asarray(merged(weight)), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_changes_nothing_at_birth():
    np.testing.assert_array_equal(run(attach(STACK, BORN, ALPHA)), run(STACK))
    assert not np.allclose(run(attach(STACK, TRAINED, ALPHA)), run(STACK), atol=1e-2)  # nor is it always nothing


def test_merged_is_attached():
    plain = merge(STACK, TRAINED, ALPHA)
    assert jax.tree.structure(plain) == jax.tree.structure(STACK)
    np.testing.assert_allclose(run(plain), run(attach(STACK, TRAINED, ALPHA)), rtol=1e-5, atol=1e-5)
    wrong = merge(STACK, TRAINED, 2 * ALPHA)  # the twin
    assert not np.allclose(run(wrong), run(attach(STACK, TRAINED, ALPHA)), atol=1e-2)


def test_two_adapters_attach_in_turn():
    other = filled(init_adapter(jax.random.key(4), MODEL, 0, 2, rank=2, targets="query, down"), 5)
    both = attach(attach(STACK, TRAINED, ALPHA), other, 1.0)
    np.testing.assert_allclose(run(merge(merge(STACK, TRAINED, ALPHA), other, 1.0)), run(both), rtol=1e-5, atol=1e-5)
    query = both["attention"]["query"]["kernel"]
    np.testing.assert_allclose(merged(query)[1], _by_hand(query, 1), rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda own, late: jnp.sum(run(attach(attach(STACK, own, ALPHA), late, 1.0)) ** 2), (0, 1))
    for gradient in gradients(TRAINED, other):
        assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(gradient))


def _by_hand(weight: LowRank, block: int) -> np.ndarray:
    inner = weight.base
    parts = [inner.base, inner.a, inner.b, weight.a, weight.b]
    w, a, b, late_a, late_b = (np.asarray(part[block], np.float64) for part in parts)
    return w + (ALPHA / RANK) * a @ b + (1.0 / 2) * late_a @ late_b


@jax.jit
def loss(stack: Any, x: jax.Array = X) -> jax.Array:
    return jnp.mean(run(stack, x) ** 2)


def test_gradient_reaches_the_adapter_and_the_input_and_no_base():
    gradient = jax.grad(loss)(attach(STACK, TRAINED, ALPHA))
    kernel = gradient["attention"]["query"]["kernel"]
    assert not np.any(kernel.base)
    assert np.all(np.any(np.asarray(kernel.a), axis=(1, 2)))
    assert np.all(np.any(np.asarray(kernel.b), axis=(1, 2)))
    assert np.any(jax.grad(loss)(STACK)["attention"]["query"]["kernel"])  # which without an adapter takes one
    assert np.any(jax.grad(loss, 1)(attach(STACK, TRAINED, ALPHA), X))


def test_gradients_are_finite_differences():
    adapter_loss = jax.jit(lambda adapter, x: loss(attach(STACK, adapter, ALPHA), x))
    toward = filled(BORN, 7)
    h = 1e-2

    def along(step: float) -> float:
        moved = jax.tree.map(lambda leaf, way: leaf + step * way, TRAINED, toward)
        return float(adapter_loss(moved, X + step))

    gradient, of_x = jax.grad(adapter_loss, (0, 1))(TRAINED, X)
    slope = sum(float(jnp.vdot(g, w)) for g, w in zip(*map(jax.tree.leaves, (gradient, toward)), strict=True))
    slope += float(of_x.sum())
    measured = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    assert measured == pytest.approx(slope, rel=1e-2)
    assert measured != pytest.approx(slope - float(of_x.sum()), rel=1e-2)  # the gradient through the base counts


def test_a_quantised_base_takes_adapters():
    """QLoRA (Dettmers et al., 2023): four bits below, float32 beside them."""
    stored = to_storage(STACK, "nf4")
    adapter_loss = lambda adapter, stack: loss(attach(stack, adapter, ALPHA))  # noqa: E731
    value, gradient = jax.value_and_grad(adapter_loss)(TRAINED, stored)
    expected, gradient_of_decoded = jax.value_and_grad(adapter_loss)(TRAINED, from_storage(stored, jnp.float32))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradient, gradient_of_decoded)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert float(value) != pytest.approx(float(adapter_loss(TRAINED, STACK)), rel=1e-3)  # the twin: four bits show
    with pytest.raises(TypeError, match="Quantised"):
        merge(stored, TRAINED, ALPHA)


def test_adapters_decode_as_they_read_whole_rows():
    stack = attach(STACK, TRAINED, ALPHA)
    empty = jnp.zeros((stack_size(stack), B, T, 1, 8))
    seen = jnp.broadcast_to(jnp.tri(T, dtype=bool)[None, None], (B, 1, T, T))

    def read(part: slice, stored: KeyValues, at: int) -> tuple[jax.Array, KeyValues]:
        context = Context(POSITIONS[:, part], seen[:, :, part], at)
        return decode_stack(stack, X[:, part], context, stored, MODEL, dtype=jnp.float32)

    first, stored = read(slice(0, 3), KeyValues(empty, empty), 0)
    second, _ = read(slice(3, T), stored, 3)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), run(stack), rtol=2e-5, atol=2e-5)


def test_an_adapter_s_values_do_not_depend_on_grouping():
    late = init_adapter(jax.random.key(1), MODEL, 1, 1, rank=RANK, targets="all")
    jax.tree.map(np.testing.assert_array_equal, late, jax.tree.map(lambda leaf: leaf[1:], BORN))


def test_targets_and_their_counts():
    assert set(adapter_table(MODEL, 2, "query,value")) == {"attention"}
    assert adapter_parameters(MODEL, 2, "query,value") == 2 * (16 + 16) + 2 * (16 + 8)
    every = 2 * (32 + 24 + 24 + 32 + 3 * 40)  # query, key, value, output; up, gate, down
    assert adapter_parameters(MODEL, 2, "all") == every
    assert sum(leaf.size for leaf in jax.tree.leaves(BORN)) == 2 * 3 * every // 2
    told = dataclasses.replace(MODEL, time_input=True)
    assert adapter_table(told, 2, "all") == adapter_table(MODEL, 2, "all")
    with pytest.raises(ValueError, match="adaptive"):
        adapter_table(told, 2, "adaptive")
    with pytest.raises(ValueError, match="upp"):
        adapter_table(MODEL, 2, "query,upp")
    with pytest.raises(ValueError, match="memory"):
        attach(STACK, {"memory": {}}, 1.0)


def test_a_base_that_is_no_array_is_not_merged():
    with pytest.raises(TypeError, match="stored as dict"):
        merged(LowRank({"codes": jnp.ones(3)}, jnp.ones((3, 1)), jnp.ones((1, 3)), 1.0))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ("constant", (8, 8, 8, 8)),
        ("increasing", (2, 4, 6, 8)),
        ("decreasing", (8, 6, 4, 2)),
        ("4, 8,8,16", (4, 8, 8, 16)),
    ],
)
def test_ranks_of_every_stack(ranks: str, expected: tuple[int, ...]):
    assert adapter_ranks(AdapterConfig(rank=8, ranks=ranks), 4) == expected


def test_no_pattern_gives_a_rank_of_nothing():
    assert min(adapter_ranks(AdapterConfig(rank=2, ranks="increasing"), 80)) == 1
    with pytest.raises(UserError, match="2 rank"):
        adapter_ranks(AdapterConfig(ranks="4,8"), 3)
