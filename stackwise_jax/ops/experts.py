"""Mixture of experts without capacity: which experts a token goes to, and matmuls of rows that lie by expert.

Rows are laid out in blocks of one expert each, so that a loop over blocks multiplies every row by its own expert's
matrix and by no other: of `jax.lax.ragged_dot` a CPU makes one product per expert of all rows. No token is dropped
whatever the experts' loads are (dropless; Gale et al., 2023, MegaBlocks). All movement of rows is by gathers, forward
and backward, so that equal inputs give equal sums.
"""

import typing

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from stackwise_jax.ops.matmul import as_array
from stackwise_jax.types import Quantised

# Rows of a block: a power of two between these, such that what fills blocks up adds at most an eighth where there are
# rows enough. A longer block reads its expert's matrix for more rows.
LEAST_BLOCK, LARGEST_BLOCK = 8, 512


class Routing(typing.NamedTuple):
    """Where tokens go.

    Attributes:
      experts: of each token, the likeliest first.
      weights: what their outputs are multiplied by, float32; the gradient reaches the router through these.
      logits: of all experts, float32.
    """

    experts: Int[Array, "rows active"]
    weights: Float32[Array, "rows active"]
    logits: Float32[Array, "rows E"]


def route(x: Float[Array, "rows D"], router: Float[Array, "D E"], *, active: int, normalises: bool) -> Routing:
    """Sends each token to its `active` likeliest experts; in float32, so that rounding seldom decides where it goes.

    Weights are the experts' shares of the softmax over all of them (Fedus et al., 2022), with `normalises` divided by
    their sum (Jiang et al., 2024). Of equal logits the lower number wins.
    """
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
    _, experts = jax.lax.top_k(logits, active)
    weights = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), experts, axis=-1)
    if normalises:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(experts, weights, logits)


def balance_loss(routing: Routing, counted: Bool[Array, "rows"] | None = None) -> Float32[Array, ""]:
    """Load-balance loss: E * sum over experts of (share of tokens sent to it) * (mean share of the softmax).

    Of Fedus et al. (2022), equation 4, for several experts a token (Lepikhin et al., 2021): shares of tokens are over
    all assignments, so even loads give 1 whatever the number of active experts, and all tokens at one expert about E.
    Its gradient goes through the softmax alone.

    Args:
      counted: tokens that the means are over; None: all.
    """
    n_experts = routing.logits.shape[-1]
    sent = jnp.mean(jax.nn.one_hot(routing.experts, n_experts, dtype=jnp.float32), axis=1)
    probabilities = jax.nn.softmax(routing.logits, axis=-1)
    return n_experts * jnp.sum(_mean(sent, counted) * _mean(probabilities, counted))


def router_z_loss(routing: Routing, counted: Bool[Array, "rows"] | None = None) -> Float32[Array, ""]:
    """Mean of log(sum(exp(logits)))**2 (Zoph et al., 2022, equation 5)."""
    squares = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
    return _mean(squares[:, None], counted)[0]


