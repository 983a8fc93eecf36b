"""No gradient from the future, and none from another document, through a whole rack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models.rack import apply_head_norm, init_rack, row_context
from stackwise_jax.models.stack import apply_stack
from stackwise_jax.schema import ModelConfig

T, D = 16, 32
CAUSAL = resolve(
    {
        "model": {"vocab_size": 64, "d_model": D, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "init_std": 0.2},
        "data": {"seq_len": T},
    }
).model
BIDIRECTIONAL = dataclasses.replace(CAUSAL, attention="bidirectional")
RACK = init_rack(jax.random.key(0), CAUSAL, (1, 1))
ONE_DOCUMENT = [1] * T
PACKED = [1] * 6 + [2] * 7 + [0] * 3


def influence(model: ModelConfig, segments: list[int]) -> np.ndarray:
    """[T T] booleans: entry [t, s] says that the output at t moves with the embedded token at s."""
    document = jnp.array([segments], jnp.int32)
    positions = jnp.array([[segments[:t].count(segments[t]) for t in range(T)]], jnp.int32)
    context = row_context(model, document, positions)
    direction = jax.random.normal(jax.random.key(2), (D,))

    def outputs(x: Any) -> Any:
        hidden = x[None]
        for stack in RACK["stacks"]:
            hidden = apply_stack(stack, hidden, context, model, dtype=jnp.float32)
        return apply_head_norm(RACK["head"], hidden, model)[0] @ direction

    x = jax.random.normal(jax.random.key(1), (T, D))
    return np.asarray(jnp.any(jax.jit(jax.jacrev(outputs))(x) != 0.0, axis=-1))


def allowed(segments: list[int], *, causal: bool) -> np.ndarray:
    return np.array([[(s <= t or not causal) and segments[s] == segments[t] for s in range(T)] for t in range(T)])


@pytest.mark.parametrize("segments", [ONE_DOCUMENT, PACKED], ids=["one document", "packed"])
def test_no_gradient_from_the_future(segments: list[int]):
    np.testing.assert_array_equal(influence(CAUSAL, segments), allowed(segments, causal=True))


def test_no_gradient_from_the_future_detects_bidirectional_attention():
    seen = influence(BIDIRECTIONAL, PACKED)
    assert not np.array_equal(seen, allowed(PACKED, causal=True))
    np.testing.assert_array_equal(seen, allowed(PACKED, causal=False))


def test_no_gradient_from_another_document_detects_rows_that_are_not_isolated():
    assert not np.array_equal(influence(CAUSAL, ONE_DOCUMENT), allowed(PACKED, causal=True))
