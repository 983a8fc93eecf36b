"""Where arrays are: frozen parts rest on the host and come to the device for as long as something runs through them."""

from typing import Any

import jax
import numpy as np

from stackwise_jax.types import Params


def to_host(params: Params) -> Params:
    """Copies a tree of arrays to the host; what held it on the device may be freed."""
    return jax.tree.map(np.asarray, jax.device_get(params))


def to_device(tree: Any) -> Any:
    """Copies a tree of arrays to the device."""
    return jax.device_put(tree)
