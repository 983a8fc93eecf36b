"""Masked language modelling: hidden places predict themselves (Devlin et al., 2019), at one rate or over a range."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from stackwise_jax.objectives import masks
from stackwise_jax.objectives.masked import ask_for, hide_places
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Key, Vocabulary


def corrupt(key: Key, batch: Batch, *, config: ObjectiveConfig, vocabulary: Vocabulary, n_rows: int) -> Example:
    """Hides places of each row at its rate; the loss is the mean over exactly the hidden ones.

    What is hidden and what is shown instead is a function of (key, row, `batch.visits`), but for stratified rates.
    """
    hidden = hide_places(key, batch, config=config, vocabulary=vocabulary, n_rows=n_rows)
    if config.replacement == "mask":
        shown = jnp.where(hidden.places, vocabulary.mask_id, batch.tokens)
    else:
        shown = _bert_replacement(jax.random.fold_in(key, masks.REPLACEMENTS), batch, hidden.places, vocabulary)
    return ask_for(batch, shown, hidden.places.astype(jnp.float32), hidden.rates, shift=config.shift)


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
