"""Attention: the reference against float64, the XLA path against the reference, and what no query may see."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.ops import attention as attention_module
from stackwise_jax.ops.attention import attention, cudnn_refusal
from stackwise_jax.ops.mask import Mask, decoding_mask

B, T, N, K, H = 2, 6, 4, 2, 8
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 3, 0, 0]])
PREFIXES = jnp.array([2, 4])
MASKS = {
    "causal": Mask("causal"),
    "bidirectional": Mask("bidirectional"),
    "prefix": Mask("prefix", None, PREFIXES),
    "causal packed": Mask("causal", SEGMENTS),
    "bidirectional packed": Mask("bidirectional", SEGMENTS),
    "prefix packed": Mask("prefix", SEGMENTS, PREFIXES),
    "block_causal": Mask("block_causal", block_length=2),
    "block_causal packed": Mask("block_causal", SEGMENTS, block_length=2),
    "block_diffusion": Mask("block_diffusion", block_length=2),
    "block_diffusion packed": Mask("block_diffusion", jnp.tile(SEGMENTS[:, :3], 2), block_length=1),
}
EXECUTIONS = ["reference", "xla"]


def inputs(key: jax.Array, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(key, 3)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    return tuple(jax.random.normal(one, shape, dtype) for one, shape in zip(keys, shapes, strict=True))


def attend_in_numpy(q: jax.Array, k: jax.Array, v: jax.Array, visible: np.ndarray, scale: float) -> np.ndarray:
    """Head by head, place by place, over the visible keys only."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(visible[b, 0, t])
        head = n // (q.shape[2] // k.shape[2])
        weights = np.exp(k[b, seen, head] @ q[b, t, n] * scale)
        out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


@pytest.mark.parametrize("name", MASKS)
def test_reference_is_the_formula_in_float64(key: jax.Array, tolerance: dict, name: str):
    q, k, v = inputs(key)
    visible = np.broadcast_to(MASKS[name].as_array(T), (B, 1, T, T))
    got = attention(q, k, v, MASKS[name], implementation="reference")
    np.testing.assert_allclose(got, attend_in_numpy(q, k, v, visible, H**-0.5), **tolerance["float32"])


def test_reference_reads_a_cache_through_a_mask_array(key: jax.Array, tolerance: dict):
    q, k, v = inputs(key)
    visible = decoding_mask(jnp.array([[4], [3]]), T, jnp.array([0, 2]))
    got = attention(q[:, :1], k, v, visible, implementation="reference", scale=0.5)
    np.testing.assert_allclose(got, attend_in_numpy(q[:, :1], k, v, np.asarray(visible), 0.5), **tolerance["float32"])


