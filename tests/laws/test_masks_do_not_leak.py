"""What a mask hides from a place cannot change what a rack puts out there, not by a bit; what it shows does.

A mask is closed (a law of `tests/ops/test_ops_mask.py`), so this holds for any number of blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import apply_rack, row_context
from stackwise_jax.ops.mask import Mask
from tests.generate.reading import MODEL, rack_of

T = 12
RACK = rack_of(MODEL)
ROW = np.random.default_rng(0).integers(1, 16, T)
POSITIONS = jnp.arange(T)[None, :] % 6
ONE_DOCUMENT = [1] * T
PACKED = [1, 1, 1, 2, 2, 0] * 2  # of block_diffusion, the same in both halves
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {},
    "prefix": {"prefix_lengths": jnp.array([5])},
    "block_causal": {"block_length": 4},
    "block_diffusion": {"block_length": 2},
}


def context_of(kind: str, segments: list[int]) -> Context:
    return row_context(MODEL, jnp.array([segments]), POSITIONS, kind=kind, **KINDS[kind])


def visible(kind: str, segments: list[int]) -> np.ndarray:
    mask = context_of(kind, segments).mask
    assert isinstance(mask, Mask)
    return np.asarray(mask.as_array(T)[0, 0])


@jax.jit
def run(row: jax.Array, context: Context) -> jax.Array:
    return apply_rack(RACK, row[None, :], context, MODEL, dtype=jnp.float32)[0]


@functools.cache
def moved(kind: str, packed: bool) -> np.ndarray:
    """[T T] booleans: entry [t, s] says that another token at s changes some bit of the output at t."""
    context = context_of(kind, PACKED if packed else ONE_DOCUMENT)
    base = np.asarray(run(jnp.array(ROW), context))
    columns = []
    for s in range(T):
        other = ROW.copy()
        other[s] = 16 + s % 2
        columns.append(np.any(np.asarray(run(jnp.array(other), context)) != base, axis=-1))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_what_is_seen_changes_a_place(kind: str, packed: bool):
    np.testing.assert_array_equal(moved(kind, packed), visible(kind, PACKED if packed else ONE_DOCUMENT))


@pytest.mark.parametrize(("kind", "leaking"), [("causal", "block_causal"), ("block_causal", "bidirectional")])
def test_exactly_what_is_seen_detects_a_wider_mask(kind: str, leaking: str):
    hidden = ~visible(kind, ONE_DOCUMENT)
    assert not np.any(moved(kind, False) & hidden)
    assert np.any(moved(leaking, False) & hidden)


def test_exactly_what_is_seen_detects_rows_that_are_not_isolated():
    other_document = np.not_equal.outer(PACKED, PACKED)
    for kind in KINDS:
        assert np.any(moved(kind, False) & other_document)
        assert not np.any(moved(kind, True) & other_document)
