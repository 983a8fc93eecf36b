"""One folder of arrays: written whole or not at all, verified, read back bit for bit or called damaged.

    arrays/        the arrays, through Orbax
    meta.json      what is not an array, with this format's number and the folder's own name
    manifest.json  a SHA-256 of meta.json and of every array

A folder is written under the name NAME.tmp, synced to the disk, read back and compared, and only then renamed: under
its own name it is complete. Orbax restores flipped bits silently; the digests do not.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stackwise_jax.errors import UserError
from stackwise_jax.memory import processes
from stackwise_jax.memory.budget import readable_bytes
from stackwise_jax.memory.fingerprint import array_digests, join_digests, named_leaves

FORMAT = 3


class DamagedError(UserError):
    """A checkpoint folder that cannot be trusted.

    Attributes:
      folder: which.
    """

    def __init__(self, folder: Path, reason: object) -> None:
        self.folder = folder
        short = (str(reason).splitlines() or [type(reason).__name__])[0][:160]
        super().__init__(f"{folder} is damaged: {short}")


class FormatError(UserError):
    """A sound folder of another version of this format."""


class StorageError(UserError):
    """The disk did not take a folder; what was there before is untouched."""


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads and verifies the meta data of a folder.

    Raises:
      DamagedError: it is missing, unreadable, differs from the manifest, or belongs to a folder of another name.
      FormatError: another version wrote it.
    """
    return _read_header(folder)[0]


def _read_header(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(meta data, digests of the arrays) as the manifest vouches for them."""
    try:
        text = (folder / "meta.json").read_bytes()
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if hashlib.sha256(text).hexdigest() != manifest["meta"]:
            raise ValueError("meta.json does not match its manifest")
        meta, digests = json.loads(text), dict(manifest["arrays"])
        written = meta.get("format", 1)
        if written == FORMAT and meta["name"] != folder.name:
            raise ValueError(f"it is a copy of {meta['name']}")
    except OSError as error:
        raise DamagedError(folder, f"{Path(error.filename or '').name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(folder, error) from None
    if written != FORMAT:
        raise FormatError(
            f"{folder} has checkpoint format {written}, this version of stackwise_jax reads {FORMAT}; finish the run "
            "with the version that wrote it, or give another --workdir"
        )
    return meta, digests


def read_tree(folder: Path, target: Any) -> Any:
    """Reads the arrays of a folder to the host, in the structure of `target` (arrays or their shapes).

    Raises:
      DamagedError: an array is missing, unreadable, of another shape or dtype, or its digest differs.
      FormatError: see `read_meta`.
    """
    return read_part(folder, target)[0]


def read_part(folder: Path, target: Any) -> tuple[Any, str]:
    """As `read_tree`, with the tree's `tree_digest`, which follows from the digests that were verified."""
    _, digests = _read_header(folder)
    arrays = _read_arrays(folder, digests)
    wanted = named_leaves(target)
    if set(arrays) != set(wanted):
        odd = sorted(set(arrays) ^ set(wanted))[0]
        raise DamagedError(folder, f"it does not hold what this run needs: {odd} is only on one side")
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (wanted[name].shape, wanted[name].dtype):
            raise DamagedError(
                folder,
                f"{name} is {array.dtype}{list(array.shape)}, expected {wanted[name].dtype}{list(wanted[name].shape)}",
            )
    tree = jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])
    return tree, join_digests(digests)


def verify(folder: Path) -> None:
    """Reads everything in a folder and keeps nothing.

    Raises:
      DamagedError, FormatError: see `read_tree`.
    """
    _read_arrays(folder, _read_header(folder)[1])


def _read_arrays(folder: Path, digests: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Every array of a folder by name, each verified once."""
    import orbax.checkpoint as ocp

    try:
        nested = _nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in digests})
        with _quiet(), _checkpointer() as checkpointer:
            restored = checkpointer.restore(folder.absolute() / "arrays", restore_args=nested) if digests else {}
        arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(restored).items()}
    except Exception as error:  # whatever the storage layer raises on damaged files
        raise DamagedError(folder, error) from None
    if set(arrays) != set(digests):
        raise DamagedError(folder, f"{sorted(set(arrays) ^ set(digests))[0]} is only on one side of its manifest")
    for name, digest in array_digests(arrays).items():
        if digest != digests[name]:
            raise DamagedError(folder, f"the digest of {name} does not match")
    return arrays


def write_folder(folder: Path, tree: Any, meta: Mapping[str, Any], digests: Mapping[str, str] | None = None) -> None:
    """Writes a folder, verifies it by reading it back, and gives it its name.

    Args:
      tree: arrays on the host, which nothing changes meanwhile.
      meta: JSON-able.
      digests: of the tree, where `array_digests` has been computed before.

    Raises:
      StorageError: the disk is full, or failing; nothing of the folder is left.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    needed = sum(array.nbytes for array in arrays.values())
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if shutil.disk_usage(folder.parent).free < needed:
            raise OSError(28, os.strerror(28))  # ENOSPC, before an hour of writing shows it
        temporary.mkdir()
        _write_contents(temporary, arrays, dict(meta) | {"format": FORMAT, "name": folder.name}, digests)
        temporary.rename(folder)
        _sync(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = _storage_reason(error)
        if reason is None:
            raise
        free = shutil.disk_usage(folder.parent).free
        raise StorageError(
            f"{folder} could not be written: {reason} (needs about {readable_bytes(needed)}, "
            f"{readable_bytes(free)} are free)"
        ) from None


def _write_contents(
    folder: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], digests: Mapping[str, str] | None
) -> None:
    if arrays:
        with _quiet(), _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute() / "arrays", _nest(arrays))
        for path in (folder / "arrays").rglob("*"):
            _sync(path)
    digests = array_digests(dict(arrays)) if digests is None else digests
    _read_arrays(folder, digests)
    text = json.dumps(meta, indent=1, sort_keys=True)
    write_text(folder / "meta.json", text)
    manifest = {"meta": hashlib.sha256(text.encode()).hexdigest(), "arrays": dict(digests)}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))


def _storage_reason(error: Exception) -> str | None:
    """Why the disk did not take something; None for any other fault."""
    if isinstance(error, DamagedError):
        return "it reads back other bytes than were written; check the disk"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as the storage layer below Orbax says it
    return os.strerror(int(code[1])) if code else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs a screen of traceback for every error that it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} to {"a": {"b": x}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def write_text(path: Path, text: str) -> None:
    """Replaces a small file so that after a crash it is the old one or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, of bytes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Brings a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpointer() -> Any:
    """Orbax for this process alone: it would have all processes of a run write together, or wait for each other."""
    import orbax.checkpoint as ocp

    if not processes.are_several():
        return ocp.PyTreeCheckpointer()
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
