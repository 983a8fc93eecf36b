"""Tiers: where chunks are, what a damaged one costs, and which tier a cache goes to."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.errors import UserError
from stackwise_jax.memory import shards
from stackwise_jax.memory.activations import ActivationCache, Trunk
from stackwise_jax.memory.precision import as_stored, from_stored
from stackwise_jax.memory.shards import ShardFolder
from stackwise_jax.memory.tiers import CHUNKS_IN_FLIGHT, DeviceStore, DiskStore, HostStore, Room, choose_tier
from stackwise_jax.types import Batch

C, T, D = 4, 4, 8
GIB = 2**30


def chunk(seed: int) -> dict[str, jax.Array]:
    return as_stored(jnp.array(np.random.default_rng(seed).normal(size=(C, T, D)), jnp.float32), "fp8")


def make_stores(folder: Path) -> list[Any]:
    return [DeviceStore(), HostStore(8), DiskStore(folder, print)]


def test_what_is_put_is_read_taken_and_dropped(tmp_path: Path) -> None:
    for store in make_stores(tmp_path):
        for number in range(8):
            store.put(number, f"f{number}", chunk(number))
        for number in (3, 3, 7, 0):
            store.expect((number + 1) % 8)
            jax.tree.map(np.testing.assert_array_equal, store.read(number), chunk(number))
            assert store.fingerprint(number) == f"f{number}"
        taken = store.take(2)
        jax.tree.map(np.testing.assert_array_equal, taken, chunk(2))
        store.put(2, "changed", chunk(20))
        store.flush()
        jax.tree.map(np.testing.assert_array_equal, store.read(2), chunk(20))
        store.drop(2)
        assert store.read(2) is None
        assert store.take(2) is None
        assert store.fingerprint(2) is None
        assert sorted(store.chunks()) == [0, 1, 3, 4, 5, 6, 7]


def test_chunks_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is expected and put, no more chunks wait on the device than the plan counts."""
    waited: list[int] = []
    original = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(1) or original(tree))
    store = HostStore(16)
    for number in range(16):
        store.put(number, "f", chunk(number))
        store.expect(number - 1)
        assert len(store._ahead._chunks) + len(store._writing) <= CHUNKS_IN_FLIGHT
    assert len(waited) == 1 + 16 - 2  # the pool once, then every copy but the last two


def test_the_host_tier_is_pinned_memory() -> None:
    store = HostStore(1)
    store.put(0, "f", chunk(0))
    assert store._chunks[0].stored["values"].sharding.memory_kind == "pinned_host"
    read = store.read(0)
    assert read is not None
    assert read["values"].sharding.memory_kind == "device"


