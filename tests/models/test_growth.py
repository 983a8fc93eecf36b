"""Growth: where old stacks lie, what new ones are made of, what keeps the function, and what becomes of moments."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.models.growth import OPERATORS, grow, grow_moments, grown_places, sources
from stackwise_jax.models.rack import apply_embedding, apply_head_norm, apply_rack, init_rack, row_context, time_vector
from stackwise_jax.models.stack import apply_stack
from stackwise_jax.schema import ModelConfig, OptimizerConfig, PrecisionConfig, RunConfig
from stackwise_jax.train.optimizer import init_part, make_transforms, update_part

B, T = 2, 6
SHAPE = {"vocab_size": 32, "d_model": 16, "n_heads": 2, "d_ff": 24, "init_std": 0.3}
PRE_FIELDS = {**SHAPE, "stability": {"residual_gain": 0.7}}
PRE = dataclasses.replace(resolve({"model": PRE_FIELDS, "data": {"seq_len": T}}).model, time_input=True)
BIASED_FIELDS = {**SHAPE, "use_bias": True, "norm": "layernorm", "ffn": "gelu"}
BIASED = resolve({"model": BIASED_FIELDS, "data": {"seq_len": T}}).model
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
NEW = [operator for operator in OPERATORS if operator != "random"]

# --- places ---


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(OPERATORS), st.integers(1, 7), st.integers(0, 9))
def test_every_place_has_a_source_and_every_old_stack_a_place(operator: str, n: int, more: int):
    m = n + more
    filled, places = sources(operator, n, m), grown_places(operator, n, m)
    assert len(filled) == m
    assert len(places) == n
    assert list(places) == sorted(set(places))
    assert [filled[place] for place in places] == list(range(n))
    uses = [filled.count(old) for old in range(n)]
    if operator == "random":
        assert (uses, filled.count(None)) == ([1] * n, more)
    else:
        assert set(uses) <= {m // n, math.ceil(m / n)}
        order = [i % n for i in range(m)] if operator == "copy" else sorted(old for old in filled if old is not None)
        assert list(filled) == order


def test_places_by_hand():
    assert sources("copy", 3, 6) == (0, 1, 2, 0, 1, 2)
    assert sources("interleave", 3, 6) == sources("zero_output", 3, 6) == (0, 0, 1, 1, 2, 2)
    assert (sources("interleave", 2, 5), grown_places("interleave", 2, 5)) == ((0, 0, 0, 1, 1), (0, 3))
    assert (sources("random", 0, 2), grown_places("random", 0, 2)) == ((None, None), ())
    assert sources("copy", 3, 6) != sources("interleave", 3, 6)


def test_what_cannot_grow_is_refused():
    with pytest.raises(UserError, match='Did you mean "interleave"'):
        sources("interleaf", 1, 2)
    for operator, n, m in (("copy", 3, 2), ("interleave", 0, 2), ("random", -1, 2)):
        with pytest.raises(ValueError, match=f"a rack of {n} stacks does not grow to {m}"):
            grown_places(operator, n, m)
    with pytest.raises(ValueError, match="draw them"):
        grow({}, "random", PRE)
    with pytest.raises(ValueError, match="draw them"):
        grow_moments({}, "random")
    post = dataclasses.replace(PRE, norm_position="post")
    with pytest.raises(UserError, match=r"zero_output' needs model\.norm_position='pre', not 'post'"):
        grow({}, "zero_output", post)
    assert grow({}, "copy", post) == {}


# --- functions ---


@functools.cache
def rack_of(model: ModelConfig) -> Any:
    """Two stacks of two blocks, no vector of which is zero or one."""
    rack = jax.jit(init_rack, static_argnums=(1, 2))(jax.random.key(0), model, (2, 2))
    leaves, structure = jax.tree.flatten(rack)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        structure, [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


def grown(model: ModelConfig, operator: str, m: int) -> list[Any]:
    old, places = rack_of(model)["stacks"], grown_places(operator, 2, m)
    filled = sources(operator, 2, m)
    return [old[j] if i in places else grow(old[j], operator, model) for i, j in enumerate(filled) if j is not None]


@functools.partial(jax.jit, static_argnums=2)
def through(stack: Any, x: jax.Array, model: ModelConfig) -> jax.Array:
    return apply_stack(stack, x, context_of(model), model, dtype=jnp.float32)


def context_of(model: ModelConfig) -> Any:
    time = time_vector(rack_of(model)["embedding"], jnp.array([0.2, 0.8])) if model.time_input else None
    return row_context(model, None, POSITIONS, time=time)


def in_turn(model: ModelConfig, stacks: list[Any]) -> np.ndarray:
    """Every stack by one and the same program, so that equal numbers come out as equal bits."""
    rack = rack_of(model)
    x = apply_embedding(rack["embedding"], TOKENS, POSITIONS, model, dtype=jnp.float32)
    for stack in stacks:
        x = through(stack, x, model)
    return np.asarray(apply_head_norm(rack["head"], x, model, context_of(model).time))


@pytest.mark.parametrize("m", [3, 5])
@pytest.mark.parametrize("model", [PRE, BIASED], ids=["gain and time", "biases"])
def test_zero_output_keeps_the_function_to_the_bit(model: ModelConfig, m: int):
    before = in_turn(model, rack_of(model)["stacks"])
    np.testing.assert_array_equal(in_turn(model, grown(model, "zero_output", m)), before)
    for operator in ("interleave", "copy"):  # the twins
        assert np.abs(in_turn(model, grown(model, operator, m)) - before).max() > 1e-2


@pytest.mark.parametrize("left", [("attention", "output"), ("mlp", "down")])
@pytest.mark.parametrize("part", ["kernel", "bias"])
def test_zero_output_detects_a_map_that_was_left(left: tuple[str, str], part: str):
    stacks = grown(BIASED, "zero_output", 3)
    source = rack_of(BIASED)["stacks"][0]
    stacks[1][left[0]][left[1]][part] = source[left[0]][left[1]][part]
    before = in_turn(BIASED, rack_of(BIASED)["stacks"])
    assert np.abs(in_turn(BIASED, stacks) - before).max() > 1e-3


def test_a_whole_grown_rack_keeps_its_function_and_only_its_outputs_take_gradient():
    rack = rack_of(BIASED)
    bigger = {**rack, "stacks": grown(BIASED, "zero_output", 4)}

    @jax.jit
    def loss(rack: Any) -> tuple[jax.Array, jax.Array]:
        hidden = apply_rack(rack, TOKENS, row_context(BIASED, None, POSITIONS), BIASED, dtype=jnp.float32)
        return jnp.mean(jnp.sin(hidden)), hidden

    gradient, hidden = jax.grad(loss, has_aux=True)(bigger)
    np.testing.assert_allclose(hidden, loss(rack)[1], rtol=1e-5, atol=1e-5)
    for place, stack in enumerate(gradient["stacks"]):
        is_old = place in grown_places("zero_output", 2, 4)
        outputs = (stack["attention"].pop("output"), stack["mlp"].pop("down"))
        assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(outputs))
        assert any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(stack)) == is_old


@pytest.mark.parametrize("operator", NEW)
def test_a_new_stack_shares_no_memory_with_its_source(operator: str):
    source = rack_of(PRE)["stacks"][0]
    new = grow(source, operator, PRE)
    assert jax.tree.structure(new) == jax.tree.structure(source)
    for one, other in zip(jax.tree.leaves(source), jax.tree.leaves(new), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
    inside = jax.jit(lambda stack: (stack, grow(stack, operator, PRE)))(source)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(inside)]
    assert len(set(pointers)) == len(pointers)


# --- moments ---


def run_of(name: str, precision: str = "fp32", beta2: float = 0.95) -> RunConfig:
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, beta2=beta2, weight_decay=0.0)
    return RunConfig(model=BIASED, optimizer=optimizer, precision=PrecisionConfig(optimizer=precision))


def trained_state(config: RunConfig, steps: int = 1) -> tuple[Any, Any, Any]:
    """(transformation, gradient, state of the first stack after so many updates by the same gradient)."""
    transforms, stack = make_transforms(config, scales_head=False), rack_of(BIASED)["stacks"][0]
    gradient = jax.tree.map(lambda leaf: 0.1 + jnp.abs(leaf), stack)
    state = init_part(transforms, "stacks", [stack])[0]
    update = lambda _, state: update_part(transforms["stacks"], gradient, state, stack, jnp.float32(1.0))[1]  # noqa: E731
    return transforms["stacks"], gradient, jax.jit(lambda state: jax.lax.fori_loop(0, steps, update, state))(state)


def is_of_zeroed(path: str) -> bool:
    return "/attention/output/" in path or "/mlp/down/" in path


@pytest.mark.parametrize(("name", "precision"), [("adamw", "fp32"), ("adamw", "int8"), ("muon", "bf16")])
@pytest.mark.parametrize("operator", NEW)
def test_moments_of_a_new_stack(name: str, precision: str, operator: str):
    _, _, state = trained_state(run_of(name, precision))
    new = grow_moments(state, operator)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    forgotten = 0
    for (path, old), leaf in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(new), strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (leaf.shape, leaf.dtype) == (old.shape, old.dtype)
        if operator == "zero_output" and is_of_zeroed(where) and "/mu/" in where:
            assert np.any(old)
            assert not np.any(leaf)
            forgotten += 1
        else:
            np.testing.assert_array_equal(leaf, old)
    # Kernel and bias of two maps; in 8 bits the scales of the two kernels besides.
    assert forgotten == {"zero_output": 6 if precision == "int8" else 4}.get(operator, 0)


def test_a_zeroed_weight_begins_with_a_small_update():
    transform, gradient, state = trained_state(run_of("adamw", beta2=0.999), steps=5000)
    stack = grow(rack_of(BIASED)["stacks"][0], "zero_output", BIASED)

    def first_update(state: Any) -> float:
        moved = update_part(transform, gradient, state, stack, jnp.float32(1.0))[0]
        return float(jnp.abs(moved["mlp"]["down"]["kernel"]).max())

    kept = grow_moments(state, "zero_output")
    without_squares = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.0 * leaf if ".nu[" in jax.tree_util.keystr(path) else leaf, kept
    )
    assert first_update(kept) < 1.5e-4  # a tenth of the learning rate: (1 - b1) of a gradient over its own size
    assert first_update(without_squares) > 3e-3  # the twin
