"""Masked language modelling: hidden places predict themselves (Devlin et al., 2019), at one rate or over a range."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from stackwise_jax.objectives import masks
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Key, Vocabulary

# Streams of the mask key, so that scores, replacements and rates are independent.
SCORES, REPLACEMENTS, RATES = 0, 1, 2
HIDE = {"bernoulli": masks.hide_by_rate, "count": masks.hide_by_count}


def corrupt(key: Key, batch: Batch, *, config: ObjectiveConfig, vocabulary: Vocabulary, n_rows: int) -> Example:
    """Hides places of each row at its rate; the loss asks for exactly the hidden ones.

    A row's rate and mask depend on (key, row, `batch.visits`) alone. Special tokens and padding are never hidden.
    """
    scores = masks.uniform_scores(jax.random.fold_in(key, SCORES), batch.row_ids, batch.visits, batch.tokens.shape[1])
    rates = masks.low_discrepancy_rates(
        jax.random.fold_in(key, RATES),
        batch.row_ids,
        batch.visits,
        n_rows=n_rows,
        low=typing.cast(float, config.rate_min),
        high=typing.cast(float, config.rate_max),
    )
    hidden = HIDE[config.mask_form](scores, eligible_places(batch, vocabulary), rates)
    if config.replacement == "mask":
        shown = jnp.where(hidden, vocabulary.mask_id, batch.tokens)
    else:
        shown = _bert_replacement(jax.random.fold_in(key, REPLACEMENTS), batch, hidden, vocabulary)
    return Example(
        inputs=shown,
        targets=batch.tokens,
        weights=hidden.astype(jnp.float32),
        segments=batch.segments,
        positions=batch.positions,
    )


def eligible_places(batch: Batch, vocabulary: Vocabulary) -> Bool[Array, "B T"]:
    """Everything but padding and special tokens."""
    return (batch.segments > 0) & ~jnp.isin(batch.tokens, jnp.array(vocabulary.special_ids))


def _bert_replacement(key: Key, batch: Batch, hidden: Bool[Array, "B T"], vocabulary: Vocabulary) -> Int[Array, "B T"]:
    """80 % of hidden places show the mask, 10 % a random ordinary token, 10 % themselves."""
    first_ordinary = max(vocabulary.special_ids) + 1

    def draw(row: Array, variant: Array) -> tuple[Array, Array]:
        choice_key, token_key = jax.random.split(masks.row_key(key, row, variant))
        length = (batch.tokens.shape[1],)
        return (
            jax.random.uniform(choice_key, length),
            jax.random.randint(token_key, length, first_ordinary, vocabulary.size, batch.tokens.dtype),
        )

    choice, random_tokens = jax.vmap(draw)(batch.row_ids, batch.visits)
    shown = jnp.where(choice < 0.8, vocabulary.mask_id, jnp.where(choice < 0.9, random_tokens, batch.tokens))
    return jnp.where(hidden, shown, batch.tokens)
