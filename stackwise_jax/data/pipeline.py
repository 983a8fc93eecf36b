"""Batches in the order of `data/order.py`; Grain reads ahead."""

from collections.abc import Iterable, Iterator

import numpy as np

from stackwise_jax.data.order import Order
from stackwise_jax.data.split import Split
from stackwise_jax.errors import UserError
from stackwise_jax.types import Batch

_END = 2**62  # a number that no run's batches reach


def make_batches(split: Split, order: Order, *, isolate_documents: bool, start: int = 0) -> Iterable[Batch]:
    """Returns the endless stream of training batches from number `start` on: int32 numpy arrays on the host.

    Every pass visits every row of a window once, chunk after chunk, in an order of its own; `visits` counts them.
    """
    import grain

    layout = order.layout
    if layout.rows_per_chunk % order.batch_size or layout.n_rows > split.n_rows:
        raise ValueError(f"{layout} does not fit batches of {order.batch_size} from {split.n_rows} rows")

    def read(index: int) -> Batch:
        row_ids, times = order.row_ids(index)
        return split.batch(row_ids, times, isolate_documents=isolate_documents)

    batches = grain.MapDataset.range(start, _END).map(read)
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
