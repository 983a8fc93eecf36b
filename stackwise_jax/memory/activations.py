"""The activation cache: what a trunk puts out, per (row, variant), so that depth k costs what depth 1 costs.

Rows live in chunks; a batch always lies inside one chunk (data/pipeline.py draws it so). Filling and advancing run
batch by batch with the caller's own forward programs, the ones that recomputation uses, so that in float32 storage a
cached number equals a recomputed one bitwise. A fingerprint says what the numbers came from; a cursor separates
chunks that have been advanced from those that have not, so that an interrupted advance mixes nothing.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stackwise_jax.errors import UserError
from stackwise_jax.types import Batch

Rows = Callable[[np.ndarray, int], Batch]
"""(row ids [B], variant) -> the batch of those rows."""


@runtime_checkable
class ChunkStore(Protocol):
    """Where chunks live. A tier implements this; the cache never asks which one it has."""

    def take(self, chunk: int) -> Float[Array, "C T D"]:
        """Returns a chunk on the device for changing; the store's own copy may be given up until `put`."""
        ...

    def read(self, chunk: int) -> Float[Array, "C T D"]:
        """Returns a chunk on the device for reading."""
        ...

    def put(self, chunk: int, values: Float[Array, "C T D"]) -> None:
        """Stores a chunk."""
        ...


class DeviceStore:
    """Chunks as device arrays: the fastest tier, for caches that fit beside the live part."""

    def __init__(self) -> None:
        self._chunks: dict[int, Array] = {}

    def take(self, chunk: int) -> Float[Array, "C T D"]:
        return self._chunks.pop(chunk)

    def read(self, chunk: int) -> Float[Array, "C T D"]:
        return self._chunks[chunk]

    def put(self, chunk: int, values: Float[Array, "C T D"]) -> None:
        self._chunks[chunk] = values


class ActivationCache:
    """Trunk outputs of `n_rows` rows in `variants` corruptions.

    Attributes:
      fingerprint: what the numbers were computed from; None while empty or while a fill or advance is under way.
      cursor: chunks already at the next depth while an advance is under way; 0 otherwise.
    """

    def __init__(
        self,
        store: ChunkStore,
        rows: Rows,
        *,
        n_rows: int,
        rows_per_chunk: int,
        batch_size: int,
        variants: int,
        dtype: DTypeLike,
    ) -> None:
        if n_rows % rows_per_chunk or rows_per_chunk % batch_size:
            raise ValueError(f"{n_rows} rows in chunks of {rows_per_chunk} in batches of {batch_size} do not divide")
        self.fingerprint: str | None = None
        self.cursor = 0
        self._target: str | None = None  # fingerprint that an advance under way leads to
        self._store, self._rows = store, rows
        self._rows_per_chunk, self._batch_size = rows_per_chunk, batch_size
        self._chunks_per_variant, self._variants = n_rows // rows_per_chunk, variants
        self._dtype = dtype

    @property
    def n_chunks(self) -> int:
        return self._chunks_per_variant * self._variants

    def fill(self, embed: Callable[[Batch], Array], fingerprint: str) -> Iterator[float]:
        """Computes every row from tokens. Yields the share done after every chunk; run it to the end."""
        self.fingerprint, self.cursor = None, 0
        for chunk in range(self.n_chunks):
            values: Array | None = None
            for offset, batch in self._batches(chunk):
                x = embed(batch)
                if values is None:
                    values = jnp.zeros((self._rows_per_chunk, *x.shape[1:]), self._dtype)
                values = _write(values, x, offset)
            assert values is not None
            self._store.put(chunk, values)
            yield (chunk + 1) / self.n_chunks
        self.fingerprint = fingerprint

    def advance(self, forward: Callable[[Array, Batch], Array], fingerprint: str) -> Iterator[float]:
        """Runs every row through one more stack, in place. Yields the share done after every chunk.

        Stopped between two chunks it can be called again with the same stack and goes on at `cursor`.

        Raises:
          ValueError: an advance to another fingerprint is under way.
        """
        if self.cursor and self._target != fingerprint:
            raise ValueError("this cache is in the middle of an advance through another stack; fill it again")
        self.fingerprint, self._target = None, fingerprint
        for chunk in range(self.cursor, self.n_chunks):
            values = self._store.take(chunk)
            for offset, batch in self._batches(chunk):
                values = _write(values, forward(_slice(values, offset, self._batch_size), batch), offset)
            self._store.put(chunk, values)
            self.cursor = chunk + 1
            yield self.cursor / self.n_chunks
        self.fingerprint, self.cursor = fingerprint, 0

    def read(self, batch: Batch) -> Float[Array, "B T D"]:
        """Returns the stored rows of a batch, in its order. All of a batch's rows lie in one chunk and variant."""
        if self.fingerprint is None:
            raise RuntimeError("the cache is empty or in the middle of an advance; it must not be read")
        row_ids = np.asarray(batch.row_ids)
        variants = np.asarray(batch.visits) % self._variants
        variant, chunk = int(variants[0]), int(row_ids[0]) // self._rows_per_chunk
        if np.any(row_ids // self._rows_per_chunk != chunk) or np.any(variants != variant):
            raise ValueError("the rows of a batch must lie in one chunk and one variant of the cache")
        values = self._store.read(variant * self._chunks_per_variant + chunk)
        return _gather(values, (row_ids % self._rows_per_chunk).astype(np.int32))

    def require(self, fingerprint: str, *, on_mismatch: str) -> bool:
        """Says whether the cache may be trained on; with on_mismatch "stop" a wrong fingerprint is an error."""
        if self.fingerprint == fingerprint:
            return True
        if on_mismatch == "stop" and self.fingerprint is not None:
            raise UserError(
                "cache.on_mismatch='stop': the activation cache was computed from another trunk, corpus, tokenizer, "
                "seed or precision; set it to 'rebuild'"
            )
        return False

    def _batches(self, chunk: int) -> Iterator[tuple[int, Batch]]:
        variant, place = divmod(chunk, self._chunks_per_variant)
        for offset in range(0, self._rows_per_chunk, self._batch_size):
            first = place * self._rows_per_chunk + offset
            yield offset, self._rows(np.arange(first, first + self._batch_size), variant)


@functools.partial(jax.jit, donate_argnums=0)
def _write(values: Float[Array, "C T D"], x: Float[Array, "B T D"], offset: Int[Array, ""] | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(values, x.astype(values.dtype), offset, 0)


@functools.partial(jax.jit, static_argnums=2)
def _slice(values: Float[Array, "C T D"], offset: Int[Array, ""] | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(values, offset, size, 0)


@jax.jit
def _gather(values: Float[Array, "C T D"], offsets: Int[Array, "B"]) -> Float[Array, "B T D"]:
    return values[offsets]
