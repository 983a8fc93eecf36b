"""A rack of random weights as a finished run would leave it: stacks in their storage format, made on the device.

Speed and memory of reading and of fusion do not depend on what the weights are, and a rack of 70B parameters takes
hours to train; this one takes seconds. The numbers are those that a run of the same config and seed begins with.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stackwise_jax.memory.precision import to_storage
from stackwise_jax.models.rack import init_embedding, init_head, init_rack_stack
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.phases import stack_sizes
from stackwise_jax.types import Key, Params, Quantised


def random_rack(config: RunConfig, *, merged: bool = True) -> Params:
    """Draws a rack on the default device. Beside it lies one matrix of one block at a time, drawn and then encoded.

    Args:
      config: of `model`, `precision.trunk` (how stacks are stored), `seed` and, for a list, the sizes of its stacks.
      merged: all blocks as one stack, as `train.trained` puts equal ones together for reading; otherwise a stack for
        every one of the config.

    Returns:
      {"embedding", "stacks", "head"}; the table and the head in float32, as a run folder holds them.
    """
    key, sizes = jax.random.key(config.seed), stack_sizes(config)
    sizes = (sum(sizes),) if merged else sizes
    return {
        "embedding": jax.jit(init_embedding, static_argnums=1)(key, config.model),
        "stacks": [
            _draw_stack(key, config.model, sum(sizes[:i]), size, config.precision.trunk) for i, size in enumerate(sizes)
        ],
        "head": jax.jit(init_head, static_argnums=1)(key, config.model),
    }


def _draw_stack(key: Key, model: ModelConfig, first_block: int, n_blocks: int, precision: str) -> Params:
    """Blocks `first_block ..` as `to_storage` stores them, one weight after another."""
    shapes = jax.eval_shape(lambda: init_rack_stack(key, model, 0, 1))
    indices = range(len(jax.tree.leaves(shapes)))
    leaves = [_draw_weight(key, first_block, model, n_blocks, precision, index) for index in indices]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@functools.partial(jax.jit, static_argnames=("model", "n_blocks", "precision", "index"))
def _draw_weight(
    key: Key, first_block: Array | int, model: ModelConfig, n_blocks: int, precision: str, index: int
) -> Array | Quantised:
    """One weight of all blocks; the loop writes each block's into its place of the result."""

    def draw(block: Array) -> Array | Quantised:
        weight = jax.tree.leaves(init_rack_stack(key, model, block, 1))[index]  # the others are never computed
        return jax.tree.map(lambda leaf: leaf[0], to_storage({"weight": weight}, precision)["weight"])

    return jax.lax.map(draw, first_block + jnp.arange(n_blocks))


def block_bytes(rack: Params) -> int:
    """Bytes of all stored blocks of a rack, scales included: what one token reads of its weights but for the head."""
    return sum(leaf.nbytes for stack in rack["stacks"] for leaf in jax.tree.leaves(stack))
