"""Decides who may attend to whom: an attention mask as a few numbers, and the boolean array that it stands for.

Kernels read the numbers (a causal mask without documents needs no array at all); the array is the oracle that every
implementation must agree with. Padding attends to padding, so no query ever has an empty row, whose softmax would be
undefined.
"""

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MaskKind = Literal["causal", "bidirectional", "prefix", "block_causal", "block_diffusion"]
BLOCK_KINDS = ("block_causal", "block_diffusion")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask of a row that attends to itself.

    Attributes:
      kind: who sees whom; static under `jax.jit`.
        causal: a place sees itself and what is before it.
        bidirectional: everything.
        prefix: the first `prefix_lengths` places of the row see each other, the rest is causal.
        block_causal: place i lies in block i // `block_length`, and sees its own block and all before it.
        block_diffusion: the row is [noised ; clean], two halves of n places with the same blocks. A clean place sees
          the clean blocks up to its own, a noised one its own noised block and the clean blocks before it: one pass
          predicts every block of a row from the clean ones before it (Arriola et al., 2025).
      segments: document number of each place, from 1; 0 is padding. Places see their own document only, and blocks are
        those of the row, wherever documents begin. None: the row is one document. Of block_diffusion both halves have
        the same numbers.
      prefix_lengths: length of each row's prefix, counted from the start of the row; given if and only if the kind is
        prefix.
      block_length: places of a block, given if and only if there are blocks; the last one may be shorter. Static.
      window: places see those at most so far away, before or after, in either half of a row of two halves as if they
        were one; None: all.
      ahead: places see those at most so far after them; None: as the kind says.
    """

    kind: MaskKind = dataclasses.field(metadata={"static": True})
    segments: Int[Array, "B T"] | None = None
    prefix_lengths: Int[Array, "B"] | None = None
    block_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    window: Int[Array, ""] | int | None = None
    ahead: Int[Array, ""] | int | None = None

    @property
    def has_data(self) -> bool:
        """Whether what is static does not tell the mask."""
        return self.differs_by_row or self.window is not None or self.ahead is not None

    @property
    def differs_by_row(self) -> bool:
        """Whether rows have masks of their own."""
        return self.segments is not None or self.prefix_lengths is not None

    def as_array(self, length: int) -> Bool[Array, "b 1 T T"]:
        """Returns the mask of rows of `length` places: [b, 0, t, s] is True where place t sees place s.

        b is B, or 1 when the mask is the same for every row (`differs_by_row` is False).

        >>> Mask("causal").as_array(3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]

        Raises:
          ValueError: no such kind, `length` is not the width of `segments`, `prefix_lengths` or `block_length` does not
            go with `kind`, or a row of two halves has an odd length.
        """
        self._check(length)
        place = jnp.arange(length)
        if self.kind == "bidirectional":
            visible = jnp.ones((1, 1, length, length), bool)
        elif self.block_length is not None:
            visible = self._blocks(length, self.block_length)[None, None]
        else:
            visible = (place[None, :] <= place[:, None])[None, None]
        if self.prefix_lengths is not None:
            # A key inside the prefix is seen from everywhere: from the prefix by its rule, from after it by causality.
            visible = visible | (place[None, None, None, :] < self.prefix_lengths[:, None, None, None])
        if self.segments is not None:
            visible = visible & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if self.window is not None:
            own = place % (length // 2) if self.kind == "block_diffusion" else place
            visible = visible & (jnp.abs(own[:, None] - own[None, :]) <= self.window)[None, None]
        if self.ahead is not None:
            visible = visible & (place[None, :] - place[:, None] <= self.ahead)[None, None]
        return visible

    def _check(self, length: int) -> None:
        if self.kind not in typing.get_args(MaskKind):
            raise ValueError(f"kind={self.kind!r} must be one of: {', '.join(typing.get_args(MaskKind))}")
        if (self.kind == "prefix") != (self.prefix_lengths is not None):
            raise ValueError(f"a mask of kind {self.kind!r} takes prefix_lengths if and only if the kind is 'prefix'")
        if (self.kind in BLOCK_KINDS) != (self.block_length is not None):
            raise ValueError(f"a mask of kind {self.kind!r} takes block_length if and only if it has blocks")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length={self.block_length} must be at least 1")
        if self.segments is not None and self.segments.shape[1] != length:
            raise ValueError(f"segments are {self.segments.shape[1]} places wide, the rows {length}")
        if self.kind == "block_diffusion" and length % 2:
            raise ValueError(f"rows of {length} places are not two halves, noised and clean")

    def _blocks(self, length: int, block_length: int) -> Bool[Array, "T T"]:
        """The rule of blocks alone, of block_causal or block_diffusion."""
        place = jnp.arange(length)
        half = length // 2 if self.kind == "block_diffusion" else 0  # places that are noised
        is_clean = place >= half
        block = (place - half * is_clean) // block_length
        query, key = (block[:, None], is_clean[:, None]), (block[None, :], is_clean[None, :])
        own = (query[0] == key[0]) & (query[1] == key[1])
        return own | (key[1] & (key[0] < query[0]))


def within_window(
    mask: Mask | Bool[Array, "B 1 T S"], window: Int[Array, ""] | int, first_query: Int[Array, ""] | int
) -> Mask | Bool[Array, "B 1 T S"]:
    """A mask of which each place sees those at most `window` away alone.

    Args:
      mask: a `Mask` without a window, or which stored keys each query sees.
      first_query: with an array, the slot in which the first query's own key lies; the next queries' follow it.
    """
    if isinstance(mask, Mask):
        return dataclasses.replace(mask, window=window)
    T, S = mask.shape[2:]
    distance = first_query + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    return mask & (jnp.abs(distance) <= window)[None, None]


def decoding_mask(
    query_positions: Int[Array, "B T"], key_count: int, first: Int[Array, "B"] | None = None
) -> Bool[Array, "B 1 T S"]:
    """Returns which of the `key_count` slots of a key-value cache each new query sees: those up to its own slot.

    Args:
      query_positions: slot of the cache in which each query's own key lies, from 0.
      key_count: slots of the cache, filled or not.
      first: first slot that holds a token, for prompts padded on the left. Padding before it is seen by padding alone.
        None: slot 0.
    """
    slot = jnp.arange(key_count)[None, None, None, :]
    query = query_positions[:, None, :, None]
    visible = slot <= query
    if first is not None:
        start = first[:, None, None, None]
        visible = visible & ((slot >= start) == (query >= start))
    return visible
