"""Counts against plain Python loops over documents."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.evals import ngram

VOCAB = 7
tokens = st.integers(0, VOCAB - 1)
training = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=8)
scored = st.lists(st.tuples(tokens, tokens, st.sampled_from([0.0, 1.0, 2.5])), min_size=1, max_size=12).filter(
    lambda triples: any(weight for _, _, weight in triples)
)


def scores_of(documents: list[list[int]], triples: list[tuple[int, int, float]], piece: int = 99) -> ngram.NgramScores:
    """Scores with training pairs in pieces of `piece` documents."""

    def training() -> Iterator[ngram.Pairs]:
        for own in itertools.batched(documents, piece):
            pairs = np.array([pair for document in own for pair in itertools.pairwise(document)], np.uint16)
            yield tuple(pairs.reshape(-1, 2).T)

    inputs, targets, weights = (np.array(column) for column in zip(*triples, strict=True))
    return ngram.ngram_scores(training(), inputs, targets, weights.astype(np.float32), VOCAB)


def naive_bigram(documents: list[list[int]], triples: list[tuple[int, int, float]], k: float) -> float:
    pairs = Counter(pair for document in documents for pair in itertools.pairwise(document))
    contexts = Counter()
    for (before, _), count in pairs.items():
        contexts[before] += count
    total = sum(w * -math.log((pairs[a, b] + k) / (contexts[a] + k * VOCAB)) for a, b, w in triples)
    return total / sum(w for _, _, w in triples)


@settings(max_examples=60, deadline=None)
@given(training, scored, st.integers(1, 5))
def test_scores_are_those_of_loops_whatever_the_pieces(documents, triples, piece):
    scores = scores_of(documents, triples, piece)
    counts = Counter(i for document in documents for i in document[1:])  # what is predicted in training
    n, weight = sum(counts.values()), sum(w for _, _, w in triples)
    unigram = sum(w * -math.log((counts[b] + 1) / (n + VOCAB)) for _, b, w in triples) / weight
    assert scores.unigram == pytest.approx(unigram)
    by_smoothing = {k: naive_bigram(documents, triples, k) for k in ngram.SMOOTHINGS}
    assert scores.bigram == pytest.approx(min(by_smoothing.values()))
    assert by_smoothing[scores.smoothing] == pytest.approx(scores.bigram)


def test_a_pair_that_never_occurred_costs_what_smoothing_says():
    triples = [(1, 2, 1.0)]
    assert scores_of([[0, 1], [2, 0]], triples).bigram == pytest.approx(math.log(VOCAB))  # nothing ever followed 1
    assert scores_of([[0, 1, 2, 0]], triples).bigram < 0.1


def test_a_language_of_pairs_is_learnt():
    rng = np.random.default_rng(0)
    successors = rng.permutation(VOCAB)
    chain = [0]
    for _ in range(500):
        chain.append(int(successors[chain[-1]]))
    triples = [(a, b, 1.0) for a, b in itertools.pairwise(chain[:51])]
    scores = scores_of([chain], triples)
    assert scores.bigram < 0.01 < 0.1 < scores.unigram
    assert scores.smoothing == min(ngram.SMOOTHINGS)