def _mean(values: Float[Array, "rows n"], counted: Bool[Array, "rows"] | None) -> Float[Array, "n"]:
    if counted is None:
        return jnp.mean(values, axis=0)
    total = jnp.sum(jnp.where(counted[:, None], values, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(counted), 1)


class Layout(typing.NamedTuple):
    """Rows by expert: every expert's begin at a new block, and zeros fill its last one up.

    Attributes:
      slot_of: slot of each assignment of a token to an expert.
      assignment_of: of each slot, token * active + which; the number of assignments where nothing lies there.
      expert_of: expert of each block.
    """

    slot_of: Int[Array, "rows active"]
    assignment_of: Int[Array, "slots"]
    expert_of: Int[Array, "blocks"]


def block_rows(assignments: int, n_experts: int) -> int:
    """Rows of a block."""
    wanted = max(1, assignments // (8 * n_experts))
    return min(max(1 << (wanted.bit_length() - 1), LEAST_BLOCK), LARGEST_BLOCK)


def lay_out(experts: Int[Array, "rows active"], n_experts: int) -> Layout:
    """Sorts assignments by expert; within one their order is that of the tokens."""
    flat = experts.reshape(-1)
    n, block = flat.size, block_rows(flat.size, n_experts)
    n_blocks = (n + n_experts * (block - 1)) // block  # enough whatever the loads
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(n_experts, jnp.int32).at[flat].add(1)
    blocks = (counts + block - 1) // block
    starts = jnp.cumsum(blocks) - blocks  # the first block of each expert
    skipped = starts * block - (jnp.cumsum(counts) - counts)  # slots left free before an expert
    slots = jnp.arange(n, dtype=jnp.int32) + skipped[flat[order]]
    expert_of = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(n_blocks), side="right")
    return Layout(
        jnp.zeros(n, jnp.int32).at[order].set(slots, unique_indices=True).reshape(experts.shape),
        jnp.full(n_blocks * block, n, jnp.int32).at[slots].set(order.astype(jnp.int32), unique_indices=True),
        jnp.minimum(expert_of, n_experts - 1).astype(jnp.int32),
    )


@jax.custom_vjp
def to_slots(x: Float[Array, "rows D"], layout: Layout) -> Float[Array, "blocks block D"]:
    """Each token at its slots, zeros where nothing lies."""
    active = layout.slot_of.shape[1]
    placed = jnp.take(x, layout.assignment_of // active, axis=0, mode="fill", fill_value=0)
    return placed.reshape(layout.expert_of.shape[0], -1, x.shape[-1])


@jax.custom_vjp
def from_slots(y: Float[Array, "blocks block D"], layout: Layout) -> Float[Array, "rows active D"]:
    """What lies at each token's slots."""
    return jnp.take(y.reshape(-1, y.shape[-1]), layout.slot_of, axis=0)


def _pull_to_slots(layout: Layout, gradient: Float[Array, "blocks block D"]) -> tuple[Array, None]:
    pulled = jnp.sum(from_slots(gradient, layout), axis=1, dtype=jnp.float32)
    return pulled.astype(gradient.dtype), None


def _pull_from_slots(layout: Layout, gradient: Float[Array, "rows active D"]) -> tuple[Array, None]:
    width = gradient.shape[-1]
    placed = jnp.take(gradient.reshape(-1, width), layout.assignment_of, axis=0, mode="fill", fill_value=0)
    return placed.reshape(layout.expert_of.shape[0], -1, width), None


to_slots.defvjp(lambda x, layout: (to_slots(x, layout), layout), _pull_to_slots)
from_slots.defvjp(lambda y, layout: (from_slots(y, layout), layout), _pull_from_slots)


def expert_matmul(
    rows: Float[Array, "blocks block D"],
    weights: Float[Array, "E D F"] | Quantised,
    expert_of: Int[Array, "blocks"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "blocks block F"]:
    """Multiplies every block by its expert's matrix, in `dtype`.

    Quantised matrices are decoded in front of the products and again in the backward pass, as in `ops.matmul`; they
    take no gradient.
    """
    return _expert_matmul(rows.astype(dtype), weights, expert_of)


@jax.custom_vjp
def _expert_matmul(rows: Array, weights: Array | Quantised, expert_of: Array) -> Float[Array, "blocks block F"]:
    return _by_block(rows, as_array(weights, dtype=rows.dtype), expert_of)


def _by_block(
    rows: Float[Array, "blocks block D"], weights: Float[Array, "E D F"], expert_of: Int[Array, "blocks"]
) -> Float[Array, "blocks block F"]:
    return jax.lax.map(lambda own: jnp.matmul(own[0], weights[own[1]]), (rows, expert_of))


def _forward(
    rows: Array, weights: Array | Quantised, expert_of: Array
) -> tuple[Array, tuple[Array, Array | Quantised, Array]]:
    return _expert_matmul(rows, weights, expert_of), (rows, weights, expert_of)


def _backward(
    kept: tuple[Array, Array | Quantised, Array], gradient: Float[Array, "blocks block F"]
) -> tuple[Array, Array | None, None]:
    rows, weights, expert_of = kept
    if isinstance(weights, Quantised):  # the compiler would keep what the forward pass decoded
        weights, gradient = jax.lax.optimization_barrier((weights, gradient))
    decoded = as_array(weights, dtype=gradient.dtype)
    of_rows = _by_block(gradient, jnp.swapaxes(decoded, 1, 2), expert_of)
    if isinstance(weights, Quantised):
        return of_rows, None, None

    def add(total: Array, own: tuple[Array, Array, Array]) -> tuple[Array, None]:
        block_rows, block_gradient, expert = own
        product = jnp.matmul(block_rows.T, block_gradient, preferred_element_type=jnp.float32)
        return total.at[expert].add(product), None

    zeros = jnp.zeros(weights.shape, jnp.float32)
    of_weights = jax.lax.scan(add, zeros, (rows, gradient, expert_of))[0]
    return of_rows, of_weights.astype(weights.dtype), None


_expert_matmul.defvjp(_forward, _backward)
