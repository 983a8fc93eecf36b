"""Dynamic loss scaling (Micikevicius et al., 2018), for gradients in fp16: its least number is 6e-8.

The loss is multiplied by a power of two before it is differentiated and gradients are divided by it in float32. A step
whose gradient overflows changes no weight and halves the scale; `GROWTH_STEPS` steps without an overflow double it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from stackwise_jax.schema import RunConfig
from stackwise_jax.types import Params

FIRST_SCALE = 2.0**16  # of the mean loss of a micro-batch
LEAST_SCALE = 2.0**-40  # of the summed loss; below it the fault is not the scale's
GROWTH_STEPS = 2000


def init_scaling(config: RunConfig) -> Params:
    """The state at the beginning of a run: `scale` (float32) and `clean_steps` (int32); empty where fp16 is not used.

    Losses are summed over a micro-batch, so the first scale is that of their mean over its tokens, a power of two.
    """
    if "fp16" not in (config.precision.compute, config.training.progressive.new_stack_precision):
        return {}
    tokens = config.training.batch_size // config.training.accumulation_steps * config.data.seq_len
    scale = FIRST_SCALE / 2.0 ** math.ceil(math.log2(tokens))
    return {"scale": jnp.float32(scale), "clean_steps": jnp.int32(0)}


def loss_scale(scaling: Params) -> Float[Array, ""] | None:
    """What the loss is multiplied by; None where it is not scaled."""
    return scaling["scale"] if scaling else None


def next_scaling(scaling: Params, gradient_norm: Float[Array, ""]) -> Params:
    """The state after a step."""
    if not scaling:
        return {}
    is_finite = jnp.isfinite(gradient_norm)
    clean = jnp.where(is_finite, scaling["clean_steps"] + 1, 0)
    grows = clean == GROWTH_STEPS
    factor = jnp.where(is_finite, jnp.where(grows, 2.0, 1.0), 0.5)
    return {"scale": scaling["scale"] * factor, "clean_steps": jnp.where(grows, 0, clean)}


def keep_where(is_finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree, or the old one after an overflow."""
    return jax.tree.map(lambda ours, theirs: jnp.where(is_finite, ours, theirs), new, old)


def scaling_metrics(scale: Float[Array, ""], is_finite: Bool[Array, ""]) -> dict[str, Array]:
    """`loss_scale` of a step, and `skipped`: 1 where its gradient overflowed, which changed no weight."""
    return {"loss_scale": scale, "skipped": 1.0 - is_finite.astype(jnp.float32)}
