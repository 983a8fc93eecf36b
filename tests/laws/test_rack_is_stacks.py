"""A rack is its stacks in turn, however its blocks are grouped; grouping is a pure reshape and decides no value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.config import resolve
from stackwise_jax.models.rack import (
    apply_embedding,
    apply_head_norm,
    apply_rack,
    init_rack,
    init_rack_stack,
    row_context,
)
from stackwise_jax.models.stack import apply_stack, init_stack, regroup, stack_size
from stackwise_jax.types import Params

B, T, L = 2, 16, 4
MODEL = resolve(
    {
        "model": {"vocab_size": 64, "d_model": 32, "n_heads": 4, "d_ff": 48, "init_std": 0.2},
        "data": {"seq_len": T},
    }
).model
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 64)
CONTEXT = row_context(MODEL, jnp.ones((B, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def rack() -> Params:
    return init_rack(jax.random.key(0), MODEL, (1, 3))


def whole(rack: Params) -> np.ndarray:
    return np.asarray(jax.jit(lambda rack: apply_rack(rack, TOKENS, CONTEXT, MODEL, dtype=jnp.float32))(rack))


def in_turn(rack: Params, stacks: list[Params]) -> np.ndarray:
    """Embedding, then every stack in a program of its own, then the norm: the way of training."""
    forward = jax.jit(lambda stack, x: apply_stack(stack, x, CONTEXT, MODEL, dtype=jnp.float32))
    x = apply_embedding(rack["embedding"], TOKENS, CONTEXT.positions, MODEL, dtype=jnp.float32)
    for stack in stacks:
        x = forward(stack, x)
    return np.asarray(apply_head_norm(rack["head"], x, MODEL))


def test_rack_is_its_stacks_in_turn(rack: Params):
    np.testing.assert_allclose(whole(rack), in_turn(rack, rack["stacks"]), **CLOSE)


def test_rack_is_its_stacks_in_turn_detects_a_swap_and_a_skip(rack: Params):
    for stacks in (rack["stacks"][::-1], rack["stacks"][:1]):
        assert not np.allclose(whole(rack), in_turn(rack, stacks), **CLOSE)


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 1, 1)])
def test_regrouping_changes_no_output(rack: Params, sizes: tuple[int, ...]):
    grouped = {**rack, "stacks": regroup(rack["stacks"], sizes)}
    assert [stack_size(stack) for stack in grouped["stacks"]] == list(sizes)
    np.testing.assert_allclose(whole(grouped), whole(rack), **CLOSE)


def blocks(stacks: list[Params]) -> list[list[np.ndarray]]:
    """Every block's leaves, in rack order."""
    leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(stack)] for stack in stacks]
    return [[leaf[i] for leaf in of_stack] for of_stack in leaves for i in range(of_stack[0].shape[0])]


def same_blocks(one: list[Params], other: list[Params]) -> bool:
    pairs = zip(blocks(one), blocks(other), strict=True)
    return all(np.array_equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


@st.composite
def sizes_of_six(draw: st.DrawFn) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, 5))))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, 6], strict=True)]


@settings(max_examples=20, deadline=None)
@given(sizes_of_six(), sizes_of_six())
def test_regroup_is_a_pure_reshape(first: list[int], second: list[int]):
    values = np.arange(6 * 4, dtype=np.float32).reshape(6, 4)
    together = [{"kernel": jnp.array(values), "norm": {"scale": jnp.array(values[:, :2])}}]
    once = regroup(together, first)
    twice = regroup(once, second)
    assert [stack_size(stack) for stack in twice] == second
    assert same_blocks(once, together)
    assert same_blocks(twice, together)


def test_regroup_is_a_pure_reshape_detects_another_order():
    together = [{"kernel": jnp.arange(6.0)[:, None]}]
    assert not same_blocks(regroup(together, [2, 4])[::-1], together)


def test_regroup_refuses_sizes_that_do_not_add_up(rack: Params):
    with pytest.raises(ValueError, match="add up to 5"):
        regroup(rack["stacks"], [2, 3])


def test_initial_values_do_not_depend_on_the_grouping(rack: Params):
    for sizes in ((4,), (2, 2), (1, 1, 1, 1)):
        other = init_rack(jax.random.key(0), MODEL, sizes)
        assert same_blocks(other["stacks"], rack["stacks"])
        for part in ("embedding", "head"):
            assert all(map(np.array_equal, jax.tree.leaves(other[part]), jax.tree.leaves(rack[part])))


def test_initial_values_do_not_depend_on_the_grouping_detects_a_split_of_one_key(rack: Params):
    keys = jax.random.split(jax.random.key(0), 2)
    grouped: list[Any] = [init_stack(key, MODEL, 0, 2) for key in keys]
    assert not same_blocks(grouped, rack["stacks"])


def test_compiled_draws_do_not_depend_on_the_grouping_either(rack: Params):
    """As phases draw their stacks. Compiling may round an initial value differently, by one unit in the last place."""
    draw = jax.jit(init_rack_stack, static_argnums=(1, 3))
    together = draw(jax.random.key(0), MODEL, 1, 3)
    assert same_blocks([draw(jax.random.key(0), MODEL, block, 1) for block in (1, 2, 3)], [together])
    for ours, eager in zip(jax.tree.leaves(together), jax.tree.leaves(rack["stacks"][1]), strict=True):
        np.testing.assert_allclose(ours, eager, rtol=1e-6)
