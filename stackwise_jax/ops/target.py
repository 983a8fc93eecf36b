"""The device that programs are for: the one at hand or, while a plan is made, one that need not be there."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

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

# JAX keeps what it traced by the value of this, so that nothing that was traced for a plan is ever run.
_planned: Any = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def planned_for(target: Target) -> Iterator[None]:
    """What is traced inside is the program of a device of this kind, for its shapes: it must not run."""
    with _planned(target):
        yield


def is_planned() -> bool:
    """Programs are traced for a plan and never run."""
    return _planned.value is not None


def is_cpu() -> bool:
    """Programs are for a CPU."""
    planned = _planned.value
    return jax.default_backend() == "cpu" if planned is None else planned == NO_GPU


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the device that programs are for; None: it is no NVIDIA GPU."""
    if (planned := _planned.value) is not None:
        return planned.capability
    if jax.default_backend() != "gpu":
        return None
    # AMD's devices, which are "gpu" too, give the name of an architecture here.
    match = re.fullmatch(r"(\d+)\.(\d+)", str(jax.local_devices()[0].compute_capability))
    return (int(match[1]), int(match[2])) if match else None
