"""fp8 matmuls against NumPy: E4M3 forward, E5M2 for the incoming gradient, a scale an operand, float32 sums."""

from typing import Any

import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.ops.fp8 import E4M3, Coded, coded, to_fp8
from stackwise_jax.ops.matmul import matmul
from stackwise_jax.ops.quant import decode, encode

M, D, F = 24, 320, 48


def rounded(x: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max() / np.float32(numbers[-1])
    return formats.nearest(x / scale, numbers) * scale


def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x, w, g = draw.normal(size=(M, D)), 0.02 * draw.normal(size=(D, F)), 1e-7 * draw.normal(size=(M, F))
    return x.astype(np.float32), w.astype(np.float32), g.astype(np.float32)  # a gradient that fp16 would lose


def test_product_and_gradients_are_the_references():
    x, w, g = drawn()
    product, pull = jax.vjp(lambda x, w: matmul(x, w, dtype=jnp.float32, in_fp8=True), x, w)
    of_x, of_w = pull(jnp.asarray(g))
    qx, qw, qg = rounded(x, formats.E4M3), rounded(w, formats.E4M3), rounded(g, formats.E5M2)

    def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())

    for found, wanted, exact in ((product, qx @ qw, x @ w), (of_x, qg @ qw.T, g @ w.T), (of_w, qx.T @ qg, x.T @ g)):
        assert_close(np.asarray(found), wanted)
        assert 0.03 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.07
    for wrong in (rounded(g, formats.E4M3), g):  # twins: a gradient in the other format, or in none
        with pytest.raises(AssertionError):
            assert_close(np.asarray(of_x), wrong @ qw.T)


def test_results_have_the_dtype_of_the_arithmetic():
    x, w, g = (jnp.asarray(a, jnp.bfloat16) for a in drawn())
    product, pull = jax.vjp(lambda x, w: matmul(x, w, dtype=jnp.bfloat16, in_fp8=True), x, w.astype(jnp.float32))
    assert product.dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in pull(g)] == [jnp.bfloat16, jnp.float32]


def test_scales_take_the_largest_to_the_largest_and_nothing_to_nothing():
    codes, scale = to_fp8(jnp.array([3.0, -1e-3, 0.0]), E4M3)
    assert float(codes[0]) == 448.0
    assert float(scale) == pytest.approx(3 / 448)
    codes, scale = to_fp8(jnp.zeros(3), E4M3)
    assert not np.asarray(codes, np.float32).any()
    assert np.isfinite(scale)
    assert np.isnan(np.asarray(to_fp8(jnp.array([jnp.nan, 1.0]), E4M3)[0], np.float32)).any()  # what is none stays none


@pytest.mark.parametrize("policy", ["everything_saveable", "nothing_saveable"])
def test_rematerialisation_changes_no_number(policy: str):
    x, w, _ = drawn()

    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(jnp.tanh(matmul(x, w, dtype=jnp.float32, in_fp8=True)))

    kept = jax.checkpoint(loss, policy=getattr(jax.checkpoint_policies, policy))
    for found, wanted in zip(*(jax.jit(jax.grad(f, argnums=(0, 1)))(x, w) for f in (kept, loss)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_a_weight_that_is_coded_before_multiplies_as_one_that_is_coded_on_the_way(dtype: Any, rounding: float):
    x, w = map(jnp.asarray, drawn()[:2])
    stack = jnp.stack([jnp.asarray(w, dtype), jnp.asarray(3.0 * w[::-1], dtype)])
    of_stack = coded(stack)
    assert (of_stack.codes.shape, of_stack.codes.dtype, of_stack.scale.shape) == ((2, F, D), E4M3, (2,))
    for block in range(2):
        own = Coded(of_stack.codes[block], of_stack.scale[block])
        wanted = matmul(x, stack[block], dtype=dtype, in_fp8=True)
        largest = float(jnp.abs(wanted).max())
        assert float(jnp.abs(matmul(x, own, dtype=dtype) - wanted).max()) < rounding * largest
        twin = matmul(x, Coded(own.codes, 1.5 * own.scale), dtype=dtype)
        assert float(jnp.abs(twin - wanted).max()) > 5 * rounding * largest


def test_a_quantised_weight_goes_on_to_fp8_and_passes_its_gradient_in_fp8():
    x, w, g = map(jnp.asarray, drawn())
    weight = encode(w, "nvfp4")
    plain = decode(weight, jnp.float32)
    product, pull = jax.vjp(lambda x: matmul(x, weight, dtype=jnp.float32, in_fp8=True), x)
    wanted, wanted_pull = jax.vjp(lambda x: matmul(x, plain, dtype=jnp.float32, in_fp8=True), x)
    np.testing.assert_array_equal(product, wanted)
    np.testing.assert_array_equal(pull(g)[0], wanted_pull(g)[0])
    in_full = jax.vjp(lambda x: matmul(x, weight, dtype=jnp.float32), x)[1](g)[0]
    assert not np.allclose(pull(g)[0], in_full, rtol=1e-3, atol=0.0)  # twin: it is fp8 that is meant