def damage(path: Path, draw: random.Random) -> str:
    """Damages one file in one of the ways that disks and people have."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "flip", "flip", "cut", "zeros", "missing", "empty", "longer", "swapped"))
    match kind:
        case "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "cut":
            del data[draw.randrange(len(data)) :]
        case "zeros":
            start = draw.randrange(len(data) - 8)
            data[start : start + 8] = b"\xff" * 8 if not any(data[start : start + 8]) else bytes(8)
        case "empty":
            data.clear()
        case "longer":
            data += b"\0"
        case "swapped":
            others = [other for other in path.parent.glob("*.chunk") if other != path]
            data = bytearray(draw.choice(others).read_bytes())
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(data))
    return kind


RNG = np.random.default_rng(0)
ROWS, B = 12, 2
TOKENS = RNG.integers(0, 16, (ROWS, T)).astype(np.int32)
TABLE = jnp.array(RNG.normal(size=(16, D)), jnp.float32)
STACK = jnp.array(RNG.normal(size=(D, D)), jnp.float32)


def rows(row_ids: np.ndarray, variant: int) -> Batch:
    zeros = np.zeros((len(row_ids), T), np.int32)
    return Batch(TOKENS[row_ids], zeros + 1, zeros, row_ids.astype(np.int32), np.zeros(len(row_ids), np.int32))


@jax.jit
def embed(batch: Batch) -> jax.Array:
    return TABLE[batch.tokens]


@jax.jit
def run_stack(x: jax.Array, batch: Batch) -> jax.Array:
    return jnp.tanh(x @ STACK)


TRUNK = Trunk(["f0", "f1"], lambda: embed, [lambda: run_stack])


def open_cache(folder: Path, reports: list[str]) -> ActivationCache:
    return ActivationCache(
        DiskStore(folder, reports.append),
        rows,
        rows_per_chunk=4,
        batch_size=B,
        n_chunks=3,
        variants=1,
        precision="fp32",
        dtype=jnp.float32,
    )


def is_right(cache: ActivationCache) -> bool:
    batches = [rows(np.arange(first, first + B), 0) for first in range(0, ROWS, B)]
    return all(np.array_equal(cache.read(batch), run_stack(embed(batch), batch)) for batch in batches)


def test_no_damage_to_a_shard_is_silent_and_it_alone_is_computed_again(tmp_path: Path) -> None:
    """200 shards damaged, half of them under a cache that is being read, half between two starts."""
    kinds = set()
    for trial in range(200):
        draw, reports = random.Random(trial), []
        folder = tmp_path / str(trial)
        cache = open_cache(folder, reports)
        list(cache.bring(TRUNK, range(3), on_mismatch="rebuild"))
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.chunk")}
        victim = folder / f"{draw.randrange(3):06d}.chunk"
        kind = damage(victim, draw)
        kinds.add(kind)
        if trial % 2:
            cache = open_cache(folder, reports)
            list(cache.bring(TRUNK, range(3), on_mismatch="rebuild"))
        assert is_right(cache), (trial, kind)
        cache._store.flush()
        after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.chunk")}
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {victim.name}, (trial, kind)
        if not trial % 2:
            assert len(reports) == 1
            assert victim.name in reports[0]
    assert len(kinds) == 7


def test_only_the_digests_tell(tmp_path: Path) -> None:
    """The twin: flipped bits under digests that were made to match reach the numbers."""
    cache = open_cache(tmp_path, [])
    list(cache.bring(TRUNK, range(3), on_mismatch="rebuild"))
    path = tmp_path / "000001.chunk"
    _, header, payload = path.read_bytes().split(b"\n", 2)
    flipped = bytearray(payload)
    flipped[-2] ^= 1
    facts = json.loads(header)
    assert facts["digests"] == [hashlib.sha256(payload).hexdigest()]
    facts["digests"] = [hashlib.sha256(flipped).hexdigest()]
    header = json.dumps(facts).encode() + b"\n"
    path.write_bytes(hashlib.sha256(header).hexdigest().encode() + b"\n" + header + flipped)
    assert not is_right(cache)


def test_large_shards_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_PIECE_BYTES", 100)
    reports: list[str] = []
    folder = ShardFolder(tmp_path, lambda arrays: arrays, reports.append)
    arrays = {name: np.asarray(leaf) for name, leaf in chunk(1).items()}
    for victim in range(3):
        folder.write_behind(victim, "f", arrays)
    folder.flush()
    jax.tree.map(np.testing.assert_array_equal, folder.read(0), arrays)
    data = bytearray((tmp_path / "000001.chunk").read_bytes())
    data[-150] ^= 4
    (tmp_path / "000001.chunk").write_bytes(data)
    assert folder.read(1) is None
    assert "000001.chunk is damaged (its digest does not match)" in reports[0]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ShardFolder(tmp_path, lambda arrays: arrays, print)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write", fail)
    folder.write_behind(0, "f", chunk(0))
    with pytest.raises(UserError, match=r"cache\.folder.*No space left on device.*free space"):
        folder.flush()
    assert folder.read(0) is None


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cache\.folder"):
        DiskStore(tmp_path / "file" / "cache", print)


def test_the_first_tier_with_room_is_taken() -> None:
    room = Room(device=2 * GIB, host=8 * GIB, disk=64 * GIB)
    assert [choose_tier("auto", n * GIB, room) for n in (1, 2, 3, 8, 9, 64)] == [
        *("device", "device", "host", "host", "disk", "disk")
    ]
    assert choose_tier("disk", GIB, room) == "disk"
    assert choose_tier("auto", 3 * GIB, Room(device=None, host=4 * GIB, disk=0)) == "device"  # a CPU's memory


@pytest.mark.parametrize(("wanted", "size"), [("auto", 65), ("device", 3), ("host", 9), ("disk", 65)])
def test_what_fits_nowhere_is_one_line_with_a_remedy(wanted: str, size: int) -> None:
    room = Room(device=2 * GIB, host=8 * GIB, disk=64 * GIB)
    with pytest.raises(UserError, match=rf"takes {size}\.0 GiB.*device 2\.0 GiB.*cache\.window_gib=57\.6"):
        choose_tier(wanted, size * GIB, room)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.integers(1, 5))
def test_fp8_rows_round_within_their_bound(seed: int, exponent: float, width: int) -> None:
    """Against ml_dtypes' own rounding in NumPy, and within 1/16 of a number or 2**-10 of its token's largest."""
    x = np.random.default_rng(seed).standard_cauchy((3, width)).astype(np.float32) * np.float32(2.0**exponent)
    stored = as_stored(jnp.array(x), "fp8")
    largest = np.abs(x).max(-1, keepdims=True)
    scales = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(448)
    expected = np.clip(x / scales, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_allclose(np.asarray(stored["scales"]), scales, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(stored["values"]).astype(np.float32), expected.astype(np.float32), rtol=0.13)
    back = np.asarray(from_stored(stored, jnp.float32))
    assert np.all(np.abs(back - x) <= np.maximum(np.abs(x) / 16, largest * 2.0**-10) * 1.001)


def test_fp8_of_zeros_is_zeros() -> None:
    stored = as_stored(jnp.zeros((2, 4)), "fp8")
    np.testing.assert_array_equal(from_stored(stored, jnp.float32), np.zeros((2, 4), np.float32))
    assert stored["values"].dtype == jnp.float8_e4m3fn
