"""In which order rows are seen: chunks, then batches inside a chunk, reshuffled every epoch; Grain reads ahead.

A chunk is what the activation cache holds as one array, so a batch never mixes two. The order is a function of the seed
and the position in the stream alone; the iterator's state is the position.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from stackwise_jax.data.corpus import Split
from stackwise_jax.data.permutation import permutation
from stackwise_jax.errors import UserError
from stackwise_jax.types import Batch

_CHUNKS, _ROWS = 0, 1  # streams of random orders


@dataclasses.dataclass(frozen=True)
class ChunkLayout:
    """Row r is in chunk `r // rows_per_chunk`; rows from `n_rows` on are not used."""

    rows_per_chunk: int
    n_chunks: int
    n_rows: int


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


def make_batches(
    split: Split, layout: ChunkLayout, *, batch_size: int, seed: int, isolate_documents: bool
) -> grain.IterDataset[Batch]:
    """Returns the endless stream of training batches: int32 numpy arrays on the host.

    Every epoch visits every row of the layout once, chunk after chunk, in an order of its own; `visits` is the epoch.
    An iterator of it has `get_state()` and `set_state()`; the state is a small JSON-able dictionary.
    """
    if layout.rows_per_chunk % batch_size or layout.n_rows > split.n_rows:
        raise ValueError(f"{layout} does not fit batches of {batch_size} from {split.n_rows} rows")
    batches_per_chunk = layout.rows_per_chunk // batch_size
    batches_per_epoch = batches_per_chunk * layout.n_chunks

    def read(index: int, _: int) -> Batch:
        chunk_visit, batch_in_chunk = divmod(index, batches_per_chunk)
        epoch, chunk_in_epoch = divmod(chunk_visit, layout.n_chunks)
        chunk = permutation(layout.n_chunks, seed, _CHUNKS, epoch)[chunk_in_epoch]
        places = permutation(layout.rows_per_chunk, seed, _ROWS, chunk_visit)
        places = places[batch_in_chunk * batch_size : (batch_in_chunk + 1) * batch_size]
        row_ids = chunk * layout.rows_per_chunk + places
        return split.batch(row_ids, epoch, isolate_documents=isolate_documents)

    batches = grain.MapDataset.range(batches_per_epoch).repeat().map_with_index(read)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))


def validation_batches(split: Split, *, batch_size: int, rows: int, isolate_documents: bool) -> Iterator[Batch]:
    """Returns the first rows of a split in whole batches, always the same, with `visits` 0.

    Raises:
      UserError: at once, when `rows` or the split has fewer rows than one batch.
    """
    n_batches = min(rows, split.n_rows) // batch_size
    if n_batches == 0:
        raise UserError(
            f"evaluation.rows={rows} of {split.n_rows} held-out row(s) are fewer than one batch of {batch_size}; "
            "raise evaluation.rows, hold out more (data.validation_fraction), or lower training.batch_size"
        )
    starts = range(0, n_batches * batch_size, batch_size)
    row_ids = (np.arange(start, start + batch_size) for start in starts)
    return (split.batch(ids, 0, isolate_documents=isolate_documents) for ids in row_ids)
