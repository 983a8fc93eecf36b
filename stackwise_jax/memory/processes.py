"""One run in several processes: all compute the same and read the same, and the first alone writes and speaks.

Every process runs the whole program, so whatever decides what is computed next must come out alike in all of them:
clocks and free memory do not, and are agreed on here. In one process every function here does nothing.
"""

import contextlib
import os
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stackwise_jax.errors import UserError
from stackwise_jax.schema import MeshConfig

_MIB = 2**20


def start_processes(config: MeshConfig) -> None:
    """Joins the processes of a run, where there are several; call it before anything touches a device.

    Raises:
      UserError: the processes do not find each other, or nothing says how many they are.
    """
    if config.n_devices > 1:
        # Devices simulated on a CPU share a pool of threads, which programs that wait for each other could use up.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not config.distributed or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(config.coordinator or None, config.processes, config.process_id)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"mesh.distributed=True, but the processes were not joined ({reason}); start them with srun or mpirun, or "
            "give each mesh.coordinator='HOST:PORT', mesh.processes and its own mesh.process_id"
        ) from None


def is_first() -> bool:
    """This is the process that writes and speaks."""
    return jax.process_index() == 0


def are_several() -> bool:
    """The run has more than one process."""
    return jax.process_count() > 1


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Drops what the other processes print; an error that leaves the block is everyone's own to tell."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def first_alone(do: Callable[[], Any]) -> Any:
    """Has the first process do something while the others wait; they get None, and fail where it failed."""
    if not are_several():
        return do()
    failure: BaseException | None = None
    result = None
    if is_first():
        try:
            result = do()
        except BaseException as error:  # the others must not wait for ever, whatever it is
            failure = error
    failed = agreed(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise UserError("process 0 of this run could not go on; what it printed says why")
    return result


def first_before_others(do: Callable[[], Any]) -> Any:
    """Has every process do something that leaves files behind: the first makes them, the others find them."""
    result = first_alone(do)
    return result if is_first() else do()


def own_folder(workdir: Path) -> Path:
    """Where this process may write: the run folder, or for all but the first one that is removed at its end."""
    if is_first():
        return workdir
    _KEPT.append(tempfile.TemporaryDirectory(prefix="stackwise-process-"))
    return Path(_KEPT[-1].name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed with the process


def agreed(flag: bool) -> bool:
    """What the first process says, in all of them; waits for what the devices have under way."""
    if not are_several():
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def smallest_bytes(count: int | None) -> int | None:
    """The smallest count of any process, to a MiB; None where they do not know it."""
    if count is None or not are_several():
        return count
    return int(_of_all(np.int32(count // _MIB)).min()) * _MIB


def count_hosts() -> int:
    """Machines that the processes run on."""
    if not are_several():
        return 1
    return len(np.unique(_of_all(np.int32(zlib.crc32(socket.gethostname().encode()) >> 1))))


def to_numpy(leaf: Any) -> np.ndarray:
    """An array on the host, whole in every process; one that is divided among them is brought together first."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _of_all(number: np.int32) -> np.ndarray:
    """One number of each process."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(number))
