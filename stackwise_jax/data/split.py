"""Rows of one side of a corpus: which row of which source a row number stands for, and what a row says.

A row number means the same row for good. Rows are dealt to the sources by their weights, so evenly that any run of row
numbers is a fair sample of the mixture, and each source hands out its own rows in an order of its own. All of it is
computed for the rows that are asked for: nothing here grows with the corpus.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt

from stackwise_jax.data.blocks import CheckedRows
from stackwise_jax.data.permutation import mixed, permuted
from stackwise_jax.types import Batch

MAX_ROWS = 2**31 - 1  # row numbers are int32 on the device
WEIGHT_TOTAL = 2**30  # of weights that a person gave


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of one source.

    Attributes:
      first_row, n_rows: where they lie in the token file.
      n_tokens: ids that are no padding; padding fills the last row.
      n_documents, text_bytes: what they were made of; UTF-8 bytes.
      weight: share of the rows, over the sum of all parts' weights.
    """

    first_row: int
    n_rows: int
    n_tokens: int
    n_documents: int
    text_bytes: int
    weight: int


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one side of a corpus.

    Attributes:
      tokens: ids by place in the file.
      bos_id, pad_id: ids that begin every document and fill what no document does; no text contains them.
      parts: the sources, in the order of their rows.
      n_rows: rows that may be drawn.
      digest: sha256 (hex) of what every row is.
      repeats: a bound on rows may exceed what the sources hold: the parts that end early begin again, in a new order.
      seed: names the order of rows; None: rows are numbered as they lie in the file.
    """

    tokens: CheckedRows | UInt[np.ndarray, "rows T"]
    bos_id: int
    pad_id: int
    parts: tuple[Part, ...]
    n_rows: int
    digest: str
    repeats: bool = False
    seed: int | None = None

    def first(self, n_rows: int) -> "Split":
        """The same split, bounded to its first rows."""
        return dataclasses.replace(self, n_rows=n_rows if self.repeats else min(n_rows, self.n_rows))

    def rows(
        self, row_ids: Int[np.ndarray, "B"], *, isolate_documents: bool
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
        """Reads rows.

        Returns:
          tokens: ids; the pad id where a source has ended.
          segments, positions: see `segments_and_positions`.

        Raises:
          IndexError: no such row.
          UserError: the file is damaged there.
        """
        if len(row_ids) and not 0 <= row_ids.min() <= row_ids.max() < self.n_rows:
            raise IndexError(f"row_ids must lie in [0, {self.n_rows}), not {row_ids.min()} to {row_ids.max()}")
        tokens = self.tokens[self.places(row_ids)].astype(np.int32)
        starts = tokens == self.bos_id if isolate_documents else None
        return tokens, *segments_and_positions(tokens != self.pad_id, starts)

    def batch(self, row_ids: Int[np.ndarray, "B"], visit: int, *, isolate_documents: bool) -> Batch:
        """Reads rows as a batch of int32 arrays, all on the same visit; raises as `rows`."""
        visits = np.full(len(row_ids), visit, dtype=np.int32)
        return Batch(*self.rows(row_ids, isolate_documents=isolate_documents), row_ids.astype(np.int32), visits)

    def places(self, row_ids: Int[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """Where rows lie in the token file."""
        row_ids = row_ids.astype(np.int64)
        if self.seed is None:
            return row_ids
        which, numbers = deal(row_ids, [part.weight for part in self.parts])
        result = np.empty_like(row_ids)
        for index, part in enumerate(self.parts):
            is_own = which == index
            passes, places = np.divmod(numbers[is_own], part.n_rows)
            names = np.full(len(places), self.seed, np.uint64), np.full(len(places), index, np.uint64)
            keys = mixed(mixed(*names), passes.astype(np.uint64))
            result[is_own] = part.first_row + permuted(places, part.n_rows, keys)
        return result


def segments_and_positions(
    is_text: Bool[np.ndarray, "B T"], starts: Bool[np.ndarray, "B T"] | None
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """What tells documents of a row apart.

    Args:
      is_text: False where a row is padding.
      starts: where documents begin; None: they are not to be told apart.

    Returns:
      segments: number of the document inside the row, from 1; 0 for padding. All 1 when starts is None.
      positions: place in the document's part of this row, from 0, and 0 for padding. Place in the row when starts is
        None.
    """
    columns = np.broadcast_to(np.arange(is_text.shape[1], dtype=np.int32)[None, :], is_text.shape)
    if starts is None:
        return is_text.astype(np.int32), columns.copy()
    segments = np.cumsum(starts, axis=1, dtype=np.int32) + ~starts[:, :1]
    begins = np.maximum.accumulate(np.where(starts, columns, np.int32(0)), axis=1)
    return np.where(is_text, segments, 0).astype(np.int32), np.where(is_text, columns - begins, 0).astype(np.int32)


def deal(row_ids: Int64[np.ndarray, "B"], weights: list[int]) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
    """Deals rows to parts: of the first r rows, a part has its share of r, rounded, for every r.

    The first part takes its share of all rows, evenly spread, the next its share of what is left, and so on.

    Returns:
      which: number of the part that each row belongs to.
      numbers: how many rows before it belong to the same part.
    """
    which, numbers = np.full_like(row_ids, len(weights) - 1), row_ids.astype(np.uint64)
    is_open, rest, total = np.ones(len(row_ids), bool), row_ids.astype(np.uint64), sum(weights)
    for index, weight in enumerate(weights[:-1]):
        before, after = _share(rest, weight, total), _share(rest + np.uint64(1), weight, total)
        is_taken = is_open & (after > before)
        which[is_taken], numbers[is_taken] = index, before[is_taken]
        is_open &= ~is_taken
        rest, total = rest - before, total - weight
    numbers[is_open] = rest[is_open]
    return which, numbers.astype(np.int64)


def _share(rows: np.ndarray, weight: int, total: int) -> np.ndarray:
    """rows * weight / total, rounded, in whole numbers: exact below 2**31 rows."""
    return (np.uint64(2 * weight) * rows + np.uint64(total)) // np.uint64(2 * total)


def rows_without_repeats(counts: list[int], weights: list[int]) -> int:
    """The most rows that can be dealt so that no part is asked for more than it has."""

    def fits(n_rows: int) -> bool:
        rest, total = np.uint64(n_rows), sum(weights)
        for count, weight in zip(counts[:-1], weights[:-1], strict=True):
            taken = _share(np.array([rest]), weight, total)[0]
            if taken > count:
                return False
            rest, total = rest - taken, total - weight
        return bool(rest <= counts[-1])

    least, most = 0, sum(counts)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
