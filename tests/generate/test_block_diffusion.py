"""Block diffusion with stored prefixes is the same as reading every block anew under the block-causal mask."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.errors import UserError
from stackwise_jax.generate.blocks import BlockDenoiser, generate_blocks
from stackwise_jax.generate.reveal import Rule, row_keys
from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import apply_embedding, init_key_values, rack_logits
from stackwise_jax.models.stack import apply_stack
from tests.generate.reading import ALLOWED, MASK, MODEL, PAD, rack_of

LENGTH, BLOCK = 12, 4
GREEDY = Rule(mask_id=MASK)
PROMPTS = [np.array(row) for row in ([1, 5, 7, 2, 9, 3], [1], [1, 4, 4, 8, 2, 6, 7, 3, 5, 9])]


def drawn(prompts: list[np.ndarray], rule: Rule = GREEDY, **options: Any) -> tuple[list[list[int]], int]:
    settings: dict[str, Any] = {"tokens": 6, "keys": row_keys(jax.random.key(2), len(prompts)), "allowed": ALLOWED}
    settings |= {"block_length": BLOCK, "rule": rule, "pad_id": PAD, "dtype": jnp.float32}
    rows, passes = generate_blocks(rack_of(MODEL), MODEL, prompts, **(settings | options))
    return [row.tolist() for row in rows], passes


@functools.partial(jax.jit, static_argnames="block_length")
def all_logits(row: jax.Array, length: jax.Array, block_length: int = BLOCK) -> jax.Array:
    """Logits of every place of one row [T], all read at once: places see their own block and the ones before."""
    place, rack = jnp.arange(len(row)), rack_of(MODEL)
    visible = (place[None, :] // block_length <= place[:, None] // block_length) & (place[None, :] < length)
    visible = visible | (place[None, :] == place[:, None])
    context = Context(place[None, :], visible[None, None])
    x = apply_embedding(rack["embedding"], row[None, :], place[None, :], MODEL, dtype=jnp.float32)
    for stack in rack["stacks"]:
        x = apply_stack(stack, x, context, MODEL, dtype=jnp.float32)
    return rack_logits(rack, x, MODEL)[0]


def decoded(fault: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a noisy second block, given the stored first one, and recomputed; a row that begins at slot 4."""
    rack, row = rack_of(MODEL), np.array([1, 5, 7, 2, 9, MASK, 3, MASK])
    first, end = jnp.array([4]), jnp.array([12])
    stored = init_key_values(rack, MODEL, 1, LENGTH, dtype=jnp.float32)
    read = functools.partial(
        BlockDenoiser, rack, first=first, end=end, before=None, model=MODEL, block_length=BLOCK, dtype=jnp.float32
    )
    prompt = jnp.array([[PAD] * 4 + row[:4].tolist()])
    _, stored = read(stored=stored, start=jnp.int32(0)).read(prompt)
    later = read(stored=stored, start=jnp.int32(8), first=first - 4 * fault)
    ours = later(jnp.array(row[None, 4:]), jnp.ones(1))
    padded = jnp.array(np.pad(row, (0, LENGTH - len(row))))
    return np.asarray(ours[0]), np.asarray(all_logits(padded, jnp.int32(8)))[4:8]


def test_a_block_is_recomputation():
    ours, expected = decoded()
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def test_a_block_is_recomputation_detects_wrong_first_slots():
    ours, expected = decoded(fault=1)
    assert np.abs(ours - expected).max() > 1e-2


def naive(prompt: np.ndarray, tokens: int, *, block_length: int = BLOCK, shift: bool = False) -> list[int]:
    """One row, greedily, one place a pass, the whole row read anew every time."""
    row = np.concatenate([prompt, np.full(tokens, MASK)])
    for start in range(0, len(row), BLOCK):
        stop = min(start + BLOCK, len(row))
        while MASK in row[start:stop]:
            padded = jnp.array(np.pad(row[:stop], (0, 2 * LENGTH - stop)))
            logits = np.asarray(all_logits(padded, jnp.int32(stop), block_length), np.float64)
            logits = np.concatenate([logits[:1], logits[:-1]]) if shift else logits
            logits[:, ~ALLOWED] = -np.inf
            shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            open_places = start + np.flatnonzero(row[start:stop] == MASK)
            best = open_places[np.argmax(shares.max(1)[open_places])]
            row[best] = np.argmax(shares[best])
    return row.tolist()


@pytest.mark.parametrize("shift", [False, True])
def test_text_is_the_naive_samplers(shift: bool):
    rows, passes = drawn(PROMPTS, shift=shift)
    assert rows == [naive(prompt, 6, shift=shift) for prompt in PROMPTS]
    assert passes == 7  # blocks of 2 + 4, 3 + 3 and 2 + 4 places: rows wait at the end of a block


def test_the_naive_sampler_detects_another_mask():
    rows, _ = drawn(PROMPTS)
    assert rows != [naive(prompt, 6, block_length=2 * LENGTH) for prompt in PROMPTS]


def test_a_row_is_the_same_alone_and_seeds_matter():
    warm = dataclasses.replace(GREEDY, temperature=1.0)
    keys = row_keys(jax.random.key(2), 3)
    together, _ = drawn(PROMPTS, warm)
    assert drawn(PROMPTS[1:2], warm, keys=keys[1:2])[0] == together[1:2]
    assert drawn(PROMPTS[1:2], warm, keys=keys[:1])[0] != together[1:2]
    assert drawn(PROMPTS, warm, keys=row_keys(jax.random.key(3), 3))[0] != together


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 17), min_size=4, max_size=7), min_size=2, max_size=2), st.integers(0, 99))
def test_prompts_stay_and_masks_go(prompts: list[list[int]], seed: int):
    rule = dataclasses.replace(GREEDY, temperature=1.0, repetition_penalty=1.3)
    keys = row_keys(jax.random.key(seed), 2)
    rows, passes = drawn([np.array(prompt) for prompt in prompts], rule, tokens=5, keys=keys, steps=4)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row[: len(prompt)] == prompt
        assert len(row) == len(prompt) + 5
        assert ALLOWED[row[len(prompt) :]].all()
    assert passes <= 6


def test_the_penalty_counts_earlier_blocks():
    plain, harsh = (drawn(PROMPTS, dataclasses.replace(GREEDY, repetition_penalty=p))[0] for p in (1.0, 1e6))
    assert any(set(row[len(p) :]) & set(p.tolist()) for row, p in zip(plain, PROMPTS, strict=True))
    for row, prompt in zip(harsh, PROMPTS, strict=True):
        assert not set(row[len(prompt) // BLOCK * BLOCK + BLOCK :]) & set(prompt.tolist())


def test_passes_are_as_asked_and_what_cannot_be_is_refused():
    even = [np.array([1, 2, 3, 4])] * 2
    assert [drawn(even, tokens=8, steps=steps)[1] for steps in (2, None)] == [2, 8]
    with pytest.raises(UserError, match="steps=1 is too few for 2 blocks"):
        drawn(even, tokens=8, steps=1)
    with pytest.raises(ValueError, match="bos"):
        drawn([np.array([], np.int32)])
    assert drawn([]) == ([], 0)
