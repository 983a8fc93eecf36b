"""Attention inside a window as attention of short rows: blocks of places, each with the keys around it.

A kernel that is given a window as an array computes every key of a row. Cut into blocks of as many places as a window
reaches, a row costs two or three keys a place of it instead, whatever its length. Each block becomes a row of its own,
so that any kernel serves it, and its keys are slices put together, whose gradient is slices added up.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.ops.mask import Mask

TILE = 128
"""Kernels want a multiple of so many keys (`ops.attention.cudnn_refusal`)."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How rows are cut.

    Attributes:
      places: of a block.
      before, after: keys that it reads besides those of its own places; together a multiple of `places`.
    """

    places: int
    before: int
    after: int

    @property
    def keys(self) -> int:
        """That a block reads: 2 or 3 times its places."""
        return self.before + self.places + self.after


def find_cut(mask: Mask, length: int) -> Cut | None:
    """Says how rows of `length` places are cut; None where their mask has no window, or they must stay whole.

    >>> find_cut(Mask("bidirectional", window=64), 1024)
    Cut(places=128, before=64, after=64)
    >>> find_cut(Mask("causal", window=64), 1024)
    Cut(places=128, before=128, after=0)
    >>> find_cut(Mask("bidirectional", window=128), 384) is None  # each block would read the row
    True
    """
    window = mask.window
    if not isinstance(window, int) or mask.ahead is not None or mask.kind not in ("causal", "bidirectional"):
        return None
    shortest = TILE * -(-window // TILE)
    places = next((own for own in range(shortest, length // 2 + 1, TILE) if length % own == 0), None)
    if places is None:
        return None
    if mask.kind == "causal":
        cut = Cut(places, places, 0)
    else:
        side = places // 2 if 2 * window <= places else places
        cut = Cut(places, side, side)
    return cut if cut.keys < length else None


def cut_rows(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K W"], mask: Mask, cut: Cut
) -> tuple[Float[Array, "M t N H"], Float[Array, "M s K H"], Float[Array, "M s K W"], Bool[Array, "M 1 t s"]]:
    """Returns queries, keys, values and mask of the M = B * T / `cut.places` blocks, those of a row one after another.

    Keys beyond the ends of a row are seen by nobody. Every place sees itself.
    """
    assert isinstance(mask.window, int)
    B, T = q.shape[:2]
    blocks = T // cut.places
    first = jnp.arange(blocks) * cut.places
    query = jnp.arange(cut.places)
    key = jnp.arange(cut.keys) - cut.before  # both counted from the block's first place
    distance = key[None, :] - query[:, None]
    near = jnp.abs(distance) <= mask.window
    if mask.kind == "causal":
        near = near & (distance <= 0)
    there = first[:, None] + key[None, :]
    visible = near[None] & ((there >= 0) & (there < T))[:, None, :]
    visible = jnp.broadcast_to(visible[None], (B, *visible.shape)).reshape(B * blocks, 1, cut.places, cut.keys)
    if mask.segments is not None:
        own = mask.segments.reshape(B * blocks, cut.places)
        visible = visible & (own[:, None, :, None] == _around(mask.segments, cut)[:, None, None, :])
    q = q.reshape(B * blocks, cut.places, *q.shape[2:])
    return q, _around(k, cut), _around(v, cut), visible


def _around(x: Float[Array, "B T *D"] | Int[Array, "B T"], cut: Cut) -> Float[Array, "M s *D"] | Int[Array, "M s"]:
    """What lies around each block of places; zeros beyond the ends of a row."""
    B, T, *rest = x.shape
    padded = jnp.pad(x, ((0, 0), (cut.before, cut.after), *((0, 0) for _ in rest)))
    starts = range(0, cut.before + cut.after + 1, cut.places)
    pieces = [padded[:, start : start + T].reshape(B, T // cut.places, cut.places, *rest) for start in starts]
    return jnp.concatenate(pieces, axis=2).reshape(B * (T // cut.places), cut.keys, *rest)
