"""A model that is told the masked fraction: nothing at birth, each row its own, trained, stored and read as the rest.

Against numpy it stands in `test_against_numpy.py`, the gradient of its norms in `tests/ops/test_ops_lean.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.generate.autoregressive import generate
from stackwise_jax.generate.blocks import BlockDenoiser
from stackwise_jax.generate.denoise import RackDenoiser
from stackwise_jax.memory.precision import from_storage, to_storage
from stackwise_jax.models import weights
from stackwise_jax.models.rack import (
    apply_rack,
    count_parameters,
    init_key_values,
    init_rack,
    output_table,
    row_context,
    time_vector,
)
from stackwise_jax.models.stack import apply_stack, decode_stack
from stackwise_jax.ops.mask import Mask
from stackwise_jax.schema import ArchitectureConfig, ModelConfig, OptimizerConfig, RunConfig
from stackwise_jax.train.optimizer import make_transforms, update_part

B, T, D, PAD, MASK = 3, 8, 16, 0, 18
PLAIN = ModelConfig(
    vocab_size=19,
    d_model=D,
    n_heads=2,
    n_kv_heads=1,
    d_head=8,
    d_ff=24,
    init_std=0.3,
    attention="bidirectional",
    architecture=ArchitectureConfig(n_stacks=2, blocks_per_stack=1),
)
MODEL = dataclasses.replace(PLAIN, time_input=True)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 1, 18)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
RATES = jnp.array([0.05, 0.5, 1.0])


@functools.cache
def rack_of(model: ModelConfig) -> Any:
    return jax.jit(init_rack, static_argnums=(1, 2))(jax.random.key(0), model, (1, 1))


@functools.cache
def trained() -> Any:
    """A rack whose adaptive norms have moved."""

    def move(path: Any, leaf: jax.Array) -> jax.Array:
        if "adaptive" not in jax.tree_util.keystr(path):
            return leaf
        return 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return jax.tree_util.tree_map_with_path(move, rack_of(MODEL))


@functools.partial(jax.jit, static_argnames="model")
def run(rack: Any, rates: jax.Array = RATES, model: ModelConfig = MODEL) -> jax.Array:
    time = time_vector(rack["embedding"], rates) if model.time_input else None
    return apply_rack(rack, TOKENS, row_context(model, None, POSITIONS, time=time), model, dtype=jnp.float32)


@pytest.mark.parametrize("fields", [{}, {"norm": "layernorm", "norm_position": "post", "ffn": "gelu"}])
def test_at_birth_it_is_the_model_without_and_draws_the_same_matrices(fields: dict[str, Any]):
    told, plain = (dataclasses.replace(model, **fields) for model in (MODEL, PLAIN))
    rack = rack_of(told)
    np.testing.assert_array_equal(run(rack, model=told), run(rack_of(plain), model=plain))
    if not fields:
        assert not np.allclose(run(trained()), run(rack), atol=1e-2)  # the twin


def test_a_row_is_told_its_own_rate():
    base = run(trained())
    other = run(trained(), RATES.at[0].set(0.06))
    np.testing.assert_array_equal(other[1:], base[1:])
    assert np.abs(other[0] - base[0]).max() > 1e-3


def test_close_rates_are_told_apart_and_all_are_of_one_size():
    """The lowest rates of a bound lie a thousandth apart; the vector neither vanishes nor saturates."""
    rates = jnp.array([0.0, 0.001, 0.002, 0.3, 0.301, 0.999, 1.0])
    vectors = np.asarray(time_vector(rack_of(MODEL)["embedding"], rates))
    apart = [np.abs(a - b).max() for i, a in enumerate(vectors) for b in vectors[:i]]
    assert min(apart) > 0.03
    assert 0.05 < vectors.std() < 1.0
    constant = jax.tree.map(jnp.zeros_like, rack_of(MODEL)["embedding"])  # the twin
    assert np.ptp(np.asarray(time_vector(constant, rates)), axis=0).max() == 0.0


def test_what_it_costs():
    in_block = 4 * D * (weights.TIME_WIDTH + 1)
    in_head, in_embedding = in_block // 2, 2 * 129 * 128
    assert count_parameters(MODEL) - count_parameters(PLAIN) == 2 * in_block + in_head + in_embedding
    assert (in_block, in_head, in_embedding) == (516 * D, 258 * D, 33_024)


def test_a_rack_that_is_not_told_says_so():
    with pytest.raises(ValueError, match=r"Context\.time is None"):
        apply_rack(rack_of(MODEL), TOKENS, row_context(MODEL, None, POSITIONS), MODEL, dtype=jnp.float32)


def test_gradients_are_finite_differences():
    """Of everything that is told and tells: the time's maps, and the adaptive norms of blocks and head."""

    @jax.jit
    def loss(moved: Any) -> jax.Array:
        rack = trained()
        rack = jax.tree.map(jnp.add, rack, moved)
        return jnp.mean(run(rack) ** 2)

    still = jax.tree.map(jnp.zeros_like, trained())
    gradient = jax.grad(loss)(still)
    h = 2e-3
    for part in (("embedding", "time"), ("head", "adaptive"), ("stacks", 0, "adaptive")):
        own = functools.reduce(lambda tree, name: tree[name], part, gradient)
        length = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(own)))
        way = jax.tree_util.tree_map_with_path(
            lambda path, leaf, own=part, length=length: leaf / length if _begins(path, own) else jnp.zeros_like(leaf),
            gradient,
        )
        ends = [float(loss(jax.tree.map(lambda leaf, step=step: step * leaf, way))) for step in (h, -h, 2 * h, -2 * h)]
        measured = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
        assert length > 1e-3
        assert measured == pytest.approx(length, rel=2e-2)


