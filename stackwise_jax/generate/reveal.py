"""Masked places become tokens, pass after pass, in one compiled loop: what every masked sampler is made of.

Of all masked places that may be revealed now, a pass predicts every one and keeps the best by some order (LLaDA, Nie et
al., 2025, section 2.4; SUBS of MDLM, Sahoo et al., 2024: the mask itself is never drawn, revealed tokens stay). Every
random number is a function of (the row's key, how many passes the row has had, place), so a row is the same whatever
rows are beside it and however long they are.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped
from jaxtyping import Key as PRNGKey

from stackwise_jax.generate.sampling import most_likely, penalise, present
from stackwise_jax.types import Key, Keys

Denoiser = Callable[[Array, Array], Array]
"""(tokens [B T], masked share of each row [B]) -> float32 logits [B T V]; jittable, and itself a pytree of arrays."""
PlaceKeys = PRNGKey[Array, "B T"]

# Streams of a place's key, so that what is drawn, when, and what is hidden again are independent.
_DRAW, _ORDER, _REMASK = 0, 1, 2
_QUIET_SHARE = 10  # nothing is hidden again in the last tenth of the passes, and never in the last one


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a pass turns masked places into tokens; static under `jax.jit`.

    Attributes:
      mask_id: what stands at a masked place.
      order: which places are revealed first: confidence (probability of the token drawn there), margin (between the two
        likeliest tokens), entropy (the lowest), random, left_to_right.
      temperature, top_k, top_p, repetition_penalty: as in `sample`; the penalty counts prompt and revealed tokens.
      remask: probability with which each revealed place is masked again before a pass (ReMDM, Wang et al., 2025), in
        [0, 1); the number masked after the pass is as without it. 0: never.
      threshold: also reveal every place whose confidence is at least this, and at least one a pass (Fast-dLLM, Wu et
        al., 2025), so that the number of passes asked for is the most. None: the number decides alone. Goes with the
        order of confidence, without re-masking.
    """

    mask_id: int
    order: str = "confidence"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    remask: float = 0.0
    threshold: float | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows under way.

    Attributes:
      tokens: ids, the mask's at places that are still to be filled.
      keys: of each row's draws.
      own_passes: passes that each row has taken part in.
      passes: network evaluations so far, of the batch.
    """

    tokens: Int[Array, "B T"]
    keys: Keys
    own_passes: Int[Array, "B"]
    passes: Int[Array, ""]


def begin_rows(tokens: Int[Array, "B T"], keys: Keys) -> Rows:
    """Rows before their first pass."""
    return Rows(tokens, keys, jnp.zeros(len(tokens), jnp.int32), jnp.int32(0))


def row_keys(key: Key, n_rows: int) -> Keys:
    """A key for each row; the first ones do not depend on how many there are."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(n_rows))


