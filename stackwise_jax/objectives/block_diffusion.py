"""Block diffusion (BD3-LM, Arriola et al., 2025): autoregressive over blocks, masked diffusion inside each.

A row is shown twice, [noised ; clean]. A noised block sees itself and the clean blocks before it, a clean one itself
and the clean ones before it (mask kind `block_diffusion`), so one pass asks for every block:

    NELBO(x) = sum_b E_{r_b ~ U(0, 1)} (1/r_b) * sum over i in M_b(r_b) of -log p(x_i | noised b, clean blocks < b)

with a rate r_b of its own for each block. One place a block is a causal model, one block a row is masked diffusion.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from stackwise_jax.objectives import masks
from stackwise_jax.objectives.masked import diffusion_weights, is_bound
from stackwise_jax.objectives.places import eligible_places, next_place
from stackwise_jax.objectives.rates import draw_rates
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import AnyArray, Batch, Example, Key, Vocabulary


def corrupt(key: Key, batch: Batch, *, config: ObjectiveConfig, vocabulary: Vocabulary, n_rows: int) -> Example:
    """Masks places of each block at a rate of its own, of the row's band; the example is 2 T places wide.

    Blocks are counted from the start of the row; the last may be short. Weights, and what the loss is divided by, are
    those of `diffusion`. The row has no one rate, so the example gives none.

    With `config.shift` a place is asked for one place before it: inside a block in the noised half; a block's first
    place at the last place of the block before it in the *clean* half, where a sampler that stores finished blocks
    reads it. Only then does the clean half bear weights.
    """
    B, T = batch.tokens.shape
    n_blocks = -(-T // config.block_length)
    as_blocks = functools.partial(_as_blocks, length=config.block_length)
    scores = masks.uniform_scores(jax.random.fold_in(key, masks.SCORES), batch.row_ids, batch.visits, T)
    eligible = eligible_places(batch, vocabulary, shift=config.shift)
    rates, density = draw_rates(
        jax.random.fold_in(key, masks.RATES), batch, config=config, n_rows=n_rows, draws=n_blocks
    )
    rates, density = rates.reshape(-1), density.reshape(-1)
    hidden = masks.hide(as_blocks(scores), as_blocks(eligible), rates, form=config.mask_form)
    weights = diffusion_weights(hidden, as_blocks(eligible), rates, density, config).reshape(B, -1)[:, :T]
    noised = jnp.where(hidden.reshape(B, -1)[:, :T], vocabulary.mask_id, batch.tokens)
    noised_weights, clean_weights = weights, jnp.zeros_like(weights)
    if config.shift:
        ends_block = _ends_block(T, config.block_length)
        shifted = next_place(weights)
        noised_weights, clean_weights = jnp.where(ends_block, 0.0, shifted), jnp.where(ends_block, shifted, 0.0)
    return Example(
        inputs=jnp.concatenate([noised, batch.tokens], axis=1),
        targets=_twice(next_place(batch.tokens) if config.shift else batch.tokens),
        weights=jnp.concatenate([noised_weights, clean_weights], axis=1),
        segments=_twice(batch.segments),
        positions=_twice(batch.positions),
        asked=jnp.sum(eligible, axis=1, dtype=jnp.float32) if is_bound(config) else None,
    )


def _as_blocks(values: Shaped[Array, "B T"], *, length: int) -> Shaped[Array, "rows length"]:
    """Every block as a row of its own; the last of a row is filled up with zeros."""
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % length))).reshape(-1, length)


def _ends_block(places: int, length: int) -> Bool[Array, "1 T"]:
    """Places whose right neighbour is in another block."""
    return (jnp.arange(places)[None, :] + 1) % length == 0


def _twice(values: Shaped[AnyArray, "B T"]) -> Shaped[Array, "B T2"]:
    return jnp.concatenate([values, values], axis=1)
