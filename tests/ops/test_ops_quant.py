"""Storage formats against NumPy, their errors and bytes; what passes through a quantised weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import REFERENCES
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.checks import choices
from stackwise_jax.config import resolve
from stackwise_jax.memory.precision import from_storage, to_storage, weight_bytes
from stackwise_jax.models.block import Block
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import apply_stack, init_stack
from stackwise_jax.models.weights import Weight
from stackwise_jax.ops import quant
from stackwise_jax.ops.matmul import matmul
from stackwise_jax.types import Params, Quantised

# Relative error (root mean square) of Gaussian weights, between which bounds; bits an entry, scales included.
MEASURED = {
    "bf16": (1.6e-3, 1.8e-3, 16.0),
    "fp16": (2.0e-4, 2.2e-4, 16.0),
    "fp8": (0.0255, 0.0275, 8.002),
    "nvfp4": (0.092, 0.098, 4.5005),
    "nf4": (0.090, 0.094, 4.1276),
}


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def through(w: np.ndarray, kind: str) -> np.ndarray:
    return np.asarray(jax.jit(lambda w: quant.decode(quant.encode(w, kind), jnp.float32))(w))


def misses(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of entries that are another number."""
    return float(np.mean(~np.isclose(found, wanted, rtol=1e-5, atol=1e-7 * np.abs(wanted).max())))


def test_formats_are_those_of_the_config():
    assert quant.FORMATS == choices.QUANTISED == tuple(REFERENCES)
    assert {*MEASURED, "fp32"} == {*choices.TRUNK_PRECISIONS}


@pytest.mark.parametrize("kind", quant.FORMATS)
@pytest.mark.parametrize("shape", [(256, 144), (150, 37)], ids=["whole blocks", "parts of blocks"])
def test_each_format_is_its_reference(kind: str, shape: tuple[int, int]):
    w = gaussian(*shape) * np.float32(4) ** np.arange(shape[1], dtype=np.float32).clip(0, 5)  # blocks of many sizes
    w[:, 9] = 0.0  # blocks of nothing
    found, wanted = through(w, kind), REFERENCES[kind](w)
    assert misses(found, wanted) < 1e-4
    # Twins: blocks along the other axis, and of another size.
    if kind != "fp8":
        assert misses(found, REFERENCES[kind](w.T).T) > 0.1
    assert misses(found, REFERENCES[kind](w, 32)) > 0.1


def test_nvfp4_rounds_halves_to_even_and_keeps_signs():
    middles, even = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    w = np.zeros((32, 1), np.float32)
    w[0] = 448 * 6  # the matrix's scale is 1, and so is that of a block whose largest is 6
    w[16:, 0] = [*middles, *(-x for x in middles)]
    np.testing.assert_array_equal(through(w, "nvfp4")[16:, 0], [*even, *(-x for x in even)])


@pytest.mark.parametrize(("kind", "block"), [("nvfp4", 16), ("nf4", 64)])
def test_every_code_with_every_scale_decodes_to_the_bits_of_the_table(kind: str, block: int):
    """Each byte holds two codes; each column has one of the 256 scales of E4M3, numbers or not."""
    table = {"nvfp4": [*quant.E2M1, *(-x for x in quant.E2M1)], "nf4": quant.NF4}[kind]
    halves = np.arange(256).astype(np.uint8)
    codes = jnp.asarray(np.repeat(halves[:, None], 256, axis=1))
    scales: dict[str, Any] = {"block": jax.lax.bitcast_convert_type(jnp.asarray(halves), jnp.float8_e4m3fn)}
    scales["block"] = jnp.broadcast_to(scales["block"][None, :], (512 // block, 256))
    steps = np.asarray(scales["block"][0].astype(jnp.float32))
    if kind == "nvfp4":
        scales["matrix"] = jnp.float32(0.37)
        steps = steps * np.float32(0.37)
    else:
        scales |= {"group": jnp.full(512 // block, 0.37), "mean": jnp.float32(0.11)}
        steps = steps * np.float32(0.37) + np.float32(0.11)
    rows = np.stack([halves & 15, halves >> 4], axis=1).reshape(-1)
    wanted = np.array(table, np.float32)[rows][:, None] * steps[None, :]
    found = np.asarray(quant.decode(Quantised(codes, scales, kind, (512, 256)), jnp.float32))
    is_number = ~np.isnan(wanted)
    assert is_number.sum() == 512 * 254
    np.testing.assert_array_equal(np.isnan(found), ~is_number)
    np.testing.assert_array_equal(found.view(np.uint32)[is_number], wanted.view(np.uint32)[is_number])


def test_blocks_without_any_size_and_with_a_giant_stay_numbers():
    w = gaussian(128, 8)
    w[:, 0], w[3, 1] = 0.0, 1e4
    for kind in quant.FORMATS:
        assert not through(np.zeros_like(w), kind).any()
        decoded = through(w, kind)
        assert np.isfinite(decoded).all()
        assert not decoded[:, 0].any()
        assert decoded[3, 1] == pytest.approx(1e4, rel=0.07)


@pytest.mark.parametrize("kind", MEASURED)
def test_error_and_bytes_of_gaussian_weights(kind: str):
    w = jnp.asarray(gaussian(1, 1024, 512))
    stored = to_storage({"kernel": w, "scale": jnp.ones((1, 512))}, kind)
    decoded = from_storage(stored, jnp.float32)["kernel"]
    low, high, bits = MEASURED[kind]
    assert low < float(jnp.linalg.norm(decoded - w) / jnp.linalg.norm(w)) < high
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(stored["kernel"]))
    assert held * 8 / w.size == pytest.approx(bits, abs=1e-3)
    assert stored["scale"].dtype == (jnp.bfloat16 if kind == "bf16" else jnp.float32)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 2), st.sampled_from(quant.FORMATS))
def test_any_shape_is_stored_in_the_bytes_that_are_planned_and_blocks_are_independent(
    D: int, F: int, L: int, kind: str
):
    w = jnp.asarray(gaussian(L, D, F, seed=D))
    stored = to_storage({"kernel": w}, kind)["kernel"]
    assert isinstance(stored, Quantised)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) == L * weight_bytes(Weight((D, F), ("D", "F")), kind)
    assert all(leaf.shape[0] == L for leaf in jax.tree.leaves(stored))
    decoded = quant.decode(stored, jnp.float32)
    assert decoded.shape == w.shape
    alone = to_storage({"kernel": w[-1:]}, kind)["kernel"]
    np.testing.assert_array_equal(quant.decode(alone, jnp.float32)[0], decoded[-1])


