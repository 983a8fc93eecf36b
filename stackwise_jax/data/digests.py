"""Digests of files, remembered: a file that has not changed is not read again to name what it holds."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import time
from pathlib import Path

from stackwise_jax.errors import UserError

_SETTLED_NS = 2 * 10**9  # a file changed later than this may change again within one tick of its clock


@dataclasses.dataclass(frozen=True)
class DigestMemo:
    """Remembers the digests of files by size and times of change: a file of `folder` for each list of paths."""

    folder: Path

    def digests(self, paths: list[Path]) -> dict[Path, bytes]:
        """Returns the sha256 of each file, reading those whose size or times are not the remembered ones.

        Raises:
          UserError: a file cannot be read.
        """
        names = [str(path.absolute()) for path in paths]
        store = self.folder / f"{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]}.json"
        before = _read(store)
        after: dict[str, list[int | str]] = {}
        result = {}
        for path, name in zip(paths, names, strict=True):
            try:
                stamp = _stamp(path)
                result[path] = _remembered(before.get(name), stamp) or _digest(path)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
            if time.time_ns() - max(stamp[1:]) > _SETTLED_NS:
                after[name] = [*stamp, result[path].hex()]
        if after != before:
            with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
                _write(store, after)
        return result


def _stamp(path: Path) -> list[int]:
    """Size, and when content and entry last changed; taken before the file is read."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _remembered(entry: list[int | str] | None, stamp: list[int]) -> bytes | None:
    if entry is None or entry[:-1] != stamp:
        return None
    with contextlib.suppress(ValueError):
        return bytes.fromhex(str(entry[-1]))
    return None


def _read(store: Path) -> dict[str, list[int | str]]:
    """What was remembered; nothing where that cannot be read."""
    try:
        entries = json.loads(store.read_text(encoding="utf-8"))
        return {name: entry for name, entry in entries.items() if isinstance(entry, list)}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(store: Path, entries: dict[str, list[int | str]]) -> None:
    """Replaces the file as a whole."""
    store.parent.mkdir(parents=True, exist_ok=True)
    scratch = store.with_name(f"{store.name}.{secrets.token_hex(4)}")
    try:
        scratch.write_text(json.dumps(entries), encoding="utf-8")
        os.replace(scratch, store)
    finally:
        scratch.unlink(missing_ok=True)
