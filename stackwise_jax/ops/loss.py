"""Decides how the head's loss is computed: a chunk of places at a time, each chunk's logits made once and dropped.

The logits of all places, [M V] in float32, are larger than everything else in a step (2 GiB for 16k places and 32k
pieces), so they never exist together. Differentiation takes no second pass: the gradient of cross-entropy is known as
soon as a chunk's logits are, so the forward pass keeps that (the size of the inputs) and the backward pass scales it.
Masked objectives ask at a part of the places alone, whose chunks are all that is computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Bool, Float, Int

ALIGNMENT = 64  # rows of the table, in the matmuls of a training step


class _Chunks(NamedTuple):
    """Places, all of them, or one chunk, or cut into equal chunks; those that fill up a chunk have weight 0."""

    hidden: Float[Array, "*n D"]
    targets: Int[Array, "*n"]
    weights: Float[Array, "*n"]


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
    asks_everywhere: bool = True,
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
      asks_everywhere: False: places of weight 0 are left out, which costs a loop whose length only the device knows,
        and pays where they are many. The result does not depend on it but for rounding.

    Raises:
      ValueError: `hidden` and `table` differ in dtype.
    """
    _check_dtypes(hidden, table)
    return _cross_entropy(hidden, table, targets, weights, chunk_tokens, z_loss, asks_everywhere)


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


def _aligned(table: Float[Array, "V D"]) -> Float[Array, "W D"]:
    """With rows of zeros up to a number that matrix units read without copies: GPT-2 has 50257 rows, BERT 30522."""
    missing = -table.shape[0] % ALIGNMENT
    return jnp.pad(table, ((0, missing), (0, 0))) if missing else table


def _logits(hidden: Float[Array, "C D"], table: Float[Array, "W D"], rows: int | None = None) -> Float[Array, "C W"]:
    """Float32 logits; of those that are not of the first `rows` rows, minus infinity."""
    logits = jnp.einsum("CD,VD->CV", hidden, table, preferred_element_type=jnp.float32)
    if rows is None or rows == table.shape[0]:
        return logits
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < rows, logits, -jnp.inf)


def _is_target(logits: Float[Array, "C V"], targets: Int[Array, "C"]) -> Array:
    """Returns a boolean [C V]; comparing fuses into what reads the logits, where a gather or scatter would not."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets.astype(jnp.int32)[:, None]


def _losses(
    logits: Float[Array, "C V"], log_sums: Float[Array, "C"], targets: Int[Array, "C"], z_loss: float = 0.0
) -> Float[Array, "C"]:
    losses = log_sums - jnp.where(_is_target(logits, targets), logits, 0.0).sum(axis=1)
    return losses if z_loss == 0.0 else losses + z_loss * log_sums**2


def _asked_places(weights: Float[Array, "M"], chunk_tokens: int) -> tuple[Int[Array, "n C"], Int[Array, ""]]:
    """The places whose weight is not 0, in order, and in how many chunks they lie; M fills up what is left."""
    M = weights.shape[0]
    C = min(chunk_tokens, M)
    asked = weights != 0
    (places,) = jnp.nonzero(asked, size=M + -M % C, fill_value=M)
    return places.reshape(-1, C), (jnp.sum(asked) + C - 1) // C


def _over_chunks(
    body: Callable[[Any, _Chunks], tuple[Any, Array | None]],
    carry: Any,
    places: _Chunks,
    chunk_tokens: int,
    skips: bool,
) -> tuple[Any, Float[Array, "M D"] | None]:
    """Runs `body` over the chunks of all places, or, where it `skips`, of those whose weight is not 0.

    Args:
      body: (carry, chunk) -> (carry, [C D] of its places or None).
      places: as one chunk.

    Returns:
      (carry, [M D] of all places: 0 where they were left out).
    """
    M, D = places.hidden.shape
    if not skips:
        carry, rows = jax.lax.scan(body, carry, _to_chunks(*places, chunk_tokens))
        return carry, None if rows is None else rows.reshape(-1, D)[:M]
    asked, n_chunks = _asked_places(places.weights, chunk_tokens)

    def take(values: Array, own: Array) -> Array:
        return values.at[own].get(mode="fill", fill_value=0)

    def turn(number: Array, state: tuple[Any, Array | None]) -> tuple[Any, Array | None]:
        carry, rows = state
        own = jax.lax.dynamic_index_in_dim(asked, number, keepdims=False)
        carry, made = body(carry, _Chunks(*(take(values, own) for values in places)))
        return carry, None if rows is None or made is None else rows.at[own].set(made, mode="drop")

    first = _Chunks(*(take(values, asked[0]) for values in places))
    made = jax.eval_shape(body, carry, first)[1]
    rows = None if made is None else jnp.zeros((M, D), made.dtype)
    return jax.lax.fori_loop(0, n_chunks, turn, (carry, rows))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(
    hidden: Float[Array, "M D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "M"],
    weights: Float[Array, "M"],
    chunk_tokens: int,
    z_loss: float,
    asks_everywhere: bool,
) -> Float[Array, ""]:
    """The loss alone: what runs when nothing is differentiated."""
    rows, table = table.shape[0], _aligned(table)

    def add_chunk(total: Array, chunk: _Chunks) -> tuple[Array, None]:
        logits = _logits(chunk.hidden, table, rows)
        losses = _losses(logits, jax.nn.logsumexp(logits, axis=1), chunk.targets, z_loss)
        return total + (chunk.weights * losses).sum(), None

    places = _Chunks(hidden, targets, weights.astype(jnp.float32))
    return _over_chunks(add_chunk, jnp.zeros((), jnp.float32), places, chunk_tokens, not asks_everywhere)[0]


def _forward(
    hidden: CustomVJPPrimal,
    table: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    chunk_tokens: int,
    z_loss: float,
    asks_everywhere: bool,
) -> tuple[Array, _Gradients]:
    """The loss and, from the same logits, the gradients of what is differentiated (`perturbed`)."""
    dtype, rows, aligned = hidden.value.dtype, table.value.shape[0], _aligned(table.value)

    def add_chunk(carry: tuple[Array, Array | None], chunk: _Chunks) -> tuple[tuple[Array, Array | None], Array | None]:
        total, d_table = carry
        logits = _logits(chunk.hidden, aligned, rows)
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
        d_hidden = jnp.einsum("CV,VD->CD", d_logits, aligned) if hidden.perturbed else None
        return (total, d_table), d_hidden

    places = _Chunks(hidden.value, targets.value, weights.value.astype(jnp.float32))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(aligned.shape, jnp.float32) if table.perturbed else None)
    (total, d_table), d_hidden = _over_chunks(add_chunk, start, places, chunk_tokens, not asks_everywhere)
    return total, _Gradients(d_hidden, None if d_table is None else d_table[:rows].astype(dtype))


def _backward(
    chunk_tokens: int, z_loss: float, asks_everywhere: bool, gradients: _Gradients, cotangent: Float[Array, ""]
) -> tuple[Array | None, Array | None, None, None]:
    def scale(gradient: Array | None) -> Array | None:
        return None if gradient is None else (cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype)

    return scale(gradients.hidden), scale(gradients.table), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