def value_and_gradients(execution: str, mask: Mask, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(*qkv, mask, implementation=execution)
        # Uneven weights, because the plain sum has no gradient in q and k where the values are alike.
        return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, *gradients


@pytest.mark.parametrize("name", MASKS)
def test_xla_is_the_reference_forward_and_backward(key: jax.Array, tolerance: dict, name: str):
    arrays = inputs(key)
    pairs = zip(*(value_and_gradients(e, MASKS[name], arrays) for e in EXECUTIONS), strict=True)
    for expected, got in pairs:
        np.testing.assert_allclose(got, expected, **tolerance["float32"])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_query_head_reads_the_key_head_of_its_group(key: jax.Array, tolerance: dict, execution: str):
    q, k, v = inputs(key)
    grouped = attention(q, k, v, Mask("causal"), implementation=execution)
    repeated, tiled = (
        attention(q, spread(k), spread(v), Mask("causal"), implementation=execution)
        for spread in (lambda x: jnp.repeat(x, N // K, axis=2), lambda x: jnp.tile(x, (1, 1, N // K, 1)))
    )
    np.testing.assert_allclose(grouped, repeated, **tolerance["float32"])
    assert not np.allclose(grouped, tiled, **tolerance["float32"]), "the other order of heads must be noticed"


def gradient_by_place(execution: str, mask: Mask, key: jax.Array, t: int) -> jax.Array:
    """Returns the largest gradient of output t with respect to the keys and values of each place."""
    q, k, v = inputs(key)

    def output(k: jax.Array, v: jax.Array) -> jax.Array:
        return (attention(q, k, v, mask, implementation=execution)[:, t] ** 2).sum()

    gradients = jax.grad(output, argnums=(0, 1))(k, v)
    return sum(jnp.abs(gradient).max(axis=(0, 2, 3)) for gradient in gradients)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("t", [0, 3])
def test_no_gradient_from_the_future(key: jax.Array, execution: str, t: int):
    gradient = gradient_by_place(execution, Mask("causal"), key, t)
    assert bool((gradient[t + 1 :] == 0).all())
    assert bool((gradient[: t + 1] > 0).all())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_no_gradient_from_the_future_detects_bidirectional(key: jax.Array, execution: str):
    assert bool((gradient_by_place(execution, Mask("bidirectional"), key, 3)[4:] > 0).all())


def second_document_moved(mask: Mask, execution: str, key: jax.Array) -> bool:
    """Whether document 2 of row 0 notices that document 1 has changed."""
    attend = jax.jit(lambda *qkv: attention(*qkv, mask, implementation=execution)[0, 3:5])
    arrays = inputs(key)
    changed = tuple(x.at[0, :3].multiply(-3.0) for x in arrays)
    return not np.array_equal(attend(*arrays), attend(*changed))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix", "block_causal"])
def test_documents_do_not_see_each_other(key: jax.Array, execution: str, name: str):
    assert not second_document_moved(MASKS[f"{name} packed"], execution, key)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_documents_detects_plain_causal(key: jax.Array, execution: str):
    assert second_document_moved(Mask("causal"), execution, key)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_padding_is_finite_and_sees_padding_alone(key: jax.Array, execution: str):
    arrays = tuple(x * 30 for x in inputs(key))
    for result in value_and_gradients(execution, MASKS["causal packed"], arrays):
        assert bool(jnp.isfinite(result).all())
    padding = attention(*arrays, MASKS["causal packed"], implementation=execution)[0, 5]
    np.testing.assert_array_equal(padding, jnp.repeat(arrays[2][0, 5], N // K, axis=0))


def test_padding_detects_an_empty_row(key: jax.Array):
    visible = MASKS["causal packed"].as_array(T) & (SEGMENTS != 0)[:, None, None, :]
    q, k, v = inputs(key)
    padding = attention(q, k, v, visible, implementation="reference")[0, 5]
    assert not np.allclose(padding, jnp.repeat(v[0, 5], N // K, axis=0))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_sixteen_bits_under_strict_promotion(key: jax.Array, tolerance: dict, execution: str):
    arrays = inputs(key, jnp.bfloat16)
    exact = attention(*(x.astype(jnp.float32) for x in arrays), MASKS["causal packed"], implementation="reference")
    with jax.numpy_dtype_promotion("strict"):
        got = attention(*arrays, MASKS["causal packed"], implementation=execution)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, **tolerance["bfloat16"])


def test_auto_is_xla_where_there_is_no_gpu(key: jax.Array):
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is there")
    auto, xla = (attention(*inputs(key), Mask("causal"), implementation=name) for name in ("auto", "xla"))
    np.testing.assert_array_equal(auto, xla)


def test_a_named_implementation_that_cannot_serve_says_why(key: jax.Array):
    with pytest.raises(UserError, match=r'attention_implementation="cudnn" needs .*; use "auto" or "xla"') as error:
        attention(*inputs(key), Mask("causal"), implementation="cudnn")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match='Did you mean "cudnn"'):
        attention(*inputs(key), Mask("causal"), implementation="cuddn")


def test_misfits_are_errors(key: jax.Array):
    q, k, v = inputs(key)
    with pytest.raises(ValueError, match="3 query heads cannot be shared out over 2"):
        attention(q[:, :, :3], k, v, Mask("causal"))
    with pytest.raises(ValueError, match="not 1 queries on 6 keys"):
        attention(q[:, :1], k, v, Mask("causal"))


REFUSALS = [  # capability, dtype, T, S, H, is_causal, the words that tell the reason
    ((9, 0), "bfloat16", 256, 256, 128, True, None),
    ((9, 0), "bfloat16", 256, 256, 256, False, None),
    ((9, 0), "float16", 192, 192, 64, True, None),
    ((8, 0), "bfloat16", 256, 256, 128, False, None),
    (None, "bfloat16", 256, 256, 128, True, "NVIDIA GPU"),
    ((7, 5), "bfloat16", 256, 256, 128, True, "8.0"),
    ((9, 0), "float32", 256, 256, 128, True, "float32"),
    ((9, 0), "bfloat16", 256, 256, 60, True, "multiple of 8"),
    ((9, 0), "bfloat16", 256, 256, 264, True, "at most 256"),
    ((8, 0), "bfloat16", 256, 256, 256, True, "at most 128"),
    ((9, 0), "bfloat16", 192, 192, 64, False, "multiple of 128 keys"),
    ((9, 0), "bfloat16", 1, 256, 64, False, "even"),
    ((9, 0), "bfloat16", 101, 101, 64, True, "even"),
]


@pytest.mark.parametrize(("capability", "dtype", "T", "S", "H", "is_causal", "reason"), REFUSALS)
def test_cudnn_refuses_what_it_cannot_serve(
    monkeypatch: pytest.MonkeyPatch, capability, dtype, T, S, H, is_causal, reason
):
    monkeypatch.setattr(attention_module, "cuda_capability", lambda: capability)
    q, k = jnp.zeros((1, T, 2, H), dtype), jnp.zeros((1, S, 1, H), dtype)
    refusal = cudnn_refusal(q, k, k, is_causal=is_causal)
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize("name", MASKS)
def test_the_kernel_gets_no_array_where_the_kind_says_it_all(
    monkeypatch: pytest.MonkeyPatch, key: jax.Array, name: str
):
    calls = []
    real: Callable = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *qkv, **how: calls.append(how) or real(*qkv, **how))
    attention(*inputs(key), MASKS[name], implementation="xla")
    (how,) = calls
    assert (how["mask"] is None) == (name in ("causal", "bidirectional"))
    assert how["is_causal"] == (name == "causal")
    assert "local_window_size" not in how


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU lacks")
def test_fp16_on_a_cpu_takes_the_reference_and_refuses_xla_by_name():
    q, k, v = (jax.random.normal(jax.random.key(n), (1, 8, 2, 16), jnp.float16) for n in range(3))
    wide = attention(*(x.astype(jnp.float32) for x in (q, k, v)), Mask("causal"))
    found = attention(q, k, v, Mask("causal"))
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=2e-3)
    with pytest.raises(UserError, match='"xla" has no fp16 on a CPU'):
        attention(q, k, v, Mask("causal"), implementation="xla")
