"""Where the chunks of an activation cache live: on the device, in pinned host memory, or on disk.

A tier never decides what is in a chunk. Every chunk carries the fingerprint of what it was computed from, so a chunk
that is missing, damaged or of another depth is seen as such, alone.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax

from stackwise_jax.errors import UserError
from stackwise_jax.memory import placement
from stackwise_jax.memory.budget import readable_bytes
from stackwise_jax.memory.precision import Stored
from stackwise_jax.memory.shards import ShardFolder

TIERS = ("device", "host", "disk")

# Chunks on the device at once: the one in use, two that are coming, two whose copies back are under way.
CHUNKS_READ, _WRITING = 3, 2
CHUNKS_IN_FLIGHT = CHUNKS_READ + _WRITING


@runtime_checkable
class ChunkStore(Protocol):
    """Chunks by number. The cache never asks which tier it has."""

    def fingerprint(self, chunk: int) -> str | None:
        """What a chunk was computed from; None when there is no such chunk."""
        ...

    def chunks(self) -> Iterable[int]:
        """The chunks that there are."""
        ...

    def expect(self, chunk: int) -> None:
        """Begins to bring a chunk to the device, which will be read or taken soon; returns at once."""
        ...

    def read(self, chunk: int) -> Stored | None:
        """Returns a chunk on the device for reading; None when it is missing or damaged, and then it is gone."""
        ...

    def take(self, chunk: int) -> Stored | None:
        """As `read`, for changing: the caller may donate it, and gives the changed chunk back with `put`."""
        ...

    def put(self, chunk: int, fingerprint: str, stored: Stored) -> None:
        """Stores a chunk; the caller gives it up. Copies may still be under way when it returns."""
        ...

    def drop(self, chunk: int) -> None:
        """Forgets a chunk."""
        ...

    def flush(self) -> None:
        """Waits for every copy; raises what went wrong in one."""
        ...


@dataclasses.dataclass(frozen=True)
class _Chunk:
    fingerprint: str
    stored: Stored


class DeviceStore:
    """Chunks as device arrays: the fastest tier, for caches that fit beside the live part."""

    def __init__(self) -> None:
        self._chunks: dict[int, _Chunk] = {}

    def fingerprint(self, chunk: int) -> str | None:
        return self._chunks[chunk].fingerprint if chunk in self._chunks else None

    def chunks(self) -> Iterable[int]:
        return list(self._chunks)

    def expect(self, chunk: int) -> None:
        pass

    def read(self, chunk: int) -> Stored | None:
        return self._chunks[chunk].stored if chunk in self._chunks else None

    def take(self, chunk: int) -> Stored | None:
        return self._chunks.pop(chunk).stored if chunk in self._chunks else None

    def put(self, chunk: int, fingerprint: str, stored: Stored) -> None:
        self._chunks[chunk] = _Chunk(fingerprint, stored)

    def drop(self, chunk: int) -> None:
        self._chunks.pop(chunk, None)

    def flush(self) -> None:
        pass


class _Ahead:
    """Chunks that are on the device or on their way to it; the one used longest ago is given up first."""

    def __init__(self) -> None:
        self._chunks: collections.OrderedDict[int, Stored] = collections.OrderedDict()

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._chunks

    def add(self, chunk: int, stored: Stored) -> None:
        self._chunks[chunk] = stored
        while len(self._chunks) > CHUNKS_READ:
            self._chunks.popitem(last=False)

    def get(self, chunk: int) -> Stored:
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]

    def discard(self, chunk: int) -> None:
        self._chunks.pop(chunk, None)


class HostStore:
    """Chunks in pinned host memory. What is expected is copied in under the computation before it, what was changed is
    copied out under the computation after it, and no more than two copies out are ever under way.

    Device memory that waits for a copy is bounded by `CHUNKS_IN_FLIGHT`.
    """

    def __init__(self, n_chunks: int) -> None:
        """An empty store for up to `n_chunks` chunks."""
        self._n_chunks, self._is_warm = n_chunks, False
        self._chunks: dict[int, _Chunk] = {}
        self._ahead = _Ahead()
        self._writing: collections.deque[Stored] = collections.deque()

    def fingerprint(self, chunk: int) -> str | None:
        return self._chunks[chunk].fingerprint if chunk in self._chunks else None

    def chunks(self) -> Iterable[int]:
        return list(self._chunks)

    def expect(self, chunk: int) -> None:
        if chunk in self._chunks and chunk not in self._ahead:
            self._ahead.add(chunk, placement.from_pinned(self._chunks[chunk].stored))

    def read(self, chunk: int) -> Stored | None:
        if chunk not in self._chunks:
            return None
        self.expect(chunk)
        return self._ahead.get(chunk)

    def take(self, chunk: int) -> Stored | None:
        stored = self.read(chunk)
        self._ahead.discard(chunk)
        return stored

    def put(self, chunk: int, fingerprint: str, stored: Stored) -> None:
        self._ahead.discard(chunk)
        self._warm_up(stored)
        pinned = placement.to_pinned(stored)
        self._chunks[chunk] = _Chunk(fingerprint, pinned)
        self._writing.append(pinned)
        if len(self._writing) > _WRITING:
            jax.block_until_ready(self._writing.popleft())

    def drop(self, chunk: int) -> None:
        self._chunks.pop(chunk, None)
        self._ahead.discard(chunk)

    def flush(self) -> None:
        while self._writing:
            jax.block_until_ready(self._writing.popleft())

    def _warm_up(self, like: Stored) -> None:
        """Touches the memory of all chunks once, so that no later copy waits for a page's first use.

        That is 20 times slower than a copy; JAX's pool of pinned memory keeps what it was once given.
        """
        if not self._is_warm:
            jax.block_until_ready([placement.to_pinned(like) for _ in range(self._n_chunks + _WRITING)])
            self._is_warm = True


class DiskStore:
    """Chunks as files with digests, which outlive the process; read ahead and written behind by threads."""

    def __init__(
        self, folder: Path, report: Callable[[str], None], place: placement.Placement = placement.ONE_DEVICE
    ) -> None:
        """Opens a folder, with the chunks that an earlier process left in it; `report` is told of damaged ones."""
        self._shards = ShardFolder(folder, place.to_chunk, report)
        self._ahead = _Ahead()

    def fingerprint(self, chunk: int) -> str | None:
        return self._shards.fingerprint(chunk)

    def chunks(self) -> Iterable[int]:
        return self._shards.numbers()

    def expect(self, chunk: int) -> None:
        if chunk not in self._ahead:
            self._shards.read_ahead(chunk)

    def read(self, chunk: int) -> Stored | None:
        if chunk not in self._ahead:
            stored = self._shards.read(chunk)
            if stored is None:
                return None
            self._ahead.add(chunk, stored)
        return self._ahead.get(chunk)

    def take(self, chunk: int) -> Stored | None:
        stored = self.read(chunk)
        self._ahead.discard(chunk)
        return stored

    def put(self, chunk: int, fingerprint: str, stored: Stored) -> None:
        self._ahead.discard(chunk)
        self._shards.write_behind(chunk, fingerprint, placement.to_pinned(stored))

    def drop(self, chunk: int) -> None:
        self._ahead.discard(chunk)
        self._shards.remove(chunk)

    def flush(self) -> None:
        self._shards.flush()


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes that each place can take; None: unknown (device: it has no memory of its own)."""

    device: int | None
    host: int | None
    disk: int


def choose_tier(wanted: str, cache_bytes: int, room: Room) -> str:
    """The first tier with room for a cache, or the one that is wanted.

    Args:
      wanted: auto or a tier.
      cache_bytes: of the whole cache.
      room: what is free once everything else of the run has its place.

    Raises:
      UserError: it does not fit where it is wanted, or nowhere.
    """
    free = {"device": room.device if room.device is not None else room.host, "host": room.host, "disk": room.disk}
    for tier in TIERS if wanted == "auto" else (wanted,):
        if (space := free[tier]) is None or cache_bytes <= space:
            return tier
    place = "any tier" if wanted == "auto" else f"cache.tier={wanted!r}"
    has = ", ".join(f"{tier} {readable_bytes(max(0, space))}" for tier, space in free.items() if space is not None)
    largest = max(space for space in free.values() if space is not None)
    raise UserError(
        f"the activation cache takes {readable_bytes(cache_bytes)}, more than {place} has free ({has}); set "
        f"cache.window_gib={max(0.1, 0.9 * max(0, largest) / 2**30):.1f} to walk the corpus in windows, store it in "
        "fewer bits (precision.cache), or bound data.max_rows"
    )
