"""The cache holds what recomputation gives, bit for bit, in every tier; what stopped in between goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.memory.activations import ActivationCache, Trunk
from stackwise_jax.memory.precision import as_stored, from_stored
from stackwise_jax.memory.tiers import DeviceStore, DiskStore, HostStore
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


def make_store(tier: str, folder: Path) -> Any:
    if tier == "disk":
        return DiskStore(folder, REPORTS.append)
    return HostStore(CHUNKS * VARIANTS) if tier == "host" else DeviceStore()


REPORTS: list[str] = []
CHUNKS = N_ROWS // ROWS_PER_CHUNK
ALL = range(CHUNKS)


def make_cache(precision: str = "fp32", store: Any = None) -> ActivationCache:
    return ActivationCache(
        store or DeviceStore(),
        rows,
        rows_per_chunk=ROWS_PER_CHUNK,
        batch_size=B,
        n_chunks=CHUNKS,
        variants=VARIANTS,
        precision=precision,
        dtype=jnp.float32,
    )


def trunk(depth: int, stacks: Any = STACKS) -> Trunk:
    chain = [f"f{'-'.join(str(id(stack)) for stack in stacks[:k])}" for k in range(depth + 1)]
    return Trunk(chain, lambda: embed, [lambda stack=stack: forward(stack) for stack in stacks[:depth]])


def bring(cache: ActivationCache, depth: int, chunks: range = ALL, **options: Any) -> list[float]:
    return [share for _, share in cache.bring(trunk(depth, **options), chunks, on_mismatch="rebuild")]


def recomputed(batch: Batch, depth: int) -> np.ndarray:
    x = embed(batch)
    for stack in STACKS[:depth]:
        x = run_stack(stack, x)
    return np.asarray(x)


BATCHES = [rows(np.array(ids), variant) for ids in ([0, 1], [3, 0], [6, 5], [11, 8]) for variant in range(VARIANTS)]


def is_recomputed(cache: ActivationCache, depth: int) -> bool:
    return all(np.array_equal(cache.read(batch), recomputed(batch, depth)) for batch in BATCHES)


TIERS = ("device", "host", "disk")


@pytest.mark.parametrize("tier", TIERS)
def test_cache_is_recompute_at_every_depth(tier: str, tmp_path: Path):
    cache = make_cache(store=make_store(tier, tmp_path))
    for depth in (0, 1, 2):
        bring(cache, depth)
        assert is_recomputed(cache, depth)
    assert not is_recomputed(cache, 1)


def test_a_cache_is_brought_through_several_stacks_at_once():
    cache = make_cache()
    bring(cache, 2)
    assert is_recomputed(cache, 2)


def test_cache_is_recompute_detects_another_stack():
    cache = make_cache()
    bring(cache, 1, stacks=STACKS[::-1])
    assert not is_recomputed(cache, 1)


def test_progress_counts_every_chunk_of_every_variant():
    cache, n = make_cache(), CHUNKS * VARIANTS
    assert bring(cache, 0) == [(chunk + 1) / n for chunk in range(n)]
    assert bring(cache, 0) == []
    assert bring(cache, 2) == [(chunk + 1) / (2 * n) for chunk in range(2 * n)]


def test_variants_repeat_after_the_last():
    cache = make_cache()
    bring(cache, 0)
    first, again = rows(np.array([1, 2]), 1), rows(np.array([1, 2]), 1 + 3 * VARIANTS)
    np.testing.assert_array_equal(cache.read(first), cache.read(again))
    assert not np.array_equal(cache.read(first), cache.read(rows(np.array([1, 2]), 0)))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("chunks_before", [1, 3, 7])
def test_an_interrupted_advance_goes_on_where_it_stopped(chunks_before: int, tier: str, tmp_path: Path):
    cache = make_cache(store=make_store(tier, tmp_path))
    bring(cache, 0)
    progress: Any = cache.bring(trunk(2), ALL, on_mismatch="rebuild")
    for _ in range(chunks_before):
        next(progress)
    progress.close()
    with pytest.raises(RuntimeError, match="must not be read"):
        cache.read(BATCHES[0])
    assert len(bring(cache, 2)) == 2 * CHUNKS * VARIANTS - chunks_before
    assert is_recomputed(cache, 2)


def test_an_interrupted_advance_detects_a_chunk_that_is_taken_for_advanced():
    cache = make_cache(store=(store := DeviceStore()))
    bring(cache, 0)
    progress: Any = cache.bring(trunk(1), ALL, on_mismatch="rebuild")
    next(progress)
    late = next(number for number in store.chunks() if store.fingerprint(number) == trunk(1).chain[0])
    store.put(late, trunk(1).chain[1], store.take(late) or {})
    bring(cache, 1)
    assert not is_recomputed(cache, 1)


def test_what_is_on_disk_outlives_the_process(tmp_path: Path):
    cache = make_cache(store=(store := make_store("disk", tmp_path)))
    bring(cache, 0)
    progress: Any = cache.bring(trunk(2), ALL, on_mismatch="rebuild")
    next(progress)
    progress.close()
    store.flush()
    again = make_cache(store=make_store("disk", tmp_path))
    assert len(bring(again, 2)) == 2 * CHUNKS * VARIANTS - 1
    assert is_recomputed(again, 2)
    again.clear()
    assert not list(tmp_path.iterdir())


def test_a_window_holds_its_chunks_and_no_others(tmp_path: Path):
    for tier in TIERS:
        store = make_store(tier, tmp_path)
        cache = make_cache(store=store)
        bring(cache, 1, range(1))
        assert len(list(store.chunks())) == VARIANTS
        np.testing.assert_array_equal(cache.read(BATCHES[0]), recomputed(BATCHES[0], 1))
        with pytest.raises(ValueError, match="not in the cache"):
            cache.read(BATCHES[-1])
        bring(cache, 1, range(2, 3))
        np.testing.assert_array_equal(cache.read(BATCHES[-1]), recomputed(BATCHES[-1], 1))


def test_what_is_expected_changes_no_number(tmp_path: Path):
    expected = [(chunk, variant) for chunk in ALL for variant in range(VARIANTS)]
    for tier in TIERS:
        cache = make_cache(store=make_store(tier, tmp_path / tier))
        bring(cache, 1)
        for _ in range(2):
            for batch in BATCHES:
                np.testing.assert_array_equal(cache.read(batch, upcoming=expected), recomputed(batch, 1))


def test_reading_needs_a_whole_depth():
    cache = make_cache()
    with pytest.raises(RuntimeError, match="must not be read"):
        cache.read(BATCHES[0])
    filling = cache.bring(trunk(0), ALL, on_mismatch="rebuild")
    next(filling)
    with pytest.raises(RuntimeError, match="must not be read"):
        cache.read(BATCHES[0])
    list(filling)
    cache.read(BATCHES[0])


def test_a_batch_across_chunks_or_variants_is_refused():
    cache = make_cache()
    bring(cache, 0)
    with pytest.raises(ValueError, match="one chunk"):
        cache.read(rows(np.array([3, 4]), 0))
    mixed = rows(np.array([0, 1]), 0)
    mixed = Batch(mixed.tokens, mixed.segments, mixed.positions, mixed.row_ids, np.array([0, 1], np.int32))
    with pytest.raises(ValueError, match="one variant"):
        cache.read(mixed)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_narrow_storage_rounds_once_per_depth(precision: str):
    cache = make_cache(precision)
    bring(cache, 1)
    for batch in BATCHES:
        rounded = from_stored(as_stored(embed(batch), precision), jnp.float32)
        after = from_stored(as_stored(run_stack(STACKS[0], rounded), precision), jnp.float32)
        np.testing.assert_array_equal(cache.read(batch), after)
    assert not is_recomputed(cache, 1)


def test_a_mismatch_is_rebuilt_or_stops():
    cache = make_cache()
    bring(cache, 1, stacks=STACKS[::-1])
    with pytest.raises(UserError, match=r"cache\.on_mismatch='stop'"):
        list(cache.bring(trunk(1), ALL, on_mismatch="stop"))
    bring(cache, 1)
    assert is_recomputed(cache, 1)
    assert list(make_cache().bring(trunk(0), ALL, on_mismatch="stop"))  # empty: nothing was computed from anything else
