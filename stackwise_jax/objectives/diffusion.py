"""Masked diffusion: the bound on a row's likelihood that needs no time, and parts of it.

In the masked fraction r (MDLM, Sahoo et al., 2024; MD4, Shi et al., 2024), for a row of n eligible places,

    NELBO(x) = E_{r ~ U(0, 1)} (1/r) * sum over i in M(r) of -log p(x_i | what M(r) leaves visible)   [nats per row]

Cut at 1 = a_0 > a_1 > ... > a_K it is the sum of the bands' means times their widths, exactly:

    NELBO(x) = sum_k (a_{k-1} - a_k) * E_{r ~ U(a_k, a_{k-1})} (1/r) * sum over i in M(r) ...

An example estimates one band's mean, *without* its width: who adds up bands multiplies by it.
"""

import dataclasses

import jax.numpy as jnp

from stackwise_jax.objectives import masks
from stackwise_jax.objectives.masked import ask_for, diffusion_weights, hide_places, is_bound
from stackwise_jax.objectives.rates import row_bands
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Key, Vocabulary


def corrupt(key: Key, batch: Batch, *, config: ObjectiveConfig, vocabulary: Vocabulary, n_rows: int) -> Example:
    """Masks places of each row at a rate of its band.

    Where the loss is a bound, sum(weights * nats) / sum(asked) is an unbiased estimate of a row's band mean over its n
    eligible places, in nats per token. At levels, and with `weighting='uniform'`, it is the mean over masked places.
    With `config.consistency` the example says which places are visible at the lower edge of the row's band.
    """
    hidden = hide_places(key, batch, config=config, vocabulary=vocabulary, n_rows=n_rows)
    inputs = jnp.where(hidden.places, vocabulary.mask_id, batch.tokens)
    weights = diffusion_weights(hidden.places, hidden.eligible, hidden.rates, hidden.density, config)
    example = ask_for(batch, inputs, weights, hidden.rates, shift=config.shift)
    if is_bound(config):
        example = dataclasses.replace(example, asked=jnp.sum(hidden.eligible, axis=1, dtype=jnp.float32))
    if config.consistency > 0.0:
        low = row_bands(batch, config)[:, 0]
        still_hidden = masks.hide(hidden.scores, hidden.eligible, low, form=config.mask_form)
        example = dataclasses.replace(example, revealed=(batch.segments > 0) & ~still_hidden)
    return example
