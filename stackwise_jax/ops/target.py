"""The device that programs are for: the one at hand or, while a plan is made, one that need not be there."""

import contextlib
import contextvars
import re
from collections.abc import Iterator

import jax

Capability = tuple[int, int]
"""Compute capability of an NVIDIA GPU, which decides what serves attention; `NO_GPU` has none."""
NO_GPU: Capability = (0, 0)

_planned: contextvars.ContextVar[Capability | None] = contextvars.ContextVar("planned", default=None)


@contextlib.contextmanager
def planned_for(capability: Capability) -> Iterator[None]:
    """What is traced inside is the program of a device with this capability, for its shapes: it must not run."""
    token = _planned.set(capability)
    try:
        yield
    finally:
        _planned.reset(token)


def is_planned() -> bool:
    """Programs are traced for a plan and never run."""
    return _planned.get() is not None


def is_cpu() -> bool:
    """Programs are for a CPU."""
    planned = _planned.get()
    return jax.default_backend() == "cpu" if planned is None else planned == NO_GPU


def cuda_capability() -> Capability | None:
    """The compute capability of the device that programs are for; None: it is no NVIDIA GPU."""
    if (planned := _planned.get()) is not None:
        return planned
    if jax.default_backend() != "gpu":
        return None
    # AMD's devices, which are "gpu" too, give the name of an architecture here.
    match = re.fullmatch(r"(\d+)\.(\d+)", str(jax.local_devices()[0].compute_capability))
    return (int(match[1]), int(match[2])) if match else None
