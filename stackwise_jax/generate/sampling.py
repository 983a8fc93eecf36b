"""Which token comes next: penalty, temperature, then top-k, then nucleus sampling, over the ids that may occur."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.types import Key


def sample(
    key: Key,
    logits: Float[Array, "B V"],
    *,
    allowed: Bool[Array, "V"],
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float = 1.0,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """Draws one id a row from softmax(logits / temperature), restricted to `allowed` ids and then to `most_likely`.

    Row b draws from its own stream of `key`, so it does not depend on how many rows there are.

    Args:
      logits: of any scale; read in float32.
      allowed: ids that may be drawn; at least one.
      temperature: 0 takes the largest logit, the lowest id of equals; `key` is then unused.
      top_k: ids a row that may be drawn; 0: all.
      top_p: probability that must be kept, in [0, 1]; 1: all.
      repetition_penalty: see `penalise`; 1: none.
      seen: ids that it counts as said; None: none.
    """
    scores = logits.astype(jnp.float32)
    if repetition_penalty != 1.0 and seen is not None:
        scores = penalise(scores, seen, repetition_penalty)
    scores = jnp.where(allowed[None, :], scores, -jnp.inf)
    if temperature == 0.0:
        return jnp.argmax(scores, axis=1)
    # The largest score becomes 0, so that no small temperature overflows.
    scores = (scores - jnp.max(scores, axis=1, keepdims=True)) / temperature
    scores = jnp.where(most_likely(scores, top_k=top_k, top_p=top_p), scores, -jnp.inf)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(scores)))
    return jax.vmap(jax.random.categorical)(keys, scores)


def most_likely(scores: Float[Array, "B V"], *, top_k: int, top_p: float) -> Bool[Array, "B V"]:
    """Marks the `top_k` largest scores of each row and, of those, the fewest that hold a share `top_p` of them.

    Nucleus sampling (Holtzman et al., 2020): the share is of softmax(scores) over the top-k ids. Of equal scores the
    lower id goes first; the largest score is always marked.
    """
    if top_k == 0 and top_p >= 1.0:
        return jnp.ones(scores.shape, bool)
    order = jnp.argsort(-scores, axis=1)
    rank = jnp.argsort(order, axis=1)
    kept = rank < (top_k or scores.shape[1])
    if top_p >= 1.0:
        return kept
    probabilities = jax.nn.softmax(jnp.where(kept, scores, -jnp.inf), axis=1)
    falling = jnp.take_along_axis(probabilities, order, axis=1)
    before = jnp.pad(jnp.cumsum(falling, axis=1)[:, :-1], ((0, 0), (1, 0)))
    return kept & ((rank == 0) | (jnp.take_along_axis(before, rank, axis=1) < top_p))


def present(tokens: Int[Array, "B T"], vocab_size: int) -> Bool[Array, "B V"]:
    """Marks the ids that occur in each row; an id outside the vocabulary marks nothing."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocab_size), bool).at[rows, tokens].set(True, mode="drop")


def penalise(scores: Float[Array, "*B V"], seen: Bool[Array, "*#B V"], penalty: float) -> Float[Array, "*B V"]:
    """Divides the scores of ids that were said before by `penalty`, or multiplies them where they are negative.

    Keskar et al. (2019), section 4.1, with the sign as in common use, so that a penalty above 1 always lowers a score.
    """
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