def _begins(path: Any, names: tuple[Any, ...]) -> bool:
    return tuple(getattr(part, "key", getattr(part, "idx", None)) for part in path[: len(names)]) == names


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adaptive_norms_leave_zero_when_trained(name: str):
    transform = make_transforms(RunConfig(model=MODEL, optimizer=OptimizerConfig(name=name)), scales_head=False)
    stack = rack_of(MODEL)["stacks"][0]
    gradient = jax.grad(lambda own: jnp.mean(run({**rack_of(MODEL), "stacks": [own, *rack_of(MODEL)["stacks"][1:]]})))(
        stack
    )
    moved = update_part(transform["stacks"], gradient, transform["stacks"].init(stack), stack, jnp.float32(1.0))[0]
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(moved["adaptive"]))
    still = jax.tree.map(jnp.zeros_like, gradient)  # the twin: without gradient there is nothing to decay either
    kept = update_part(transform["stacks"], still, transform["stacks"].init(stack), stack, jnp.float32(1.0))[0]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(kept["adaptive"]))


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_stored_stack_is_told_the_time_and_passes_its_gradient_on(precision: str):
    stored = to_storage(trained()["stacks"][0], precision)
    x = jax.random.normal(jax.random.key(2), (B, T, D))

    @jax.jit
    def of_time(time: jax.Array, stack: Any) -> jax.Array:
        return apply_stack(stack, x, row_context(MODEL, None, POSITIONS, time=time), MODEL, dtype=jnp.float32)

    time = time_vector(trained()["embedding"], RATES)
    decoded = from_storage(stored, jnp.float32)
    np.testing.assert_allclose(of_time(time, stored), of_time(time, decoded), rtol=2e-5, atol=2e-5)
    assert not np.allclose(of_time(time, stored), of_time(time, trained()["stacks"][0]), atol=1e-3)  # rounding shows
    pulls = [jax.grad(lambda t, own=stack: jnp.sum(of_time(t, own) ** 2))(time) for stack in (stored, decoded)]
    np.testing.assert_allclose(*pulls, rtol=1e-3, atol=1e-4)
    assert np.abs(pulls[0]).max() > 1e-2


def test_stored_keys_and_values_are_those_of_the_rate():
    stack, x = trained()["stacks"][0], jax.random.normal(jax.random.key(2), (B, T, D))
    causal = jnp.broadcast_to(jnp.tri(T, dtype=bool)[None, None], (B, 1, T, T))
    context = dataclasses.replace(
        row_context(MODEL, None, POSITIONS, time=time_vector(trained()["embedding"], RATES)), mask=Mask("causal")
    )
    expected = apply_stack(stack, x, context, MODEL, dtype=jnp.float32)
    stored = init_key_values({"stacks": [stack]}, MODEL, B, T, dtype=jnp.float32)[0]
    parts = []
    for part in (slice(0, 5), slice(5, T)):
        own = dataclasses.replace(
            context, positions=POSITIONS[:, part], mask=causal[:, :, part], write_at=jnp.int32(part.start)
        )
        out, stored = decode_stack(stack, x[:, part], own, stored, MODEL, dtype=jnp.float32)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=2e-5, atol=2e-5)


def logits_at(rates: jax.Array) -> np.ndarray:
    return np.asarray(run(trained(), rates) @ output_table(trained()["head"], trained()["embedding"]).T)


def test_a_denoiser_passes_its_rate_on():
    denoiser = RackDenoiser(trained(), MODEL, MASK, PAD, jnp.float32)
    np.testing.assert_allclose(denoiser(TOKENS, RATES), logits_at(RATES), rtol=1e-4, atol=1e-4)
    assert not np.allclose(denoiser(TOKENS, RATES / 2), logits_at(RATES), atol=1e-2)
    deaf = RackDenoiser(rack_of(PLAIN), PLAIN, MASK, PAD, jnp.float32)
    np.testing.assert_array_equal(deaf(TOKENS, RATES), deaf(TOKENS, RATES / 2))


def test_a_block_denoiser_passes_its_rate_on_and_a_finished_block_has_none():
    stored = init_key_values(trained(), MODEL, B, T, dtype=jnp.float32)
    first, end = jnp.zeros(B, jnp.int32), jnp.full(B, T)
    block = BlockDenoiser(
        trained(), stored, first, end, jnp.int32(0), None, model=MODEL, block_length=T, dtype=jnp.float32
    )
    np.testing.assert_allclose(block(TOKENS, RATES), logits_at(RATES), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(block.read(TOKENS)[0], logits_at(0.0 * RATES), rtol=1e-4, atol=1e-4)
    assert not np.allclose(logits_at(0.0 * RATES), logits_at(RATES), atol=1e-2)


def test_text_is_read_as_having_no_masks():
    causal = dataclasses.replace(MODEL, attention="causal")
    allowed = np.arange(19) < 18
    (row,) = generate(
        trained(),
        causal,
        [np.asarray(TOKENS[0, :3])],
        tokens=T - 3,
        key=jax.random.key(0),
        allowed=allowed,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        eos_id=None,
        dtype=jnp.float32,
    )
    time = time_vector(trained()["embedding"], jnp.zeros(1))
    context = row_context(causal, None, POSITIONS[:1], time=time)
    hidden = apply_rack(trained(), jnp.array(row)[None], context, causal, dtype=jnp.float32)
    logits = np.array(hidden[0] @ output_table(trained()["head"], trained()["embedding"]).T)
    logits[:, ~allowed] = -np.inf
    np.testing.assert_array_equal(row[3:], logits.argmax(-1)[2:-1])
