"""cuDNN's attention against the float32 reference on the card: values, gradients, leaks, and its known traps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.ops.attention import attention, cudnn_refusal
from stackwise_jax.ops.mask import Mask, decoding_mask
from stackwise_jax.ops.window import find_cut

pytestmark = pytest.mark.gpu

SHAPES = [(2, 256, 8, 2, 64), (2, 512, 4, 4, 128)]  # B, T, N, K, H
KINDS = ["causal", "bidirectional", "prefix", "causal packed", "bidirectional packed"]
KINDS += ["block_causal", "block_diffusion", "block_causal packed", "block_diffusion packed"]


def make_segments(B: int, T: int) -> jax.Array:
    """Returns rows of three documents and some padding; the borders lie inside and on a kernel's tiles."""
    place = jnp.arange(T)
    row = 1 + (place >= 100).astype(jnp.int32) + (place >= 128).astype(jnp.int32)
    return jnp.broadcast_to(jnp.where(place >= T - 30, 0, row), (B, T))


def make_mask(kind: str, B: int, T: int) -> Mask:
    name, *packed = kind.split()
    prefixes = jnp.array([T // 3, T // 2]) if name == "prefix" else None
    segments = make_segments(B, T) if packed else None
    if packed and name == "block_diffusion":
        segments = jnp.tile(make_segments(B, T)[:, 64 : 64 + T // 2], 2)
    return Mask(name, segments, prefixes, 24 if name.startswith("block") else None)


def inputs(key: jax.Array, shape: tuple[int, int, int, int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    B, T, N, K, H = shape
    keys = jax.random.split(key, 3)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    return tuple(jax.random.normal(one, shape, jnp.bfloat16) for one, shape in zip(keys, shapes, strict=True))


def value_and_gradients(implementation: str, mask: Mask, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    direction = jax.random.normal(jax.random.key(7), arrays[0].shape, jnp.bfloat16).astype(arrays[0].dtype)
    attend = jax.jit(lambda *qkv: attention(*qkv, mask, implementation=implementation))
    out, pull_back = jax.vjp(attend, *arrays)
    return out, *pull_back(direction)


def relative_error(got: jax.Array, expected: jax.Array) -> float:
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cudnn_is_the_reference(key: jax.Array, tolerance: dict, shape: tuple, kind: str):
    mask, arrays = make_mask(kind, *shape[:2]), inputs(key, shape)
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    results = zip(value_and_gradients("cudnn", mask, arrays), value_and_gradients("reference", mask, wide), strict=True)
    for got, expected in results:
        assert relative_error(got, expected) < tolerance["bfloat16"]["rtol"]


LONG = (2, 1024, 8, 2, 64)


def window_results(kind: str, window: int, other: int) -> list[tuple[jax.Array, jax.Array]]:
    """What cuDNN makes of a window, of which it gets blocks, and the reference of `other`, on whole rows."""
    arrays = inputs(jax.random.key(0), LONG)
    ours, theirs = (dataclasses.replace(make_mask(kind, *LONG[:2]), window=own) for own in (window, other))
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    results = value_and_gradients("cudnn", ours, arrays), value_and_gradients("reference", theirs, wide)
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("window", [1, 64, 100, 128])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "causal packed", "bidirectional packed"])
def test_cudnn_is_the_reference_inside_a_window(tolerance: dict, kind: str, window: int):
    assert find_cut(dataclasses.replace(make_mask(kind, *LONG[:2]), window=window), LONG[1]) is not None
    for got, expected in window_results(kind, window, window):
        assert relative_error(got, expected) < tolerance["bfloat16"]["rtol"]


@pytest.mark.parametrize("kind", ["causal", "bidirectional packed"])
def test_cudnn_is_the_reference_inside_a_window_detects_another_window(tolerance: dict, kind: str):
    for got, expected in window_results(kind, 64, 60):
        assert relative_error(got, expected) > tolerance["bfloat16"]["rtol"]


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "bidirectional packed"])
def test_strongly_negative_logits_inside_a_window_give_no_nan(tolerance: dict, kind: str):
    """As below; zeros beyond the ends of a row, whose logits are the largest, are seen by nobody."""
    q, k, v = inputs(jax.random.key(0), LONG)
    q, k = q.at[..., 0].set(30.0), k.at[..., 0].set(-30.0)  # logits near -112
    mask = dataclasses.replace(make_mask(kind, *LONG[:2]), window=64)
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    results = value_and_gradients("cudnn", mask, (q, k, v)), value_and_gradients("reference", mask, wide)
    for got, expected in zip(*results, strict=True):
        assert bool(jnp.isfinite(got).all())
        assert relative_error(got, expected) < tolerance["bfloat16"]["rtol"]


@pytest.mark.parametrize("shape", SHAPES)
def test_cudnn_is_the_reference_detects_another_mask(key: jax.Array, tolerance: dict, shape: tuple):
    arrays = inputs(key, shape)
    results = zip(
        value_and_gradients("cudnn", make_mask("causal", *shape[:2]), arrays),
        value_and_gradients("reference", make_mask("causal packed", *shape[:2]), arrays),
        strict=True,
    )
    assert all(relative_error(got, expected) > tolerance["bfloat16"]["rtol"] for got, expected in results)


def second_document_moved(mask: Mask, key: jax.Array, shape: tuple[int, int, int, int, int]) -> bool:
    """Whether documents 2 and 3 notice that document 1 and padding have changed, or send them any gradient."""
    segments = make_segments(*shape[:2])
    foreign = ((segments == 1) | (segments == 0))[:, :, None, None]
    arrays = inputs(key, shape)
    changed = tuple(jnp.where(foreign, -3.0 * x, x).astype(x.dtype) for x in arrays)

    def own_output(*qkv: jax.Array) -> jax.Array:
        out = attention(*qkv, mask, implementation="cudnn")
        return jnp.where(foreign, jnp.zeros_like(out), out)

    out, pull_back = jax.vjp(jax.jit(own_output), *arrays)
    # Gradients are compared with zero and not with each other: cuDNN sums dQ in an order that differs between runs.
    gradients = pull_back(jnp.ones_like(out))
    is_sent = any(bool(jnp.where(foreign, gradient, 0).astype(bool).any()) for gradient in gradients)
    return is_sent or not np.array_equal(out, jax.jit(own_output)(*changed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["causal packed", "bidirectional packed"])
def test_documents_do_not_see_each_other(key: jax.Array, shape: tuple, kind: str):
    assert not second_document_moved(make_mask(kind, *shape[:2]), key, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_documents_detects_plain_causal(key: jax.Array, shape: tuple):
    assert second_document_moved(Mask("causal"), key, shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [192, 256])
def test_strongly_negative_logits_give_no_nan(key: jax.Array, tolerance: dict, kind: str, length: int):
    """Rows with a log-sum-exp below -88.7, where exp underflows: cuDNN fails at T % 128 == 64, unless causal."""
    q, k, v = inputs(key, (2, length, 8, 2, 64))
    q, k = q.at[..., 0].set(30.0), k.at[..., 0].set(-30.0)  # logits near -112
    mask = make_mask(kind, 2, length)
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    for got, expected in zip(
        value_and_gradients("auto", mask, (q, k, v)), value_and_gradients("reference", mask, wide), strict=True
    ):
        assert bool(jnp.isfinite(got).all())
        assert relative_error(got, expected) < tolerance["bfloat16"]["rtol"]


def test_auto_leaves_awkward_lengths_to_xla_unless_plainly_causal(key: jax.Array):
    arrays = inputs(key, (2, 192, 8, 2, 64))
    packed = make_mask("causal packed", 2, 192)
    assert cudnn_refusal(*arrays, is_causal=False) is not None
    assert cudnn_refusal(*arrays, is_causal=True) is None

    def calls_cudnn(mask: Mask) -> bool:
        lowered = jax.jit(lambda *qkv: attention(*qkv, mask)).lower(*arrays)
        return "cudnn" in lowered.as_text()

    assert not calls_cudnn(packed)
    assert not calls_cudnn(Mask("bidirectional"))
    assert calls_cudnn(Mask("causal"))
    with pytest.raises(UserError, match="multiple of 128 keys"):
        attention(*arrays, packed, implementation="cudnn")


def test_auto_serves_what_cudnn_cannot(key: jax.Array, tolerance: dict):
    q, k, v = inputs(key, (2, 128, 8, 2, 64))
    visible = decoding_mask(jnp.array([[90], [17]]), 128, jnp.array([0, 5]))
    got = attention(q[:, :1], k, v, visible)
    expected = attention(q[:, :1], k, v, visible, implementation="reference")
    assert relative_error(got, expected) < tolerance["bfloat16"]["rtol"]
    wide = tuple(x.astype(jnp.float32) for x in (q, k, v))
    with pytest.raises(UserError, match="float32"):
        attention(*wide, Mask("causal"), implementation="cudnn")
    assert attention(*wide, Mask("causal")).dtype == jnp.float32
