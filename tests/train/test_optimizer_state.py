"""Moments and weights in 16 and 8 bits: as small as they say, as good as float32 within a band, the same bits again."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stackwise_jax.memory import budget
from stackwise_jax.memory.liveness import peak_memory
from stackwise_jax.memory.precision import as_master, to_storage
from stackwise_jax.ops import rounding
from stackwise_jax.ops.target import HOPPER, NO_GPU, Target, planned_for
from stackwise_jax.schema import OptimizerConfig, PrecisionConfig, RunConfig
from stackwise_jax.train import optimizer_state
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.optimizer import init_part, make_transforms, update_part, update_parts
from stackwise_jax.train.optimizer_state import KeptState, rounded_like, widened
from stackwise_jax.train.state import PartSource

ONE = jnp.float32(1.0)
ADAMW = OptimizerConfig(learning_rate=0.02, weight_decay=0.0, beta2=0.95)
MUON = dataclasses.replace(ADAMW, name="muon", muon_learning_rate=0.2)


def config_of(own: OptimizerConfig = ADAMW, *, seed: int = 0, **precision: str) -> RunConfig:
    return RunConfig(optimizer=own, precision=PrecisionConfig(**precision), seed=seed)


def stack_transform(config: RunConfig) -> optax.GradientTransformation:
    return make_transforms(config, scales_head=False)["stacks"]


# Bytes.

SHAPES = {
    "kernel": jax.ShapeDtypeStruct((2, 512, 1024), jnp.float32),
    "scale": jax.ShapeDtypeStruct((2, 512), jnp.float32),
}
N = 2 * 512 * 1024


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("own", "optimizer", "per_parameter"),
    [
        (ADAMW, "fp32", 8.0),
        (ADAMW, "bf16", 4.0),
        (ADAMW, "int8", 2 * (1 + 4 / 256)),
        (MUON, "fp32", 4.0),
        (MUON, "bf16", 2.0),
        (MUON, "int8", 1 + 4 / 256),
    ],
)
def test_state_is_as_small_as_it_says(own: OptimizerConfig, optimizer: str, per_parameter: float):
    config = config_of(own, optimizer=optimizer)
    state = jax.eval_shape(stack_transform(config).init, SHAPES)
    vectors = 8 * 2 * 512 + 64  # moments of vectors are float32; a key and some counts
    assert per_parameter * N <= bytes_of(state) <= per_parameter * N + vectors
    assert budget.optimizer_bytes(config, live=N, live_in_stacks=N) == per_parameter * N  # what the plan says
    moved = jax.eval_shape(functools.partial(update_part, stack_transform(config)), SHAPES, state, SHAPES, ONE)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), moved[1]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )


def test_weights_in_bf16_are_half_and_stay_so():
    params = jax.eval_shape(lambda: as_master(jax.tree.map(lambda s: jnp.zeros(s.shape), SHAPES), "bf16"))
    assert (params["kernel"].dtype, params["scale"].dtype) == (jnp.bfloat16, jnp.float32)
    config = config_of(weights="bf16")
    assert bytes_of(params) - 4 * 2 * 512 == 2 * N
    assert budget.weight_and_gradient_bytes(config, live=N, live_in_stacks=N) == (2 * N, 2 * N)
    transform = stack_transform(config)
    state = jax.eval_shape(transform.init, params)
    moved, _ = jax.eval_shape(functools.partial(update_part, transform), params, state, params, ONE)
    assert jax.tree.map(lambda leaf: leaf.dtype, moved) == jax.tree.map(lambda leaf: leaf.dtype, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim == 3} == {jnp.dtype(jnp.float32)}  # moments


@pytest.mark.parametrize("trunk", ["fp32", "bf16", "fp16", "nf4"])
def test_a_stack_trained_in_bf16_freezes_into_what_any_does(trunk: str):
    stack = {"kernel": jax.random.normal(jax.random.key(0), (2, 64, 8)), "scale": jnp.ones((2, 8))}
    frozen = [to_storage(as_master(stack, weights), trunk) for weights in ("fp32", "bf16")]
    assert jax.tree.structure(frozen[0]) == jax.tree.structure(frozen[1])
    for one, other in zip(*map(jax.tree.leaves, frozen), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_float32_is_the_plain_transformation():
    """So nothing of a run without these options changes, names in its snapshots included."""
    plain = jax.eval_shape(stack_transform(config_of()).init, SHAPES)
    assert not isinstance(plain, KeptState)
    for name, transform in make_transforms(config_of(weights="bf16"), scales_head=False).items():
        state = jax.eval_shape(transform.init, SHAPES)
        assert isinstance(state, KeptState) == (name == "stacks")


# Error bands: least squares whose outputs differ in scale by a thousand, so mean squares in a block do by a million.

DRAW = np.random.default_rng(0)
INPUTS = jnp.asarray(DRAW.normal(size=(256, 32)), jnp.float32)
SPREAD = jnp.asarray(10.0 ** np.linspace(0, -3, 48), jnp.float32)
TARGETS = INPUTS @ jnp.asarray(DRAW.normal(size=(32, 48)), jnp.float32) * SPREAD[None]
START = {"kernel": jnp.zeros((1, 32, 48))}


def loss(params: Any) -> jax.Array:
    return jnp.mean((INPUTS @ params["kernel"][0].astype(jnp.float32) - TARGETS) ** 2)


def train(config: RunConfig, steps: int = 150) -> float:
    """The loss, of 2.28 at the beginning, at the end of a linear decay."""
    transform = stack_transform(config)
    params = as_master(START, config.precision.weights)
    state = init_part({"stacks": transform}, "stacks", [params])[0]

    @jax.jit
    def whole(params: Any, state: Any) -> jax.Array:
        def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
            params, state = carry
            fraction = jnp.minimum(1.0, 2.0 * (1.0 - index / steps))
            return update_part(transform, jax.grad(loss)(params), state, params, fraction), None

        return loss(jax.lax.scan(step, (params, state), jnp.arange(steps, dtype=jnp.float32))[0][0])

    return float(whole(params, state))


@pytest.fixture(scope="module")
def in_float32() -> dict[str, float]:
    found = {own.name: train(config_of(own)) for own in (ADAMW, MUON)}
    assert max(found.values()) < 4e-4  # there is something to lose
    return found


def limit(in_float32: float) -> float:
    """Half as much again, and what sixteen bits of the weights themselves cost; seeds differ by a fifth."""
    return 1.5 * in_float32 + 3e-5


@pytest.mark.parametrize("own", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("precision", [("fp32", "bf16"), ("fp32", "int8"), ("bf16", "int8")], ids="-".join)
def test_the_loss_stays_in_a_band(own: OptimizerConfig, precision: tuple[str, str], in_float32: dict[str, float]):
    weights, optimizer = precision
    assert train(config_of(own, weights=weights, optimizer=optimizer)) < limit(in_float32[own.name])


def test_the_band_detects_linear_codes_of_mean_squares(in_float32: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    """The small ones of a block become 0 and are divided by."""
    monkeypatch.setattr(rounding, "to_log8", rounding.to_int8)
    assert train(config_of(optimizer="int8")) > 1e6 * limit(in_float32["adamw"])


def test_the_band_detects_weights_rounded_to_the_nearest(in_float32: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounding, "to_bf16", lambda x, bits: x.astype(jnp.bfloat16))
    assert train(config_of(weights="bf16")) > 2 * limit(in_float32["adamw"])


# The same bits again, and others for others.

NARROW: dict[str, Any] = {"weights": "bf16", "optimizer": "int8"}
KERNELS = {"kernel": jax.random.normal(jax.random.key(1), (2, 8, 300)), "scale": jnp.ones((2, 8))}


def few_updates(config: RunConfig, *, cut: int | None = None, loses: str = "") -> tuple[Any, Any]:
    """(two equal stacks, their states) after four equal updates.

    Args:
      cut: goes through the host there, as a snapshot does.
      loses: a field of the state that does not survive it.
    """
    transforms = make_transforms(config, scales_head=False)
    params: Any = {"stacks": [as_master(KERNELS, config.precision.weights)] * 2}
    states: Any = {"stacks": init_part(transforms, "stacks", params["stacks"])}
    step = jax.jit(lambda grads, states, params: update_parts(transforms, grads, states, params, jnp.ones(2)))
    for index in range(4):
        if index == cut:
            params, states = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), (params, states))
            fresh = init_part(transforms, "stacks", params["stacks"])
            if loses:
                pairs = zip(states["stacks"], fresh, strict=True)
                states = {"stacks": [old._replace(**{loses: getattr(new, loses)}) for old, new in pairs]}
        grads = jax.tree.map(lambda leaf, i=index: jnp.sin(leaf + i), params)
        params, states = step(grads, states, params)
    return params["stacks"], states["stacks"]


def same(one: Any, other: Any) -> bool:
    return all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


@pytest.fixture(scope="module")
def uncut() -> tuple[Any, Any]:
    return few_updates(config_of(**NARROW))


def test_rounding_goes_on_where_it_stopped(uncut: tuple[Any, Any]):
    assert same(few_updates(config_of(**NARROW), cut=2), uncut)
    assert not same(few_updates(config_of(**NARROW), cut=2, loses="count")[0], uncut[0])  # the twin


def test_rounding_differs_by_seed_stack_update_and_array(uncut: tuple[Any, Any]):
    stacks, states = uncut
    assert not same(few_updates(config_of(seed=1, **NARROW))[0], stacks)
    assert not np.array_equal(stacks[0]["kernel"], stacks[1]["kernel"])  # which began and were moved alike
    np.testing.assert_array_equal(stacks[0]["scale"], stacks[1]["scale"])  # float32 is not rounded
    assert not np.array_equal(states[0].key, states[1].key)
    key, like = states[0].key, jnp.zeros(1000)
    drawn = [optimizer_state._bits(key, jnp.int32(count), name, like) for count in (1, 2) for name in ("mu/a", "nu/a")]
    for index, bits in enumerate(drawn):
        assert abs(float(bits.mean()) / 32767.5 - 1) < 0.1
        assert all(float(jnp.mean(bits == other)) < 0.05 for other in drawn[:index])


def test_an_update_uses_moments_that_were_not_rounded_yet():
    """So the first update from nothing is that of float32, whatever is stored after it."""
    grads = jax.tree.map(jnp.sin, KERNELS)
    moved = []
    for optimizer in ("fp32", "int8"):
        transform = stack_transform(config_of(optimizer=optimizer))
        moved.append(update_part(transform, grads, transform.init(KERNELS), KERNELS, ONE)[0])
    assert same(*moved)


# What a GPU is told.


def moments_of(target: Target) -> tuple[int, int, int]:
    """(parameters, bytes that an update needs besides its arguments, bytes that drawing a state needs besides it)."""
    transform = stack_transform(config_of(**NARROW))
    params = as_master(
        {"up": {"kernel": jnp.zeros((1, 512, 1024))}, "down": {"kernel": jnp.zeros((1, 1024, 512))}}, "bf16"
    )
    state = jax.eval_shape(transform.init, params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        return update_part(transform, grads, state, params, ONE)

    def temporary(function: Any, *operands: Any, donated: int = 0) -> int:
        with planned_for(target):
            closed = jax.make_jaxpr(function)(*operands)
        labels = [""] * len(closed.jaxpr.invars)
        return peak_memory(closed, labels, flops_per_byte=target.flops_per_byte, donated=donated).temporary

    donated = len(jax.tree.leaves((params, state)))
    updating, drawing = temporary(update, params, state, params, donated=donated), temporary(transform.init, params)
    return sum(map(jnp.size, jax.tree.leaves(params))), updating, drawing - budget.tree_bytes(state)


def test_a_gpu_stores_no_moment_in_float32():
    parameters, updating, drawing = moments_of(HOPPER)
    assert updating < 0.1 * parameters
    assert drawing < 0.1 * parameters
    assert moments_of(NO_GPU)[1] > 2 * parameters  # the twin: computed once, one array after the other


@pytest.mark.parametrize("own", [ADAMW, MUON], ids=lambda own: own.name)
def test_moments_that_are_computed_again_are_the_same(own: OptimizerConfig, monkeypatch: pytest.MonkeyPatch):
    """As a GPU does it, on a CPU: up to the last bit of a sum, and a code where a number lay on the edge."""
    moved = []
    for is_cpu in (True, False):
        monkeypatch.setattr(optimizer_state, "is_cpu", lambda own=is_cpu: own)
        moved.append(few_updates(config_of(own, **NARROW)))
    (weights, states), (other_weights, other_states) = moved
    for left, right in zip(jax.tree.leaves(weights), jax.tree.leaves(other_weights), strict=True):
        np.testing.assert_allclose(*(np.asarray(leaf, np.float32) for leaf in (left, right)), rtol=2**-7, atol=1e-3)
    for left, right in zip(jax.tree.leaves(states), jax.tree.leaves(other_states), strict=True):
        apart = np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64))
        if left.dtype in (jnp.int8, jnp.uint8):
            assert np.mean(apart > 0) < 0.01
        else:
            assert np.all(apart <= 1e-3 * np.abs(np.asarray(left, np.float64)))


def test_weights_in_bf16_need_the_state_that_was_made_for_them():
    narrow, plain = as_master(KERNELS, "bf16"), stack_transform(config_of())
    with pytest.raises(TypeError, match="weights in bfloat16"):
        rounded_like(widened(narrow), narrow, plain.init(KERNELS))


def test_what_a_run_trains_and_saves_is_stored_so(tiny: Any):
    config = tiny(precision__weights="bf16", precision__optimizer="int8")
    phases = make_curriculum(config)
    source = PartSource(config, jax.random.key(0))
    state = source.snapshot_shape(phases, 1, inside=True, head_has_table=True, scaling={})
    stack, moments = state.params["stacks"][0], state.optimizer["stacks"][0].inner[0]
    kernels = [tree["mlp"]["up"]["kernel"].dtype for tree in (stack, moments.mu, moments.nu)]
    assert kernels == [jnp.bfloat16, jnp.int8, jnp.uint8]
    assert stack["mlp_norm"]["scale"].dtype == moments.nu["mlp_norm"]["scale"].dtype == jnp.float32
    assert state.params["head"]["table"].dtype == jnp.float32
    assert state.optimizer["head"].inner[0].mu["table"].dtype == jnp.int8
