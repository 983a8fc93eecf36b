"""In which order rows are seen: windows, chunks in them, batches in those, reshuffled every time.

A chunk is what the activation cache holds as one array, so a batch never mixes two; a window is what it holds at once.
The order is a function of the seed and the number of the batch alone, so a stream begins anywhere at once.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int64

from stackwise_jax.data.permutation import mixed, permutation, permuted
from stackwise_jax.errors import UserError

_CHUNKS, _ROWS = 0, 1  # streams of random orders
_SHORT = 4096  # chunks whose order is made as a whole, which is quicker


@dataclasses.dataclass(frozen=True)
class ChunkLayout:
    """Row r is in chunk `r // rows_per_chunk`; rows from `n_rows` on are not used.

    The chunks are divided into `n_windows` equal windows, one after another; every window is visited `window_visits`
    times before the next.
    """

    rows_per_chunk: int
    n_chunks: int
    n_rows: int
    n_windows: int = 1
    window_visits: int = 1

    @property
    def chunks_per_window(self) -> int:
        return self.n_chunks // self.n_windows

    @property
    def rows_per_window(self) -> int:
        return self.chunks_per_window * self.rows_per_chunk


def chunk_layout(n_rows: int, batch_size: int, row_bytes: int, chunk_bytes: int) -> ChunkLayout:
    """Divides rows into equal chunks of whole batches.

    Among the counts of chunks from the smallest that keeps a chunk within `chunk_bytes` up to twice that, it takes the
    one that leaves the fewest batches out (fewer than there are chunks), and of those the smallest. A chunk is at least
    one batch, whatever its bytes.

    Args:
      n_rows: rows that there are.
      batch_size: rows a batch.
      row_bytes: bytes that a row takes in the cache.
      chunk_bytes: bytes that a chunk may take.

    Raises:
      UserError: fewer rows than one batch.
    """
    n_batches = n_rows // batch_size
    if n_batches == 0:
        raise UserError(
            f"training.batch_size={batch_size} is more than the {n_rows} row(s) of the training data; lower it, give "
            "more text (data.source, data.max_bytes, data.max_rows), or lower data.seq_len"
        )
    most_batches = max(1, chunk_bytes // (batch_size * row_bytes))
    fewest_chunks = n_batches // (most_batches + 1) + 1
    counts = np.arange(fewest_chunks, min(2 * fewest_chunks, n_batches) + 1)
    n_chunks = int(counts[np.argmin(n_batches % counts)])
    rows_per_chunk = n_batches // n_chunks * batch_size
    return ChunkLayout(rows_per_chunk, n_chunks, n_chunks * rows_per_chunk)


def in_windows(layout: ChunkLayout, rows_per_window: int, window_visits: int) -> ChunkLayout:
    """Divides chunks into the fewest equal windows of at most `rows_per_window` rows, or of one chunk.

    Fewer chunks than there are windows may be left out.
    """
    most_chunks = max(1, rows_per_window // layout.rows_per_chunk)
    n_windows = -(-layout.n_chunks // most_chunks)
    n_chunks = layout.n_chunks // n_windows * n_windows
    return ChunkLayout(
        layout.rows_per_chunk,
        n_chunks,
        n_chunks * layout.rows_per_chunk,
        n_windows,
        window_visits if n_windows > 1 else 1,
    )


@dataclasses.dataclass(frozen=True)
class ChunkVisit:
    """One pass over the rows of one chunk.

    Attributes:
      chunk: which.
      times: how many times it was visited before.
    """

    chunk: int
    times: int


@dataclasses.dataclass(frozen=True)
class Order:
    """Which rows batch number `index` has, for every index from 0 on."""

    layout: ChunkLayout
    batch_size: int
    seed: int

    @property
    def batches_per_chunk(self) -> int:
        return self.layout.rows_per_chunk // self.batch_size

    def visit(self, number: int) -> ChunkVisit:
        """The chunk that is visited as number `number`; batches `number * batches_per_chunk ..` come out of it."""
        layout = self.layout
        window_pass, place = divmod(number, layout.chunks_per_window)
        stay, times_in_stay = divmod(window_pass, layout.window_visits)
        times_before, window = divmod(stay, layout.n_windows)
        times = times_before * layout.window_visits + times_in_stay
        inside = _chunk_at(place, layout.chunks_per_window, self.seed, times, window)
        return ChunkVisit(window * layout.chunks_per_window + inside, times)

    def window(self, index: int) -> int:
        """The window that batch `index` comes out of."""
        return self.visit(index // self.batches_per_chunk).chunk // self.layout.chunks_per_window

    def row_ids(self, index: int) -> tuple[Int64[np.ndarray, "B"], int]:
        """The rows of batch `index`, and how many times each was drawn before."""
        number, batch_in_chunk = divmod(index, self.batches_per_chunk)
        visit = self.visit(number)
        places = permutation(self.layout.rows_per_chunk, self.seed, _ROWS, number)
        places = places[batch_in_chunk * self.batch_size : (batch_in_chunk + 1) * self.batch_size]
        return visit.chunk * self.layout.rows_per_chunk + places, visit.times


@functools.lru_cache(maxsize=64)
def _chunk_at(place: int, n_chunks: int, *seeds: int) -> int:
    """The chunk at a place of an order of its own for all seeds; a long order is not made to find it."""
    if n_chunks <= _SHORT:
        return int(permutation(n_chunks, _CHUNKS, *seeds)[place])
    key = np.zeros(1, np.uint64)
    for seed in (_CHUNKS, *seeds):
        key = mixed(key, np.array([seed], np.uint64))
    return int(permuted(np.array([place]), n_chunks, key)[0])
