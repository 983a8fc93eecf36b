"""Routing, the layout of rows by expert, and their products, against loops over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.ops import experts as ops
from stackwise_jax.ops.quant import decode, encode

E, A, D, F, M = 5, 2, 12, 10, 37
GENERATOR = np.random.default_rng(0)
X = jnp.asarray(GENERATOR.standard_normal((M, D)), jnp.float32)
ROUTER = jnp.asarray(GENERATOR.standard_normal((D, E)), jnp.float32)
WEIGHTS = jnp.asarray(GENERATOR.standard_normal((E, D, F)), jnp.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@pytest.mark.parametrize("normalises", [True, False])
def test_routing_is_that_of_a_loop(normalises: bool):
    found = ops.route(X, ROUTER, active=A, normalises=normalises)
    for token in range(M):
        shares = softmax(np.asarray(X[token], np.float64) @ np.asarray(ROUTER, np.float64))
        chosen = np.argsort(-shares)[:A]
        weights = shares[chosen] / (shares[chosen].sum() if normalises else 1.0)
        assert list(found.experts[token]) == list(chosen)
        np.testing.assert_allclose(found.weights[token], weights, rtol=1e-5)


def penalties(counted: np.ndarray | None) -> tuple[float, float]:
    """Balance and z-loss by loops."""
    sent, shares, squares, n = np.zeros(E), np.zeros(E), 0.0, 0
    for token in range(M):
        if counted is not None and not counted[token]:
            continue
        logits = np.asarray(X[token], np.float64) @ np.asarray(ROUTER, np.float64)
        own = softmax(logits)
        sent[np.argsort(-own)[:A]] += 1.0
        shares, squares, n = shares + own, squares + np.log(np.exp(logits).sum()) ** 2, n + 1
    return E * float((sent / (n * A)) @ (shares / n)), squares / n


@pytest.mark.parametrize("counted", [None, np.arange(M) % 3 > 0])
def test_penalties_are_those_of_loops(counted: np.ndarray | None):
    routing, among = ops.route(X, ROUTER, active=A, normalises=True), None if counted is None else jnp.asarray(counted)
    balance, z = penalties(counted)
    assert float(ops.balance_loss(routing, among)) == pytest.approx(balance, rel=1e-5)
    assert float(ops.router_z_loss(routing, among)) == pytest.approx(z, rel=1e-5)
    assert abs(penalties(np.arange(M) > 3)[0] - balance) > 1e-3  # the twin: of other tokens


@pytest.mark.parametrize("active", [1, 3])
def test_even_loads_cost_one_and_a_single_expert_all_of_them(active: int):
    even = jnp.stack([(jnp.arange(E * 4) + i) % E for i in range(active)], axis=1)
    flat = jnp.zeros((E * 4, E))
    assert float(ops.balance_loss(ops.Routing(even, flat[:, :active], flat))) == pytest.approx(1.0, rel=1e-6)
    one = 30.0 * jax.nn.one_hot(jnp.zeros(E * 4, int), E)
    assert float(ops.balance_loss(ops.Routing(jnp.zeros((E * 4, 1), int), one[:, :1], one))) == pytest.approx(E)


LOADS = {
    "mixed": lambda n: GENERATOR.integers(0, E, n),
    "all to one": lambda n: np.full(n, 3),
    "one to the last": lambda n: np.where(np.arange(n) == n // 2, E - 1, 0),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("n", [1, 700])
def test_every_assignment_has_a_slot_in_a_block_of_its_expert(load: str, n: int):
    chosen = jnp.asarray(LOADS[load](n).reshape(-1, 1), jnp.int32)
    layout = jax.jit(ops.lay_out, static_argnums=1)(chosen, E)
    slots = np.asarray(layout.slot_of).reshape(-1)
    block = layout.assignment_of.size // layout.expert_of.size
    assert len(set(slots)) == n
    np.testing.assert_array_equal(layout.assignment_of[slots], np.arange(n))
    np.testing.assert_array_equal(layout.expert_of[slots // block], chosen[:, 0])
    assert int((np.asarray(layout.assignment_of) == n).sum()) == layout.assignment_of.size - n
    assert layout.assignment_of.size <= n + E * (block - 1)


def mixed(x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
    layout = ops.lay_out(chosen, E)
    out = ops.expert_matmul(ops.to_slots(x, layout), weights, layout.expert_of, dtype=jnp.float32)
    return ops.from_slots(out, layout)


def test_products_and_gradients_are_those_of_one_matrix_a_token():
    """And the twin: of tokens sent elsewhere they are not."""
    chosen = ops.route(X, ROUTER, active=A, normalises=True).experts
    probe = jnp.asarray(GENERATOR.standard_normal((M, A, F)), jnp.float32)
    ours = jax.jit(jax.value_and_grad(lambda x, w, c: jnp.sum(jnp.sin(mixed(x, w, c)) * probe), argnums=(0, 1)))

    def loop(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.einsum("MD,MADF->MAF", x, weights[chosen])) * probe)

    expected = jax.value_and_grad(loop, argnums=(0, 1))(X, WEIGHTS)
    for found, wanted in zip(jax.tree.leaves(ours(X, WEIGHTS, chosen)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    moved = ours(X, WEIGHTS, (chosen + 1) % E)
    assert float(jnp.abs(moved[1][1] - expected[1][1]).max()) > 0.1


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_quantised_experts_multiply_as_their_decoded_matrices(kind: str):
    chosen, stored = ops.route(X, ROUTER, active=A, normalises=True).experts, encode(WEIGHTS, kind)
    plain = decode(stored, jnp.float32)
    assert float(jnp.abs(plain - WEIGHTS).max()) > 1e-3

    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(mixed(x, weights, chosen)))

    for found, wanted in zip(
        *(jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(X, w)) for w in (stored, plain)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_balance_loss_evens_out_loads():
    """A router that sends nearly all tokens to one expert; the twin, without the loss, stays where it is."""
    skewed = (0.3 * ROUTER).at[0].set(jnp.asarray([4.0, 0.0, 0.0, 0.0, 0.0]))
    x = X.at[:, 0].set(1.0 + jnp.abs(X[:, 0]))

    def largest_load(weight: float) -> float:
        def loss(router: jax.Array) -> jax.Array:
            return weight * ops.balance_loss(ops.route(x, router, active=1, normalises=False))

        router = skewed
        step = jax.jit(lambda router: router - 0.3 * jax.grad(loss)(router))
        for _ in range(200):
            router = step(router)
        experts = np.asarray(ops.route(x, router, active=1, normalises=False).experts)
        return float(np.bincount(experts[:, 0], minlength=E).max()) / M

    assert largest_load(0.0) > 0.9
    assert largest_load(1.0) < 0.5
