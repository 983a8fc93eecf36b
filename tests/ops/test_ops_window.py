"""Attention inside a window, cut into blocks: the reference on the whole row, values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.ops import attention as attention_module
from stackwise_jax.ops.attention import attention
from stackwise_jax.ops.mask import Mask
from stackwise_jax.ops.window import Cut, cut_rows, find_cut

B, N, K, H = 2, 4, 2, 8
LENGTH = 512


def packed(length: int) -> jax.Array:
    """Rows of three documents and padding, whose borders lie on and beside those of blocks."""
    place = jnp.arange(length)
    rows = [(place >= 128).astype(int) + (place >= 300), (place >= 5).astype(int) + (place >= 255)]
    return jnp.where(place >= length - 40, 0, 1 + jnp.stack(rows))


def arrays_of(length: int, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (N, K, K)
    return tuple(jax.random.normal(k, (B, length, n, H), dtype) for k, n in zip(keys, heads, strict=True))


def value_and_gradients(implementation: str, mask: Mask, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    direction = jax.random.normal(jax.random.key(7), arrays[0].shape, arrays[0].dtype)
    # The window is no argument of the compiled function: it must be known while tracing.
    out, pull = jax.vjp(jax.jit(lambda *qkv: attention(*qkv, mask, implementation=implementation)), *arrays)
    return out, *pull(direction)


@pytest.mark.parametrize("is_packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [1, 64, 100, 128])
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_blocks_are_the_reference_on_the_whole_row(tolerance: dict, kind: Any, window: int, is_packed: bool):
    mask = Mask(kind, packed(LENGTH) if is_packed else None, window=window)
    assert find_cut(mask, LENGTH) is not None
    arrays = arrays_of(LENGTH)
    results = [value_and_gradients(name, mask, arrays) for name in ("xla", "reference")]
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, **tolerance["float32"])


@pytest.mark.parametrize("other", [{"window": 63}, {"window": 65}, {"kind": "causal"}, {"segments": packed(LENGTH)}])
def test_blocks_are_the_reference_detects_another_mask(tolerance: dict, other: dict[str, Any]):
    ours, theirs = Mask("bidirectional", window=64), Mask(**{"kind": "bidirectional", "window": 64, **other})
    arrays = arrays_of(LENGTH)
    got, expected = value_and_gradients("xla", ours, arrays), value_and_gradients("reference", theirs, arrays)
    for one, another in zip(got, expected, strict=True):
        assert not np.allclose(one, another, **tolerance["float32"])


CUTS = [
    (Mask("bidirectional", window=64), 1024, Cut(128, 64, 64)),
    (Mask("bidirectional", window=65), 1024, Cut(128, 128, 128)),
    (Mask("causal", window=64), 1024, Cut(128, 128, 0)),
    (Mask("causal", window=129), 1024, Cut(256, 256, 0)),
    (Mask("causal", window=300), 1536, Cut(384, 384, 0)),
    (Mask("causal", window=300), 1024, None),  # 384 and 512 are the blocks: neither divides it or is short enough
    (Mask("bidirectional", window=64), 256, None),  # a block would read the row
    (Mask("bidirectional", window=64), 1000, None),
    (Mask("bidirectional", window=4096), 1024, None),
    (Mask("bidirectional"), 1024, None),
    (Mask("bidirectional", window=64, ahead=0), 1024, None),
    (Mask("prefix", None, jnp.array([4, 4]), window=64), 1024, None),
    (Mask("block_causal", None, None, 4, window=64), 1024, None),
    (Mask("bidirectional", window=jnp.int32(64)), 1024, None),  # not known while tracing
]


@pytest.mark.parametrize(("mask", "length", "cut"), CUTS)
def test_what_is_cut_and_how(mask: Mask, length: int, cut: Cut | None):
    assert find_cut(mask, length) == cut
    if cut is not None:
        assert (cut.before + cut.after) % cut.places == 0
        assert cut.keys % 128 == 0


@pytest.mark.parametrize("length", [384, 500, 512])
def test_rows_that_are_not_cut_are_attended_whole(tolerance: dict, length: int, monkeypatch: pytest.MonkeyPatch):
    """384 places would be read by every block, 500 are no blocks, and a traced window cuts nothing."""
    mask, arrays = Mask("bidirectional", window=100), arrays_of(length)
    calls: list[Any] = []
    monkeypatch.setattr(attention_module, "cut_rows", lambda *own: calls.append(own) or cut_rows(*own))
    expected = attention(*arrays, mask, implementation="reference")
    assert not calls
    whole = jax.jit(lambda own: attention(*arrays, own))(mask)  # an argument is no number while tracing
    assert not calls
    found = attention(*arrays, mask)
    assert len(calls) == (length == 512)
    np.testing.assert_allclose(found, expected, **tolerance["float32"])
    np.testing.assert_allclose(whole, expected, **tolerance["float32"])


def test_the_mask_of_blocks_is_that_of_the_row():
    """Every place of the row that is seen is seen once, by the queries that see it; each query sees itself."""
    for mask in (Mask("bidirectional", packed(LENGTH), window=100), Mask("causal", packed(LENGTH), window=64)):
        cut = find_cut(mask, LENGTH)
        assert cut is not None
        *_, visible = cut_rows(*arrays_of(LENGTH), mask, cut)
        found = np.zeros((B, LENGTH + cut.keys, LENGTH + cut.keys), int)
        blocks = LENGTH // cut.places
        for number, own in enumerate(np.asarray(visible[:, 0])):
            row, start = number // blocks, number % blocks * cut.places
            found[row, start : start + cut.places, start : start + cut.keys] += own
        end = cut.before + LENGTH
        np.testing.assert_array_equal(found[:, :LENGTH, cut.before : end], mask.as_array(LENGTH)[:, 0])
        assert found.sum() == found[:, :LENGTH, cut.before : end].sum()
        assert found.diagonal(cut.before, 1, 2)[:, :LENGTH].all()


def test_values_of_another_width_and_sixteen_bits(tolerance: dict):
    q, k, v = arrays_of(LENGTH, jnp.bfloat16)
    mask, v = Mask("causal", packed(LENGTH), window=64), v[..., :6]
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask, implementation="reference")
    with jax.numpy_dtype_promotion("strict"):
        found = attention(q, k, v, mask)
    assert (found.dtype, found.shape) == (jnp.bfloat16, exact.shape)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, **tolerance["bfloat16"])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU lacks")
def test_fp16_on_a_cpu_takes_the_reference():
    arrays, mask = arrays_of(LENGTH, jnp.float16), Mask("bidirectional", window=64)
    np.testing.assert_array_equal(attention(*arrays, mask), attention(*arrays, mask, implementation="reference"))
