"""Baselines that a language model must beat: unigram and bigram counts, in nats per token.

They count the pairs of neighbours that the model is trained on and are scored on exactly the (input, target, weight)
triples that it is scored on. The bigram's smoothing is the best one on the scored tokens themselves, which favours it.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Integer

SMOOTHINGS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)

Pairs = tuple[Integer[np.ndarray, "n"], Integer[np.ndarray, "n"]]
"""Tokens and the token after each."""


@dataclasses.dataclass(frozen=True)
class NgramScores:
    """Held-out losses in nats per token.

    Attributes:
      unigram: with add-one smoothing.
      bigram: with add-`smoothing`, the best of `SMOOTHINGS` on the scored tokens themselves.
    """

    unigram: float
    bigram: float
    smoothing: float


def ngram_scores(
    training: Iterable[Pairs],
    inputs: Integer[np.ndarray, "m"],
    targets: Integer[np.ndarray, "m"],
    weights: Float[np.ndarray, "m"],
    vocab: int,
) -> NgramScores:
    """Weighted means of -log((count(target) + 1) / (n + V)) and -log((count(pair) + k) / (count(input) + k V)).

    Only pairs that are scored are counted, so memory is that of the scored tokens and of one piece of `training`.

    Args:
      training: pairs of neighbours, in pieces; none of them across documents that the model does not read across.
      inputs, targets, weights: what is scored.
      vocab: V; ids are below it.
    """
    is_scored = weights > 0
    inputs, targets, weights = inputs[is_scored], targets[is_scored], weights[is_scored]
    wanted, place = np.unique(_codes(inputs, targets, vocab), return_inverse=True)
    pairs, before, after = np.zeros(len(wanted), np.int64), np.zeros(vocab, np.int64), np.zeros(vocab, np.int64)
    for first, second in training:
        before += np.bincount(first, minlength=vocab)
        after += np.bincount(second, minlength=vocab)
        codes = _codes(first, second, vocab)
        nearest = np.minimum(np.searchsorted(wanted, codes), len(wanted) - 1)
        pairs += np.bincount(nearest[wanted[nearest] == codes], minlength=len(wanted))

    def mean_loss(counts: np.ndarray, totals: np.ndarray | int, k: float) -> float:
        return float(np.average(np.log(totals + k * vocab) - np.log(counts + k), weights=weights))

    bigram, smoothing = min((mean_loss(pairs[place], before[inputs], k), k) for k in SMOOTHINGS)
    return NgramScores(mean_loss(after[targets], int(after.sum()), 1.0), bigram, smoothing)


def _codes(first: Integer[np.ndarray, "n"], second: Integer[np.ndarray, "n"], vocab: int) -> Integer[np.ndarray, "n"]:
    return first.astype(np.int64) * vocab + second.astype(np.int64)
