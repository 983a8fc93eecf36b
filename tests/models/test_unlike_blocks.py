"""Blocks of one stack that differ by their place: some attend inside a window, the first may have no attention norm."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models import weights
from stackwise_jax.models.block import Context
from stackwise_jax.models.growth import grow
from stackwise_jax.models.rack import (
    apply_rack,
    count_parameters,
    decode_rack,
    init_key_values,
    init_rack,
    output_table,
    row_context,
    time_vector,
)
from stackwise_jax.models.stack import regroup
from stackwise_jax.ops.mask import decoding_mask
from stackwise_jax.schema import ModelConfig
from stackwise_jax.train import loop
from stackwise_jax.train.state import PartSource
from stackwise_jax.train.trained import load_trained

B, T = 2, 12
UNLIKE: dict[str, Any] = {
    "window": 2,
    "global_every": 3,
    "rope_theta_local": 100.0,
    "first_attention_norm": False,
    "embedding_norm": True,
}
SHAPE = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "d_ff": 48, "init_std": 0.3}
ENTRIES = {"model": {**SHAPE, **UNLIKE, "architecture": {"n_stacks": 5}}, "data": {"seq_len": T}}
MODEL = resolve(ENTRIES).model
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 64)
PLACES = jnp.broadcast_to(jnp.arange(T)[None], (B, T))


@jax.jit
def read(rack: Any) -> Any:
    return apply_rack(rack, TOKENS, row_context(MODEL, None, PLACES), MODEL, dtype=jnp.float32)


def test_a_block_keeps_what_it_is_when_stacks_are_cut_otherwise():
    whole, cut = init_rack(jax.random.key(0), MODEL, (5,)), init_rack(jax.random.key(0), MODEL, (2, 3))
    np.testing.assert_array_equal(whole["stacks"][0]["is_local"], [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(whole["stacks"][0]["is_first"], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(read(whole), read(cut), rtol=1e-5, atol=1e-5)
    again = {**whole, "stacks": regroup(cut["stacks"], (1, 4))}
    np.testing.assert_allclose(read(whole), read(again), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fact", ["is_local", "is_first"])
def test_facts_decide_what_a_block_does(fact: str):
    rack = init_rack(jax.random.key(0), MODEL, (5,))
    stack = {**rack["stacks"][0], "attention_norm": {"scale": jnp.full((5, 32), 1.5)}}
    rack, other = ({**rack, "stacks": [own]} for own in (stack, {**stack, fact: jnp.zeros(5)}))
    assert float(jnp.abs(read(rack) - read(other)).max()) > 1e-3


@pytest.mark.parametrize("kind", ["is_local", "is_first"])
def test_facts_take_no_gradient(kind: str):
    rack = init_rack(jax.random.key(0), MODEL, (5,))
    gradient = jax.grad(lambda rack: jnp.sum(read(rack) ** 2))(rack)["stacks"][0]
    np.testing.assert_array_equal(gradient[kind], 0.0)
    norms = np.abs(gradient["attention_norm"]["scale"]).max(axis=1)
    np.testing.assert_array_equal(norms > 0, [False, True, True, True, True])  # the first block's is never read


def test_facts_are_no_parameters():
    plain = dataclasses.replace(MODEL, window=None, global_every=None, first_attention_norm=True)
    assert weights.count(weights.block_table(MODEL)) == weights.count(weights.block_table(plain))
    assert not weights.block_facts(plain, 0)


def decode(rack: Any, model: ModelConfig) -> np.ndarray:
    """float32 logits of the last place, read in three parts."""
    stored, logits = init_key_values(rack, model, B, T, dtype=jnp.float32), None
    for start, end in ((0, 7), (7, 8), (8, T)):
        places = PLACES[:, start:end]
        context = Context(places, decoding_mask(places, T), write_at=start)
        logits, stored = decode_rack(rack, TOKENS[:, start:end], context, stored, model, dtype=jnp.float32)
    return np.asarray(logits)


@pytest.mark.parametrize("every", [3, None])
def test_windows_hold_for_stored_keys(every: int | None):
    model = MODEL if every else dataclasses.replace(MODEL, global_every=None, rope_theta_local=None)
    rack = init_rack(jax.random.key(0), model, (5,))
    hidden = apply_rack(rack, TOKENS, row_context(model, None, PLACES), model, dtype=jnp.float32)
    expected = hidden[:, -1] @ output_table(rack["head"], rack["embedding"]).T
    np.testing.assert_allclose(decode(rack, model), expected, rtol=1e-4, atol=1e-4)
    other = decode(rack, dataclasses.replace(model, window=3))
    assert float(np.abs(other - expected).max()) > 1e-3


def test_unlike_blocks_train_and_stay_what_they_are(tiny: Any, tiny_corpus: Any, tmp_path: Path):
    """Through cache, bfloat16 trunk and optimiser, one executable for all depths; with a head that has everything."""
    config = tiny(training__mode="layerwise", precision__trunk="bf16")
    model = dataclasses.replace(config.model, **{**UNLIKE, "global_every": 2}, head_transform=True, logit_bias=True)
    config = dataclasses.replace(config, model=dataclasses.replace(model, token_types=2))
    result = loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    rack = load_trained(tmp_path / "run", merged=False).rack
    assert [float(fact) for stack in rack["stacks"] for fact in stack["is_local"]] == [0.0, 1.0, 0.0]
    assert [float(fact) for stack in rack["stacks"] for fact in stack["is_first"]] == [1.0, 0.0, 0.0]
    assert float(jnp.abs(rack["head"]["logit_bias"]).max()) > 0.0
    assert result.plan.compilations == 2


def facts_of(stack: Any) -> dict[str, list[float]]:
    return {name: np.asarray(stack[name]).tolist() for name in ("is_local", "is_first")}


@pytest.mark.parametrize("operator", ["copy", "zero_output"])
def test_a_grown_stack_is_what_its_own_place_says(operator: str):
    """The third stack of a growing rack, made of the first; moments of facts stay zero."""
    entries = {**ENTRIES, "model": {**ENTRIES["model"], "architecture": {"n_stacks": 3, "blocks_per_stack": 2}}}
    source = PartSource(resolve(entries), jax.random.key(0))
    old = source.fresh(0, True)
    stack, moments = source._grown(old, operator, 2)
    assert facts_of(old[0]) == {"is_local": [0.0, 1.0], "is_first": [1.0, 0.0]}
    assert facts_of(stack) == {"is_local": [1.0, 1.0], "is_first": [0.0, 0.0]}
    assert facts_of(source.fresh(2, True)[0]) == facts_of(stack)
    assert facts_of(grow(old[0], operator, MODEL)) == facts_of(old[0])  # the twin: places must be told
    same = jax.tree.map(lambda a, b: bool((a == b).all()), old[0], stack)
    assert (same["attention"]["query"]["kernel"], same["attention"]["output"]["kernel"]) == (True, operator == "copy")
    assert jax.tree.structure(moments) == jax.tree.structure(old[1])


def test_the_first_block_without_a_norm_is_not_told_the_time_before_attention():
    model = dataclasses.replace(MODEL, time_input=True)
    rack = init_rack(jax.random.key(0), model, (5,))
    rack["stacks"][0]["adaptive"]["kernel"] += 0.1  # zeros, through which no gradient reaches the time

    @jax.jit
    @jax.grad
    def gradient(rack: Any) -> Any:
        time = time_vector(rack["embedding"], jnp.array([0.2, 0.8]))
        hidden = apply_rack(rack, TOKENS, row_context(model, None, PLACES, time=time), model, dtype=jnp.float32)
        return jnp.sum(hidden * jnp.cos(jnp.arange(32.0))[None, None])

    kernel = np.abs(gradient(rack)["stacks"][0]["adaptive"]["kernel"]).max(axis=1)  # of attention's norm, of the other
    assert (kernel.reshape(5, 2, -1).max(axis=-1) > 0).tolist() == [[False, True], *[[True, True]] * 4]
    unread = weights.count(weights.block_table(model)["adaptive"]) // 2 + MODEL.d_model
    whole = dataclasses.replace(model, first_attention_norm=True)
    assert count_parameters(model) == count_parameters(whole) - unread
