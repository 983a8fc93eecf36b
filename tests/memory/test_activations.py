"""The cache holds what recomputation gives, bit for bit; an interrupted advance goes on where it stopped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.memory.activations import ActivationCache, DeviceStore
from stackwise_jax.types import Batch

B, T, D, V = 2, 8, 16, 32
N_ROWS, ROWS_PER_CHUNK, VARIANTS = 12, 4, 2
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (N_ROWS, T)).astype(np.int32)
TABLE = jnp.array(RNG.normal(size=(VARIANTS, V, D)), jnp.float32)
STACKS = [jnp.array(RNG.normal(size=(D, D)), jnp.float32) for _ in range(2)]


def rows(row_ids: np.ndarray, variant: int) -> Batch:
    visits = np.full(len(row_ids), variant, np.int32)
    zeros = np.zeros((len(row_ids), T), np.int32)
    return Batch(TOKENS[row_ids], zeros + 1, zeros, np.asarray(row_ids, np.int32), visits)


@jax.jit
def embed(batch: Batch) -> Any:
    return TABLE[batch.visits[:, None], batch.tokens]


@jax.jit
def run_stack(stack: Any, x: Any) -> Any:
    return jnp.tanh(x.astype(jnp.float32) @ stack) + x


def forward(stack: Any) -> Callable[[Any, Batch], Any]:
    return lambda x, batch: run_stack(stack, x)


def make_cache(dtype: Any = jnp.float32) -> ActivationCache:
    return ActivationCache(
        DeviceStore(),
        rows,
        n_rows=N_ROWS,
        rows_per_chunk=ROWS_PER_CHUNK,
        batch_size=B,
        variants=VARIANTS,
        dtype=dtype,
    )


def finish(progress: Any) -> list[float]:
    return list(progress)


def filled(dtype: Any = jnp.float32) -> ActivationCache:
    cache = make_cache(dtype)
    finish(cache.fill(embed, "f0"))
    return cache


def recomputed(batch: Batch, depth: int) -> np.ndarray:
    x = embed(batch)
    for stack in STACKS[:depth]:
        x = run_stack(stack, x)
    return np.asarray(x)


BATCHES = [rows(np.array(ids), variant) for ids in ([0, 1], [3, 0], [6, 5], [11, 8]) for variant in range(VARIANTS)]


def is_recomputed(cache: ActivationCache, depth: int) -> bool:
    return all(np.array_equal(cache.read(batch), recomputed(batch, depth)) for batch in BATCHES)


def test_cache_is_recompute_at_every_depth():
    cache = filled()
    assert is_recomputed(cache, 0)
    for depth, stack in enumerate(STACKS, 1):
        finish(cache.advance(forward(stack), f"f{depth}"))
        assert (cache.fingerprint, cache.cursor) == (f"f{depth}", 0)
        assert is_recomputed(cache, depth)


def test_cache_is_recompute_detects_another_stack_and_another_depth():
    cache = filled()
    finish(cache.advance(forward(STACKS[1]), "f1"))
    assert not is_recomputed(cache, 1)
    assert not is_recomputed(cache, 0)


def test_progress_counts_every_chunk_of_every_variant():
    cache = make_cache()
    assert cache.n_chunks == N_ROWS // ROWS_PER_CHUNK * VARIANTS
    expected = [(chunk + 1) / cache.n_chunks for chunk in range(cache.n_chunks)]
    assert finish(cache.fill(embed, "f0")) == expected
    assert finish(cache.advance(forward(STACKS[0]), "f1")) == expected


def test_variants_repeat_after_the_last():
    cache = filled()
    first, again = rows(np.array([1, 2]), 1), rows(np.array([1, 2]), 1 + 3 * VARIANTS)
    np.testing.assert_array_equal(cache.read(first), cache.read(again))
    assert not np.array_equal(cache.read(first), cache.read(rows(np.array([1, 2]), 0)))


@pytest.mark.parametrize("chunks_before", [1, 3, 6])
def test_an_interrupted_advance_goes_on_where_it_stopped(chunks_before: int):
    cache = filled()
    progress: Any = cache.advance(forward(STACKS[0]), "f1")
    for _ in range(chunks_before):
        next(progress)
    progress.close()
    assert (cache.fingerprint, cache.cursor) == (None, chunks_before)
    finish(cache.advance(forward(STACKS[0]), "f1"))
    assert is_recomputed(cache, 1)


def test_an_interrupted_advance_detects_a_restart_from_the_first_chunk():
    cache = filled()
    next(cache.advance(forward(STACKS[0]), "f1"))
    cache.cursor = 0
    finish(cache.advance(forward(STACKS[0]), "f1"))
    assert not is_recomputed(cache, 1)


def test_a_fill_after_an_interrupted_advance_starts_over():
    cache = filled()
    next(cache.advance(forward(STACKS[0]), "f1"))
    finish(cache.fill(embed, "f0"))
    assert is_recomputed(cache, 0)


def test_reading_needs_a_whole_depth():
    cache = make_cache()
    with pytest.raises(RuntimeError, match="must not be read"):
        cache.read(BATCHES[0])
    filling = cache.fill(embed, "f0")
    next(filling)
    with pytest.raises(RuntimeError, match="must not be read"):
        cache.read(BATCHES[0])
    finish(filling)
    cache.read(BATCHES[0])
    next(cache.advance(forward(STACKS[0]), "f1"))
    with pytest.raises(RuntimeError, match="must not be read"):
        cache.read(BATCHES[0])


def test_a_batch_across_chunks_or_variants_is_refused():
    cache = filled()
    with pytest.raises(ValueError, match="one chunk"):
        cache.read(rows(np.array([3, 4]), 0))
    mixed = rows(np.array([0, 1]), 0)
    mixed = Batch(mixed.tokens, mixed.segments, mixed.positions, mixed.row_ids, np.array([0, 1], np.int32))
    with pytest.raises(ValueError, match="one variant"):
        cache.read(mixed)


def test_chunks_must_divide():
    for n_rows, rows_per_chunk in ((10, 4), (12, 3)):
        with pytest.raises(ValueError, match="do not divide"):
            ActivationCache(
                DeviceStore(),
                rows,
                n_rows=n_rows,
                rows_per_chunk=rows_per_chunk,
                batch_size=B,
                variants=1,
                dtype=jnp.float32,
            )


def test_bfloat16_storage_rounds_once_per_depth():
    cache = filled(jnp.bfloat16)
    finish(cache.advance(forward(STACKS[0]), "f1"))
    for batch in BATCHES:
        stored = cache.read(batch)
        assert stored.dtype == jnp.bfloat16
        rounded = embed(batch).astype(jnp.bfloat16)
        np.testing.assert_array_equal(stored, run_stack(STACKS[0], rounded).astype(jnp.bfloat16))
    assert not is_recomputed(cache, 1)


def test_require_rebuilds_or_stops():
    cache = make_cache()
    assert not cache.require("f0", on_mismatch="stop")  # empty: nothing was computed from anything else
    finish(cache.fill(embed, "f0"))
    assert cache.require("f0", on_mismatch="stop")
    assert not cache.require("other", on_mismatch="rebuild")
    with pytest.raises(UserError, match=r"cache\.on_mismatch='stop'"):
        cache.require("other", on_mismatch="stop")
