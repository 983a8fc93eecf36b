"""What the objectives say about places of packed rows: what may be hidden, and what comes next."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from stackwise_jax.types import AnyArray, Batch, Vocabulary


def next_place(values: Shaped[AnyArray, "B T"]) -> Shaped[Array, "B T"]:
    """What stands one place to the right of each; 0 at the end of a row."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))


def has_next(batch: Batch) -> Bool[Array, "B T"]:
    """Places whose right neighbour belongs to the same document."""
    return (next_place(batch.segments) == batch.segments) & (batch.segments > 0)


def eligible_places(batch: Batch, vocabulary: Vocabulary, *, shift: bool = False) -> Bool[Array, "B T"]:
    """Everything but padding and special tokens.

    With `shift` a place is predicted at its left neighbour, so what begins a document in the row is not eligible.
    """
    eligible = (batch.segments > 0) & ~jnp.isin(batch.tokens, jnp.array(vocabulary.special_ids))
    if shift:
        eligible = eligible & jnp.pad(has_next(batch)[:, :-1], ((0, 0), (1, 0)))
    return eligible
