"""Norms and activations: the gradients of the plain formulas, and nothing kept for them that can be made again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models.block import Block
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import init_stack
from stackwise_jax.models.weights import TIME_WIDTH
from stackwise_jax.ops.activation import ACTIVATIONS, activate
from stackwise_jax.ops.norm import normalise

B, T, D, F = 2, 8, 24, 72


def plain_norm(x: Any, scale: Any, bias: Any, subtracts_mean: bool) -> Any:
    if subtracts_mean:
        x = x - x.mean(-1, keepdims=True)
    y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale.reshape(-1, 1, D)
    return y if bias is None else y + bias.reshape(-1, 1, D)


def plain_activation(x: Any, up: Any, kind: str) -> Any:
    return ACTIVATIONS[kind](x) * (1.0 if up is None else up)


def assert_same(ours: Callable[..., Any], plain: Callable[..., Any], arguments: Any, pull: Any) -> None:
    """Two functions give the same values and the same gradients of every argument."""
    found, lean = jax.vjp(ours, *arguments)
    expected, other = jax.vjp(plain, *arguments)
    pairs = zip(jax.tree.leaves((found, lean(pull))), jax.tree.leaves((expected, other(pull))), strict=True)
    for mine, its in pairs:
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(D,), (B, D)], ids=["one scale", "a scale a row"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("subtracts_mean", [False, True])
def test_norm_and_its_gradient(subtracts_mean: bool, has_bias: bool, shape: tuple[int, ...]):
    keys = jax.random.split(jax.random.key(0), 4)
    x, pull = 3.0 + jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (B, T, D))
    scale, bias = jax.random.normal(keys[2], shape), jax.random.normal(keys[3], shape) if has_bias else None

    def ours(x: Any, scale: Any, bias: Any) -> Any:
        return normalise(x, scale, bias, subtracts_mean=subtracts_mean, epsilon=1e-5)

    def plain(x: Any, scale: Any, bias: Any) -> Any:
        return plain_norm(x, scale, bias, subtracts_mean)

    def other(x: Any, scale: Any, bias: Any) -> Any:
        return plain_norm(x, scale, bias, not subtracts_mean)

    assert_same(ours, plain, (x, scale, bias), pull)
    with pytest.raises(AssertionError):
        assert_same(ours, other, (x, scale, bias), pull)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_and_its_gradient(kind: str):
    keys = jax.random.split(jax.random.key(0), 3)
    x, up, pull = (2 * jax.random.normal(key, (B, F)) for key in keys)
    for second in (None, up):
        arguments = (x, second)
        assert_same(lambda x, up: activate(x, up, kind), lambda x, up: plain_activation(x, up, kind), arguments, pull)
    with pytest.raises(AssertionError):
        assert_same(lambda x, up: activate(x, up, kind), lambda x, up: jax.nn.relu(x) * up, (x, up), pull)


def kept(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the backward pass of a function reads, its arguments included."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *arguments))


def wide(arrays: list[Any]) -> list[Any]:
    """Float32 arrays with an entry for every place and coordinate."""
    return [
        array.shape
        for array in arrays
        if array.dtype == jnp.float32 and array.shape[-1:] in ((D,), (F,)) and array.size >= B * T * D
    ]


@pytest.mark.parametrize("fields", [{}, {"norm": "layernorm", "ffn": "gelu", "use_bias": True}, {"time_input": True}])
def test_a_block_in_bfloat16_keeps_nothing_in_float32(fields: dict[str, Any]):
    shape = {"vocab_size": 64, "d_model": D, "n_heads": 2, "d_ff": F, **fields}
    model = resolve({"model": shape, "data": {"seq_len": T}}).model
    params = jax.tree.map(lambda leaf: leaf[0], init_stack(jax.random.key(0), model, 0, 1))
    time = jnp.ones((B, TIME_WIDTH)) if model.time_input else None
    context = row_context(model, None, jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0), time=time)
    x = jnp.ones((B, T, D), jnp.bfloat16)
    found = kept(lambda params, x: Block(model, jnp.bfloat16).apply({"params": params}, x, context)[0], params, x)
    assert wide(found) == []
    hidden = [array for array in found if array.shape == (B * T, F)]
    assert len(hidden) == (2 if model.ffn == "gelu" else 3)  # matmul outputs, and the last matmul's input
    assert wide(kept(lambda x: plain_norm(x.astype(jnp.float32), jnp.ones(D), None, False), x))
