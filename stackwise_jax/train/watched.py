"""The run folder as the processes of one run share it: the first takes it, the others watch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stackwise_jax.memory import processes
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.folder import Part, RunFolder, Snapshot, newest_snapshot, refuse_foreign, step_name


class WatchedFolder(RunFolder):
    """A run folder that another process writes: it reads and answers alike, and writes and removes nothing."""

    def __init__(self, path: Path, config: RunConfig, *, say: Callable[[str], None]) -> None:
        refuse_foreign(path, config)
        self.path, self.newest = path, ""
        self._say = say

    def restore(self) -> Snapshot | None:
        """As the process does that writes; what is damaged is left for that to set aside."""
        snapshot, _ = newest_snapshot(self.path, say=self._say)
        if snapshot is not None:
            self.newest = snapshot.folder.name
        return snapshot

    def save(
        self, step: int, phase: int, tree: Any, meta: Mapping[str, Any], parts: list[Part], *, keep: int, required: bool
    ) -> None:
        """Only remembers the name."""
        self.newest = step_name(step, phase)

    def check(self) -> None:
        """Nothing can have gone wrong."""

    def flush(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing was taken."""


def open_folder(path: Path, config: RunConfig, *, say: Callable[[str], None]) -> RunFolder:
    """The run folder of this process.

    Raises:
      UserError: see `RunFolder`; in all processes alike.
    """
    folder = processes.first_alone(lambda: RunFolder(path, config, say=say))
    return folder if processes.is_first() else WatchedFolder(path, config, say=say)
