"""The largest singular value of every live matrix, measured by numpy, stays at its limit however hard it is pushed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.schema import ModelConfig, OptimizerConfig, PrecisionConfig, RunConfig, StabilityConfig
from stackwise_jax.train.optimizer import make_transforms, update_part

LIMIT = 2.0
ADAMW = OptimizerConfig(learning_rate=0.05, weight_decay=0.0)
MUON = dataclasses.replace(ADAMW, name="muon", muon_learning_rate=0.2)
PARAMS = {
    "up": 0.3 * jax.random.normal(jax.random.key(0), (2, 12, 20)),
    "down": 0.3 * jax.random.normal(jax.random.key(1), (2, 20, 12)),
    "scale": jnp.ones((2, 12)),
}


def config_of(own: OptimizerConfig, limit: float | None, **precision: str) -> RunConfig:
    model = ModelConfig(stability=StabilityConfig(spectral_norm=limit))
    return RunConfig(model=model, optimizer=own, precision=PrecisionConfig(**precision))


def pushed(config: RunConfig, steps: int = 40, fraction: float = 1.0, params: Any = PARAMS) -> Any:
    """Parameters after gradients that make every matrix larger in a direction of its own, and noise."""
    transform = make_transforms(config, scales_head=False)["stacks"]

    @jax.jit
    def whole(params: Any) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            noise = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), params)
            grads = jax.tree.map(lambda leaf, some: some - 1.0 - leaf, params, noise)
            return update_part(transform, grads, state, params, jnp.float32(fraction)), None

        keys = jax.random.split(jax.random.key(2), steps)
        return jax.lax.scan(step, (params, transform.init(params)), keys)[0][0]

    return whole(params)


def norms(params: Any) -> list[float]:
    return [float(np.linalg.svd(block, compute_uv=False)[0]) for name in ("up", "down") for block in params[name]]


@pytest.mark.parametrize("own", [ADAMW, MUON], ids=["adamw", "muon"])
def test_no_matrix_passes_the_limit(own: OptimizerConfig):
    bounded = pushed(config_of(own, LIMIT))
    assert max(norms(bounded)) < 1.05 * LIMIT  # the estimate comes from below, an update late
    assert min(norms(bounded)) > 0.9 * LIMIT  # and takes no more away than it must
    free = pushed(config_of(own, None))
    assert min(norms(free)) > 2 * LIMIT  # the twin
    np.testing.assert_array_equal(bounded["scale"], free["scale"])  # vectors are not bounded


def test_a_share_of_the_rate_goes_a_share_of_the_way():
    assert max(norms(pushed(config_of(ADAMW, LIMIT), steps=80, fraction=0.5))) < 1.05 * LIMIT


def test_what_is_within_the_limit_moves_as_without_one():
    few, free = (pushed(config_of(ADAMW, limit), steps=3) for limit in (50.0, None))
    jax.tree.map(np.testing.assert_array_equal, few, free)


def test_a_matrix_above_the_limit_is_brought_down():
    large = {**PARAMS, "up": 5.0 * PARAMS["up"]}
    assert max(norms(large)) > 3 * LIMIT
    assert max(norms(pushed(config_of(ADAMW, LIMIT), params=large))) < 1.05 * LIMIT


def test_each_block_has_its_own_limit():
    """One block of a stack is small: it keeps what it has."""
    uneven = {**PARAMS, "up": PARAMS["up"] * jnp.array([5.0, 0.1])[:, None, None]}
    config = config_of(dataclasses.replace(ADAMW, learning_rate=1e-4), LIMIT)
    moved = pushed(config, steps=30, params=uneven)
    assert norms(moved)[0] < 1.05 * LIMIT
    assert norms(moved)[1] == pytest.approx(norms(uneven)[1], rel=0.05)


def test_the_limit_holds_beside_rounding_and_from_zero():
    """Output maps may begin at zero, where there is no direction; bfloat16 rounds after the limit."""
    nothing = {**PARAMS, "down": jnp.zeros((2, 20, 12))}
    narrow = {name: leaf.astype(jnp.bfloat16) if leaf.ndim == 3 else leaf for name, leaf in nothing.items()}
    moved = pushed(config_of(ADAMW, LIMIT, weights="bf16", optimizer="int8"), params=narrow)
    moved = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moved)
    assert 0.8 * LIMIT < min(norms(moved)) <= max(norms(moved)) < 1.05 * LIMIT
