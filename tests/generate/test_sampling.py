"""Sampling against NumPy: which ids may be drawn, that no other ever is, and with what frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.generate.sampling import most_likely, penalise, present, sample

VOCAB = 9
ALL = np.ones(VOCAB, bool)
ROUNDING = 1e-5  # of a float32 sum of probabilities

# Whole numbers bring ties, which a nucleus and a top-k must break alike. XLA takes subnormal numbers for zero.
rows = st.lists(
    st.one_of(st.integers(-4, 4).map(float), st.floats(-8, 8, width=32, allow_subnormal=False)),
    min_size=VOCAB,
    max_size=VOCAB,
).map(lambda row: np.array([row], np.float32))


def softmax(scores: np.ndarray) -> np.ndarray:
    unnormalised = np.exp(scores.astype(np.float64) - scores.max())
    return unnormalised / unnormalised.sum()


def check_nucleus(scores: np.ndarray, kept: np.ndarray, top_p: float) -> None:
    """The kept ids hold at least top_p, would not without their least likely one, and none outside is likelier."""
    probabilities = softmax(scores)
    assert probabilities[kept].sum() >= top_p - ROUNDING
    assert probabilities[kept].sum() - probabilities[kept].min() <= top_p + ROUNDING
    assert kept.all() or scores[kept].min() >= scores[~kept].max()


@settings(max_examples=60, deadline=None)
@given(rows, st.floats(0, 0.999))
def test_nucleus_is_the_smallest_set_that_holds_the_share(scores: np.ndarray, top_p: float):
    check_nucleus(scores[0], np.asarray(most_likely(jnp.array(scores), top_k=0, top_p=top_p))[0], top_p)


def test_nucleus_law_detects_one_id_too_few_and_one_too_many():
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    check_nucleus(scores, np.array([True, True, False, False]), 0.6)
    for kept in ([True, False, False, False], [True, True, True, False], [True, False, True, False]):
        with pytest.raises(AssertionError):
            check_nucleus(scores, np.array(kept), 0.6)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, VOCAB + 2))
def test_top_k_is_a_stable_sort_cut_off(scores: np.ndarray, top_k: int):
    expected = np.zeros(VOCAB, bool)
    expected[np.argsort(-scores[0], kind="stable")[: top_k or VOCAB]] = True
    np.testing.assert_array_equal(most_likely(jnp.array(scores), top_k=top_k, top_p=1.0)[0], expected)


@settings(max_examples=40, deadline=None)
@given(rows, st.integers(1, VOCAB), st.floats(0, 0.999))
def test_the_nucleus_is_taken_of_the_top_k(scores: np.ndarray, top_k: int, top_p: float):
    of_both = np.asarray(most_likely(jnp.array(scores), top_k=top_k, top_p=top_p))[0]
    of_k = np.asarray(most_likely(jnp.array(scores), top_k=top_k, top_p=1.0))[0]
    assert not (of_both & ~of_k).any()
    check_nucleus(scores[0][of_k], of_both[of_k], top_p)


def draw(logits: np.ndarray, n: int, *, allowed: np.ndarray = ALL, **options: float) -> np.ndarray:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    repeated = jnp.broadcast_to(jnp.array(logits)[None, :], (n, VOCAB))
    return np.asarray(sample(jax.random.key(3), repeated, allowed=jnp.array(allowed), **settings))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"temperature": 1e-30}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 50.0}]
)
def test_forbidden_ids_are_never_drawn(options: dict[str, float]):
    logits = np.arange(VOCAB, dtype=np.float32)
    allowed = np.array([True, False] * 4 + [False])  # the largest logit is forbidden
    drawn = draw(logits, 400, allowed=allowed, **options)
    assert allowed[drawn].all()


def test_forbidding_detects_an_id_that_is_allowed_after_all():
    allowed = np.arange(VOCAB) < 4
    drawn = draw(np.zeros(VOCAB, np.float32), 400)
    assert not allowed[drawn].all()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-30}])
def test_greedy_settings_take_the_first_largest_logit(options: dict[str, float]):
    logits = np.array([0, 1, 5, 2, 5, 4, 3, 1, 0], np.float32)
    if "temperature" in options and options["temperature"] > 0:
        logits[4] = 4.9  # at a small temperature equals are drawn alike
    assert set(draw(logits, 50, **options)) == {2}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_tempered_softmax(temperature: float):
    logits = np.linspace(-1, 1, VOCAB).astype(np.float32)
    n = 20_000
    frequencies = np.bincount(draw(logits, n, temperature=temperature), minlength=VOCAB) / n
    expected = softmax(logits / temperature)
    assert np.abs(frequencies - expected).max() < 5 * np.sqrt(0.25 / n)
    assert np.abs(frequencies - softmax(logits / temperature / 2)).max() > 5 * np.sqrt(0.25 / n)


def test_a_row_draws_the_same_whatever_rows_are_beside_it(key: jax.Array):
    logits = jnp.zeros((6, VOCAB))
    options = {"allowed": jnp.array(ALL), "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    six = sample(key, logits, **options)
    np.testing.assert_array_equal(six[:2], sample(key, logits[:2], **options))
    assert len(set(np.asarray(six).tolist())) > 1  # rows have streams of their own


@settings(max_examples=40, deadline=None)
@given(rows, st.sets(st.integers(0, VOCAB - 1)), st.floats(0.5, 3, width=32))
def test_what_was_said_is_penalised(scores: np.ndarray, said: set[int], penalty: float):
    tokens = np.full((1, VOCAB), VOCAB)  # no id at all
    tokens[0, : len(said)] = list(said)
    seen = present(jnp.array(tokens), VOCAB)
    np.testing.assert_array_equal(np.flatnonzero(seen[0]), sorted(said))
    expected = [
        (s / penalty if s > 0 else s * penalty) if i in said else s for i, s in enumerate(scores[0].astype(np.float64))
    ]
    np.testing.assert_allclose(
        penalise(jnp.array(scores), seen, penalty)[0], expected, rtol=1e-6, atol=1e-37
    )  # of subnormal numbers nothing


def test_the_penalty_of_a_negative_score_is_no_reward(key: jax.Array):
    scores, seen = jnp.array([[-1.0, -1.5, -9.0]]), jnp.array([[True, False, False]])
    options = {"allowed": jnp.ones(3, bool), "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seen": seen}
    assert sample(key, scores, **options, repetition_penalty=2.0).item() == 1
    assert sample(key, scores, **options).item() == 0
