"""Attention: the one public call, the exact reference, and the decision which kernel serves a call.

Softmax attention (Vaswani et al., 2017) with grouped queries (Ainslie et al., 2023): K key-value heads serve N query
heads. A kernel is never told a window: cuDNN's window without causality attends to the whole future. Rows are cut into
blocks of places with the keys around them instead (`ops/window.py`), as far as their number and the window, which must
be known while tracing, allow. All else that is neither causal nor bidirectional goes to a kernel as an array, which it
reads whole: places that are not seen cost as much as others.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.ops.mask import Mask
from stackwise_jax.ops.target import cuda_capability, is_cpu, is_planned
from stackwise_jax.ops.window import cut_rows, find_cut

IMPLEMENTATIONS = ("auto", "reference", "xla", "cudnn")
Kernel = Literal["xla", "cudnn"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    mask: Mask | Bool[Array, "b 1 T S"],
    *,
    implementation: str = "auto",
    scale: float | None = None,
) -> Float[Array, "B T N W"]:
    """Returns softmax(scale * q k^T) v over the visible keys, query head n reading key-value head n // (N / K).

    Args:
      q, k, v: of one dtype; N is a multiple of K. Kernels know one width only: for them the narrower of H and W is
        filled up with zeros.
      mask: a `Mask` when the row attends to itself (T = S), or the array itself, b being B or 1. A row of the array
        without a visible key yields numbers without meaning; a `Mask` has none.
      implementation: auto (cudnn where it can serve, else xla; fp16 on a CPU: reference), reference, xla or cudnn.
      scale: of the logits; None: 1 / sqrt(H).

    Returns:
      One vector a query and head, in q.dtype. The softmax is float32 whatever the inputs.

    Raises:
      UserError: the implementation is unknown, or is named and cannot serve this call on this device.
      ValueError: the shapes do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f'model.attention_implementation="{implementation}" is not one of {", ".join(IMPLEMENTATIONS)}.'
            + did_you_mean(implementation, IMPLEMENTATIONS)
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot be shared out over {k.shape[2]} key-value heads")
    if isinstance(mask, Mask) and q.shape[1] != k.shape[1]:
        raise ValueError(f"a Mask is for a row that attends to itself, not {q.shape[1]} queries on {k.shape[1]} keys")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if q.dtype == jnp.float16 and is_cpu():  # JAX's call refuses the pair
        if implementation == "xla":
            raise UserError('model.attention_implementation="xla" has no fp16 on a CPU; use "auto" or "reference".')
        implementation = "reference" if implementation == "auto" else implementation
    if implementation == "reference":
        visible = mask.as_array(q.shape[1]) if isinstance(mask, Mask) else mask
        return _reference(q, k, v, visible, scale)
    if isinstance(mask, Mask) and (cut := find_cut(mask, q.shape[1])) is not None:
        own_q, own_k, own_v, visible = cut_rows(q, k, v, mask, cut)
        mixed = attention(own_q, own_k, own_v, visible, implementation=implementation, scale=scale)
        return mixed.reshape(*q.shape[:3], -1)

    width = v.shape[-1]
    q, k, v = _of_one_width(q, k, v)
    if isinstance(mask, Mask):
        is_causal = mask.kind == "causal" and not mask.has_data
        needs_array = mask.has_data or mask.kind not in ("causal", "bidirectional")
        visible = mask.as_array(q.shape[1]) if needs_array else None
    else:
        is_causal, visible = False, mask
    refusal = cudnn_refusal(q, k, v, is_causal=is_causal)
    if implementation == "cudnn" and refusal:
        raise UserError(f'model.attention_implementation="cudnn" {refusal}; use "auto" or "xla".')
    kernel: Kernel = "xla" if refusal or implementation == "xla" else "cudnn"
    if kernel == "cudnn" and is_planned():
        return _planned_kernel(q, k, v, None if visible is None else jnp.where(visible, 0.0, -1e9).astype(q.dtype))
    # JAX's call mixes dtypes inside, which strict promotion would refuse although the result is as wanted.
    with jax.numpy_dtype_promotion("standard"):
        mixed = jax.nn.dot_product_attention(
            q, k, v, mask=visible, is_causal=is_causal, scale=scale, implementation=kernel
        )
    return mixed[..., :width]


