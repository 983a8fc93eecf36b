"""The run folder: what lies in it, in which order it is written, and which snapshot is the newest good one.

    config.json          the resolved config, for people; each snapshot holds its own
    tokenizer.model      so that the folder can be read alone; each snapshot holds its digest
    plan.txt             the plan as printed
    metrics.jsonl        one object a line
    stacks/NAME-DIGEST/  a frozen part (embedding, stack, head, tap), written once, never changed
    steps/N-PHASE/       the live state after N updates, in that phase, with references to frozen parts

A folder of steps/ or stacks/ exists whole or not at all (`train/checkpoint.py`). NAME.tmp is being written or removed;
NAME.damaged was found damaged and set aside, and nothing reads or removes it.
"""

import dataclasses
import fcntl
import functools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError, warn
from stackwise_jax.memory.fingerprint import array_digests, join_digests
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.checkpoint import (
    DamagedError,
    StorageError,
    read_meta,
    read_part,
    read_tree,
    verify,
    write_bytes,
    write_folder,
    write_text,
)
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.phases import signature
from stackwise_jax.train.scaling import init_scaling
from stackwise_jax.train.state import Frozen, PartSource, TrainState, part_shape
from stackwise_jax.types import Params

STEP_NAME = re.compile(r"\d{8,}-\d{4,}")
PART_NAME = re.compile(r"[a-z0-9-]+-[0-9a-f]{16}")
PART_KINDS = ("embedding", "stacks", "head", "adapters", "shelves")


def step_name(step: int, phase: int) -> str:
    """The folder of a snapshot after `step` updates, in `phase`."""
    return f"{step:08d}-{phase:04d}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A frozen part on its way to the disk.

    Attributes:
      tree: on the host.
      digests: of its arrays, by name.
      digest: its `tree_digest`.
      reference: its folder's name.
    """

    tree: Params
    digests: Mapping[str, str]
    digest: str
    reference: str


def make_part(name: str, tree: Params) -> Part:
    """Names a part after its digest; the one time that it is hashed before it is written."""
    digests = array_digests(tree)
    digest = join_digests(digests)
    return Part(tree, digests, digest, f"{name}-{digest[:16]}")


def committed(steps: Path) -> list[Path]:
    """Snapshots, oldest first."""
    return _folders(steps, STEP_NAME) if steps.is_dir() else []


def _folders(folder: Path, name: re.Pattern[str], suffix: str = "") -> list[Path]:
    """Folders inside that have one of our names, sorted; whatever else lies there is left alone."""
    inside = (entry for entry in folder.iterdir() if entry.is_dir() and entry.name.endswith(suffix))
    ours = (entry for entry in inside if name.fullmatch(entry.name.removesuffix(suffix)))
    return sorted(ours, key=lambda entry: (len(entry.name), entry.name))


def references(meta: Mapping[str, Any]) -> list[str]:
    """Every frozen part that a step refers to."""
    return [ref for kind in meta["parts"].values() for ref in kind.values()]


def _newest_meta(path: Path) -> dict[str, Any] | None:
    """The meta data of the newest snapshot whose meta data can be read; None without one."""
    for step in reversed(committed(path / "steps")):
        try:
            return read_meta(step)
        except DamagedError:
            continue  # whoever reads the snapshots says so
    return None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run as it stood.

    Attributes:
      meta: {"step", "phase", "position", "parts", "corpus", "tokenizer"}.
      frozen: the settled parts.
      state: the live state, on the host; None when the run had finished.
    """

    folder: Path
    config: RunConfig
    meta: dict[str, Any]
    frozen: Frozen
    state: TrainState | None


def newest_snapshot(path: Path, *, say: Callable[[str], None] = warn) -> tuple[Snapshot | None, list[DamagedError]]:
    """Reads the newest snapshot that is sound with everything it refers to; see `newest_sound`."""
    return newest_sound(path, functools.partial(read_snapshot, path), say=say)


