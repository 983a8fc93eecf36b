"""Latent and kernel attention: against float64 numpy written from the papers' equations, stored in every way."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.checks.attention import linear_maps
from stackwise_jax.config import resolve
from stackwise_jax.memory.precision import from_storage, to_storage
from stackwise_jax.models import weights
from stackwise_jax.models.adapters import adapter_table, attach, init_adapter, merge
from stackwise_jax.models.block import Block
from stackwise_jax.models.mixing import Context
from stackwise_jax.models.stack import apply_stack, decode_stack, init_stack
from stackwise_jax.models.stores import KernelSums, KeyValues, Latents, init_store
from stackwise_jax.ops.kernel_features import directions, frequencies
from stackwise_jax.ops.mask import Mask, decoding_mask
from stackwise_jax.schema import ModelConfig

B, T, D = 2, 12, 32
SHAPE = {"vocab_size": 64, "d_model": D, "n_heads": 4, "d_head": 8, "d_ff": 48, "init_std": 0.3}
LATENT = {"kv_rank": 40, "query_rank": 6, "d_rope": 4, "d_value": 6}
SEPARATE = {"form": "separate", "kv_rank": 10, "query_rank": 6}
KINDS: dict[str, dict[str, Any]] = {
    "mla": {"attention_kind": "mla", "latent": LATENT},
    "mla, grouped, biases": {"attention_kind": "mla", "latent": {"kv_rank": 10}, "n_kv_heads": 2, "use_bias": True},
    "mla, no positions": {"attention_kind": "mla", "latent": {"kv_rank": 10}, "positions": "none", "norm": "layernorm"},
    "separate": {"attention_kind": "mla", "latent": SEPARATE, "n_kv_heads": 2},
    "gaussian": {"attention_kind": "kernel", "kernel": {"n_features": 16}, "n_kv_heads": 2},
    "uniform": {"attention_kind": "kernel", "kernel": {"family": "uniform", "n_features": 16, "scale": 5.0}},
    "linear": {"attention_kind": "kernel", "kernel": {"family": "linear"}, "n_kv_heads": 2},
    "mlgka": {"attention_kind": "mlgka", "latent": LATENT, "kernel": {"n_features": 16}, "n_kv_heads": 2},
    "mlgka, separate": {"attention_kind": "mlgka", "latent": SEPARATE, "kernel": {"bandwidth": 2.0, "seed": 3}},
    "linear, linear time": {
        "attention_kind": "kernel",
        "kernel": {"family": "linear", "form": "linear", "positive_features": 8},
    },
    "mlgka, linear time": {"attention_kind": "mlgka", "kernel": {"form": "linear", "scale": 0.5}, "n_kv_heads": 2},
}
SEGMENTS = jnp.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * T])
PLACES = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
MASKS = {
    "packed": Mask("bidirectional", SEGMENTS),
    "prefix": Mask("prefix", None, jnp.array([4, 7])),
    "window": Mask("causal", SEGMENTS, window=2),
    "block_causal": Mask("block_causal", SEGMENTS, block_length=4),
}


@functools.cache
def model_of(name: str) -> ModelConfig:
    return resolve({"model": {**SHAPE, **KINDS[name]}, "data": {"seq_len": T}}).model


@functools.cache
def stack_of(name: str, n_blocks: int = 1) -> Any:
    """A stack whose biases and norms are random too, so that leaving one out shows."""
    rng = np.random.default_rng(0)

    def draw(weight: weights.Weight) -> jax.Array:
        values = (weight.std or 0.1) * rng.standard_normal((n_blocks, *weight.shape))
        return jnp.asarray(values + (weight.init == "ones"), jnp.float32)

    return jax.tree.map(draw, weights.block_table(model_of(name)), is_leaf=weights.is_weight)


def activations() -> jax.Array:
    return jax.random.normal(jax.random.key(5), (B, T, D))


# --- the other implementation ---


def linear(p: Any, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0.0)


def rms(p: Any, x: np.ndarray, model: ModelConfig) -> np.ndarray:
    return p["scale"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon)


def rotate(x: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Heads [T N H]: pair i with i + H/2, as complex numbers."""
    if model.positions != "rotary":
        return x
    half = x.shape[-1] // 2
    angles = np.arange(T)[:, None] * model.rope_theta ** (-np.arange(half) * 2.0 / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def heads(p: Any, x: np.ndarray, model: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values [T heads width] of one row."""
    own, kv, d_head = model.n_heads, model.n_kv_heads or 0, model.d_head or 0
    if not model.has_latents:
        q, k, v = (linear(p[name], x) for name in ("query", "key", "value"))
        return rotate(q.reshape(T, own, -1), model), rotate(k.reshape(T, kv, -1), model), v.reshape(T, kv, -1)
    read = x if "query_latent" not in p else linear(p["query_latent"], x)
    if model.latent.form == "separate":
        q, k, v = (
            linear(p[name], linear(p[f"{name}_latent"], x)) if name != "query" else linear(p[name], read)
            for name in ("query", "key", "value")
        )
        return rotate(q.reshape(T, own, -1), model), rotate(k.reshape(T, kv, -1), model), v.reshape(T, kv, -1)
    q = linear(p["query"], rms(p["query_norm"], read, model) if "query_norm" in p else read).reshape(T, own, -1)
    latent = rms(p["latent_norm"], linear(p["latent"], x), model)
    k, v = (linear(p[name], latent).reshape(T, kv, -1) for name in ("key", "value"))
    if model.positions == "rotary":
        shared = rotate(linear(p["rotary_key"], x)[:, None], model)
        q = np.concatenate([q[..., :d_head], rotate(q[..., d_head:], model)], axis=-1)
        k = np.concatenate([k, np.repeat(shared, kv, axis=1)], axis=-1)
    return q, k, v


def weights_of(q: np.ndarray, k: np.ndarray, head: int, model: ModelConfig) -> np.ndarray:
    """What a query [H] gives to keys [S H], before normalisation."""
    width, kernel = q.shape[-1], model.kernel
    if not model.has_kernel:
        return np.exp(k @ q / math.sqrt(width))
    if kernel.family == "linear":
        embed = lambda x: x / math.sqrt(width)  # noqa: E731
    else:
        bandwidth = kernel.bandwidth or (float(width) if kernel.family == "laplacian" else math.sqrt(width))
        size = {"bandwidth": bandwidth, "seed": kernel.seed}
        own = frequencies(kernel.family or "", model.n_kv_heads or 0, width, kernel.n_features // 2, **size)[head]
        embed = lambda x: np.concatenate([np.cos(x @ own.T), np.sin(x @ own.T)], -1) / math.sqrt(len(own))  # noqa: E731
    u, w = embed(q), embed(k)
    if kernel.form == "softmax":
        return np.exp((kernel.scale or math.sqrt(width)) * (w @ u))
    scale, drawn = (
        kernel.scale or 1.0,
        directions(model.n_kv_heads or 0, len(u), kernel.positive_features, seed=kernel.seed),
    )
    positive = [
        np.exp(math.sqrt(scale) * x @ drawn[head].T - scale * (x**2).sum(-1, keepdims=True) / 2) for x in (w, u)
    ]
    return positive[0] @ positive[1]


def attention_in_numpy(name: str, x: np.ndarray, visible: np.ndarray) -> np.ndarray:
    model = model_of(name)
    p = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), stack_of(name)["attention"])
    out = []
    for row, seen in zip(x, visible, strict=True):
        q, k, v = heads(p, row, model)
        mixed = np.zeros((T, model.n_heads, v.shape[-1]))
        for t, n in np.ndindex(T, model.n_heads):
            own = n // (model.n_heads // k.shape[1])
            given = weights_of(q[t, n], k[seen[t], own], own, model)
            mixed[t, n] = given @ v[seen[t], own] / given.sum()
        out.append(linear(p["output"], mixed.reshape(T, -1)))
    return np.array(out)


@functools.partial(jax.jit, static_argnames="name")
def attention_by_package(x: Any, mask: Any, name: str) -> Any:
    own = jax.tree.map(lambda leaf: leaf[0], stack_of(name))
    attend = lambda block, x: block.attention(x, Context(PLACES, mask), None)[0]  # noqa: E731
    return Block(model_of(name), jnp.float32).apply({"params": own}, x, method=attend)


@functools.cache
def visible_under(mask: str) -> np.ndarray:
    return np.broadcast_to(MASKS[mask].as_array(T), (B, 1, T, T))


CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # float32 against float64, of entries of order 1 to 10


@pytest.mark.parametrize("name", KINDS)
def test_attention_is_the_numpy_attention(name: str):
    """Under every mask that the kind can have; sums read the mask itself, the others are given its array."""
    x, sums = activations(), model_of(name).is_linear_time
    masks = ["packed", "prefix"] if sums else [*MASKS]
    expected = {mask: attention_in_numpy(name, np.asarray(x, np.float64), visible_under(mask)[:, 0]) for mask in masks}
    for mask, own in expected.items():
        ours = attention_by_package(x, MASKS[mask] if sums else visible_under(mask), name)
        np.testing.assert_allclose(ours, own, **CLOSE, err_msg=mask)
        others = [values for other, values in expected.items() if other != mask]  # the twins
        assert not any(np.allclose(ours, other, **CLOSE) for other in others)


def test_a_linear_kernel_inside_the_softmax_is_plain_attention():
    plain = dataclasses.replace(model_of("linear"), attention_kind="mha")
    context = Context(PLACES, Mask("causal", SEGMENTS))
    ours, other, twin = (
        apply_stack(stack_of("linear"), activations(), context, model, dtype=jnp.float32)
        for model in (model_of("linear"), plain, dataclasses.replace(plain, rope_theta=100.0))
    )
    np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-5)
    assert not np.allclose(twin, other, rtol=1e-2)


def test_linear_time_approaches_the_softmax_as_its_features_grow():
    """Both forms weigh by exp(scale * k); the linear one estimates it."""
    x, shape = activations(), {**SHAPE, "init_std": 0.05, "attention_kind": "kernel"}
    stack = init_stack(jax.random.key(0), resolve({"model": shape}).model, 0, 1)

    def out(**kernel: Any) -> np.ndarray:
        model = resolve({"model": {**shape, "kernel": {"scale": 0.5, **kernel}}}).model
        return np.asarray(apply_stack(stack, x, Context(PLACES, Mask("causal")), model, dtype=jnp.float32))

    exact = out(form="softmax")
    errors = [np.std(out(form="linear", positive_features=count) - exact) for count in (16, 1024)]
    assert errors[0] > 5 * errors[1]  # eight times as small, in expectation
    assert np.std(out(form="linear", positive_features=1024, scale=2.0) - exact) > 2 * errors[1]


# --- stored ---


@functools.partial(jax.jit, static_argnames=("name", "slots"))
def read(stored: Any, x: Any, places: Any, first: Any, name: str, slots: int = T) -> Any:
    """(outputs, store) of a stack of two blocks that reads more places of rows that are padded on the left."""
    positions = jnp.maximum(places - first[:, None], 0)
    context = Context(positions, decoding_mask(places, slots, first), write_at=places[0, 0])
    return decode_stack(stack_of(name, 2), x, context, stored, model_of(name), dtype=jnp.float32)


@pytest.mark.parametrize("name", ["mla", "mla, grouped, biases", "mlgka"])
def test_reading_in_parts_is_reading_at_once(name: str):
    """A long part, whose keys and values are made, and single places, by absorbed maps."""
    model, x, first = model_of(name), activations(), jnp.array([0, 3])
    segments = (first[:, None] <= PLACES).astype(jnp.int32)
    context = Context(jnp.maximum(PLACES - first[:, None], 0), Mask("causal", segments))
    whole = apply_stack(stack_of(name, 2), x, context, model, dtype=jnp.float32)
    stored, parts = init_store(model, 2, B, T, dtype=jnp.float32), []
    for part in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        out, stored = read(stored, x[:, part], PLACES[:, part], first, name)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, **CLOSE)
    empty = init_store(model, 2, B, T, dtype=jnp.float32)  # the twin: what came before is forgotten
    assert not np.allclose(read(empty, x[:, 11:], PLACES[:, 11:], first, name)[0], whole[:, 11:], rtol=1e-2)


def numbers_stored(name: str, kind: type, length: int = 100) -> int:
    """Of one place, block and row; all of them where it does not grow."""
    store = init_store(model_of(name), 1, 1, length, dtype=jnp.float32)
    assert isinstance(store, kind)
    return sum(leaf.size for leaf in jax.tree.leaves(store)) // (1 if kind is KernelSums else length)


def test_stores_are_as_narrow_as_the_kind_allows():
    assert numbers_stored("mla", Latents) == 40 + 4
    assert numbers_stored("mla, no positions", Latents) == 10
    assert numbers_stored("separate", KeyValues) == 2 * (8 + 8)
    assert numbers_stored("gaussian", KeyValues) == 2 * (16 + 8)
    for length in (100, 10**6):
        assert numbers_stored("linear, linear time", KernelSums, length) == 4 * 8 * (8 + 1)


@pytest.mark.parametrize("name", KINDS)
def test_adapters_reach_every_map(name: str):
    table = adapter_table(model_of(name), 2, "all")
    assert {key for part in table.values() for key in part} == set(linear_maps(model_of(name)))


def test_frozen_formats_and_adapters_multiply_as_what_they_stand_for():
    model, stack, x = model_of("mla"), stack_of("mla"), activations()
    context = Context(PLACES, Mask("causal"))
    run = jax.jit(lambda stack: apply_stack(stack, x, context, model, dtype=jnp.float32))
    frozen = to_storage(stack, "fp8")
    np.testing.assert_allclose(run(frozen), run(from_storage(frozen, jnp.float32)), rtol=1e-5, atol=1e-5)
    assert np.abs(run(frozen) - run(stack)).max() > 1e-2
    rng = np.random.default_rng(3)
    sizes = jax.eval_shape(lambda: init_adapter(jax.random.key(3), model, 0, 1, rank=2, targets="all"))
    adapter = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), sizes)
    merged = run(merge(stack, adapter, 4.0))
    np.testing.assert_allclose(run(attach(stack, adapter, 4.0)), merged, rtol=1e-4, atol=1e-4)
    assert np.abs(merged - run(stack)).max() > 1e-2


def test_absorbed_maps_are_those_of_a_frozen_stack_with_an_adapter():
    model, stack, x = model_of("mla"), to_storage(stack_of("mla", 1), "fp8"), activations()[:, :1]
    adapter = init_adapter(jax.random.key(3), model, 0, 1, rank=2, targets="key,value")
    adapter = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(jax.random.key(4), leaf.shape), adapter)
    plain = merge(from_storage(stack, jnp.float32), adapter, 4.0)
    context = Context(PLACES[:, :1], decoding_mask(PLACES[:, :1], 4))
    stored = init_store(model, 1, B, 4, dtype=jnp.float32)
    ours, expected, twin = (
        decode_stack(own, x, context, stored, model, dtype=jnp.float32)[0]
        for own in (attach(stack, adapter, 4.0), plain, stack)
    )
    np.testing.assert_allclose(ours, expected, **CLOSE)
    assert not np.allclose(twin, expected, rtol=1e-2)


def test_fp8_multiplies_every_map():
    model, stack, x = model_of("mla"), stack_of("mla"), activations()
    context = Context(PLACES, Mask("causal"))
    text = jax.make_jaxpr(lambda s: apply_stack(s, x, context, model, dtype=jnp.float32, in_fp8=True, unroll=1))(stack)
    n_matrices = sum(w.is_matrix for w in jax.tree.leaves(weights.block_table(model), is_leaf=weights.is_weight))
    assert str(text).count("fp8_matmul") == n_matrices == len(linear_maps(model))
