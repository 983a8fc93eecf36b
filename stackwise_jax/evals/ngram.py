"""Baselines that a language model must beat: unigram and bigram counts, in nats per token.

They are scored on exactly the (input, target, weight) triples that the model is scored on, and every choice favours
them: they count the whole training text, and the bigram's smoothing is the best one on the scored tokens themselves.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Integer

SMOOTHINGS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
PIECE_TOKENS = 2**22  # training tokens looked at together, which bounds memory


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
    train_ids: Integer[np.ndarray, "n"],
    starts: Integer[np.ndarray, "_"],
    inputs: Integer[np.ndarray, "m"],
    targets: Integer[np.ndarray, "m"],
    weights: Float[np.ndarray, "m"],
    vocab: int,
) -> NgramScores:
    """Both baselines; the arguments are those of `bigram_loss`."""
    bigram, smoothing = bigram_loss(train_ids, starts, inputs, targets, weights, vocab)
    return NgramScores(unigram_loss(train_ids, targets, weights, vocab), bigram, smoothing)


def unigram_loss(
    train_ids: Integer[np.ndarray, "n"],
    targets: Integer[np.ndarray, "m"],
    weights: Float[np.ndarray, "m"],
    vocab: int,
) -> float:
    """Weighted mean of -log((count(target) + 1) / (n + vocab)) over the scored tokens."""
    counts = np.zeros(vocab, np.int64)
    for begin in range(0, len(train_ids), PIECE_TOKENS):
        counts += np.bincount(train_ids[begin : begin + PIECE_TOKENS], minlength=vocab)
    is_scored = weights > 0
    losses = np.log(len(train_ids) + vocab) - np.log1p(counts[targets[is_scored]])
    return float(np.average(losses, weights=weights[is_scored]))


def bigram_loss(
    train_ids: Integer[np.ndarray, "n"],
    starts: Integer[np.ndarray, "_"],
    inputs: Integer[np.ndarray, "m"],
    targets: Integer[np.ndarray, "m"],
    weights: Float[np.ndarray, "m"],
    vocab: int,
) -> tuple[float, float]:
    """Weighted mean of -log((count(input, target) + k) / (count(input) + k vocab)) for the best k of `SMOOTHINGS`.

    Only pairs that are scored are counted, so memory is that of the scored tokens and one piece, whatever `vocab` is.

    Args:
      train_ids: training tokens, one document after another.
      starts: where documents start; a pair across a start does not count.
      inputs, targets, weights: what is scored.
      vocab: ids are below it.

    Returns:
      (nats per token, k); k is chosen on the scored tokens, which favours the baseline.
    """
    is_scored = weights > 0
    inputs, targets, weights = inputs[is_scored], targets[is_scored], weights[is_scored]
    wanted, place = np.unique(_pair_codes(inputs, targets, vocab), return_inverse=True)
    pairs, contexts = np.zeros(len(wanted), np.int64), np.zeros(vocab, np.int64)
    for before, after in _pairs(train_ids, starts):
        contexts += np.bincount(before, minlength=vocab)
        codes = _pair_codes(before, after, vocab)
        nearest = np.minimum(np.searchsorted(wanted, codes), len(wanted) - 1)
        pairs += np.bincount(nearest[wanted[nearest] == codes], minlength=len(wanted))
    scores = [
        (float(np.average(np.log(contexts[inputs] + k * vocab) - np.log(pairs[place] + k), weights=weights)), k)
        for k in SMOOTHINGS
    ]
    return min(scores)


def _pair_codes(
    before: Integer[np.ndarray, "n"], after: Integer[np.ndarray, "n"], vocab: int
) -> Integer[np.ndarray, "n"]:
    return before.astype(np.int64) * vocab + after.astype(np.int64)


def _pairs(
    train_ids: Integer[np.ndarray, "n"], starts: Integer[np.ndarray, "_"]
) -> Iterator[tuple[Integer[np.ndarray, "_"], Integer[np.ndarray, "_"]]]:
    """Neighbours inside documents, a piece at a time."""
    for begin in range(0, len(train_ids) - 1, PIECE_TOKENS):
        piece = np.asarray(train_ids[begin : begin + PIECE_TOKENS + 1])
        inside = np.ones(len(piece) - 1, bool)
        own = starts[(starts > begin) & (starts < begin + len(piece))]
        inside[own - begin - 1] = False
        yield piece[:-1][inside], piece[1:][inside]
