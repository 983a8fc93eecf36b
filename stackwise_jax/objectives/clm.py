"""Causal language modelling: each place predicts the next token of its own document."""

import jax.numpy as jnp

from stackwise_jax.types import Batch, Example, Key


def corrupt(key: Key, batch: Batch) -> Example:
    """Targets are the row shifted by one; the last place of a document and padding bear no weight. `key` is unused."""
    del key
    next_segment = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
    has_next = (next_segment == batch.segments) & (batch.segments > 0)
    return Example(
        inputs=batch.tokens,
        targets=jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1))),
        weights=has_next.astype(jnp.float32),
        segments=batch.segments,
        positions=batch.positions,
    )
