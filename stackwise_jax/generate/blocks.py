"""Block diffusion: blocks from left to right, each unmasked given the finished ones, whose keys and values are stored.

BD3-LM (Arriola et al., 2025): block b of a row is its places bL .. bL + L - 1; places see their own block and the ones
before. A finished block is read once more, clean, and what it leaves in the store never changes, so a pass costs one
block. A rack trained under another attention is read so as an approximation. Prefill, blocks and passes are one
compiled program.
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
from stackwise_jax.generate.denoise import check_length, logits_of_places
from stackwise_jax.generate.reveal import Rows, Rule, begin_rows, reveal_until
from stackwise_jax.generate.sampling import present
from stackwise_jax.models.mixing import Context
from stackwise_jax.models.rack import decode_stacks, init_key_values, rack_logits, time_vector
from stackwise_jax.models.stores import Store, slots
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Keys, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDenoiser:
    """One block of each row as a `Denoiser`, given what is stored of the blocks before it.

    Attributes:
      stored: keys and values of the slots so far; slot s of a row holds its place s - first.
      first, end: slots of each row's first token and after its last one; both starts of blocks but for `end`.
      start: slot of the block's first place.
      before: logits of the slot before the block, for a shifted head.
    """

    rack: Params
    stored: list[Store]
    first: Int[Array, "B"]
    end: Int[Array, "B"]
    start: Int[Array, ""]
    before: Float[Array, "B V"] | None
    model: ModelConfig = dataclasses.field(metadata={"static": True})
    block_length: int = dataclasses.field(metadata={"static": True})
    dtype: DTypeLike = dataclasses.field(metadata={"static": True})

    def __call__(self, tokens: Int[Array, "B T"], rate: Float[Array, "B"]) -> Float[Array, "B T V"]:
        logits = self.read(tokens, rate)[0]
        return logits if self.before is None else logits_of_places(logits, self.before)

    def read(
        self, tokens: Int[Array, "B T"], rate: Float[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T V"], list[Store]]:
        """Logits at every place of the blocks that `tokens` are, and the store with them in it.

        Args:
          rate: masked share of these blocks, for a rack that is told. None: they are finished.
        """
        n_slots = slots(self.stored)
        if n_slots is None:
            raise ValueError("blocks are read from stored places, and attention in linear time stores none")
        places = jnp.broadcast_to(self.start + jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        context = Context(
            positions=jnp.maximum(places - self.first[:, None], 0),
            mask=see_blocks(places, n_slots, self.first, self.end, self.block_length),
            write_at=self.start,
            time=self._time(jnp.zeros(len(tokens)) if rate is None else rate),
        )
        x, stored = decode_stacks(self.rack, tokens, context, self.stored, self.model, dtype=self.dtype)
        return rack_logits(self.rack, x, self.model, context.time), stored

    def _time(self, rate: Float[Array, "B"]) -> Float[Array, "B C"] | None:
        return time_vector(self.rack["embedding"], rate) if self.model.time_input else None


def see_blocks(
    places: Int[Array, "B T"], slots: int, first: Int[Array, "B"], end: Int[Array, "B"], block_length: int
) -> Bool[Array, "B 1 T S"]:
    """Which slots each query sees: the tokens of its own block and of earlier ones, and always itself.

    Args:
      places: slot of each query.
      first, end: slots of each row's first token, a multiple of `block_length`, and after its last one.
    """
    slot = jnp.arange(slots)[None, None, None, :]
    query = places[:, None, :, None]
    start, stop = first[:, None, None, None], end[:, None, None, None]
    tokens = (slot >= start) & (slot < stop) & (query >= start) & (query < stop)
    return (tokens & (slot // block_length <= query // block_length)) | (slot == query)


def generate_blocks(
    rack: Params,
    model: ModelConfig,
    prompts: Sequence[Int[np.ndarray, "_"]],
    *,
    tokens: int,
    block_length: int,
    keys: Keys,
    allowed: Bool[np.ndarray, "V"],
    rule: Rule,
    pad_id: int,
    dtype: DTypeLike,
    shift: bool = False,
    steps: int | None = None,
) -> tuple[list[Int[np.ndarray, "_"]], int]:
    """Continues prompts of any lengths by `tokens` ids each, block by block.

    Args:
      prompts: ids, at least one each; their first is at place 0. A prompt that ends inside a block shares it.
      keys, allowed, rule: as in `denoise`.
      shift: the head predicts the next place.
      steps: passes a row, divided among its blocks evenly. None: one a new token.

    Returns:
      Each prompt followed by its continuation, and the network evaluations that unmasked; one more for the prompts
      and for each block but the last stores them.

    Raises:
      UserError: fewer steps than blocks, or more places than learned positions.
      ValueError: a prompt without ids.
    """
    if not prompts:
        return [], 0
    lengths = np.array([len(prompt) for prompt in prompts])
    if lengths.min() == 0:
        raise ValueError("a prompt needs at least one id; begin it with bos")
    check_length(model, int(lengths.max()) + tokens)
    whole = lengths // block_length
    n_new = -(-(lengths % block_length + tokens) // block_length)
    if steps is not None and steps < n_new.max():
        raise UserError(
            f"steps={steps} is too few for {n_new.max()} blocks of block_length={block_length}; each needs one at least"
        )
    first = ((whole.max() - whole) * block_length).astype(np.int32)
    end = (first + lengths + tokens).astype(np.int32)
    canvas = np.full((len(prompts), (whole.max() + n_new.max()) * block_length), pad_id, np.int32)
    for row, start, stop, prompt in zip(canvas, first, end, prompts, strict=True):
        row[start:stop] = rule.mask_id
        row[start : start + len(prompt)] = prompt
    n_read = int(whole.max())
    rows, passes = _generate_blocks(
        rack, canvas, first, end, keys, allowed, n_new, steps, n_read, rule, model, block_length, dtype, shift
    )
    return [row[a:b] for row, a, b in zip(np.asarray(rows), first, end, strict=True)], int(passes)


@functools.partial(jax.jit, static_argnames=("n_read", "rule", "model", "block_length", "dtype", "shift"))
def _generate_blocks(
    rack: Params,
    canvas: Int[Array, "B T"],
    first: Int[Array, "B"],
    end: Int[Array, "B"],
    keys: Keys,
    allowed: Bool[Array, "V"],
    n_new: Int[Array, "B"],
    steps: Int[Array, ""] | int | None,
    n_read: int,
    rule: Rule,
    model: ModelConfig,
    block_length: int,
    dtype: DTypeLike,
    shift: bool,
) -> tuple[Int[Array, "B T"], Int[Array, ""]]:
    B, T = canvas.shape
    stored = init_key_values(rack, model, B, T, dtype=dtype)
    before = jnp.zeros((B, model.vocab_size)) if shift else None
    at = functools.partial(
        BlockDenoiser, rack, first=first, end=end, model=model, block_length=block_length, dtype=dtype
    )

    def store(start: Array, tokens: Array, stored: list[Store]) -> tuple[list[Store], Array | None]:
        logits, stored = at(stored=stored, start=start, before=None).read(tokens)
        return stored, logits[:, -1] if shift else None

    if n_read:
        stored, before = store(jnp.int32(0), canvas[:, : n_read * block_length], stored)

    def fill_block(
        number: Array, carry: tuple[Rows, list[Store], Array | None]
    ) -> tuple[Rows, list[Store], Array | None]:
        rows, stored, before = carry
        start = (n_read + number) * block_length
        block = jax.lax.dynamic_slice_in_dim(rows.tokens, start, block_length, 1)
        masked = block == rule.mask_id
        own_steps = jnp.sum(masked, axis=1)
        if steps is not None:
            own_steps = jnp.broadcast_to(steps // n_new + (number < steps % n_new), own_steps.shape)
        filled = reveal_until(
            at(stored=stored, start=start, before=before),
            dataclasses.replace(rows, tokens=block),
            masked,
            ordinary=jnp.sum(masked | allowed[block], axis=1),
            target=jnp.zeros_like(own_steps),
            steps=own_steps,
            allowed=allowed,
            rule=rule,
            said=present(rows.tokens, model.vocab_size) if rule.repetition_penalty != 1.0 else None,
        )
        stored, before = jax.lax.cond(
            number + 1 < jnp.max(n_new),
            lambda: store(start, filled.tokens, stored),
            lambda: (stored, before),
        )
        whole = jax.lax.dynamic_update_slice_in_dim(rows.tokens, filled.tokens, start, 1)
        return dataclasses.replace(filled, tokens=whole), stored, before

    rows = jax.lax.fori_loop(0, jnp.max(n_new), fill_block, (begin_rows(canvas, keys), stored, before))[0]
    return rows.tokens, rows.passes
