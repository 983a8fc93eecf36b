"""Prefix language modelling: a prefix that sees itself whole is given, what follows is predicted from left to right.

As in UniLM (Dong et al., 2019) and T5's prefix LM (Raffel et al., 2020, section 3.2): a place inside the prefix sees
all of it, a later one sees the prefix and what is before itself. Nothing inside the prefix is asked.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from stackwise_jax.objectives import clm
from stackwise_jax.objectives.masks import PREFIXES, row_key
from stackwise_jax.types import AnyArray, Batch, Example, Key


def corrupt(key: Key, batch: Batch, *, share: float) -> Example:
    """Asks for the next token from the last place of the prefix on, or from the first place where there is none.

    Args:
      share: longest prefix, as a share of the row; lengths are uniform on 0 .. floor(share * T), a function of
        (key, row, visit) alone, and counted from the start of the row.
    """
    T = batch.tokens.shape[1]
    longest = int(share * T + 1e-6)  # 0.29 * 100 lies below 29
    lengths = prefix_lengths(jax.random.fold_in(key, PREFIXES), batch.row_ids, batch.visits, longest)
    example = clm.corrupt(key, batch)
    asked = jnp.arange(T)[None, :] >= lengths[:, None] - 1
    weights = jnp.where(asked, example.weights, 0.0)
    return dataclasses.replace(example, weights=weights, prefix_lengths=lengths, asks_everywhere=False)


def prefix_lengths(
    key: Key, row_ids: Int[AnyArray, "B"], variants: Int[AnyArray, "B"], longest: int
) -> Int[Array, "B"]:
    """One length for each row, uniform on 0 .. longest."""

    def draw(row: Array, variant: Array) -> Array:
        return jax.random.randint(row_key(key, row, variant), (), 0, longest + 1)

    return jax.vmap(draw)(row_ids, variants)
