"""Programs that are traced for a plan: what they are, and that none of them is ever run."""

from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.ops.attention import attention
from stackwise_jax.ops.fp8 import fp8_matmul
from stackwise_jax.ops.mask import Mask
from stackwise_jax.ops.target import HOPPER, NO_GPU, cuda_capability, is_cpu, is_planned, planned_for

ROWS, WEIGHT = jnp.ones((16, 32), jnp.bfloat16), jnp.ones((32, 8), jnp.bfloat16)


def gradients(rows: Any, weight: Any) -> Any:
    return jax.grad(lambda *own: fp8_matmul(*own).astype(jnp.float32).sum(), argnums=(0, 1))(rows, weight)


def accumulated(function: Any) -> set[str]:
    """The dtypes that matmuls of a function put out."""
    text = str(jax.make_jaxpr(function)(ROWS, WEIGHT))
    return {dtype for dtype in ("float32", "bfloat16") if f"preferred_element_type={dtype}" in text}


def test_a_plan_leaves_nothing_behind_that_would_be_run() -> None:
    """JAX keeps what it traced of a differentiated matmul; on a CPU it must not be the one of a GPU."""
    alone = jax.jit(fp8_matmul)
    with planned_for(HOPPER):
        planned = accumulated(gradients), accumulated(alone)
    assert planned == ({"bfloat16"}, {"bfloat16"})
    assert (accumulated(gradients), accumulated(alone)) == ({"float32"}, {"float32"})


def test_attention_of_a_plan_is_a_kernel_that_is_not_looked_into() -> None:
    q, k, v = (jnp.ones((2, 128, heads, 64), jnp.bfloat16) for heads in (4, 2, 2))

    def loss(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, Mask("causal", None)).astype(jnp.float32).sum()

    def text() -> str:
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))

    with planned_for(HOPPER):
        assert "kernel_forward" in text()
        assert "kernel_backward" in text()
    with planned_for(NO_GPU):
        assert "kernel_" not in text()
    assert "kernel_" not in text()


def test_the_device_at_hand_is_a_cpu_here() -> None:
    assert is_cpu()
    assert not is_planned()
    assert cuda_capability() is None
    with planned_for(HOPPER):
        assert not is_cpu()
        assert is_planned()
        assert cuda_capability() == (9, 0)
    with planned_for(NO_GPU):
        assert is_cpu()
