"""What masked objectives share: hiding places of whole rows, weighing them, and asking through a shifted head."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.objectives import masks
from stackwise_jax.objectives.places import eligible_places, next_place
from stackwise_jax.objectives.rates import draw_rates
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import AnyArray, Batch, Example, Key, Vocabulary


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Which places of each row are hidden, and how that came about.

    Attributes:
      places: the hidden ones.
      eligible: those that could have been.
      scores: what decides, the same at every rate.
      rates: masked fraction of each row.
      density: weight of each row's draw of its rate (`rates.rates_in`).
    """

    places: Bool[Array, "B T"]
    eligible: Bool[Array, "B T"]
    scores: Float[Array, "B T"]
    rates: Float[Array, "B"]
    density: Float[Array, "B"]


def hide_places(key: Key, batch: Batch, *, config: ObjectiveConfig, vocabulary: Vocabulary, n_rows: int) -> Hidden:
    """Hides places of each row at a rate of its band (`batch.bands`, or the config's range).

    Special tokens and padding are never hidden, nor, with `config.shift`, what begins a document.
    """
    scores = masks.uniform_scores(
        jax.random.fold_in(key, masks.SCORES), batch.row_ids, batch.visits, batch.tokens.shape[1]
    )
    eligible = eligible_places(batch, vocabulary, shift=config.shift)
    rates, density = draw_rates(jax.random.fold_in(key, masks.RATES), batch, config=config, n_rows=n_rows)
    rates, density = rates[:, 0], density[:, 0]
    return Hidden(masks.hide(scores, eligible, rates, form=config.mask_form), eligible, scores, rates, density)


def is_bound(config: ObjectiveConfig) -> bool:
    """Whether diffusion's losses are weighed as terms of the bound; levels and uniform weights are not."""
    return config.weighting == "bound" and not config.levels


def diffusion_weights(
    hidden: Bool[Array, "B T"],
    eligible: Bool[Array, "B T"],
    rates: Float[Array, "B"],
    density: Float[Array, "B"],
    config: ObjectiveConfig,
) -> Float[Array, "B T"]:
    """`masks.bound_weights`, clipped at `config.max_weight`; 1 at hidden places where the loss is no bound."""
    if not is_bound(config):
        return hidden.astype(jnp.float32)
    weights = masks.bound_weights(hidden, eligible, rates, density, form=config.mask_form)
    return weights if config.max_weight is None else jnp.minimum(weights, config.max_weight)


def ask_for(
    batch: Batch,
    inputs: Int[AnyArray, "B T"],
    weights: Float[Array, "B T"],
    rates: Float[Array, "B"],
    *,
    shift: bool,
) -> Example:
    """The example that asks for each weighted place's own token, there or, with `shift`, one place before it."""
    return Example(
        inputs=inputs,
        targets=next_place(batch.tokens) if shift else batch.tokens,
        weights=next_place(weights) if shift else weights,
        segments=batch.segments,
        positions=batch.positions,
        rates=rates,
        prefix_lengths=batch.prefix_lengths,
    )
