"""Normalised attention in linear time: weights that are inner products of positive features, summed before they meet.

    out_t = sum_s (q_t k_s) v_s / sum_s (q_t k_s) = q_t (sum_s k_s v_s') / q_t (sum_s k_s)

The sums over keys are one matrix a head (Katharopoulos et al., 2020), and all that a reader must keep of the past. A
causal row is read in chunks: squares inside a chunk, the running sums for all before it. A row that looks both ways is
read once from either side.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from stackwise_jax.ops.mask import Mask

KINDS = ("causal", "bidirectional", "prefix")
"""Kinds of masks that need no more than sums; windows and blocks do."""

CHUNK = 128


def linear_attention(
    q: Float[Array, "B T N M"],
    k: Float[Array, "B T K M"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    *,
    sums: Float32[Array, "B K M W"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B K M W"]]:
    """Returns what each query mixes, in v.dtype, and the sums over the keys of each row's last document, in float32.

    Args:
      q, k: features, none negative; of each query one product with a key that it sees above 0. Query head n reads key
        head n // (N / K).
      mask: causal, bidirectional or prefix; the places of a document lie side by side.
      sums: of a causal row, over the keys of its last document that were read before; W = H + 1, the last being that of
        the features themselves.
      chunk: places whose square is formed.

    Raises:
      ValueError: a mask that sums cannot express, or sums with one that looks ahead.
    """
    if mask.kind not in KINDS or mask.window is not None or mask.ahead is not None:
        limits = f"window={mask.window} and ahead={mask.ahead}"
        raise ValueError(f"linear-time attention has no mask of kind {mask.kind!r} with {limits}")
    if sums is not None and mask.kind != "causal":
        raise ValueError(f"sums of the past are for causal rows, not for kind {mask.kind!r}")
    B, T, N, M = q.shape
    K = k.shape[2]
    q, k, v_dtype = q.astype(jnp.float32).reshape(B, T, K, N // K, M), k.astype(jnp.float32), v.dtype
    v = jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:3], 1), jnp.float32)], axis=-1)
    if mask.kind == "bidirectional" and mask.segments is None:
        sums = jnp.einsum("BSKM,BSKW->BKMW", k, v)
        mixed = jnp.einsum("BTKGM,BKMW->BTKGW", q, sums)
    else:
        segments = jnp.zeros((B, T), jnp.int32) if mask.segments is None else mask.segments
        mixed, sums = _read(q, k, v, segments, sums, is_strict=False, chunk=min(chunk, T))
        if mask.kind != "causal":
            mixed = mixed + _from_the_right(q, _seen_ahead(k, mask), v, segments, chunk=min(chunk, T))
    out = mixed[..., :-1] / mixed[..., -1:]
    return out.reshape(B, T, N, -1).astype(v_dtype), sums


def _seen_ahead(k: Float32[Array, "B T K M"], mask: Mask) -> Float32[Array, "B T K M"]:
    """The keys that places before them see: all, or those of a prefix."""
    if mask.prefix_lengths is None:
        return k
    inside = jnp.arange(k.shape[1])[None, :] < mask.prefix_lengths[:, None]
    return jnp.where(inside[:, :, None, None], k, 0.0)


def _from_the_right(
    q: Float32[Array, "B T K G M"],
    k: Float32[Array, "B T K M"],
    v: Float32[Array, "B T K W"],
    segments: Int[Array, "B T"],
    *,
    chunk: int,
) -> Float32[Array, "B T K G W"]:
    """What places mix of those after them."""
    q, k, v, segments = (jnp.flip(array, 1) for array in (q, k, v, segments))
    return jnp.flip(_read(q, k, v, segments, None, is_strict=True, chunk=chunk)[0], 1)


def _read(
    q: Float32[Array, "B T K G M"],
    k: Float32[Array, "B T K M"],
    v: Float32[Array, "B T K W"],
    segments: Int[Array, "B T"],
    sums: Float32[Array, "B K M W"] | None,
    *,
    is_strict: bool,
    chunk: int,
) -> tuple[Float32[Array, "B T K G W"], Float32[Array, "B K M W"]]:
    """One pass from the left: of each place the sum over its document so far (strict: before it), times its query."""
    B, T = segments.shape
    missing = -T % chunk
    # What fills up the last chunk belongs to the last document, and its keys are zero.
    arrays = [jnp.pad(array, ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2))) for array in (q, k, v)]
    arrays.append(jnp.pad(segments, ((0, 0), (0, missing)), mode="edge"))
    chunks = [jnp.moveaxis(array.reshape(B, -1, chunk, *array.shape[2:]), 1, 0) for array in arrays]
    if sums is None:
        sums = jnp.zeros((B, *k.shape[2:], v.shape[-1]), jnp.float32)
    before = jnp.tril(jnp.ones((chunk, chunk), bool), -1 if is_strict else 0)
    (sums, _), mixed = jax.lax.scan(functools.partial(_turn, before), (sums, segments[:, -1]), tuple(chunks))
    return jnp.moveaxis(mixed, 0, 1).reshape(B, -1, *mixed.shape[3:])[:, :T], sums


def _turn(before: Array, carry: tuple[Array, Array], of_chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
    """A chunk: its own square, what the running sums add for the document that goes on, and the sums after it."""
    (sums, document), (q, k, v, segments) = carry, of_chunk
    visible = before[None] & (segments[:, :, None] == segments[:, None, :])
    weights = jnp.einsum("BtKGM,BsKM->BKGts", q, k) * visible[:, None, None].astype(q.dtype)
    mixed = jnp.einsum("BKGts,BsKW->BtKGW", weights, v)
    goes_on = (segments == document[:, None]).astype(q.dtype)[:, :, None, None, None]
    mixed = mixed + goes_on * jnp.einsum("BtKGM,BKMW->BtKGW", q, sums)
    last = segments[:, -1]
    kept = (last == document).astype(q.dtype)[:, None, None, None]
    of_last = (segments == last[:, None]).astype(q.dtype)[:, :, None, None]
    return (kept * sums + jnp.einsum("BsKM,BsKW->BKMW", k * of_last, v), last), mixed
