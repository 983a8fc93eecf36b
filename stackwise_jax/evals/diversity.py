"""How much samples differ from each other and within: what a low perplexity of samples may hide."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

Runs = Sequence[Int[np.ndarray, "_"]]
"""The runs of new ids of one sample: one for a continuation, one a hole for a filled-in text."""


def distinct(samples: Sequence[Runs], n: int = 2) -> float:
    """Share of the n-grams of all samples together that are different ones (Li et al., 2016); nan without any."""
    grams = [tuple(run[i : i + n].tolist()) for runs in samples for run in runs for i in range(len(run) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def token_entropy(samples: Sequence[Runs]) -> float:
    """Entropy, in nats, of the ids that one sample is made of; the mean over samples that have any, nan without one."""
    entropies = []
    for runs in samples:
        ids = np.concatenate([np.zeros(0, np.int32), *runs])
        if len(ids):
            shares = np.unique(ids, return_counts=True)[1] / len(ids)
            entropies.append(float(-np.sum(shares * np.log(shares))))
    return float(np.mean(entropies)) if entropies else float("nan")