@pytest.mark.parametrize("kind", quant.FORMATS)
def test_gradient_passes_through_a_quantised_weight_and_none_goes_to_it(kind: str):
    weight = quant.encode(jnp.asarray(gaussian(48, 24)) * 50, kind)
    plain = quant.decode(weight, jnp.float32)
    x, pull = jnp.asarray(gaussian(2, 3, 48, seed=1)) * 50, jnp.asarray(gaussian(2, 3, 24, seed=2)) * 50

    def loss(x: Any, weight: Any) -> Any:
        return jnp.sum(jnp.tanh(matmul(x, weight, dtype=jnp.float32)) * pull)

    through, of_weight = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, weight)
    np.testing.assert_allclose(through, jax.grad(loss)(x, plain), rtol=1e-5, atol=1e-6)
    step = jnp.asarray(gaussian(2, 3, 48, seed=3))
    slope = (loss(x + step, weight) - loss(x - step, weight)) / 2
    assert float(jnp.sum(through * step)) == pytest.approx(float(slope), rel=2e-2)
    assert float(jnp.sum(through * step)) != pytest.approx(float(slope) * 1.1, rel=2e-2)
    assert not any(np.any(leaf.astype(np.float32)) for leaf in jax.tree.leaves(of_weight) if leaf.dtype.itemsize)


@pytest.mark.parametrize("kind", quant.FORMATS)
@pytest.mark.parametrize("shape", [(256, 144), (150, 37)], ids=["whole blocks", "parts of blocks"])
def test_one_row_is_multiplied_as_any_row_is(kind: str, shape: tuple[int, int]):
    weight = quant.encode(jnp.asarray(gaussian(*shape)), kind)
    rows = jnp.asarray(gaussian(2, shape[0], seed=1))
    multiply = jax.jit(lambda rows: matmul(rows, weight, dtype=jnp.float32))
    wanted = multiply(rows)
    np.testing.assert_allclose(multiply(rows[:1]), wanted[:1], rtol=1e-5, atol=1e-8)
    swapped = rows.reshape(2, -1, 2)[:, :, ::-1].reshape(rows.shape)  # what would stand in the other half of a byte
    assert not np.allclose(multiply(swapped[:1]), wanted[:1], rtol=1e-5, atol=1e-8)


# A stack.

B, T, D, L = 2, 8, 32, 3
MODEL = resolve(
    {
        "model": {"vocab_size": 64, "d_model": D, "n_heads": 4, "d_ff": 80, "init_std": 0.2, "use_bias": True},
        "data": {"seq_len": T},
    }
).model
CONTEXT = row_context(MODEL, None, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)))


def run_stack(params: Params, x: Any) -> Any:
    return apply_stack(params, x, CONTEXT, MODEL, dtype=jnp.float32)


@pytest.mark.parametrize("kind", quant.FORMATS)
def test_a_scan_over_a_quantised_stack_is_the_loop_over_its_blocks(kind: str):
    plain = init_stack(jax.random.key(0), MODEL, 0, L)
    stored = to_storage(plain, kind)
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    scanned = jax.jit(run_stack)(stored, x)
    block = jax.jit(lambda own, x: Block(MODEL, jnp.float32).apply({"params": own}, x, CONTEXT)[0])

    def looped(order: list[int]) -> Any:
        y = x
        for index in order:
            y = block(jax.tree.map(lambda leaf, i=index: leaf[i], stored), y)
        return y

    np.testing.assert_allclose(scanned, looped([0, 1, 2]), rtol=2e-5, atol=1e-5)
    assert not np.allclose(scanned, looped([0, 2, 1]), rtol=2e-5, atol=1e-5)
    decoded = from_storage(stored, jnp.float32)
    np.testing.assert_allclose(scanned, jax.jit(run_stack)(decoded, x), rtol=2e-5, atol=1e-5)
    assert not np.allclose(scanned, jax.jit(run_stack)(plain, x), rtol=2e-5, atol=1e-5)


def test_the_backward_pass_of_a_quantised_tail_keeps_no_decoded_matrix():
    plain = init_stack(jax.random.key(0), MODEL, 0, L)
    x = jax.random.normal(jax.random.key(1), (B, T, D))

    def kept(params: Params) -> int:
        """Float32 arrays of the shape of all kernels of one kind."""
        leaves = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: run_stack(params, x), x)[1], x))
        shapes = {leaf.shape for leaf in jax.tree.leaves(plain) if leaf.ndim == 3}
        return sum(leaf.shape in shapes and leaf.dtype == jnp.float32 for leaf in leaves)

    assert kept(to_storage(plain, "nf4")) == 0
    assert kept(plain) > 0  # what is seen where nothing is quantised
