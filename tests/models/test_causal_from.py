"""Racks whose first blocks look both ways and whose last look back: what they compute, cost and refuse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.checks.generation import samplers
from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.memory import budget
from stackwise_jax.memory.fingerprint import tree_digest
from stackwise_jax.models.rack import init_key_values, init_rack, reading_context, row_context
from stackwise_jax.models.stack import apply_stack, decode_stack, placed, regroup
from stackwise_jax.ops.mask import Mask
from stackwise_jax.schema import RunConfig
from stackwise_jax.types import Params

B, T, D = 2, 10, 16
PLACES = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
SEGMENTS = jnp.array([[1] * 6 + [2] * 4, [1] * 7 + [0] * 3])
X = jax.random.normal(jax.random.key(1), (B, T, D))


def config_of(causal_from: int | None = 2, objective: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
    own = {"vocab_size": 64, "d_model": D, "n_heads": 2, "d_ff": 24, "init_std": 0.3, "attention": "bidirectional"}
    own |= {"architecture": {"n_stacks": 3, "blocks_per_stack": 1}, "causal_from": causal_from}
    return resolve({"model": own | fields, "data": {"seq_len": T}, "objective": objective or {"name": "diffusion"}})


CONFIG = config_of()
STACKS = init_rack(jax.random.key(0), CONFIG.model, (1, 1, 1))["stacks"]


def without_fact(stack: Params) -> Params:
    return {name: leaf for name, leaf in stack.items() if name != "is_causal"}


def in_turn(stacks: list[Params], kinds: list[str], model: Any) -> jax.Array:
    x = X
    for stack, kind in zip(stacks, kinds, strict=True):
        context = row_context(model, SEGMENTS, PLACES, kind=kind)
        x = jax.jit(lambda stack, x, c=context: apply_stack(stack, x, c, model, dtype=jnp.float32))(stack, x)
    return x


def test_they_are_blocks_of_either_kind_in_turn_however_they_are_cut():
    """Twins: a rack that looks both ways throughout, and one in which another block looks back."""
    plain = dataclasses.replace(CONFIG.model, causal_from=None)
    bare = [without_fact(stack) for stack in STACKS]
    expected = in_turn(bare, ["bidirectional", "bidirectional", "causal"], plain)
    both = ["bidirectional"]
    for sizes in ((1, 1, 1), (3,), (1, 2)):
        found = in_turn(regroup(STACKS, sizes), both * len(sizes), CONFIG.model)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    everywhere = in_turn(bare, both * 3, plain)
    moved = in_turn(
        [placed(stack, CONFIG.model, place) for stack, place in zip(STACKS, (2, 0, 1), strict=True)],
        both * 3,
        CONFIG.model,
    )
    assert min(float(jnp.abs(other - expected).max()) for other in (everywhere, moved)) > 1e-2


@pytest.mark.parametrize("ahead", [0, 2, T])
def test_a_mask_ends_so_far_ahead(ahead: int):
    found = np.asarray(Mask("bidirectional", SEGMENTS, ahead=ahead).as_array(T))
    for row, query, key in np.ndindex(B, T, T):
        assert found[row, 0, query, key] == (SEGMENTS[row, query] == SEGMENTS[row, key] and key - query <= ahead)
    assert Mask("bidirectional", ahead=ahead).has_data


def test_a_stacks_digest_tells_which_it_is():
    elsewhere = placed(STACKS[2], CONFIG.model, 0)
    assert tree_digest(without_fact(elsewhere)) == tree_digest(without_fact(STACKS[2]))
    assert tree_digest(elsewhere) != tree_digest(STACKS[2])


def test_flops_are_those_of_its_blocks():
    mixed, both, back = (
        budget.block_forward_flops(config_of(at).model, 64, kind)
        for at, kind in ((2, None), (None, None), (None, "causal"))
    )
    assert 3 * mixed == pytest.approx(2 * both + back)
    assert back < mixed < both


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the answer in sight": ({"objective": {"name": "clm"}, "attention": "causal"}, "model.causal_from=2 is of racks"),
    "a prefix": ({"objective": {"name": "prefix"}}, "model.causal_from=2 is of racks"),
    "no such block": ({"causal_from": 3}, "must be below the 3 blocks"),
    "sums": ({"attention_kind": "kernel", "kernel": {"form": "linear"}}, "model.kernel.form='linear'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(case: str):
    fields, words = REFUSED[case]
    with pytest.raises(UserError, match=words) as caught:
        config_of(**fields)
    assert "\n" not in str(caught.value)


def test_it_is_read_whole():
    """No sampler that stores places is offered, and the store itself is refused."""
    assert samplers(CONFIG) == ("denoise",)
    assert samplers(config_of(None)) == ("denoise", "blocks")
    rack = {"stacks": STACKS}
    stored = init_key_values(rack, CONFIG.model, B, T, dtype=jnp.float32)
    context = reading_context(stored, PLACES, jnp.zeros(B, int))
    with pytest.raises(ValueError, match="read whole"):
        decode_stack(STACKS[0], X, context, stored[0], CONFIG.model, dtype=jnp.float32)
