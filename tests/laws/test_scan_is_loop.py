"""A stack scanned is its blocks applied one after the other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models.block import Block
from stackwise_jax.models.layers import dropout
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import apply_stack, init_stack
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Params

B, T, D, L = 2, 16, 32, 3
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def model_of(**fields: Any) -> ModelConfig:
    shape = {"vocab_size": 64, "d_model": D, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "init_std": 0.2}
    return resolve({"model": {**shape, **fields}, "data": {"seq_len": T}}).model


def scanned(params: Params, x: Any, model: ModelConfig, key: Any = None, unroll: int = 1) -> np.ndarray:
    context = row_context(model, jnp.ones((B, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0))
    run = jax.jit(lambda params, x: apply_stack(params, x, context, model, dtype=jnp.float32, unroll=unroll, key=key))
    return np.asarray(run(params, x))


def looped(params: Params, x: Any, model: ModelConfig, order: list[int], key: Any = None) -> np.ndarray:
    context = row_context(model, jnp.ones((B, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0))
    keys = [None] * L if key is None else list(jax.random.split(key, L))
    block = jax.jit(lambda own, x, own_key: Block(model, jnp.float32).apply({"params": own}, x, context, own_key)[0])
    for index in order:
        x = block(jax.tree.map(lambda leaf, i=index: leaf[i], params), x, keys[index])
    return np.asarray(x)


@pytest.fixture(scope="module")
def x() -> Any:
    return jax.random.normal(jax.random.key(5), (B, T, D))


@pytest.mark.parametrize(
    "fields", [{}, {"norm": "layernorm", "norm_position": "post", "ffn": "gelu", "use_bias": True}]
)
def test_scan_is_loop(x: Any, fields: dict[str, Any]):
    model = model_of(**fields)
    params = init_stack(jax.random.key(0), model, 0, L)
    np.testing.assert_allclose(scanned(params, x, model), looped(params, x, model, [0, 1, 2]), **CLOSE)


def test_scan_is_loop_detects_another_order_and_a_missing_block(x: Any):
    model = model_of()
    params = init_stack(jax.random.key(0), model, 0, L)
    for order in ([1, 0, 2], [0, 1]):
        assert not np.allclose(scanned(params, x, model), looped(params, x, model, order), **CLOSE)


def test_scan_is_loop_with_dropout(x: Any):
    model = model_of(dropout=0.5)
    params, key = init_stack(jax.random.key(0), model, 0, L), jax.random.key(9)
    with_dropout = scanned(params, x, model, key)
    np.testing.assert_allclose(with_dropout, looped(params, x, model, [0, 1, 2], key), **CLOSE)
    assert not np.allclose(with_dropout, scanned(params, x, model, jax.random.key(10)), **CLOSE)


@pytest.mark.parametrize("unroll", [2, L, 16])
def test_unrolled_is_loop(x: Any, unroll: int):
    model = model_of(dropout=0.5)
    params, key = init_stack(jax.random.key(0), model, 0, L), jax.random.key(9)
    ours = scanned(params, x, model, key, unroll)
    np.testing.assert_allclose(ours, looped(params, x, model, [0, 1, 2], key), **CLOSE)
    assert not np.allclose(ours, looped(params, x, model, [0, 2, 1], key), **CLOSE)


def test_unrolling_leaves_no_loop(x: Any):
    model, params = model_of(), init_stack(jax.random.key(0), model_of(), 0, L)
    context = row_context(model, None, jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0))

    def loops(unroll: int) -> int:
        run = jax.jit(lambda params: apply_stack(params, x, context, model, dtype=jnp.float32, unroll=unroll))
        return run.lower(params).as_text().count("stablehlo.while")

    assert (loops(1), loops(2), loops(L)) == (1, 1, 0)


def test_dropout_is_off_without_a_key_and_at_rate_0(x: Any):
    with_rate, without = model_of(dropout=0.5), model_of()
    params, key = init_stack(jax.random.key(0), without, 0, L), jax.random.key(9)
    plain = scanned(params, x, without)
    np.testing.assert_array_equal(scanned(params, x, with_rate), plain)
    np.testing.assert_array_equal(scanned(params, x, without, key), plain)
    assert not np.allclose(scanned(params, x, with_rate, key), plain, **CLOSE)


@pytest.mark.parametrize("width", [64, 63])
@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_dropout_keeps_the_mean(width: int, rate: float):
    dropped = np.asarray(dropout(jnp.ones((8, 64, width)), rate, jax.random.key(0)))
    assert np.mean(dropped == 0.0) == pytest.approx(rate, abs=0.01)
    assert np.mean(dropped) == pytest.approx(1.0, abs=0.02)
    kept = round((1 - rate) * 65536) / 65536  # the very rate, not the one asked for
    assert set(np.unique(dropped)) == {np.float32(0.0), np.float32(1 / kept)}


def test_dropout_draws_are_independent():
    """Of neighbours, which share a word of the generator, and of the same place under another key."""
    drop = [np.asarray(dropout(jnp.ones((1, 64, 1024)), 0.25, jax.random.key(seed)))[0] == 0 for seed in (0, 1)]
    even, odd = drop[0][:, ::2], drop[0][:, 1::2]
    for first, second in ((even, odd), (drop[0], drop[1]), (drop[0][:, :512], drop[0][:, 512:])):
        assert np.mean(first & second) == pytest.approx(1 / 16, abs=0.006)


def test_dropout_too_small_to_draw_keeps_everything():
    x = jnp.ones((1, 2, 8))
    np.testing.assert_array_equal(dropout(x, 1e-6, jax.random.key(0)), x)
