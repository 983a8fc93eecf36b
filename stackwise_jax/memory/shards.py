"""Chunks as files: raw bytes under a SHA-256, read ahead and written behind by threads.

    NNNNNN.chunk    a line: the digest of the next; a line of JSON: number, fingerprint, arrays, digests; then bytes

The bytes are read, written and digested in pieces, several at a time: one thread digests no faster than a disk reads.
A file is written under another name and renamed, so it is the old chunk or the new one. Every reading checks every
digest; a file that fails is removed and reported, and its chunk counts as missing.
"""

import concurrent.futures
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from stackwise_jax.errors import UserError
from stackwise_jax.memory.budget import readable_bytes
from stackwise_jax.types import AnyArray

_READ_AHEAD, _WRITE_BEHIND = 2, 2
_PIECE_BYTES = 8 * 2**20
_PIECES = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), "cache-pieces")
_HEADER_LIMIT = 2**20
_SUFFIX = ".chunk"

Arrays = dict[str, np.ndarray]
Load = Callable[[Arrays], dict[str, Any]]
"""What a reading thread does with a shard's arrays: copies them to the device."""


class DamagedShardError(Exception):
    """A file that does not hold what was written; the message says how."""


class ShardFolder:
    """A folder of shards, for one process at a time."""

    def __init__(self, folder: Path, load: Load, report: Callable[[str], None]) -> None:
        self._folder, self._load, self._report = folder, load, report
        self._fingerprints: dict[int, str] = {}
        self._reading: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        self._writing: dict[int, concurrent.futures.Future[None]] = {}
        self._readers = concurrent.futures.ThreadPoolExecutor(_READ_AHEAD, "cache-read")
        self._writers = concurrent.futures.ThreadPoolExecutor(_WRITE_BEHIND, "cache-write")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{_SUFFIX}.tmp"):
                left.unlink()
        except OSError as error:
            raise UserError(f"cache.folder: {folder} cannot be written: {error.strerror or error}") from None
        for path in folder.glob(f"*{_SUFFIX}"):
            if path.stem.isdecimal() and (fingerprint := _peek(path, int(path.stem))):
                self._fingerprints[int(path.stem)] = fingerprint

    def numbers(self) -> list[int]:
        """The chunks that there are, as far as their headers say."""
        return sorted(self._fingerprints)

    def fingerprint(self, number: int) -> str | None:
        """What a chunk was computed from, by its header; None when there is none."""
        return self._fingerprints.get(number)

    def read_ahead(self, number: int) -> None:
        """Begins to read a chunk in a thread."""
        if number not in self._fingerprints or number in self._reading:
            return
        self._finish_writing(number)
        while len(self._reading) >= _READ_AHEAD:  # expected once, but never read
            self._reading.pop(next(iter(self._reading)))
        path, fingerprint = self._path(number), self._fingerprints[number]
        self._reading[number] = self._readers.submit(lambda: self._load(_read(path, number, fingerprint)))

    def read(self, number: int) -> dict[str, Any] | None:
        """Returns a chunk, loaded; None when there is none, or it was damaged, which is reported and removes it."""
        self.read_ahead(number)
        future = self._reading.pop(number, None)
        if future is None:
            return None
        try:
            return future.result()
        except DamagedShardError as error:
            self._report(f"{self._path(number)} is damaged ({error}); that chunk of the cache is computed again")
            self.remove(number)
            return None

    def write_behind(self, number: int, fingerprint: str, arrays: Mapping[str, AnyArray]) -> None:
        """Begins to write a chunk; waits for an earlier one when too many are under way."""
        self._reading.pop(number, None)
        self._finish_writing(number)
        while len(self._writing) >= _WRITE_BEHIND:
            self._finish_writing(next(iter(self._writing)))
        self._fingerprints[number] = fingerprint
        self._writing[number] = self._writers.submit(_write, self._path(number), number, fingerprint, arrays)

    def remove(self, number: int) -> None:
        """Forgets a chunk."""
        self._finish_writing(number)
        self._reading.pop(number, None)
        self._fingerprints.pop(number, None)
        self._path(number).unlink(missing_ok=True)

    def flush(self) -> None:
        """Waits for every write."""
        for number in list(self._writing):
            self._finish_writing(number)

    def _finish_writing(self, number: int) -> None:
        future = self._writing.pop(number, None)
        if future is None:
            return
        try:
            future.result()
        except OSError as error:
            self._fingerprints.pop(number, None)
            free = readable_bytes(shutil.disk_usage(self._folder).free)
            raise UserError(
                f"cache.folder: {self._folder} cannot be written ({error.strerror or error}, {free} free); free space "
                "and start again, give another cache.folder, or set cache.window_gib or precision.cache"
            ) from None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}{_SUFFIX}"