def newest_sound[T](
    path: Path, read: Callable[[Path], T], *, say: Callable[[str], None] = warn
) -> tuple[T | None, list[DamagedError]]:
    """What `read` returns of the newest snapshot's folder in which it finds no damage; writes nothing.

    Args:
      read: raises DamagedError where something that it needs cannot be trusted.
      say: told of every newer snapshot that is passed over, in one line.

    Returns:
      that, or None where there is no snapshot yet, and what is wrong with the newer ones.

    Raises:
      UserError: there are snapshots and none is sound, or another version of this program wrote them.
    """
    damaged: dict[Path, DamagedError] = {}
    while left := [step for step in committed(path / "steps") if step not in damaged]:
        try:
            found = read(left[-1])
        except DamagedError as error:
            damaged[left[-1]] = error
            continue
        for step, error in damaged.items():
            needs = "" if error.folder == step else f"; snapshot {step.name} needs it"
            say(f"{error}{needs}; using snapshot {left[-1].name}")
        return found, list(damaged.values())
    if damaged:
        raise UserError(
            f"{path} holds no sound snapshot: {next(iter(damaged.values()))}; restore the folder from a copy, or start "
            "again in another --workdir"
        )
    return None, []


def read_snapshot(path: Path, step: Path, kinds: Sequence[str] = PART_KINDS) -> Snapshot:
    """Reads a snapshot of the run folder `path` with the frozen parts of some kinds.

    Raises:
      DamagedError: of the snapshot or of a part.
    """
    meta = read_meta(step)
    config = config_lib.resolve(meta["config"])
    phases, key = make_curriculum(config), jax.random.key(config.seed)
    index, state = meta["phase"], None
    if index < len(phases):
        inside = meta["position"]["phase_step"] > 0
        has_table = signature(phases[index], phases[index].main, phases, config).head_has_table
        source, scaling = PartSource(config, key), init_scaling(config)
        shape = source.snapshot_shape(phases, index, inside=inside, head_has_table=has_table, scaling=scaling)
        state = read_tree(step, shape)
    frozen = Frozen()
    for kind in kinds:
        for name in meta["parts"][kind]:
            part, shape = part_place(path, config, meta, kind, name)
            tree, digest = read_part(part, shape)
            frozen.keep(kind, name, tree, digest, functools.partial(read_tree, part, shape))
            frozen.stacks.release(config.checkpoint.host_gib * 2**30)
    return Snapshot(step, config, meta, frozen, state)


