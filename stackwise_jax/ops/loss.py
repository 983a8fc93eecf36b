"""Decides how the head's loss is computed: a chunk of places at a time, each chunk's logits made once and dropped.

The logits of all places, [M V] in float32, are larger than everything else in a step (2 GiB for 16k places and 32k
pieces), so they never exist together. Differentiation takes no second pass: the gradient of cross-entropy is known as
soon as a chunk's logits are, so the forward pass keeps that (the size of the inputs) and the backward pass scales it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Bool, Float, Int


class _Chunks(NamedTuple):
    """The places, cut into equal chunks; those that fill up the last chunk have weight 0."""

    hidden: Float[Array, "n C D"]
    targets: Int[Array, "n C"]
    weights: Float[Array, "n C"]


class _Gradients(NamedTuple):
    """The gradients of the summed loss; None for an input that is not differentiated."""

    hidden: Float[Array, "M D"] | None
    table: Float[Array, "V D"] | None


def cross_entropy(
    hidden: Float[Array, "M D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "M"],
    weights: Float[Array, "M"],
    *,
    chunk_tokens: int,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Returns the sum over places of weight * -log softmax(hidden @ table.T)[target], in nats, float32.

    With `z_loss` each place's loss is larger by z_loss * log(sum(exp(logits)))**2, which keeps the logits from drifting
    together (Chowdhery et al., 2022); for training alone.

    Differentiable in `hidden` and `table`. What is not differentiated is neither computed nor stored: no gradient of a
    frozen table, none at all in an evaluation. `weights` count as constants: their gradient is given as zero.

    Args:
      hidden, table: of one dtype, in which the matmuls read them; logits and softmax are float32, and so is the table's
        gradient until it is complete.
      targets: ids below V; read only where the weight is not 0.
      weights: 0 where nothing is asked, which gives gradients of exactly 0.
      chunk_tokens: places whose logits exist at once; the result does not depend on it but for rounding.

    Raises:
      ValueError: `hidden` and `table` differ in dtype.
    """
    _check_dtypes(hidden, table)
    return _cross_entropy(hidden, table, targets, weights, chunk_tokens, z_loss)


def token_losses(
    hidden: Float[Array, "M D"], table: Float[Array, "V D"], targets: Int[Array, "M"], *, chunk_tokens: int
) -> Float[Array, "M"]:
    """Returns -log softmax(hidden @ table.T)[target] of each place, in nats, float32.

    For evaluations: differentiating it would keep the logits of every chunk. The rest is as in `cross_entropy`.
    """
    _check_dtypes(hidden, table)
    M = hidden.shape[0]
    chunks = _to_chunks(hidden, targets, jnp.ones(M, jnp.float32), chunk_tokens)

    def losses(chunk: _Chunks) -> Array:
        logits = _logits(chunk.hidden, table)
        return _losses(logits, jax.nn.logsumexp(logits, axis=1), chunk.targets)

    return jax.lax.map(losses, chunks).reshape(-1)[:M]


def token_scores(
    hidden: Float[Array, "M D"], table: Float[Array, "V D"], targets: Int[Array, "M"], *, chunk_tokens: int
) -> tuple[Float[Array, "M"], Float[Array, "M"], Bool[Array, "M"]]:
    """As `token_losses`, and of each place the largest probability, and whether it is the target's."""
    _check_dtypes(hidden, table)
    M = hidden.shape[0]
    chunks = _to_chunks(hidden, targets, jnp.ones(M, jnp.float32), chunk_tokens)

    def scores(chunk: _Chunks) -> tuple[Array, Array, Array]:
        logits = _logits(chunk.hidden, table)
        log_sums = jax.nn.logsumexp(logits, axis=1)
        confidence = jnp.exp(jnp.max(logits, axis=1) - log_sums)
        return _losses(logits, log_sums, chunk.targets), confidence, jnp.argmax(logits, axis=1) == chunk.targets

    losses, confidence, is_right = (part.reshape(-1)[:M] for part in jax.lax.map(scores, chunks))
    return losses, confidence, is_right


def _check_dtypes(hidden: Array, table: Array) -> None:
    if hidden.dtype != table.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and the table {table.dtype}: cast the table to {hidden.dtype} first"
        )


