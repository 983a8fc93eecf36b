"""Maps of the feed-forward that stay as they were drawn: no gradient, no moments, no update."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.memory import budget
from stackwise_jax.memory.fingerprint import named_leaves
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import apply_stack, init_stack
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.optimizer import init_part, make_transforms, update_part
from stackwise_jax.train.plan import make_plan, phase_device_bytes
from stackwise_jax.types import Params

D, F, T = 16, 24, 8
X = jax.random.normal(jax.random.key(1), (2, T, D))
DENSE: dict[str, Any] = {}
EXPERTS = {"experts": {"count": 4, "shared": 1}}


def config_of(fixed: str, model: dict[str, Any] = DENSE, **sections: Any) -> RunConfig:
    own = {"vocab_size": 64, "d_model": D, "n_heads": 2, "d_ff": F, "fixed_maps": fixed, **model}
    return resolve({"model": own, "data": {"seq_len": T}, **sections})


def stack_of(config: RunConfig, seed: int = 0) -> Params:
    return init_stack(jax.random.key(seed), config.model, 0, 2)


def fixed_names(config: RunConfig) -> set[str]:
    """As they ought to be."""
    names = {"none": (), "up": ("/up/kernel",), "up_and_gate": ("/up/kernel", "/gate/kernel")}[config.model.fixed_maps]
    return {name for name in named_leaves(stack_of(config)) if name.endswith(names)} if names else set()


@pytest.mark.parametrize(("fixed", "model"), [("up", EXPERTS), ("up_and_gate", DENSE), ("none", DENSE)])
def test_no_gradient_reaches_them_and_all_else_has_one(fixed: str, model: dict[str, Any]):
    config = config_of(fixed, model)
    context = row_context(config.model, None, jnp.broadcast_to(jnp.arange(T)[None], (2, T)))

    def loss(stack: Params) -> jax.Array:
        return jnp.sum(jnp.sin(3.0 * apply_stack(stack, X, context, config.model, dtype=jnp.float32)))

    grads = named_leaves(jax.jit(jax.grad(loss))(stack_of(config)))
    assert {name for name, grad in grads.items() if not bool(jnp.any(grad != 0))} == fixed_names(config)


@pytest.mark.parametrize(("optimizer", "stability"), [("adamw", {}), ("muon", {}), ("adamw", {"spectral_norm": 0.01})])
@pytest.mark.parametrize("precision", [{}, {"weights": "bf16", "optimizer": "int8"}])
def test_updates_leave_them_and_keep_nothing_for_them(
    optimizer: str, stability: dict[str, Any], precision: dict[str, str]
):
    """Whatever gradient, decay or limit there is. The twin is everything else, which moves."""
    config = config_of("up_and_gate", {"stability": stability}, optimizer={"name": optimizer}, precision=precision)
    transform = make_transforms(config, scales_head=False)["stacks"]
    params, grads = stack_of(config), stack_of(config, 1)
    state = init_part({"stack": transform}, "stack", params)
    moved, state = jax.jit(lambda *args: update_part(transform, *args, jnp.float32(1.0)))(grads, state, params)
    before, after = named_leaves(params), named_leaves(moved)
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == fixed_names(config) != set()
    assert not [name for name in named_leaves(state) if name.endswith(("up/kernel", "gate/kernel"))]
    assert [name for name in named_leaves(state) if name.endswith("down/kernel")]


def test_they_are_drawn_from_the_key_at_unit_gain_and_change_no_other_weight():
    config, plain = config_of("up", {"d_model": 64, "d_ff": 256}), config_of("none", {"d_model": 64, "d_ff": 256})
    drawn, other = named_leaves(stack_of(config)), named_leaves(stack_of(plain))
    up = drawn["mlp/up/kernel"]
    assert float(jnp.std(up)) == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert {name for name in drawn if not np.array_equal(drawn[name], other[name])} == {"mlp/up/kernel"}
    assert not np.array_equal(up, named_leaves(stack_of(config, 1))["mlp/up/kernel"])
    assert not np.array_equal(up[0], up[1])


def test_costs_by_hand():
    """A live block is spared one of the three products of a fixed matrix, and its two moments."""
    found = {}
    for fixed in ("none", "up", "up_and_gate"):
        for model in (DENSE, EXPERTS):
            plan = make_plan(config_of(fixed, model, training={"embedding_phase": "with_first_stack"}), 64)
            flops = budget.step_flops_per_token(
                plan.config.model, T, live_blocks=2, passed_blocks=1, trunk_blocks=1, table_is_live=True
            )
            device = phase_device_bytes(plan, len(plan.phases) - 1)
            found[fixed, len(model)] = np.array([flops, device.optimizer, device.weights])
    for fixed, n_maps in (("up", 1), ("up_and_gate", 2)):
        for kind, (met, all_maps) in enumerate(((1, 1), (3, 5))):  # two active and one shared, of four and one
            spared = found["none", kind] - found[fixed, kind]
            assert list(spared) == [2 * 2 * n_maps * met * D * F, 8 * n_maps * all_maps * D * F, 0]


def test_a_map_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"model.fixed_maps='up_and_gate'.*no gate"):
        config_of("up_and_gate", {"ffn": "gelu"})
    assert config_of("up", {"ffn": "gelu"}).model.fixed_maps == "up"
