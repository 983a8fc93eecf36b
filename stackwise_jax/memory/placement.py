"""Where arrays are: on the device, in pinned host memory, or on the host as NumPy; and how much room each place has."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def start_backend() -> None:
    """Settings that must stand before JAX touches a device; programs call it first.

    Compiled programs are kept, so that the next start finds them: in $STACKWISE_CACHE/compiled, unless
    JAX_COMPILATION_CACHE_DIR names another folder or JAX_ENABLE_COMPILATION_CACHE=false forbids it. JAX's pool of
    pinned host memory may take three quarters of the host's, where it would stop at 64 GiB, unless
    XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB is set.
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("STACKWISE_CACHE") or "~/.cache/stackwise_jax").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    total = _meminfo("MemTotal")
    if total is not None:
        os.environ.setdefault(PINNED_LIMIT, str(max(1, int(0.75 * total / 2**30))))


def to_host(params: Any) -> Any:
    """Copies a tree of arrays to the host, into memory of its own; what held it on the device may be freed or donated.

    On a CPU `device_get` returns the device's own memory, which the next step may write to.
    """
    must_copy = True if jax.default_backend() == "cpu" else None
    return jax.tree.map(lambda leaf: np.array(leaf, copy=must_copy), jax.device_get(params))


def to_device(tree: Any) -> Any:
    """Copies a tree of arrays to the device."""
    return jax.device_put(tree)


def to_pinned(tree: Any) -> Any:
    """Begins copying a tree of device arrays to pinned host memory, from where the device reads at full speed."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), tree)


def from_pinned(tree: Any) -> Any:
    """Begins copying a tree in pinned host memory back to the device that it came from."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("device")), tree)


def device_room() -> int | None:
    """Bytes that the first device can still take; None where it has no memory of its own (CPU)."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def host_room() -> int | None:
    """Bytes of host memory that can still be taken; None where the system does not say."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