def _to_chunks(
    hidden: Float[Array, "M D"], targets: Int[Array, "M"], weights: Float[Array, "M"], chunk_tokens: int
) -> _Chunks:
    M, D = hidden.shape
    C = min(chunk_tokens, M)
    filling = -M % C
    return _Chunks(
        jnp.pad(hidden, ((0, filling), (0, 0))).reshape(-1, C, D),
        jnp.pad(targets, (0, filling)).reshape(-1, C),
        jnp.pad(weights.astype(jnp.float32), (0, filling)).reshape(-1, C),
    )


def _logits(hidden: Float[Array, "C D"], table: Float[Array, "V D"]) -> Float[Array, "C V"]:
    return jnp.einsum("CD,VD->CV", hidden, table, preferred_element_type=jnp.float32)


def _is_target(logits: Float[Array, "C V"], targets: Int[Array, "C"]) -> Array:
    """Returns a boolean [C V]; comparing fuses into what reads the logits, where a gather or scatter would not."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets.astype(jnp.int32)[:, None]


def _losses(
    logits: Float[Array, "C V"], log_sums: Float[Array, "C"], targets: Int[Array, "C"], z_loss: float = 0.0
) -> Float[Array, "C"]:
    losses = log_sums - jnp.where(_is_target(logits, targets), logits, 0.0).sum(axis=1)
    return losses if z_loss == 0.0 else losses + z_loss * log_sums**2


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden: Float[Array, "M D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "M"],
    weights: Float[Array, "M"],
    chunk_tokens: int,
    z_loss: float,
) -> Float[Array, ""]:
    """The loss alone: what runs when nothing is differentiated."""

    def add_chunk(total: Array, chunk: _Chunks) -> tuple[Array, None]:
        logits = _logits(chunk.hidden, table)
        losses = _losses(logits, jax.nn.logsumexp(logits, axis=1), chunk.targets, z_loss)
        return total + (chunk.weights * losses).sum(), None

    chunks = _to_chunks(hidden, targets, weights, chunk_tokens)
    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(
    hidden: CustomVJPPrimal,
    table: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    chunk_tokens: int,
    z_loss: float,
) -> tuple[Array, _Gradients]:
    """The loss and, from the same logits, the gradients of what is differentiated (`perturbed`)."""
    dtype = hidden.value.dtype

    def add_chunk(carry: tuple[Array, Array | None], chunk: _Chunks) -> tuple[tuple[Array, Array | None], Array | None]:
        total, d_table = carry
        logits = _logits(chunk.hidden, table.value)
        log_sums = jax.nn.logsumexp(logits, axis=1)
        total += (chunk.weights * _losses(logits, log_sums, chunk.targets, z_loss)).sum()
        # d loss / d logits = weight * (softmax * (1 + 2 z_loss log_sum) - one-hot target)
        d_logits = jnp.exp(logits - log_sums[:, None])
        if z_loss != 0.0:
            d_logits *= 1.0 + 2.0 * z_loss * log_sums[:, None]
        d_logits -= _is_target(logits, chunk.targets).astype(jnp.float32)
        d_logits = (d_logits * chunk.weights[:, None]).astype(dtype)
        if d_table is not None:
            d_table += jnp.einsum("CV,CD->VD", d_logits, chunk.hidden, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("CV,VD->CD", d_logits, table.value) if hidden.perturbed else None
        return (total, d_table), d_hidden

    chunks = _to_chunks(hidden.value, targets.value, weights.value, chunk_tokens)
    d_table = jnp.zeros(table.value.shape, jnp.float32) if table.perturbed else None
    (total, d_table), d_hidden = jax.lax.scan(add_chunk, (jnp.zeros((), jnp.float32), d_table), chunks)
    M, D = hidden.value.shape
    return total, _Gradients(
        None if d_hidden is None else d_hidden.reshape(-1, D)[:M], None if d_table is None else d_table.astype(dtype)
    )


def _backward(
    chunk_tokens: int, z_loss: float, gradients: _Gradients, cotangent: Float[Array, ""]
) -> tuple[Array | None, Array | None, None, None]:
    def scale(gradient: Array | None) -> Array | None:
        return None if gradient is None else (cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype)

    return scale(gradients.hidden), scale(gradients.table), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