def _write(path: Path, number: int, fingerprint: str, arrays: Mapping[str, AnyArray]) -> None:
    """Writes a shard; waits for arrays that are still being computed."""
    host = {name: np.ascontiguousarray(np.asarray(array)) for name, array in sorted(arrays.items())}
    kinds = {name: [array.dtype.name, list(array.shape)] for name, array in host.items()}
    payload = np.concatenate([array.reshape(-1).view(np.uint8) for array in host.values()])
    pieces = _pieces(payload)
    facts = {
        "number": number,
        "fingerprint": fingerprint,
        "arrays": kinds,
        "digests": list(_PIECES.map(_digest, pieces)),
    }
    header = json.dumps(facts).encode() + b"\n"
    start = _digest(header).encode() + b"\n" + header
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(start)
            file.write(payload.data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path, number: int, fingerprint: str) -> Arrays:
    """Reads a shard and checks that it is the one that was written under that number."""
    try:
        with path.open("rb") as file:
            facts, offset = _header(file.read(_HEADER_LIMIT))
            if (facts["number"], facts["fingerprint"]) != (number, fingerprint):
                raise DamagedShardError("it is another chunk's")
            sizes = {name: _bytes(*kind) for name, kind in facts["arrays"].items()}
            payload = np.empty(sum(sizes.values()), np.uint8)
            if os.fstat(file.fileno()).st_size != offset + len(payload):
                raise DamagedShardError("its size is not what was written")
            pieces = _pieces(payload)
            starts = range(offset, offset + len(payload), _PIECE_BYTES)
            found = _PIECES.map(lambda piece, start: _read_piece(file.fileno(), piece, start), pieces, starts)
            if list(found) != facts["digests"]:
                raise DamagedShardError("its digest does not match")
    except OSError as error:
        raise DamagedShardError(error.strerror or str(error)) from None
    ends = np.cumsum(list(sizes.values()))
    parts = zip(facts["arrays"].items(), ends, sizes.values(), strict=True)
    return {
        name: payload[end - size : end].view(jnp.dtype(dtype)).reshape(shape)
        for (name, (dtype, shape)), end, size in parts
    }


def _peek(path: Path, number: int) -> str | None:
    """The fingerprint in a shard's header; None when it cannot be that of this chunk."""
    try:
        with path.open("rb") as file:
            facts, _ = _header(file.read(_HEADER_LIMIT))
    except (OSError, DamagedShardError):
        return None
    return facts["fingerprint"] if facts["number"] == number else None


def _header(start: bytes) -> tuple[dict[str, Any], int]:
    """The checked header at the start of a shard, and where its bytes begin."""
    digest, _, rest = start.partition(b"\n")
    line, newline, _ = rest.partition(b"\n")
    if _digest(line + newline).encode() != digest:
        raise DamagedShardError("its header's digest does not match")
    return json.loads(line), len(digest) + 1 + len(line) + 1


def _pieces(payload: np.ndarray) -> list[memoryview]:
    return [payload[start : start + _PIECE_BYTES].data for start in range(0, len(payload), _PIECE_BYTES)]


def _read_piece(file: int, piece: memoryview, start: int) -> str:
    """Fills a piece from its place in a file; returns its digest."""
    done = 0
    while done < len(piece):
        count = os.preadv(file, [piece[done:]], start + done)
        if count == 0:
            raise DamagedShardError("it ends too early")
        done += count
    return _digest(piece)


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize
