"""Whole racks of three families against a float64 implementation in numpy that shares no code with the package."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models.rack import (
    apply_rack,
    decode_rack,
    init_key_values,
    init_rack,
    output_table,
    row_context,
    time_vector,
)
from stackwise_jax.models.stack import apply_stack
from stackwise_jax.schema import ModelConfig, StabilityConfig

B, T, V, D = 2, 16, 64, 32
SHAPE = {"vocab_size": V, "d_model": D, "n_heads": 4, "d_ff": 48, "init_std": 0.3}
BLOCKS = {"architecture": {"n_stacks": 1, "blocks_per_stack": 2}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2},
    "gpt2": {"norm": "layernorm", "ffn": "gelu", "positions": "learned", "use_bias": True, "ties_embedding": True},
    "bert": {
        "norm": "layernorm",
        "norm_position": "post",
        "norm_epsilon": 1e-12,
        "ffn": "gelu",
        "positions": "learned",
        "use_bias": True,
        "ties_embedding": True,
        "embedding_norm": True,
        "attention": "bidirectional",
    },
}


def model_of(family: str, *, time_input: bool = False, **fields: Any) -> ModelConfig:
    objective = {"name": "mlm" if family == "bert" else "clm"}
    entries = {"model": {**SHAPE, **BLOCKS, **FAMILIES[family], **fields}, "data": {"seq_len": T}}
    model = resolve({**entries, "objective": objective}).model
    return dataclasses.replace(model, time_input=time_input)  # which a config has from its objective


def rack_of(model: ModelConfig) -> Any:
    """A rack whose biases and norms are random too, so that leaving one out shows."""
    rack = init_rack(jax.random.key(0), model, (2,))
    leaves, structure = jax.tree.flatten(rack)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def row(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and positions: two documents and padding; one document."""
    tokens = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
    segments = np.array([[1] * 7 + [2] * 6 + [0] * 3, [1] * T], np.int32)
    positions = np.array([[*range(7), *range(6), *range(3)], [*range(T)]], np.int32)
    return tokens, segments, positions


RATES = np.array([0.15, 0.9], np.float32)


# --- the other implementation ---


def norm(p: Any, x: np.ndarray, model: ModelConfig, change: Any = (0.0, 0.0)) -> np.ndarray:
    if model.norm == "rmsnorm":
        y = p["scale"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon)
    else:
        centred = x - x.mean(-1, keepdims=True)
        y = p["scale"] * centred / np.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon) + p["bias"]
    return y * (1.0 + change[0]) + change[1]


def linear(p: Any, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0.0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def changes(p: Any, rack: Any, rate: float, model: ModelConfig) -> Any:
    """(scale, shift) of each norm of a block, or of the head, at a masked fraction."""
    if not model.time_input:
        return [(0.0, 0.0)] * 2
    # Angles of hundreds are rounded as in float32, or the waves would differ in the fifth digit.
    angles = np.float32(1000) * np.float32(rate) * (10000 ** (-np.arange(64) / 64)).astype(np.float32)
    waves = np.exp(1j * angles.astype(np.float64))
    time = silu(linear(rack["embedding"]["time"]["first"], np.concatenate([waves.real, waves.imag])))
    mapped = linear(p["adaptive"], silu(linear(rack["embedding"]["time"]["second"], time)))
    return mapped.reshape(-1, 2, D)


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """One head: pair i with i + H/2, as complex numbers."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) * 2.0 / len(x))
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def attend(p: Any, x: np.ndarray, segments: np.ndarray, positions: np.ndarray, model: ModelConfig) -> np.ndarray:
    """One row [T D], head by head and query by query."""
    n, k = model.n_heads, model.n_kv_heads or model.n_heads
    heads = {name: linear(p[name], x).reshape(T, count, -1) for name, count in (("query", n), ("key", k), ("value", k))}
    if model.positions == "rotary":
        for name in ("query", "key"):
            turned = [[rotate(h, int(positions[t]), model.rope_theta) for h in heads[name][t]] for t in range(T)]
            heads[name] = np.array(turned)
    mixed = np.zeros_like(heads["query"])
    for t in range(T):
        seen = [s for s in range(T) if segments[s] == segments[t] and (s <= t or model.attention == "bidirectional")]
        for head in range(n):
            own = head // (n // k)
            logits = heads["key"][seen, own] @ heads["query"][t, head] / math.sqrt(mixed.shape[-1])
            probabilities = np.exp(logits - logits.max())
            mixed[t, head] = probabilities / probabilities.sum() @ heads["value"][seen, own]
    return linear(p["output"], mixed.reshape(T, -1))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def feed_forward(p: Any, x: np.ndarray, model: ModelConfig, gelu: Any) -> np.ndarray:
    if model.ffn == "gelu":
        return linear(p["down"], gelu(linear(p["up"], x)))
    gate = linear(p["gate"], x)
    act = gate / (1 + np.exp(-gate)) if model.ffn == "swiglu" else gelu(gate)
    return linear(p["down"], act * linear(p["up"], x))


def hidden_by_numpy(
    rack: Any, rows: Any, model: ModelConfig, gelu: Any = gelu_tanh, rates: np.ndarray = RATES
) -> np.ndarray:
    rack = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), rack)
    outputs = []
    for tokens, segments, positions, rate in zip(*rows, rates, strict=True):
        x = rack["embedding"]["tokens"][tokens]
        if model.positions == "learned":
            x = x + rack["embedding"]["positions"][positions]
        if model.embedding_norm:
            x = norm(rack["embedding"]["norm"], x, model)
        for index in range(2):
            p = jax.tree.map(lambda leaf, i=index: leaf[i], rack["stacks"][0])
            g = 1.0 if model.stability.residual_gain is None else p["residual_gain"]
            first, second = changes(p, rack, rate, model)
            if model.norm_position == "pre":
                seen = norm(p["attention_norm"], x, model, first)
                x = x + g * attend(p["attention"], seen, segments, positions, model)
                x = x + g * feed_forward(p["mlp"], norm(p["mlp_norm"], x, model, second), model, gelu)
            else:
                mixed = attend(p["attention"], x, segments, positions, model)
                x = norm(p["attention_norm"], x + g * mixed, model, first)
                x = norm(p["mlp_norm"], x + g * feed_forward(p["mlp"], x, model, gelu), model, second)
        if model.norm_position == "pre":
            x = norm(rack["head"]["norm"], x, model, changes(rack["head"], rack, rate, model)[0])
        outputs.append(x)
    return np.array(outputs)


def hidden_by_package(rack: Any, rows: Any, model: ModelConfig) -> np.ndarray:
    tokens, segments, positions = map(jnp.array, rows)

    @jax.jit
    def run(rack: Any) -> Any:
        time = time_vector(rack["embedding"], jnp.array(RATES)) if model.time_input else None
        context = row_context(model, segments, positions, time=time)
        return apply_rack(rack, tokens, context, model, dtype=jnp.float32)

    return np.asarray(run(rack))


CASES = {
    "llama": model_of("llama"),
    "gpt2": model_of("gpt2"),
    "bert": model_of("bert"),
    "wide heads, geglu, no positions": model_of("llama", d_head=12, ffn="geglu", positions="none", norm="layernorm"),
    "llama, residual gain": model_of("llama", stability={"residual_gain": 0.5}),
    "bert, residual gain": model_of("bert", stability={"residual_gain": 0.5}),
    "llama, time input": model_of("llama", time_input=True),
    "bert, time input": model_of("bert", time_input=True),
}
# Float32 against float64 over two blocks of weights with standard deviation 0.3.
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}


@pytest.mark.parametrize("name", CASES)
def test_rack_is_the_numpy_rack(name: str):
    model, rows = CASES[name], row()
    rack = rack_of(model)
    np.testing.assert_allclose(hidden_by_package(rack, rows, model), hidden_by_numpy(rack, rows, model), **CLOSE)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rope_theta": 1000.0}),
        ("llama", {"norm_epsilon": 1e-2}),
        ("gpt2", {"attention": "bidirectional"}),
        ("bert", {"embedding_norm": False}),
        ("bert", {"attention": "causal"}),
        ("llama, residual gain", {"stability": StabilityConfig()}),
    ],
)
def test_rack_is_the_numpy_rack_detects(name: str, fields: dict[str, Any]):
    model, rows = CASES[name], row()
    rack = rack_of(model)
    other = hidden_by_numpy(rack, rows, dataclasses.replace(model, **fields))
    assert not np.allclose(hidden_by_package(rack, rows, model), other, **CLOSE)


@pytest.mark.parametrize("name", ["llama, time input", "bert, time input"])
def test_rack_is_the_numpy_rack_detects_another_time(name: str):
    model, rows = CASES[name], row()
    rack = rack_of(model)
    ours = hidden_by_package(rack, rows, model)
    assert not np.allclose(ours, hidden_by_numpy(rack, rows, model, rates=RATES + 0.01), **CLOSE)


def test_gelu_is_the_tanh_form():
    """GPT-2 publishes the tanh form; the comparison is fine enough to tell it from erf."""
    model, rows = CASES["gpt2"], row()
    rack = rack_of(model)
    ours = hidden_by_package(rack, rows, model)
    assert not np.allclose(ours, hidden_by_numpy(rack, rows, model, gelu_erf), **CLOSE)


def test_output_table_is_tied_or_its_own():
    for name, tied in (("llama", False), ("gpt2", True)):
        rack = rack_of(CASES[name])
        own = output_table(rack["head"], rack["embedding"])
        assert (own is rack["embedding"]["tokens"]) is tied
        assert own.shape == (V, D)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoding_a_prompt_and_then_tokens_is_reading_the_row(name: str):
    model = CASES[name]
    rack = rack_of(model)
    tokens = jnp.array(row()[0])
    positions = jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0)
    hidden = hidden_by_package(rack, (tokens, np.ones((B, T), np.int32), positions), model)
    expected = hidden @ np.asarray(output_table(rack["head"], rack["embedding"])).T

    @jax.jit
    def decode(tokens: Any, first: Any, stored: Any) -> Any:
        places = jnp.broadcast_to((first + jnp.arange(tokens.shape[1]))[None], tokens.shape)
        visible = jnp.arange(T)[None, None, None, :] <= places[:, None, :, None]
        context = dataclasses.replace(row_context(model, places, places), mask=visible, write_at=first)
        return decode_rack(rack, tokens, context, stored, model, dtype=jnp.float32)

    stored, first = init_key_values(rack, model, B, T, dtype=jnp.float32), 0
    for length in (5, *[1] * (T - 5)):  # a prompt, then one token at a time
        logits, stored = decode(tokens[:, first : first + length], jnp.int32(first), stored)
        first += length
        np.testing.assert_allclose(logits, expected[:, first - 1], rtol=1e-3, atol=1e-4)


def test_bfloat16_stays_bfloat16_between_blocks(tolerance: dict[str, dict[str, float]]):
    model = CASES["llama"]
    rack, rows = rack_of(model), tuple(map(jnp.array, row()))
    context = row_context(model, rows[1], rows[2])
    x = jax.random.normal(jax.random.key(3), (B, T, D))
    narrow = apply_stack(rack["stacks"][0], x, context, model, dtype=jnp.bfloat16)
    wide = apply_stack(rack["stacks"][0], x, context, model, dtype=jnp.float32)
    assert (narrow.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    error = np.abs(np.asarray(narrow, np.float32) - np.asarray(wide)).max() / np.abs(wide).max()
    assert 0.0 < error < 2 * tolerance["bfloat16"]["rtol"]
