"""The run folder: what is written, in which order, and how it is read back.

    config.json          the resolved config; a folder is continued only by the same one
    corpus.digest        of the prepared corpus, for the same reason
    tokenizer.model      so that the folder can be read alone
    plan.txt             the plan as printed
    metrics.jsonl        one object a line
    stacks/NAME-DIGEST/  a frozen part (embedding, stack, head, tap), written once, never changed
    steps/N-PHASE/       the live state after N updates, in that phase, with references to frozen parts

Arrays go through Orbax. Beside them lies `manifest.json` with a SHA-256 of every array and of the meta data; it is
written and fsynced last, and a folder without one does not exist. Orbax restores flipped bits silently; the digests
do not.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError
from stackwise_jax.memory import processes
from stackwise_jax.memory.fingerprint import named_leaves, tree_digest
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.state import Frozen, part_shape

FORMAT = 1
STEP_NAME = re.compile(r"\d{8,}-\d{4,}")
PART_NAME = re.compile(r"[a-z0-9-]+-[0-9a-f]{16}")


class DamagedError(UserError):
    """A checkpoint folder that cannot be trusted; the message names it and the reason."""


def refuse_foreign(path: Path, config: RunConfig) -> None:
    """Checks that a path is free, or holds a run of `config`; reads only.

    Raises:
      UserError: it holds a run of another config (every differing field is named), or is something else.
    """
    foreign = UserError(f"{path} exists and is not a run folder; give another --workdir")
    if not path.exists():
        return
    if not path.is_dir():
        raise foreign
    if not (path / "config.json").exists():
        if any(path.iterdir()):
            raise foreign
        return
    stored = config_lib.from_json(path / "config.json")
    changed = config_lib.differences(stored, config) if latest_step(path) is not None else []
    if changed:
        raise UserError(
            f"{path} holds a run of another config: {'; '.join(changed)}; "
            "give another --workdir, or the config it was started with"
        )


def _lock(path: Path) -> IO[str]:
    """Takes the folder for this process; the lock ends with the file or the process."""
    file = (path / ".lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is in use by another run; wait for it, stop it, or give another --workdir") from None
    return file


class RunFolder:
    """A run folder. Opening creates it, or checks that it belongs to the same config.

    A folder in which nothing has been saved yet takes any config: a run that failed at once is simply started again.

    Raises:
      UserError: see `refuse_foreign` (nothing is touched); another process has it; it cannot be written.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        refuse_foreign(path, config)
        self.path = path
        self.stacks, self.steps = path / "stacks", path / "steps"
        try:
            self.stacks.mkdir(parents=True, exist_ok=True)
            self.steps.mkdir(exist_ok=True)
            self._lock = _lock(path)
            write_text(path / "config.json", config_lib.to_json(config))
        except OSError as error:
            raise UserError(f"--workdir={path} cannot be written: {error.strerror or error}") from None
        self._sweep()

    def unlock(self) -> None:
        """Lets another process, or another `RunFolder` of this one, take the folder."""
        self._lock.close()

    def _sweep(self) -> None:
        """Removes what a stopped run left half written; nothing that is not ours, and nothing that a step needs."""
        for step in _folders(self.steps, STEP_NAME):
            if not (step / "manifest.json").exists():
                shutil.rmtree(step)
        needed = {ref for step in committed(self.steps) for ref in references(read_meta(step))}
        for part in _folders(self.stacks, PART_NAME):
            if not (part / "manifest.json").exists() and part.name not in needed:
                shutil.rmtree(part)

    def require_corpus(self, digest: str) -> None:
        """Notes the corpus of a new run, or checks that a continued one still has its own.

        Raises:
          UserError: the text, its split or its tokenizer changed since the run began.
        """
        stored = self.path / "corpus.digest"
        known = stored.exists() and latest_step(self.path) is not None
        if known and stored.read_text(encoding="utf-8", errors="replace").strip() != digest:
            raise UserError(
                f"{self.path} was trained on another corpus: the text of data.source, its split or the tokenizer has "
                "changed since; give another --workdir, or the text as it was"
            )
        write_text(stored, digest + "\n")

    def write_part(self, name: str, tree: Any, digest: str) -> str:
        """Writes a frozen part of a `tree_digest` once; returns the reference to it (its folder's name)."""
        reference = f"{name}-{digest[:16]}"
        folder = self.stacks / reference
        if not (folder / "manifest.json").exists():
            _write_folder(folder, tree, {})
        return reference

    def write_step(self, phase: int, step: int, tree: Any, meta: Mapping[str, Any], *, keep: int) -> None:
        """Writes the live state of `phase` after `step` updates, then removes what is beyond `keep` or needless.

        A folder of the same phase and step holds the same numbers (a run is deterministic) and is left alone.
        """
        folder = self.steps / f"{step:08d}-{phase:04d}"
        if not (folder / "manifest.json").exists():
            _write_folder(folder, tree, dict(meta) | {"phase": phase, "step": step})
        for old in committed(self.steps)[:-keep]:
            shutil.rmtree(old)
        needed = {ref for kept in committed(self.steps) for ref in references(read_meta(kept))}
        for part in _folders(self.stacks, PART_NAME):
            if part.name not in needed:
                shutil.rmtree(part)


