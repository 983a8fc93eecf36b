"""Held-out loss and what it means: perplexity and bits per byte for a causal model, neither for a masked one.

Masked cross-entropy at some rates is no likelihood of anything, so it is never turned into a perplexity here.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from stackwise_jax.types import Batch

RowLosses = Callable[[Batch], tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]]
"""Batch -> each row's summed loss in nats and its summed weight."""


def held_out_loss(
    row_losses: RowLosses, batches: Iterable[Batch], *, target_bytes: Callable[[Batch], int] | None
) -> dict[str, float]:
    """Sums a model's loss over held-out batches.

    Args:
      row_losses: the model.
      target_bytes: UTF-8 bytes that the scored targets of a batch stand for; None: the objective is masked.

    Returns:
      For a likelihood: loss (nats a token), perplexity, bits_per_byte, tokens, standard_error. For a masked objective:
      masked_cross_entropy (nats a masked token), tokens, standard_error. The standard error is that of the loss over
      rows, as of a ratio of sums; NaN for a single row. `tokens` is the summed weight.
    Where nothing is scored the loss is NaN and `tokens` is 0.
    """
    losses, weights, n_bytes = [], [], 0
    for batch in batches:
        own_losses, own_weights = row_losses(batch)
        losses.append(np.asarray(own_losses, np.float64))
        weights.append(np.asarray(own_weights, np.float64))
        n_bytes += target_bytes(batch) if target_bytes is not None else 0
    loss, weight = np.concatenate([[], *losses]), np.concatenate([[], *weights])
    tokens = float(weight.sum())
    mean = float(loss.sum()) / tokens if tokens else math.nan
    rest = {"tokens": tokens, "standard_error": ratio_error(loss, weight)}
    if target_bytes is None:
        return {"masked_cross_entropy": mean} | rest
    bits = float(loss.sum()) / math.log(2) / max(n_bytes, 1)
    return {"loss": mean, "perplexity": float(np.exp(mean)), "bits_per_byte": bits} | rest


def ratio_error(loss: Float[np.ndarray, "n"], weight: Float[np.ndarray, "n"]) -> float:
    """Standard error of sum(loss) / sum(weight) over independent rows, to first order (Cochran, 1977, section 6.3).

    Rows of no weight do not count; nan for fewer than two others.
    """
    loss, weight = loss[weight > 0], weight[weight > 0]
    n = len(loss)
    if n < 2:
        return math.nan
    mean = loss.sum() / weight.sum()
    return math.sqrt(n / (n - 1) * float(np.sum(np.square(loss - mean * weight)))) / float(weight.sum())
