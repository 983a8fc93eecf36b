"""The axis alphabet and the names of the things that every other file passes around.

One alphabet, in annotations and einsums alike:

    B batch     T query position   S key position   D width      N query heads   K key-value heads
    G = N / K   H head dimension   F hidden width   V vocabulary L blocks in a stack   C rows in a chunk, or the width
    of the vector that tells the time               R low rank   P rotary key      M random features of a head
    E experts

A row is one packed sequence of the corpus; its number is fixed when the corpus is prepared, and every random choice
that must not depend on order (masks, rates) is a function of it.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped
from jaxtyping import Key as PRNGKey

Params = dict[str, Any]
"""A plain tree of arrays with string keys; the keys are the names in the checkpoint."""

Key = PRNGKey[Array, ""]
Keys = PRNGKey[Array, "B"]

if TYPE_CHECKING:
    AnyArray = Any  # the pipeline's batches are numpy, those inside a step are JAX's; both have what is used of them
else:
    AnyArray = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows as the pipeline yields them.

    Attributes:
      tokens: ids; padding wherever `segments` is 0.
      segments: document number inside the row, from 1; 0 is padding.
      positions: place inside the document, from 0.
      row_ids: which row of the corpus this is.
      visits: how many times the row was drawn before.
      bands: (low, high) of each row's masked fraction, as a phase asks for it; None: the range of the config.
      prefix_lengths: places of each row, from its start, that every place sees, where a phase opens masked rows so far.
    """

    tokens: Int[AnyArray, "B T"]
    segments: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    row_ids: Int[AnyArray, "B"]
    visits: Int[AnyArray, "B"]
    bands: Float[AnyArray, "B 2"] | None = None
    prefix_lengths: Int[AnyArray, "B"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """A batch after the objective has corrupted it: what goes in and what the loss asks for.

    Attributes:
      inputs: ids that the embedding reads.
      targets: ids that the head must predict at each place.
      weights: weight of each place in the loss; 0 where nothing is asked.
      segments, positions: as in `Batch`.
      asked: tokens that each row's loss is a mean over, where that is not the sum of its weights: of a bound, all that
        could have been masked.
      rates: masked fraction of each row, for a model that is told.
      prefix_lengths: of a prefix mask.
      revealed: places that are still visible at the lower edge of the row's band.
      asks_everywhere: few places have weight 0, so that leaving them out of the loss would not pay. Static.
    """

    inputs: Int[AnyArray, "B T"]
    targets: Int[AnyArray, "B T"]
    weights: Float[AnyArray, "B T"]
    segments: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    asked: Float[AnyArray, "B"] | None = None
    rates: Float[AnyArray, "B"] | None = None
    prefix_lengths: Int[AnyArray, "B"] | None = None
    revealed: Bool[AnyArray, "B T"] | None = None
    asks_everywhere: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def weight(self) -> Float[AnyArray, ""]:
        """What the batch's summed loss is divided by."""
        return self.weights.sum() if self.asked is None else self.asked.sum()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Matrices in a storage format of `ops/quant.py`, which makes and reads them.

    Attributes:
      codes: one an entry, or two 4-bit ones a byte; leading axes as the matrices had them.
      scales: by name, of blocks and of whatever is scaled besides, with the same leading axes.
      kind: the format: fp8, nvfp4 or nf4.
      shape: of one matrix, (D, F), without leading axes and without what fills up the last block.
    """

    codes: Shaped[Array, "*L _ F"]
    scales: dict[str, Array]
    kind: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The ids that objectives must know.

    Attributes:
      size: pieces of the tokenizer; ids at or above it never occur.
      mask_id: what hides a token.
      special_ids: never hidden and never a random replacement.
    """

    size: int
    mask_id: int
    special_ids: tuple[int, ...]
