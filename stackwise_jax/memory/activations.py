"""The activation cache: what a trunk puts out, per (row, variant), so that depth k costs what depth 1 costs.

Rows live in chunks; a batch always lies inside one chunk (data/pipeline.py draws it so). Every chunk carries the
fingerprint of what it was computed from, so a cache may hold chunks of different depths: bringing it to a trunk
computes what is missing and advances what is behind, whatever stopped an earlier attempt. Filling and advancing run
batch by batch with the caller's own forward programs, the ones that recomputation uses, so that in float32 storage a
cached number equals a recomputed one bitwise.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from stackwise_jax.errors import UserError
from stackwise_jax.memory.placement import ONE_DEVICE, Placement
from stackwise_jax.memory.precision import Stored, as_stored, from_stored
from stackwise_jax.memory.tiers import ChunkStore
from stackwise_jax.types import Batch

Rows = Callable[[np.ndarray, int], Batch]
"""(row ids [B], variant) -> the batch of those rows."""

_MISSING = -1  # the depth of a chunk that must be computed from tokens


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What a cache is brought to: k frozen stacks over a settled embedding.

    Attributes:
      chain: f_0 .. f_k, the fingerprints of its outputs after 0 .. k stacks.
      embed: brings the embedding to the device and returns batch -> x.
      stacks: for each stack, brings it to the device and returns (x, batch) -> x.
    """

    chain: Sequence[str]
    embed: Callable[[], Callable[[Batch], Array]]
    stacks: Sequence[Callable[[], Callable[[Array, Batch], Array]]]


