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

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError
from stackwise_jax.memory.fingerprint import named_leaves, tree_digest
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.state import Frozen, part_shape

FORMAT = 1


class DamagedError(UserError):
    """A checkpoint folder that cannot be trusted; the message names it and the reason."""


class RunFolder:
    """A run folder. Opening creates it, or checks that it belongs to the same config.

    A folder in which nothing has been saved yet takes any config: a run that failed at once is simply started again.

    Raises:
      UserError: the folder holds a run of another config (every differing field is named; nothing is touched), or is
        something else than a run folder.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.stacks, self.steps = path / "stacks", path / "steps"
        stored = path / "config.json"
        if stored.exists() and latest_step(path) is not None:
            changed = config_lib.differences(config_lib.from_json(stored), config)
            if changed:
                raise UserError(
                    f"{path} holds a run of another config: {'; '.join(changed)}; "
                    "give another --workdir, or the config it was started with"
                )
        elif not stored.exists() and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not a run folder; give another --workdir")
        self.stacks.mkdir(parents=True, exist_ok=True)
        self.steps.mkdir(exist_ok=True)
        write_text(stored, config_lib.to_json(config))
        for folder in (*self.stacks.iterdir(), *self.steps.iterdir()):
            if not (folder / "manifest.json").exists():
                shutil.rmtree(folder)

    def require_corpus(self, digest: str) -> None:
        """Notes the corpus of a new run, or checks that a continued one still has its own.

        Raises:
          UserError: the text, its split or its tokenizer changed since the run began.
        """
        stored = self.path / "corpus.digest"
        known = stored.exists() and latest_step(self.path) is not None
        if known and stored.read_text(encoding="utf-8").strip() != digest:
            raise UserError(
                f"{self.path} was trained on another corpus: the text of data.source, its split or the tokenizer has "
                "changed since; give another --workdir, or the text as it was"
            )
        write_text(stored, digest + "\n")

    def write_part(self, name: str, tree: Any) -> str:
        """Writes a frozen part once; returns the reference to it (its folder's name)."""
        reference = f"{name}-{tree_digest(tree)[:16]}"
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
        for old in [f for f in self.steps.iterdir() if f not in committed(self.steps)[-keep:]]:
            shutil.rmtree(old)
        needed = {ref for kept in committed(self.steps) for ref in references(read_meta(kept))}
        for part in self.stacks.iterdir():
            if part.name not in needed:
                shutil.rmtree(part)


def committed(folder: Path) -> list[Path]:
    """Committed step folders, oldest first."""
    return sorted(f for f in folder.iterdir() if (f / "manifest.json").exists())


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
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"{folder} is damaged: {error}") from None


def read_tree(folder: Path, target: Any) -> Any:
    """Reads the arrays of a step or part folder to the host, in the structure of `target` (arrays or their shapes).

    Raises:
      DamagedError: an array is missing, unreadable, of another shape or dtype, or its digest differs.
    """
    import orbax.checkpoint as ocp

    try:
        digests = json.loads((folder / "manifest.json").read_bytes())["arrays"]
        nested = _nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in digests})
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(folder.absolute() / "arrays", restore_args=nested) if digests else {}
    except Exception as error:  # whatever the storage layer raises on damaged files
        raise DamagedError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(restored).items()}
    wanted = named_leaves(target)
    if set(arrays) != set(wanted):
        odd = sorted(set(arrays) ^ set(wanted))[0]
        raise DamagedError(f"{folder} does not hold what this run needs: {odd} is only on one side")
    for name, array in arrays.items():
        if _digest(array) != digests[name]:
            raise DamagedError(f"{folder} is damaged: the digest of {name} does not match")
        if (array.shape, array.dtype) != (wanted[name].shape, wanted[name].dtype):
            raise DamagedError(
                f"{folder}: {name} is {array.dtype}{list(array.shape)}, "
                f"expected {wanted[name].dtype}{list(wanted[name].shape)}"
            )
    names = list(named_leaves(target))
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in names])


def read_frozen(path: Path, config: RunConfig, parts: Mapping[str, Mapping[str, str]]) -> Frozen:
    """Reads the settled parts that a step refers to.

    Raises:
      DamagedError: see `read_tree`.
    """
    frozen = Frozen()
    has_table = config.training.head == "copy" or not config.model.ties_embedding
    for kind in ("embedding", "stacks", "head"):
        for name, reference in parts[kind].items():
            shape = part_shape(config, jax.random.key(0), kind, name, head_has_table=has_table)
            frozen.keep(kind, name, read_tree(path / "stacks" / reference, shape))
    return frozen


def _write_folder(folder: Path, tree: Any, meta: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if arrays:
        with ocp.PyTreeCheckpointer() as checkpointer:
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
