"""Iterative unmasking of a masked rack: from all masks, from a prompt, or between given texts; one compiled loop.

A canvas is a row of given tokens and masks. Given tokens may stand anywhere and are never touched; rows of different
lengths are padded on the right, and padding is seen by padding alone.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.errors import UserError
from stackwise_jax.generate.reveal import Denoiser, Rows, Rule, begin_rows, reveal_until
from stackwise_jax.models.rack import apply_embedding, rack_logits, row_context, time_vector
from stackwise_jax.models.stack import apply_stack
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import AnyArray, Keys, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RackDenoiser:
    """A rack as a `Denoiser`: (tokens [B T], masked share [B]) -> float32 logits [B T V], by the model's own attention.

    Attributes:
      rack: with the stacks that are to run, and the head that reads the last of them.
      pad_id: what fills rows up.
      mask_id: what stands at a masked place.
      shift: the head predicts the next place, so what it says of a place is read one place before it. The first place
        of a row then has no prediction of its own and must be given.
      rescales_mask: E([MASK]) is brought to the root mean square of the embedding (step-local execution).
      segments, positions: of packed rows, as in `Batch`; such a denoiser reads these rows alone. None: a row is one
        text, padded on the right.
    """

    rack: Params
    model: ModelConfig = dataclasses.field(metadata={"static": True})
    mask_id: int = dataclasses.field(metadata={"static": True})
    pad_id: int = dataclasses.field(metadata={"static": True})
    dtype: DTypeLike = dataclasses.field(metadata={"static": True})
    shift: bool = dataclasses.field(default=False, metadata={"static": True})
    rescales_mask: bool = dataclasses.field(default=False, metadata={"static": True})
    segments: Int[AnyArray, "B T"] | None = None
    positions: Int[AnyArray, "B T"] | None = None

    def __call__(self, tokens: Int[Array, "B T"], rate: Float[Array, "B"]) -> Float[Array, "B T V"]:
        # A rack that is not told the share of masks counts them itself.
        time = time_vector(self.rack["embedding"], rate) if self.model.time_input else None
        positions = self.positions
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        segments = (tokens != self.pad_id).astype(jnp.int32) if self.segments is None else self.segments
        context = row_context(self.model, segments, positions, time=time)
        x = apply_embedding(self.rack["embedding"], tokens, positions, self.model, dtype=self.dtype)
        if self.rescales_mask:
            x = jnp.where((tokens == self.mask_id)[:, :, None], self._as_embedding(x), x)
        for stack in self.rack["stacks"]:
            x = apply_stack(stack, x, context, self.model, dtype=self.dtype)
        logits = rack_logits(self.rack, x, self.model, time)
        return logits_of_places(logits, logits[:, 0]) if self.shift else logits

    def _as_embedding(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Vectors of the root mean square that the embedded vocabulary has, standing at place 0."""
        every = jnp.arange(self.model.vocab_size)[:, None]
        table = apply_embedding(
            self.rack["embedding"], every, jnp.zeros_like(every), self.model, dtype=jnp.dtype(jnp.float32)
        )
        wide = x.astype(jnp.float32)
        own = jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True))
        return (wide * (jnp.sqrt(jnp.mean(table**2)) / jnp.maximum(own, 1e-30))).astype(x.dtype)


def logits_of_places(logits: Float[Array, "B T V"], before: Float[Array, "B V"]) -> Float[Array, "B T V"]:
    """What a shifted head says of each place, given what it puts out at each, and at the place `before` the row."""
    return jnp.concatenate([before[:, None], logits[:, :-1]], axis=1)


def pad_rows(rows: Sequence[Int[np.ndarray, "_"]], pad_id: int) -> Int[np.ndarray, "B T"]:
    """Rows of any lengths as one array, padded on the right."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=pad_id) for row in rows]).astype(np.int32)


def check_length(model: ModelConfig, length: int) -> None:
    """UserError when a model of learned positions cannot read `length` places."""
    if model.positions == "learned" and length > (model.max_positions or 0):
        raise UserError(
            f"a row of {length} tokens exceeds the model's learned model.max_positions={model.max_positions}; "
            "shorten the prompt or lower the number of tokens"
        )


def denoise(
    denoiser: Denoiser,
    canvas: Int[np.ndarray, "B T"],
    *,
    keys: Keys,
    allowed: Bool[np.ndarray, "V"],
    rule: Rule,
    steps: int | None = None,
    block_length: int | None = None,
) -> tuple[Int[np.ndarray, "B T"], int]:
    """Fills every mask of a canvas.

    Args:
      denoiser: for example a `RackDenoiser`.
      canvas: given tokens, masks, and padding.
      keys: of the rows' draws, see `row_keys`.
      allowed: ids of text: those that may be drawn, and those of the given ones that count in the masked share.
      rule: how a pass reveals.
      steps: passes a row; a row of fewer masks takes as many as it has, unless it re-masks. None: one a mask.
      block_length: masks are filled in groups of so many, left to right, each in its share of the steps (LLaDA's
        semi-autoregressive sampling); rows wait for each other at the end of a block. None: all at once.

    Returns:
      The filled canvas, and the network evaluations it took.

    Raises:
      UserError: fewer steps than blocks.
    """
    n_masks = np.sum(canvas == rule.mask_id, axis=1)
    n_blocks = 1 if block_length is None else max(1, -(-int(n_masks.max(initial=0)) // block_length))
    if steps is not None and steps < n_blocks:
        raise UserError(
            f"steps={steps} is too few for {n_blocks} blocks of block_length={block_length}; each needs one at least"
        )
    rows = _denoise(denoiser, canvas, keys, allowed, steps, block_length, rule)
    return np.asarray(rows.tokens), int(rows.passes)


@functools.partial(jax.jit, static_argnames="rule")
def _denoise(
    denoiser: Denoiser,
    canvas: Int[Array, "B T"],
    keys: Keys,
    allowed: Bool[Array, "V"],
    steps: Int[Array, ""] | int | None,
    block_length: Int[Array, ""] | int | None,
    rule: Rule,
) -> Rows:
    masked = canvas == rule.mask_id
    n_masks = jnp.sum(masked, axis=1)
    size = jnp.maximum(n_masks, 1) if block_length is None else jnp.broadcast_to(block_length, n_masks.shape)
    block = (jnp.cumsum(masked, axis=1) - 1) // size[:, None]
    n_blocks = jnp.maximum(-(-n_masks // size), 1)
    ordinary = count_ordinary(canvas, allowed, rule)

    def fill_block(number: Array, rows: Rows) -> Rows:
        places = masked & (block == number)
        own_steps = jnp.sum(places, axis=1)
        if steps is not None:
            own_steps = jnp.where(own_steps > 0, steps // n_blocks + (number < steps % n_blocks), 0)
        target = jnp.zeros_like(own_steps)
        return reveal_until(
            denoiser, rows, places, ordinary=ordinary, target=target, steps=own_steps, allowed=allowed, rule=rule
        )

    return jax.lax.fori_loop(0, jnp.max(n_blocks), fill_block, begin_rows(canvas, keys))


def count_ordinary(canvas: Int[Array, "B T"], allowed: Bool[Array, "V"], rule: Rule) -> Int[Array, "B"]:
    """Places of each row that hold text or a mask."""
    return jnp.sum((canvas == rule.mask_id) | allowed[canvas], axis=1)
