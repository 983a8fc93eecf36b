"""Keyed permutations are permutations, even ones, and the same for good."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.data.permutation import mixed, permutation, permuted


def keyed(n: int, key: int) -> np.ndarray:
    return permuted(np.arange(n), n, np.full(n, key, np.uint64))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_key_is_a_permutation(n: int, key: int) -> None:
    assert sorted(keyed(n, key)) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2**31, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_places_of_huge_ranges_stay_apart(n: int, key: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)))
    sent = permuted(places, n, np.full(len(places), key, np.uint64))
    assert len(set(sent.tolist())) == len(places)
    assert sent.min() >= 0
    assert sent.max() < n
    one_by_one = [permuted(places[i : i + 1], n, np.full(1, key, np.uint64))[0] for i in range(len(places))]
    assert sent.tolist() == one_by_one


def spread(orders: np.ndarray) -> float:
    """How far the counts of (place, value) are from even ones, in standard deviations of chi-squared."""
    n_keys, n = orders.shape
    counts = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    freedom = (n - 1) ** 2
    return (np.sum((counts - n_keys / n) ** 2) / (n_keys / n) - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 8, 12, 33, 100])
def test_keys_send_every_place_everywhere_equally_often(n: int) -> None:
    n_keys = 6000
    keys = np.repeat(np.arange(n_keys, dtype=np.uint64), n)
    orders = permuted(np.tile(np.arange(n), n_keys), n, keys).reshape(n_keys, n)
    assert abs(spread(orders)) < 5
    # Neighbours are as far apart as two places drawn at random, in both directions.
    if n > 2:
        pairs = np.bincount(orders[:, 0] * n + orders[:, 1], minlength=n * n).reshape(n, n)[~np.eye(n, dtype=bool)]
        freedom = len(pairs) - 1
        assert abs(np.sum((pairs - pairs.mean()) ** 2) / pairs.mean() - freedom) < 5 * np.sqrt(2 * freedom)


def test_evenness_detects_rotations_that_favour_a_place() -> None:
    shifts = np.random.default_rng(0).integers(0, 9, 6000)
    assert spread((np.arange(10)[None, :] + shifts[:, None]) % 10) > 5


def test_a_run_of_a_long_order_is_a_fair_sample() -> None:
    n = 10**10
    sent = permuted(np.arange(10**5) + 10**7, n, np.full(10**5, 20, np.uint64))
    counts = np.bincount(sent // (n // 100), minlength=100)
    assert abs(np.sum((counts - 1000) ** 2 / 1000) - 99) < 5 * np.sqrt(2 * 99)
    assert abs(np.corrcoef(sent[1:], sent[:-1])[0, 1]) < 5 / np.sqrt(10**5)


def test_orders_never_change() -> None:
    """Computed by hand in Python's whole numbers."""

    def finalised(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    def walk(word: int, key: int) -> int:
        high, low = word >> 4, word & 15  # of seven bits
        for number in range(4):
            high ^= finalised(finalised(key + 2 * number) ^ low) & 7
            low ^= finalised(finalised(key + 2 * number + 1) ^ high) & 15
        return high << 4 | low

    expected = []
    for place in range(100):
        word = walk(place, 5)
        while word >= 100:
            word = walk(word, 5)
        expected.append(word)
    assert keyed(100, 5).tolist() == expected
    assert finalised(0) == 0xE220A8397B1DCDAF  # as published for SplitMix64
    assert mixed(np.zeros(1, np.uint64), np.array([finalised(0)], np.uint64))[0] == finalised(0)
    assert permutation(5, 1, 2).tolist() == permutation(5, 1, 2).tolist()