def part_place(path: Path, config: RunConfig, meta: Mapping[str, Any], kind: str, name: str) -> tuple[Path, Params]:
    """Where a frozen part lies that the meta data of a snapshot names, and the shapes that it has."""
    shape = part_shape(config, jax.random.key(config.seed), kind, name)
    return path / "stacks" / meta["parts"][kind][name], shape


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
    meta = _newest_meta(path)
    if meta is None:
        config_lib.from_json(path / "config.json")  # a run that saved nothing yet may be started with any config
        return
    changed = config_lib.differences(config_lib.resolve(meta["config"]), config)
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
    """A run folder, taken for this process until `close`. Opening creates it, or checks that it is of the same config.

    A folder in which nothing has been saved yet takes any config: a run that failed at once is simply started again.

    Snapshots are written by one thread, one at a time: the parts of a boundary, then the step that refers to them, then
    what is no longer needed goes. An error in it surfaces at the next `check`, `save` or `flush`.

    Attributes:
      newest: the name of the last snapshot that was written and verified, or restored.

    Raises:
      UserError: see `refuse_foreign` (nothing is touched); another process has it; it cannot be written.
    """

    def __init__(self, path: Path, config: RunConfig, *, say: Callable[[str], None] = warn) -> None:
        refuse_foreign(path, config)
        self.path, self.newest = path, ""
        self.stacks, self.steps = path / "stacks", path / "steps"
        try:
            self.stacks.mkdir(parents=True, exist_ok=True)
            self.steps.mkdir(exist_ok=True)
            self._lock = _lock(path)
            write_text(path / "config.json", config_lib.to_json(config))
        except OSError as error:
            raise UserError(f"--workdir={path} cannot be written: {error.strerror or error}") from None
        for half in [*_folders(self.steps, STEP_NAME, ".tmp"), *_folders(self.stacks, PART_NAME, ".tmp")]:
            shutil.rmtree(half)
        self._facts: dict[str, Any] = {"config": dataclasses.asdict(config)}
        self._say, self._has_complained = say, False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._writing: Future[None] | None = None

    def require_text(self, corpus_digest: str, tokenizer: bytes, tokenizer_digest: str) -> None:
        """Notes the corpus and the tokenizer of a new run, or checks that a continued one still has its own.

        Raises:
          UserError: the text, its split or its tokenizer changed since the run began.
        """
        facts = {"corpus": corpus_digest, "tokenizer": tokenizer_digest}
        meta = _newest_meta(self.path)
        if meta is not None and {name: meta[name] for name in facts} != facts:
            raise UserError(
                f"{self.path} was trained on another corpus: the text of data.source, its split or the tokenizer has "
                "changed since; give another --workdir, or the text as it was"
            )
        self._facts |= facts
        write_bytes(self.path / "tokenizer.model", tokenizer)

    def restore(self) -> Snapshot | None:
        """The newest sound snapshot; None for a new run. Damaged ones after it are set aside, so that they can be
        written again.

        Raises:
          UserError: see `newest_snapshot`.
        """
        snapshot, damaged = newest_snapshot(self.path, say=self._say)
        if snapshot is not None:
            steps = committed(self.steps)
            newer = steps[steps.index(snapshot.folder) + 1 :]
            for folder in dict.fromkeys([*newer, *(error.folder for error in damaged)]):
                self._set_aside(folder)
            self.newest = snapshot.folder.name
        return snapshot

    def _set_aside(self, folder: Path) -> None:
        """Renames a damaged folder to NAME.damaged, or NAME.damaged2 and so on where that is taken."""
        if folder.exists():
            taken = len(list(folder.parent.glob(f"{folder.name}.damaged*")))
            folder.rename(folder.with_name(f"{folder.name}.damaged{taken + 1 if taken else ''}"))

    def save(
        self, step: int, phase: int, tree: Any, meta: Mapping[str, Any], parts: list[Part], *, keep: int, required: bool
    ) -> None:
        """Writes parts, then the live state of `phase` after `step` updates, in the background; waits for the last one.

        Then what is beyond `keep` snapshots, or no longer referred to, is removed.

        Args:
          tree: on the host; nothing may change its arrays any more.
          meta: at least {"parts"}.
          required: a disk that does not take it is an error, which surfaces later; otherwise the run is told, once.
        """
        self.flush()
        name = step_name(step, phase)
        meta = {**self._facts, **meta, "phase": phase, "step": step}

        def write() -> None:
            try:
                for part in parts:
                    self._write(self.stacks / part.reference, part.tree, {}, part.digests)
                self._write(self.steps / name, tree, meta, None)
                self.newest = name
                self._retain(keep)
                self._has_complained = False
            except StorageError as error:
                if required:
                    raise UserError(
                        f"{error}; what was saved before is untouched: free space and run the same command again"
                    ) from None
                if not self._has_complained:
                    self._say(f"{error}; the run goes on and tries again; saved so far: {self.newest or 'nothing'}")
                self._has_complained = True

        self._writing = self._thread.submit(write)

    def reader(self, part: Part) -> Callable[[], Params]:
        """Reads a part from the disk again; only once it has been saved. It keeps nothing of the part's arrays."""
        shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part.tree)
        return functools.partial(read_tree, self.path / "stacks" / part.reference, shape)

    def check(self) -> None:
        """Raises what went wrong in the background, without waiting for it."""
        if self._writing is not None and self._writing.done():
            self.flush()

    def flush(self) -> None:
        """Waits until everything is on the disk, and raises what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for the thread and lets another process, or another `RunFolder` of this one, take the folder."""
        self._thread.shutdown(wait=True)
        error = None if self._writing is None else self._writing.exception()
        if error is not None:  # another error is on its way; this one must not be lost behind it
            self._say(str(error))
        self._lock.close()

    def _write(self, folder: Path, tree: Any, meta: Mapping[str, Any], digests: Mapping[str, str] | None) -> None:
        """A folder of this name holds the same numbers, because a run is deterministic: a sound one is left alone."""
        if folder.exists():
            try:
                return verify(folder)
            except DamagedError as error:
                self._say(f"{error}; it is written again")
                self._set_aside(folder)
        write_folder(folder, tree, meta, digests)

    def _retain(self, keep: int) -> None:
        for old in committed(self.steps)[:-keep]:
            _remove(old)
        try:
            needed = {ref for kept in committed(self.steps) for ref in references(read_meta(kept))}
        except DamagedError:  # it cannot say what it needs, so nothing goes
            return
        for part in _folders(self.stacks, PART_NAME):
            if part.name not in needed:
                _remove(part)


def _remove(folder: Path) -> None:
    """Removes a folder so that no half of it can be taken for the whole."""
    gone = folder.rename(folder.with_name(folder.name + ".tmp"))
    shutil.rmtree(gone)
