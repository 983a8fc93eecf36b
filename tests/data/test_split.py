"""What a row says, and which row a row number stands for: shares hold at every row, every row is dealt once."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.data.split import MAX_ROWS, WEIGHT_TOTAL, Part, Split, deal, rows_without_repeats

BOS, PAD = 1, 0


def make_split(lengths: list[int], seq_len: int) -> Split:
    """Documents of the given lengths, in the order of the file; other tokens are their place + 2."""
    starts = np.cumsum([0, *lengths])
    n_tokens = int(starts[-1])
    n_rows = -(-n_tokens // seq_len)
    tokens = np.full(n_rows * seq_len, PAD, np.uint16)
    tokens[:n_tokens] = np.arange(n_tokens) + 2
    tokens[starts[:-1]] = BOS
    part = Part(0, n_rows, n_tokens, len(lengths), 0, weight=1)
    return Split(tokens.reshape(n_rows, seq_len), BOS, PAD, (part,), n_rows, "")


def slow_rows(split: Split, lengths: list[int], row_ids: list[int], isolate_documents: bool) -> list[list[list[int]]]:
    """The definition of tokens, segments and positions, one token at a time, from the documents' lengths."""
    bounds, (_, seq_len) = np.cumsum([0, *lengths]).tolist(), split.tokens.shape
    result: list[list[list[int]]] = [[], [], []]
    for row in row_ids:
        segments, positions = [], []
        for column in range(seq_len):
            place = row * seq_len + column
            if place >= bounds[-1]:
                segments.append(0)
                positions.append(0 if isolate_documents else column)
            elif not isolate_documents:
                segments.append(1)
                positions.append(column)
            elif column == 0:
                segments.append(1)
                positions.append(0)
            else:
                is_new = place in bounds
                segments.append(segments[-1] + is_new)
                positions.append(0 if is_new else positions[-1] + 1)
        result[0].append(np.asarray(split.tokens).reshape(-1)[row * seq_len : (row + 1) * seq_len].tolist())
        result[1].append(segments)
        result[2].append(positions)
    return result


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12),
    seq_len=st.integers(2, 9),
    isolate_documents=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_definition(lengths: list[int], seq_len: int, isolate_documents: bool, seed: int) -> None:
    split = make_split(lengths, seq_len)
    row_ids = random.Random(seed).choices(range(split.n_rows), k=4)
    arrays = split.rows(np.array(row_ids), isolate_documents=isolate_documents)
    assert all(array.dtype == np.int32 for array in arrays)
    assert [array.tolist() for array in arrays] == slow_rows(split, lengths, row_ids, isolate_documents)


def test_rows_detects_a_boundary_that_is_off_by_one() -> None:
    split = make_split([3, 5, 4], 4)
    arrays = split.rows(np.arange(3), isolate_documents=True)
    assert [array.tolist() for array in arrays] == slow_rows(split, [3, 5, 4], [0, 1, 2], True)
    assert [array.tolist() for array in arrays] != slow_rows(split, [3, 6, 3], [0, 1, 2], True)


def test_rows_by_hand_and_out_of_range() -> None:
    split = make_split([3, 5, 2], 4)
    _, segments, positions = split.rows(np.array([0, 2, 1]), isolate_documents=True)
    assert segments.tolist() == [[1, 1, 1, 2], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0], [0, 1, 2, 3]]
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=r"\[0, 3\)"):
            split.rows(np.array([0, bad]), isolate_documents=True)
    first = split.first(2)
    assert (first.n_rows, split.first(9).n_rows) == (2, 3)
    with pytest.raises(IndexError):
        first.rows(np.array([2]), isolate_documents=False)


WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(weights=WEIGHTS, n_rows=st.integers(1, 400))
def test_parts_number_their_rows_without_gaps_and_keep_their_shares(weights: list[int], n_rows: int) -> None:
    which, numbers = deal(np.arange(n_rows), weights)
    for part, weight in enumerate(weights):
        assert numbers[which == part].tolist() == list(range(np.sum(which == part)))
        so_far = np.cumsum(which == part)
        shares = np.arange(1, n_rows + 1) * weight / sum(weights)
        assert np.abs(so_far - shares).max() < 1 + len(weights) / 2


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.integers(1, WEIGHT_TOTAL // 4), min_size=1, max_size=4),
    row_ids=st.lists(st.integers(0, MAX_ROWS - 1), min_size=1, max_size=20),
)
def test_deals_of_huge_row_numbers_are_those_of_whole_numbers(weights: list[int], row_ids: list[int]) -> None:
    which, numbers = deal(np.array(row_ids), weights)
    for row, part, number in zip(row_ids, which.tolist(), numbers.tolist(), strict=True):
        rest, total = row, sum(weights)
        for index, weight in enumerate(weights):
            before = (2 * weight * rest + total) // (2 * total)
            after = (2 * weight * (rest + 1) + total) // (2 * total)
            if after > before:
                assert (part, number) == (index, before)
                break
            rest, total = rest - before, total - weight


def make_mixture(counts: list[int], weights: list[int], n_rows: int, *, repeats: bool = False) -> Split:
    first = np.cumsum([0, *counts]).tolist()
    parts = tuple(Part(f, n, n, 1, 0, w) for f, n, w in zip(first, counts, weights, strict=False))
    tokens = np.arange(sum(counts), dtype=np.uint32)[:, None]
    return Split(tokens, 2**31, 2**31 + 1, parts, n_rows, "", repeats=repeats, seed=20)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_without_weights_every_row_is_drawn_once(counts: list[int]) -> None:
    n_rows = rows_without_repeats(counts, counts)
    assert n_rows == sum(counts)
    places = make_mixture(counts, counts, n_rows).places(np.arange(n_rows))
    assert sorted(places) == list(range(n_rows))


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=4), data=st.data())
def test_a_mixture_ends_where_the_first_source_would_repeat(counts: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 20), min_size=len(counts), max_size=len(counts)))
    n_rows = rows_without_repeats(counts, weights)

    def most(n: int) -> bool:
        which, _ = deal(np.arange(n), weights)
        return all(np.sum(which == part) <= count for part, count in enumerate(counts))

    assert most(n_rows)
    assert not most(n_rows + 1)
    places = make_mixture(counts, weights, n_rows).places(np.arange(n_rows))
    assert len(set(places.tolist())) == n_rows


def test_any_run_of_rows_is_a_fair_sample() -> None:
    counts, weights = [3000, 7000, 500], [3, 6, 1]
    n_rows = rows_without_repeats(counts, weights)
    places = make_mixture(counts, weights, n_rows).places(np.arange(n_rows))
    which = np.searchsorted(np.cumsum(counts), places, side="right")
    for begin in range(0, n_rows - 100, 37):
        shares = np.bincount(which[begin : begin + 100], minlength=3)
        assert np.abs(shares - [30, 60, 10]).max() <= 2
    inside = places[which == 1] - 3000  # of the second source, from everywhere in it
    assert abs(np.mean(inside[:300]) / 7000 - 0.5) < 5 * np.sqrt(1 / 12 / 300)


def test_the_sample_detects_sources_one_after_another() -> None:
    which = np.repeat([0, 1, 2], [300, 600, 100])
    shares = np.bincount(which[:100], minlength=3)
    assert np.abs(shares - [30, 60, 10]).max() > 2


def test_repeats_are_whole_passes_in_new_orders() -> None:
    split = make_mixture([10, 1000], [1, 1], 20, repeats=True).first(60)
    assert split.n_rows == 60
    places = split.places(np.arange(60))
    small = places[places < 10].reshape(3, 10)
    assert [sorted(row) for row in small.tolist()] == [list(range(10))] * 3
    assert len({tuple(row) for row in small.tolist()}) == 3
    np.testing.assert_array_equal(split.places(np.array([41, 3])), places[[41, 3]])
    assert make_mixture([10, 1000], [1, 1], 20).first(60).n_rows == 20
    with pytest.raises(IndexError):
        split.rows(np.array([60]), isolate_documents=True)
