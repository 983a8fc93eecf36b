"""What must not be stored, and what a device has no room for: noticed, and said with what to try."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from stackwise_jax.errors import UserError
from stackwise_jax.memory.budget import readable_bytes
from stackwise_jax.train.plan import Plan, phase_device_bytes
from stackwise_jax.train.scaling import LEAST_SCALE

TRY = (
    "the run folder keeps the last good snapshot: lower optimizer.learning_rate, raise optimizer.warmup_fraction or "
    "compute in fp32, in a new --workdir"
)


def read_metrics(phase_step: int, metrics: dict[str, Array]) -> dict[str, float]:
    """Fetches the metrics of a step.

    Raises:
      UserError: the loss or the gradient norm is not a number. Where the loss is scaled, a step whose gradient was none
        was skipped and reports no norm, as long as a smaller scale may help.
    """
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if math.isfinite(values["loss"]) and values.get("skipped") and values["loss_scale"] > LEAST_SCALE:
        return {name: value for name, value in values.items() if name != "gradient_norm"}
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        raise UserError(
            f"loss={values['loss']} and gradient norm={values['gradient_norm']} at phase step {phase_step}; {TRY}"
        )
    return values


def require_finite(state: Any, where: str) -> None:
    """Raises `UserError` where weights or optimiser state that are about to be stored are not numbers."""
    if not _all_finite(state):
        raise UserError(f"weights or optimiser state are not finite after {where}; {TRY}")


@jax.jit
def _all_finite(tree: Any) -> Bool[Array, ""]:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in leaves], jnp.bool_(True))


def explain_memory(plan: Plan, index: int, error: Exception) -> str:
    """A few lines for a device that ran out of memory in phase `index`: what fills it by the plan, what to try."""
    estimate = dataclasses.asdict(phase_device_bytes(plan, index))
    largest = sorted(estimate.items(), key=lambda item: item[1], reverse=True)[:3]
    named = ", ".join(f"{name} {readable_bytes(size)}" for name, size in largest)
    return (
        f"out of memory in phase {plan.phases[index].name}: {str(error).splitlines()[0][:160]}\n"
        f"  the plan counts on {readable_bytes(sum(estimate.values()))} there, most of it {named}\n"
        "  try training.remat=full, a larger training.accumulation_steps, a smaller training.loss_chunk_tokens or "
        "data.seq_len, or cache.tier=host; the run folder keeps its last snapshot"
    )
