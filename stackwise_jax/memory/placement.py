"""Where arrays are: frozen parts rest on the host and come to the device for as long as something runs through them."""

from typing import Any

import jax
import numpy as np


def to_host(params: Any) -> Any:
    """Copies a tree of arrays to the host, into memory of its own; what held it on the device may be freed or donated.

    On a CPU `device_get` returns the device's own memory, which the next step may write to.
    """
    must_copy = True if jax.default_backend() == "cpu" else None
    return jax.tree.map(lambda leaf: np.array(leaf, copy=must_copy), jax.device_get(params))


def to_device(tree: Any) -> Any:
    """Copies a tree of arrays to the device."""
    return jax.device_put(tree)
