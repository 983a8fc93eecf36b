"""Continues prompts with a causal rack: prompts padded on the left, keys and values stored, one program for everything.

Prefill and the loop over new tokens are one compiled program, so the host waits once, at the end. Slot s of the store
holds place `s - first` of a row, `first` being the slot of the row's first real token.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.errors import UserError
from stackwise_jax.generate.sampling import present, sample
from stackwise_jax.models.rack import decode_rack, init_key_values, reading_context, time_vector
from stackwise_jax.models.stores import Store
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key, Params

# Of the loop: new tokens so far, their ids, rows done, ids said where they count, the store.
_Carry = tuple[Array, Array, Array, Array | None, list[Store]]


def generate(
    rack: Params,
    model: ModelConfig,
    prompts: Sequence[Int[np.ndarray, "_"]],
    *,
    tokens: int,
    key: Key,
    allowed: Bool[np.ndarray, "V"],
    temperature: float,
    top_k: int,
    top_p: float,
    eos_id: int | None,
    dtype: DTypeLike,
    repetition_penalty: float = 1.0,
) -> list[Int[np.ndarray, "_"]]:
    """Continues prompts of any lengths by up to `tokens` ids each.

    Args:
      prompts: ids, at least one each; their first is at position 0.
      key: of the draws; row b of new token t has a stream of its own.
      allowed, temperature, top_k, top_p, repetition_penalty: see `sample`; prompts count as said.
      eos_id: ends a row; None: every row gets all `tokens`.
      dtype: of matmul inputs, and of the stored keys and values.

    Returns:
      Each prompt followed by its continuation, which ends with `eos_id` if it was drawn.

    Raises:
      UserError: the model is not causal, or prompt and continuation exceed its learned positions.
      ValueError: a prompt without ids.
    """
    if model.attention != "causal":
        raise UserError(
            f"model.attention={model.attention!r}: stored keys and values are for causal attention; "
            "a rack that fills in masked places is read by generation.sampler='denoise'"
        )
    if not prompts:
        return []
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise ValueError("a prompt needs at least one id; begin it with bos")
    longest = max(lengths)
    if model.positions == "learned" and longest + tokens > (model.max_positions or 0):
        raise UserError(
            f"a prompt of {longest} tokens and {tokens} new ones need {longest + tokens} positions, but the model has "
            f"learned model.max_positions={model.max_positions}; shorten the prompt or lower the number of tokens"
        )
    padded = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]).astype(np.int32)
    first = np.array([longest - length for length in lengths], np.int32)
    drawing = (temperature, top_k, top_p, repetition_penalty)
    new = np.asarray(generate_rows(rack, padded, first, key, allowed, model, tokens, drawing, eos_id, dtype))
    return [
        np.concatenate([prompt.astype(np.int32), _until(row, eos_id)]) for prompt, row in zip(prompts, new, strict=True)
    ]


def read_prompts(
    rack: Params,
    padded: Int[Array, "B T"],
    first: Int[Array, "B"],
    model: ModelConfig,
    *,
    slots: int,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B V"], list[Store]]:
    """Reads prompts whose tokens lie at slots `first ..` of `padded` into a store of `slots` places.

    Returns:
      float32 logits of what follows each prompt, and the store.
    """
    B, T = padded.shape
    stored = init_key_values(rack, model, B, slots, dtype=dtype)
    places = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
    return _read(rack, padded, places, first, stored, model, dtype)


def read_token(
    rack: Params,
    token: Int[Array, "B"],
    slot: Int[Array, ""],
    first: Int[Array, "B"],
    stored: list[Store],
    model: ModelConfig,
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B V"], list[Store]]:
    """Reads one more token a row, into `slot`; returns as `read_prompts`."""
    return _read(rack, token[:, None], jnp.full((len(token), 1), slot), first, stored, model, dtype)


def _read(
    rack: Params,
    tokens: Int[Array, "B T"],
    places: Int[Array, "B T"],
    first: Int[Array, "B"],
    stored: list[Store],
    model: ModelConfig,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B V"], list[Store]]:
    time = time_vector(rack["embedding"], jnp.zeros(len(tokens))) if model.time_input else None  # nothing is masked
    context = reading_context(stored, places, first, time=time)
    return decode_rack(rack, tokens, context, stored, model, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("model", "n_tokens", "drawing", "eos_id", "dtype"))
def generate_rows(
    rack: Params,
    padded: Int[Array, "B T"],
    first: Int[Array, "B"],
    key: Key,
    allowed: Bool[Array, "V"],
    model: ModelConfig,
    n_tokens: int,
    drawing: tuple[float, int, float, float],
    eos_id: int | None,
    dtype: DTypeLike,
) -> Int[Array, "B n"]:
    """As `generate`, of prompts whose ids lie at slots `first ..` of `padded`; after `eos_id` a row repeats it.

    Args:
      drawing: temperature, top-k, top-p, repetition penalty.

    Returns:
      the new ids of every row.
    """
    B, T = padded.shape
    temperature, top_k, top_p, penalty = drawing

    def pick(logits: Array, t: Array, done: Array, seen: Array | None) -> tuple[Array, Array, Array | None]:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
        token = sample(jax.random.fold_in(key, t), logits, allowed=allowed, seen=seen, **options)
        seen = None if seen is None else seen.at[jnp.arange(B), token].set(True)
        if eos_id is None:
            return token, done, seen
        token = jnp.where(done, eos_id, token)
        return token, token == eos_id, seen

    def unfinished(carry: _Carry) -> Array:
        t, _, done, _, _ = carry
        return (t < n_tokens) & ~jnp.all(done)

    def step(carry: _Carry) -> _Carry:
        t, new, done, seen, stored = carry
        logits, stored = read_token(rack, new[:, t - 1], T + t - 1, first, stored, model, dtype=dtype)
        token, done, seen = pick(logits, t, done, seen)
        return t + 1, new.at[:, t].set(token), done, seen, stored

    logits, stored = read_prompts(rack, padded, first, model, slots=T + n_tokens - 1, dtype=dtype)
    seen = None
    if penalty != 1.0:  # padding stands for no id
        seen = present(jnp.where(jnp.arange(T)[None, :] < first[:, None], model.vocab_size, padded), model.vocab_size)
    token, done, seen = pick(logits, jnp.int32(0), jnp.zeros(B, bool), seen)
    new = jnp.full((B, n_tokens), 0 if eos_id is None else eos_id, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), new, done, seen, stored))[1]


def _until(row: Int[np.ndarray, "n"], eos_id: int | None) -> Int[np.ndarray, "_"]:
    """A row up to and including its first `eos_id`."""
    if eos_id is None or eos_id not in row:
        return row
    return row[: np.argmax(row == eos_id) + 1]
