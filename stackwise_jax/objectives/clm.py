"""Causal language modelling: each place predicts the next token of its own document."""

import jax.numpy as jnp

from stackwise_jax.objectives.places import has_next, next_place
from stackwise_jax.types import Batch, Example, Key


def corrupt(key: Key, batch: Batch) -> Example:
    """Targets are the row shifted by one; the last place of a document and padding bear no weight. `key` is unused."""
    del key
    return Example(
        inputs=batch.tokens,
        targets=next_place(batch.tokens),
        weights=has_next(batch).astype(jnp.float32),
        segments=batch.segments,
        positions=batch.positions,
        asks_everywhere=True,
    )
