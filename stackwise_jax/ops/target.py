"""The device that programs are for: the one at hand or, while a plan is made, one that need not be there."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device, as far as it decides what a program is.

    Attributes:
      capability: compute capability of an NVIDIA GPU, which decides what serves attention; (0, 0): it is none.
      flops_per_byte: float32 FLOPs that it computes while its memory moves a byte; decides what is computed twice.
    """

    capability: tuple[int, int]
    flops_per_byte: float


NO_GPU = Target((0, 0), 20.0)
HOPPER = Target((9, 0), 20.0)

_planned: contextvars.ContextVar[Target | None] = contextvars.ContextVar("planned", default=None)


@contextlib.contextmanager
def planned_for(target: Target) -> Iterator[None]:
    """What is traced inside is the program of a device of this kind, for its shapes: it must not run."""
    token = _planned.set(target)
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


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the device that programs are for; None: it is no NVIDIA GPU."""
    if (planned := _planned.get()) is not None:
        return planned.capability
    if jax.default_backend() != "gpu":
        return None
    # AMD's devices, which are "gpu" too, give the name of an architecture here.
    match = re.fullmatch(r"(\d+)\.(\d+)", str(jax.local_devices()[0].compute_capability))
    return (int(match[1]), int(match[2])) if match else None
