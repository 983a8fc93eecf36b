"""The order of rows: whole epochs, batches inside chunks, a function of seed and position, and exact continuation."""

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.data.order import ChunkLayout, Order, chunk_layout, in_windows
from stackwise_jax.data.pipeline import make_batches, validation_batches
from stackwise_jax.data.split import Part, Split
from stackwise_jax.errors import UserError
from stackwise_jax.types import Batch

B = 2
LAYOUT = ChunkLayout(rows_per_chunk=6, n_chunks=4, n_rows=24)
PER_EPOCH = LAYOUT.n_rows // B


@pytest.fixture(scope="session")
def split() -> Split:
    """25 rows of 4 tokens in the order of the file; every token is its place, and 500 begins each 7 of them."""
    tokens = np.arange(100, dtype=np.uint16)
    tokens[::7] = 500
    part = Part(first_row=0, n_rows=25, n_tokens=100, n_documents=15, text_bytes=0, weight=1)
    return Split(tokens.reshape(25, 4), bos_id=500, pad_id=501, parts=(part,), n_rows=25, digest="")


def stream(split: Split, seed: int = 0, layout: ChunkLayout = LAYOUT, start: int = 0) -> Any:
    return iter(make_batches(split, Order(layout, B, seed), isolate_documents=True, start=start))


def order(batches: Any, n_batches: int) -> list[int]:
    return [int(row) for batch in islice(batches, n_batches) for row in batch.row_ids]