def reveal_until(
    denoiser: Denoiser,
    rows: Rows,
    places: Bool[Array, "B T"],
    *,
    ordinary: Int[Array, "B"],
    target: Int[Array, "B"],
    steps: Int[Array, "B"],
    allowed: Bool[Array, "V"],
    rule: Rule,
    said: Bool[Array, "B V"] | None = None,
) -> Rows:
    """Reveals masked ones among `places` until `target` of them are masked, in at most `steps` passes a row.

    The numbers of a row's passes are equal but for a remainder, which goes to the first ones. A row takes part in as
    many passes as it reveals places at the most (with re-masking: in all of `steps`), and in none when `target` is
    reached already.

    Args:
      places: where tokens may be written; what stands elsewhere is never touched.
      ordinary: places of each row that hold text or a mask: the denominator of the masked share.
      allowed: ids that may be drawn; the mask's is not among them, whatever it says.
      said: ids that the repetition penalty counts besides those of `rows`.
    """
    start = jnp.sum((rows.tokens == rule.mask_id) & places, axis=1)
    due = jnp.maximum(start - target, 0)
    steps = jnp.where(due > 0, steps if rule.remask > 0 else jnp.minimum(steps, due), 0)
    allowed = allowed & (jnp.arange(len(allowed)) != rule.mask_id)

    def unfinished(carry: tuple[Rows, Array]) -> Array:
        return jnp.any(carry[1] < steps)

    def one_pass(carry: tuple[Rows, Array]) -> tuple[Rows, Array]:
        rows, taken = carry
        active = taken < steps
        keys = _place_keys(rows.keys, rows.own_passes, places.shape[1])
        tokens = rows.tokens
        if rule.remask > 0:
            loud = active & (steps - taken > jnp.maximum(1, steps // _QUIET_SHARE))
            tokens = _mask_again(tokens, keys, places & loud[:, None], rule)
        masked = (tokens == rule.mask_id) & places
        n_masked = jnp.sum(masked, axis=1)
        each, rest = due // jnp.maximum(steps, 1), due % jnp.maximum(steps, 1)
        count = n_masked - (start - each * (taken + 1) - jnp.minimum(taken + 1, rest))
        rate = jnp.sum(tokens == rule.mask_id, axis=1) / jnp.maximum(ordinary, 1)
        drawn, confidence, score = predict(denoiser(tokens, rate), tokens, keys, said, allowed=allowed, rule=rule)
        if rule.threshold is not None:
            sure = jnp.sum(masked & (confidence >= rule.threshold), axis=1)
            count = jnp.minimum(jnp.maximum(jnp.maximum(count, sure), 1), n_masked - target)
        revealed = _best(score, masked, count) & active[:, None]
        after = jnp.where(active & (n_masked - count <= target), steps, taken + 1) if rule.remask == 0 else taken + 1
        rows = Rows(
            tokens=jnp.where(revealed, drawn, tokens),
            keys=rows.keys,
            own_passes=rows.own_passes + active,
            passes=rows.passes + 1,
        )
        return rows, jnp.where(active, after, taken)

    return jax.lax.while_loop(unfinished, one_pass, (rows, jnp.zeros_like(steps)))[0]


def predict(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    keys: PlaceKeys,
    said: Bool[Array, "B V"] | None,
    *,
    allowed: Bool[Array, "V"],
    rule: Rule,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """What would stand at every place: the id drawn, its probability, and how early the place is to be revealed.

    Gumbel-max with the generator's fine mode: the plain float32 one never draws what is less likely than about 1e-7,
    which lowers the entropy of samples. Probabilities are of temperature 1, over the allowed ids.
    """
    scores = logits.astype(jnp.float32)
    if rule.repetition_penalty != 1.0:
        seen = present(tokens, scores.shape[-1])
        seen = seen if said is None else seen | said
        scores = penalise(scores, seen[:, None, :], rule.repetition_penalty)
    scores = jnp.where(allowed[None, None, :], scores, -jnp.inf)
    drawn = _draw(scores, keys, rule)
    probabilities = jax.nn.softmax(scores, axis=-1)
    confidence = jnp.take_along_axis(probabilities, drawn[:, :, None], axis=2)[:, :, 0]
    if rule.order == "confidence":
        return drawn, confidence, confidence
    if rule.order == "margin":
        first, second = jnp.moveaxis(jax.lax.top_k(probabilities, 2)[0], -1, 0)
        return drawn, confidence, first - second
    if rule.order == "entropy":
        return drawn, confidence, jnp.sum(jax.scipy.special.xlogy(probabilities, probabilities), axis=-1)
    if rule.order == "random":
        return drawn, confidence, _uniform(keys, _ORDER)
    return drawn, confidence, -jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.float32)[None, :], tokens.shape)


def _draw(scores: Float[Array, "B T V"], keys: PlaceKeys, rule: Rule) -> Int[Array, "B T"]:
    if rule.temperature == 0.0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # The largest score becomes 0, so that no small temperature overflows.
    scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / rule.temperature
    flat = scores.reshape(-1, scores.shape[-1])
    kept = most_likely(flat, top_k=rule.top_k, top_p=rule.top_p).reshape(scores.shape)
    noise = _of_places(lambda key: jax.random.gumbel(key, scores.shape[-1:], mode="high"), keys, _DRAW)
    return jnp.argmax(jnp.where(kept, scores, -jnp.inf) + noise, axis=-1).astype(jnp.int32)


def _mask_again(
    tokens: Int[Array, "B T"], keys: PlaceKeys, places: Bool[Array, "B T"], rule: Rule
) -> Int[Array, "B T"]:
    hidden = places & (tokens != rule.mask_id) & (_uniform(keys, _REMASK) < rule.remask)
    return jnp.where(hidden, rule.mask_id, tokens)


def _best(score: Float[Array, "B T"], masked: Bool[Array, "B T"], count: Int[Array, "B"]) -> Bool[Array, "B T"]:
    """The `count` masked places of the highest score; of equals the leftmost."""
    order = jnp.argsort(jnp.where(masked, -score, jnp.inf), axis=1, stable=True)
    return masked & (jnp.argsort(order, axis=1) < count[:, None])


def _place_keys(keys: Keys, passes: Int[Array, "B"], length: int) -> PlaceKeys:
    """A key for each place of each row, [B T], in the pass that is to come."""
    of_pass = jax.vmap(jax.random.fold_in)(keys, passes)
    return jax.vmap(lambda key: jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(length)))(of_pass)


def _of_places(draw: Callable[[Key], Array], keys: PlaceKeys, stream: int) -> Shaped[Array, "B T *n"]:
    return jax.vmap(jax.vmap(lambda key: draw(jax.random.fold_in(key, stream))))(keys)


def _uniform(keys: PlaceKeys, stream: int) -> Float[Array, "B T"]:
    return _of_places(jax.random.uniform, keys, stream)