class WatchedFolder(RunFolder):
    """A run folder that another process writes: the same answers, and nothing is written or removed."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        refuse_foreign(path, config)
        self.path = path
        self.stacks, self.steps = path / "stacks", path / "steps"

    def unlock(self) -> None:
        pass

    def require_corpus(self, digest: str) -> None:
        pass

    def write_part(self, name: str, tree: Any, digest: str) -> str:
        return f"{name}-{digest[:16]}"

    def write_step(self, phase: int, step: int, tree: Any, meta: Mapping[str, Any], *, keep: int) -> None:
        pass


def open_folder(path: Path, config: RunConfig) -> RunFolder:
    """The run folder: the first process of a run takes it, the others watch it.

    Raises:
      UserError: see `RunFolder`; in all processes alike.
    """
    folder = processes.first_alone(lambda: RunFolder(path, config))
    return folder if processes.is_first() else WatchedFolder(path, config)


def committed(folder: Path) -> list[Path]:
    """Committed step folders, oldest first."""
    return [step for step in _folders(folder, STEP_NAME) if (step / "manifest.json").exists()]


def _folders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Folders inside that have one of our names, sorted; whatever else lies there is left alone."""
    return sorted(entry for entry in folder.iterdir() if name.fullmatch(entry.name) and entry.is_dir())


def references(meta: Mapping[str, Any]) -> list[str]:
    """Every frozen part that a step refers to."""
    return [ref for kind in meta["parts"].values() for ref in kind.values()]


def latest_step(path: Path) -> Path | None:
    """The newest committed step folder of a run folder; None when it has none yet."""
    steps = path / "steps"
    found = committed(steps) if steps.is_dir() else []
    return found[-1] if found else None


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads and verifies the meta data of a step or part folder.

    Raises:
      DamagedError: it is missing, unreadable, or differs from the manifest.
    """
    try:
        text = (folder / "meta.json").read_bytes()
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if hashlib.sha256(text).hexdigest() != manifest["meta"] or manifest["format"] != FORMAT:
            raise ValueError("meta.json does not match its manifest")
        return json.loads(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(_damage(folder, error)) from None


def read_tree(folder: Path, target: Any) -> Any:
    """Reads the arrays of a step or part folder to the host, in the structure of `target` (arrays or their shapes).

    Raises:
      DamagedError: an array is missing, unreadable, of another shape or dtype, or its digest differs.
    """
    import orbax.checkpoint as ocp

    try:
        digests = json.loads((folder / "manifest.json").read_bytes())["arrays"]
        nested = _nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in digests})
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(folder.absolute() / "arrays", restore_args=nested) if digests else {}
    except Exception as error:  # whatever the storage layer raises on damaged files
        raise DamagedError(_damage(folder, error)) from None
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(restored).items()}
    wanted = named_leaves(target)
    if set(arrays) != set(wanted):
        odd = sorted(set(arrays) ^ set(wanted))[0]
        raise DamagedError(f"{folder} does not hold what this run needs: {odd} is only on one side")
    for name, array in arrays.items():
        if _digest(array) != digests[name]:
            raise DamagedError(_damage(folder, f"the digest of {name} does not match"))
        if (array.shape, array.dtype) != (wanted[name].shape, wanted[name].dtype):
            raise DamagedError(
                f"{folder}: {name} is {array.dtype}{list(array.shape)}, "
                f"expected {wanted[name].dtype}{list(wanted[name].shape)}"
            )
    names = list(named_leaves(target))
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in names])


def _damage(folder: Path, reason: object) -> str:
    """What is damaged, why, and what to do about it."""
    short = (str(reason).splitlines() or [type(reason).__name__])[0][:160]
    if folder.parent.name == "steps":
        remedy = "remove that folder to continue from the snapshot before it"
    else:
        remedy = "restore it from a copy, or start again in another --workdir"
    return f"{folder} is damaged: {short}; {remedy}"


def read_frozen(path: Path, config: RunConfig, parts: Mapping[str, Mapping[str, str]]) -> Frozen:
    """Reads the settled parts that a step refers to.

    Raises:
      DamagedError: see `read_tree`.
    """
    frozen = Frozen()
    for kind in ("embedding", "stacks", "head"):
        for name, reference in parts[kind].items():
            shape = part_shape(config, jax.random.key(0), kind, name)
            tree = read_tree(path / "stacks" / reference, shape)
            frozen.keep(kind, name, tree, tree_digest(tree))
    return frozen


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


def _write_folder(folder: Path, tree: Any, meta: dict[str, Any]) -> None:
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if arrays:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute() / "arrays", _nest(arrays))
    meta_text = json.dumps(meta, indent=1, sort_keys=True)
    write_text(folder / "meta.json", meta_text)
    manifest = {
        "format": FORMAT,
        "meta": hashlib.sha256(meta_text.encode()).hexdigest(),
        "arrays": {name: _digest(array) for name, array in arrays.items()},
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))


def _digest(array: np.ndarray) -> str:
    header = f"{array.dtype} {array.shape}\n".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


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
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