def follows_the_rules(rows: list[int], layout: ChunkLayout = LAYOUT) -> bool:
    """Whether one epoch visits every used row once, chunk after chunk."""
    chunks = [row // layout.rows_per_chunk for row in rows]
    changes = sum(a != b for a, b in pairwise(chunks))
    return sorted(rows) == list(range(layout.n_rows)) and changes == layout.n_chunks - 1


def test_every_epoch_visits_every_used_row_once_chunk_by_chunk(split: Split) -> None:
    batches = stream(split)
    epochs = [order(batches, PER_EPOCH) for _ in range(8)]
    assert all(follows_the_rules(rows) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 8
    assert len({tuple(row // 6 for row in rows) for rows in epochs}) > 2  # the order of chunks changes, and
    orders = {tuple(row % 6 for row in rows[i : i + 6]) for rows in epochs for i in range(0, 24, 6)}
    assert len(orders) > 25  # so does the order inside them, from chunk to chunk too


def test_the_rules_detect_a_global_shuffle_and_a_repeated_row() -> None:
    rows = list(range(24))
    assert follows_the_rules(rows)
    assert not follows_the_rules(np.random.default_rng(0).permutation(24).tolist())
    assert not follows_the_rules([0, *rows[:-1]])


def test_rows_mix_evenly(split: Split) -> None:
    """Over many epochs each row stands at each place about equally often (chi-squared, 5 standard deviations)."""
    layout = ChunkLayout(rows_per_chunk=4, n_chunks=2, n_rows=8)
    epochs = 400
    rows = np.array(order(stream(split, layout=layout), epochs * 4)).reshape(epochs, 8)
    counts = np.array([[np.sum(rows[:, place] == row) for row in range(8)] for place in range(8)])
    chi_squared = np.sum((counts - epochs / 8) ** 2 / (epochs / 8))
    assert chi_squared < 49 + 5 * np.sqrt(2 * 49)


def test_batches_hold_the_rows_they_name(split: Split) -> None:
    for number, batch in enumerate(islice(stream(split), 3 * PER_EPOCH)):
        tokens, segments, positions = split.rows(batch.row_ids, isolate_documents=True)
        np.testing.assert_array_equal(batch.tokens, tokens)
        np.testing.assert_array_equal(batch.segments, segments)
        np.testing.assert_array_equal(batch.positions, positions)
        assert batch.visits.tolist() == [number // PER_EPOCH] * B
        fields = (batch.tokens, batch.segments, batch.positions, batch.row_ids, batch.visits)
        assert all(type(field) is np.ndarray and field.dtype == np.int32 for field in fields)
        assert len({int(row) // LAYOUT.rows_per_chunk for row in batch.row_ids}) == 1


def test_isolation_reaches_the_rows(split: Split) -> None:
    batch: Batch = next(iter(make_batches(split, Order(LAYOUT, B, 0), isolate_documents=False)))
    assert np.asarray(batch.segments).max() == 1


def test_the_seed_alone_decides_the_order(split: Split) -> None:
    assert order(stream(split, 3), 30) == order(stream(split, 3), 30)
    orders = {tuple(order(stream(split, seed), 30)) for seed in (0, 1, 2, 3, 2**32 - 1)}
    assert len(orders) == 5
    # Neighbouring seeds are not each other's order, one epoch late.
    assert order(stream(split, 0), 2 * PER_EPOCH)[24:] != order(stream(split, 1), PER_EPOCH)


def drawn(batches: Any, n_batches: int) -> list[tuple[list[int], list[int]]]:
    return [(batch.row_ids.tolist(), batch.visits.tolist()) for batch in islice(batches, n_batches)]


@pytest.mark.parametrize("start", [0, 1, 5, PER_EPOCH - 1, PER_EPOCH, 3 * PER_EPOCH + 2])
def test_a_stream_begins_anywhere(split: Split, start: int) -> None:
    whole = drawn(stream(split), start + 40)
    assert drawn(stream(split, start=start), 40) == whole[start:]
    assert drawn(stream(split, start=start + 1), 40) != whole[start:]


def test_a_stream_begins_far_out_without_walking_there(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Order.row_ids

    def count(self: Order, index: int) -> Any:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Order, "row_ids", count)
    batch = next(stream(split, start=10**7))
    assert min(read) == 10**7
    assert len(read) < 32  # what is read ahead
    assert batch.visits.tolist() == [10**7 // PER_EPOCH] * B


WINDOWS = ChunkLayout(rows_per_chunk=4, n_chunks=6, n_rows=24, n_windows=3, window_visits=2)


def test_windows_are_visited_several_times_before_the_next(split: Split) -> None:
    order_of = Order(WINDOWS, B, 0)
    per_pass = WINDOWS.rows_per_window // B
    for first in range(0, 12 * per_pass, per_pass):
        rows = np.concatenate([order_of.row_ids(index)[0] for index in range(first, first + per_pass)])
        window = order_of.window(first)
        assert sorted(rows) == list(range(8 * window, 8 * window + 8))
        assert {order_of.window(index) for index in range(first, first + per_pass)} == {window}
        times = {order_of.row_ids(index)[1] for index in range(first, first + per_pass)}
        stay, again = divmod(first // per_pass, 2)
        assert window == stay % 3
        assert times == {2 * (stay // 3) + again}


def test_one_window_is_no_window(split: Split) -> None:
    assert in_windows(LAYOUT, 1000, 5) == LAYOUT
    assert in_windows(LAYOUT, 12, 5) == ChunkLayout(6, 4, 24, 2, 5)
    assert in_windows(ChunkLayout(6, 5, 30), 13, 1) == ChunkLayout(6, 3, 18, 3, 1)
    assert in_windows(LAYOUT, 1, 1) == ChunkLayout(6, 4, 24, 4, 1)


def test_a_layout_that_does_not_fit_is_refused(split: Split) -> None:
    for layout in (ChunkLayout(3, 8, 24), ChunkLayout(6, 5, 30)):
        with pytest.raises(ValueError, match="does not fit"):
            stream(split, layout=layout)


@settings(max_examples=500, deadline=None)
@given(
    n_rows=st.integers(0, 3000),
    batch_size=st.integers(1, 40),
    row_bytes=st.integers(1, 1000),
    chunk_bytes=st.integers(1, 10**6),
)
def test_layouts_obey_their_laws(n_rows: int, batch_size: int, row_bytes: int, chunk_bytes: int) -> None:
    n_batches = n_rows // batch_size
    if n_batches == 0:
        with pytest.raises(UserError, match=rf"^training\.batch_size={batch_size} is more than the {n_rows} row"):
            chunk_layout(n_rows, batch_size, row_bytes, chunk_bytes)
        return
    layout = chunk_layout(n_rows, batch_size, row_bytes, chunk_bytes)
    assert layout.n_rows == layout.rows_per_chunk * layout.n_chunks <= n_rows
    assert layout.rows_per_chunk % batch_size == 0
    assert layout.rows_per_chunk == batch_size or layout.rows_per_chunk * row_bytes <= chunk_bytes
    left_out = n_batches - layout.n_rows // batch_size
    assert 0 <= left_out < layout.n_chunks
    fewest = next(n for n in range(1, n_batches + 1) if fits(n_batches // n, batch_size, row_bytes, chunk_bytes))
    assert fewest <= layout.n_chunks <= 2 * fewest
    assert left_out == min(n_batches % n for n in range(fewest, min(2 * fewest, n_batches) + 1))


def fits(batches: int, batch_size: int, row_bytes: int, chunk_bytes: int) -> bool:
    return batches == 1 or batches * batch_size * row_bytes <= chunk_bytes


def test_layouts_of_known_sizes() -> None:
    assert chunk_layout(100, 10, 1, 10**9) == ChunkLayout(100, 1, 100)
    assert chunk_layout(109, 10, 1, 50) == ChunkLayout(50, 2, 100)
    assert chunk_layout(90, 10, 8, 80) == ChunkLayout(10, 9, 90)  # one batch a chunk leaves nothing out
    assert chunk_layout(10, 10, 10**9, 1) == ChunkLayout(10, 1, 10)


def test_validation_batches_are_always_the_same(split: Split) -> None:
    def read(rows: int, batch_size: int = 4) -> list[Batch]:
        return list(validation_batches(split, batch_size=batch_size, rows=rows, isolate_documents=True))

    batches = read(10)
    assert [batch.row_ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(not np.asarray(batch.visits).any() for batch in batches)
    assert batches[1].tokens[:, 2].tolist() == [18, 22, 26, 30]
    assert len(read(1000)) == 6
    assert len(read(25, batch_size=25)) == 1
    for rows, batch_size in ((3, 4), (1000, 26)):
        with pytest.raises(UserError, match=rf"^evaluation\.rows={rows} of 25 held-out row"):
            validation_batches(split, batch_size=batch_size, rows=rows, isolate_documents=True)


def test_a_prepared_corpus_streams(corpus: Corpus) -> None:
    layout = chunk_layout(corpus.train.n_rows, 4, 100, 2000)
    batches = make_batches(corpus.train, Order(layout, 4, 0), isolate_documents=True)
    seen = [row for batch in islice(batches, layout.n_rows // 4) for row in batch.row_ids.tolist()]
    assert follows_the_rules(seen, layout)
    assert layout.n_chunks > 1
