"""A learned gain a block: 1 is none, 0 is the identity, its gradient is that of finite differences, it does not decay.

Against numpy it stands in `test_against_numpy.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import apply_stack, init_stack
from stackwise_jax.schema import OptimizerConfig, RunConfig, StabilityConfig
from stackwise_jax.train.optimizer import make_transforms, update_part

SIZES = {"vocab_size": 32, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "init_std": 0.2}
MODEL = resolve({"model": SIZES, "data": {"seq_len": 8}}).model
B, T = 2, 5
X = jax.random.normal(jax.random.key(3), (B, T, 16))
CONTEXT = row_context(MODEL, None, jnp.broadcast_to(jnp.arange(T), (B, T)))


def with_gain(gain: float | None) -> Any:
    """(model, a stack of two blocks of it)."""
    model = dataclasses.replace(MODEL, stability=StabilityConfig(residual_gain=gain))
    return model, init_stack(jax.random.key(0), model, 0, 2)


def run(model: Any, stack: Any) -> jax.Array:
    return jax.jit(lambda stack: apply_stack(stack, X, CONTEXT, model, dtype=jnp.float32))(stack)


def test_a_gain_of_1_is_none_and_draws_the_same_matrices():
    (model, stack), (plain, without) = with_gain(1.0), with_gain(None)
    assert set(stack) - set(without) == {"residual_gain"}
    np.testing.assert_array_equal(stack["residual_gain"], np.ones(2, np.float32))
    np.testing.assert_array_equal(run(model, stack), run(plain, without))


def test_a_gain_of_0_is_the_identity_and_each_block_has_its_own():
    model, stack = with_gain(0.0)
    np.testing.assert_array_equal(run(model, stack), X)
    first = {**stack, "residual_gain": jnp.array([1.0, 0.0])}
    alone = jax.tree.map(lambda leaf: leaf[:1], first)
    np.testing.assert_allclose(run(model, first), run(model, alone), rtol=1e-6, atol=1e-6)
    assert not np.allclose(run(model, first), X, atol=1e-2)  # the twin


def test_the_gradient_of_a_gain_is_its_finite_difference():
    model, stack = with_gain(0.7)

    @jax.jit
    def loss(gain: jax.Array) -> jax.Array:
        return jnp.mean(apply_stack({**stack, "residual_gain": gain}, X, CONTEXT, model, dtype=jnp.float32) ** 2)

    gain, h = stack["residual_gain"], 1e-2
    for block, slope in enumerate(jax.grad(loss)(gain)):
        way = h * jax.nn.one_hot(block, 2)
        measured = (8 * (loss(gain + way) - loss(gain - way)) - (loss(gain + 2 * way) - loss(gain - 2 * way))) / (
            12 * h
        )
        assert float(slope) == pytest.approx(float(measured), rel=5e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gain_is_trained_and_does_not_decay(name: str):
    _, stack = with_gain(0.5)
    transform = make_transforms(RunConfig(optimizer=OptimizerConfig(name=name)), scales_head=False)["stacks"]
    own = {"residual_gain": stack["residual_gain"], "up": stack["mlp"]["up"]["kernel"]}
    zero = jax.tree.map(jnp.zeros_like, own)
    for push, moves in ((0.0, False), (1.0, True)):
        grads = {**zero, "residual_gain": jnp.full(2, push)}
        moved = update_part(transform, grads, transform.init(own), own, jnp.float32(1.0))[0]
        assert bool(jnp.all(moved["residual_gain"] < 0.5)) is moves
        assert not np.array_equal(moved["up"], own["up"])  # which decays