class ActivationCache:
    """Trunk outputs of some rows in `variants` corruptions, in any tier.

    Args:
      store: the tier.
      rows: reads rows.
      rows_per_chunk, batch_size: a chunk is whole batches.
      n_chunks: of the whole corpus in one variant; a cache may hold a part of them.
      precision: of storage, a key of `memory.precision.DTYPES`.
      dtype: of what `read` returns.
      placement: of the run; each of its devices holds an equal part of every chunk.
    """

    def __init__(
        self,
        store: ChunkStore,
        rows: Rows,
        *,
        rows_per_chunk: int,
        batch_size: int,
        n_chunks: int,
        variants: int,
        precision: str,
        dtype: DTypeLike,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        if rows_per_chunk % batch_size:
            raise ValueError(f"chunks of {rows_per_chunk} rows in batches of {batch_size} do not divide")
        self._store, self._rows = store, rows
        self._rows_per_chunk, self._batch_size = rows_per_chunk, batch_size
        self._n_chunks, self._variants = n_chunks, variants
        self._precision, self._dtype, self._placement = precision, dtype, placement
        self._trunk: Trunk | None = None  # what reading promises; None while that is not reached
        self._wanted: list[int] = []

    def bring(self, trunk: Trunk, chunks: range, *, on_mismatch: str) -> Iterator[tuple[str, float]]:
        """Makes the chunks of those numbers, in every variant, the output of a trunk, and forgets all others.

        Yields ("filling" or "advancing", share done) after every chunk; run it to the end. Stopped in between it may
        be called again.

        Raises:
          UserError: with on_mismatch "stop", when a chunk was computed from something else.
        """
        self._trunk = None
        self._wanted = [self._number(chunk, variant) for variant in range(self._variants) for chunk in chunks]
        for number in set(self._store.chunks()) - set(self._wanted):
            self._store.drop(number)
        depth_of = {fingerprint: depth for depth, fingerprint in enumerate(trunk.chain)}
        self._require_known(depth_of, on_mismatch)
        top = len(trunk.chain) - 1

        def depths() -> dict[int, int]:
            found = ((number, self._store.fingerprint(number)) for number in self._wanted)
            return {number: depth_of.get(fingerprint or "", _MISSING) for number, fingerprint in found}

        left = sum(top - depth for depth in depths().values())
        done = 0
        while (lowest := min(depths().values())) < top:  # a chunk found damaged on the way is missing, and comes again
            behind = [number for number, depth in depths().items() if depth == lowest]
            for _ in self._raise_by_one(trunk, lowest, behind):
                done += 1
                yield "filling" if lowest == _MISSING else "advancing", min(1.0, done / left)
        self._store.flush()
        self._trunk = trunk

    def read(self, batch: Batch, *, upcoming: Sequence[tuple[int, int]] = ()) -> Float[Array, "B T D"]:
        """Returns the rows of a batch, in its order. All of them lie in one chunk and variant.

        Args:
          upcoming: (chunk, variant) pairs that will be read soon; they are brought closer meanwhile. Copies to the
            device run one after another, so everything small that the step needs must be on its way already.
        """
        if self._trunk is None:
            raise RuntimeError("the cache is empty or on its way to another trunk; it must not be read")
        row_ids = np.asarray(batch.row_ids)
        variants = np.asarray(batch.visits) % self._variants
        variant, chunk = int(variants[0]), int(row_ids[0]) // self._rows_per_chunk
        if np.any(row_ids // self._rows_per_chunk != chunk) or np.any(variants != variant):
            raise ValueError("the rows of a batch must lie in one chunk and one variant of the cache")
        number = self._number(chunk, variant)
        if self._store.fingerprint(number) != self._trunk.chain[-1]:
            raise ValueError(f"chunk {chunk} of variant {variant} is not in the cache")
        stored = self._store.read(number)
        while stored is None:  # it was damaged: it alone is computed again
            self._rebuild(number)
            stored = self._store.read(number)
        (offsets,) = self._placement.to_small((row_ids % self._rows_per_chunk).astype(np.int32))
        for next_chunk, next_variant in upcoming:
            self._store.expect(self._number(next_chunk, next_variant))
        return _gather(stored, offsets, self._dtype, self._placement)

    def clear(self) -> None:
        """Forgets every chunk, also those on disk."""
        self._trunk = None
        for number in self._store.chunks():
            self._store.drop(number)

    def _number(self, chunk: int, variant: int) -> int:
        return variant * self._n_chunks + chunk

    def _require_known(self, depth_of: dict[str, int], on_mismatch: str) -> None:
        foreign = [number for number in self._wanted if self._store.fingerprint(number) not in {None, *depth_of}]
        if foreign and on_mismatch == "stop":
            raise UserError(
                "cache.on_mismatch='stop': the activation cache was computed from another trunk, corpus, tokenizer, "
                "seed or precision; set it to 'rebuild'"
            )

    def _raise_by_one(self, trunk: Trunk, depth: int, numbers: Sequence[int]) -> Iterator[None]:
        """Brings chunks from `depth` to the next; one that turns out damaged is left missing."""
        if depth == _MISSING:
            embed = trunk.embed()
            for number in numbers:
                self._store.put(number, trunk.chain[0], self._computed(number, embed))
                yield
            return
        forward = trunk.stacks[depth]()
        for number, following in zip(numbers, [*numbers[1:], None], strict=True):
            stored = self._store.take(number)
            batches = list(self._batches(number))  # their tokens go first: they would wait behind a chunk
            if following is not None:
                self._store.expect(following)
            if stored is not None:
                self._store.put(number, trunk.chain[depth + 1], self._advanced(stored, batches, forward))
            yield

    def _rebuild(self, number: int) -> None:
        assert self._trunk is not None
        for depth in range(_MISSING, len(self._trunk.stacks)):
            list(self._raise_by_one(self._trunk, depth, [number]))

    def _computed(self, number: int, embed: Callable[[Batch], Array]) -> Stored:
        stored: Stored | None = None
        for offset, batch in self._batches(number):
            x = embed(batch)
            if stored is None:
                stored = _empty(x, self._rows_per_chunk, self._precision, self._placement)
            stored = _write(stored, x, offset, self._precision, self._placement)
        assert stored is not None
        return stored

    def _advanced(
        self, stored: Stored, batches: Sequence[tuple[int, Batch]], forward: Callable[[Array, Batch], Array]
    ) -> Stored:
        for offset, batch in batches:
            x = forward(_slice(stored, offset, self._batch_size, self._dtype, self._placement), batch)
            stored = _write(stored, x, offset, self._precision, self._placement)
        return stored

    def _batches(self, number: int) -> Iterator[tuple[int, Batch]]:
        variant, chunk = divmod(number, self._n_chunks)
        for offset in range(0, self._rows_per_chunk, self._batch_size):
            first = chunk * self._rows_per_chunk + offset
            yield offset, self._rows(np.arange(first, first + self._batch_size), variant)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _empty(x: Float[Array, "B T D"], rows: int, precision: str, place: Placement) -> Stored:
    like = as_stored(x, precision)
    return place.as_chunk(jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), like))


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write(
    stored: Stored, x: Float[Array, "B T D"], offset: Int[Array, ""] | int, precision: str, place: Placement
) -> Stored:
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=offset, axis=0)
    return place.as_chunk(jax.tree.map(update, stored, place.as_chunk(as_stored(x, precision))))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _slice(
    stored: Stored, offset: Int[Array, ""] | int, size: int, dtype: DTypeLike, place: Placement
) -> Float[Array, "B T D"]:
    rows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, offset, size, 0), stored)
    return from_stored(place.as_rows(place.as_chunk(rows)), dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gather(stored: Stored, offsets: Int[Array, "B"], dtype: DTypeLike, place: Placement) -> Float[Array, "B T D"]:
    rows = jax.tree.map(lambda leaf: leaf[offsets], stored)
    return from_stored(place.as_rows(place.as_chunk(rows)), dtype)