def _of_one_width(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K W"]
) -> tuple[Float[Array, "B T N D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Zeros in queries and keys change no product, those in values are cut off again."""
    width = max(q.shape[-1], v.shape[-1])
    if q.shape[-1] == v.shape[-1]:
        return q, k, v
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (q, k, v))
    return q, k, v


def cudnn_refusal(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *, is_causal: bool
) -> str | None:
    """Returns why cuDNN cannot serve a call on the default device, as the rest of a sentence; None when it can.

    Args:
      q, k, v: the call's arrays; only shapes and dtypes are read.
      is_causal: whether causality is all there is to the mask, so that no array need be passed.
    """
    capability = cuda_capability()
    if capability is None or capability < (8, 0):
        device = jax.local_devices()[0].device_kind
        return f"needs an NVIDIA GPU of compute capability 8.0 (A100) or newer, and the device is {device}"
    dtypes = {x.dtype.name for x in (q, k, v)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        return f"needs bfloat16 or float16 queries, keys and values, not {' and '.join(sorted(dtypes))}"
    d_head, longest = q.shape[-1], 256 if capability >= (9, 0) else 128
    if d_head % 8 or d_head > longest:
        return f"needs a head dimension that is a multiple of 8 and at most {longest} on this GPU, not {d_head}"
    T, S = q.shape[1], k.shape[1]
    if T % 2 or S % 2:
        return f"needs even numbers of queries and keys, not {T} and {S}"
    if not is_causal and S % 128:
        # Its backward pass returns NaN in dQ for rows of strongly negative logits where S % 128 == 64: with a mask
        # array (https://github.com/pytorch/pytorch/issues/196678), and with none (cuDNN 9.19 on an H200, H = 64).
        return f"needs a multiple of 128 keys unless rows are causal and one document each, not {S}"
    return None


@jax.custom_vjp
def _planned_kernel(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
    return kernel_forward(q, k, v, bias)[0]


@jax.jit
def kernel_forward(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
    """Stands for cuDNN's forward kernel in a plan: what it reads, and the result and the statistics that it writes."""
    read = _sum(q, k, v) if bias is None else _sum(q, k, v, bias)
    B, T, N, _ = q.shape
    mixed = jnp.zeros((B, T, N, v.shape[-1]), q.dtype) + read.astype(q.dtype)
    return mixed, jnp.zeros((B, N, T), jnp.float32) + read


@jax.jit
def kernel_backward(
    q: Array, k: Array, v: Array, bias: Array | None, mixed: Array, statistics: Array, gradient: Array
) -> tuple[Array, Array, Array, Array]:
    """Stands for cuDNN's backward kernel in a plan: three gradients, and dQ in float32, in which they are summed."""
    read = _sum(mixed, statistics, gradient) if bias is None else _sum(mixed, statistics, gradient, bias)
    of_q, of_k, of_v = (own * read.astype(own.dtype) for own in (q, k, v))
    return of_q, of_k, of_v, q.astype(jnp.float32) * read


def _sum(*arrays: Array) -> Array:
    return jnp.stack([jnp.sum(own).astype(jnp.float32) for own in arrays]).sum()


def _planned_forward(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    mixed, statistics = kernel_forward(q, k, v, bias)
    return mixed, (q, k, v, bias, mixed, statistics)


def _planned_backward(kept: Any, gradient: Array) -> tuple[Array | None, ...]:
    return (*kernel_backward(*kept, gradient)[:3], None)


_planned_kernel.defvjp(_planned_forward, _planned_backward)


def _reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    visible: Bool[Array, "b 1 T S"],
    scale: float,
) -> Float[Array, "B T N W"]:
    """The formula as it is written, in float32 up to the probabilities: what the kernels are compared with."""
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    # The highest precision, because float32 matmuls on a GPU otherwise round their inputs to 10 bits.
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, precision="highest", preferred_element_type=jnp.float32)
    logits = jnp.where(visible[:, :, None], logits * scale, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(logits, axis=-1)
    if v.dtype.itemsize == 2:
        probabilities = probabilities.astype(v.dtype)
    mixed = jnp.einsum("BKGTS,BSKW->BTKGW", probabilities, v, precision="highest", preferred_element_type=jnp.float32)
    return mixed.reshape(B, T, N, -1).astype(q.dtype)
