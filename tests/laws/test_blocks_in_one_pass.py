"""Block diffusion in one pass over [noised ; clean] is as many passes as there are blocks, and is what samplers read.

BD3-LM (Arriola et al., 2025): a noised block is predicted from the clean ones before it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.generate.blocks import BlockDenoiser
from stackwise_jax.models.rack import apply_rack, init_key_values, output_table, row_context
from tests.generate.reading import MASK, MODEL, rack_of

N, BLOCK = 12, 4
RACK = rack_of(MODEL)
DRAW = np.random.default_rng(1)
CLEAN = DRAW.integers(1, 16, N).astype(np.int32)
NOISED = np.where(DRAW.random(N) < 0.6, MASK, CLEAN).astype(np.int32)
DOCUMENTS = {"one document": [1] * N, "packed": [1] * 6 + [2] * 5 + [0]}
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


@functools.partial(jax.jit, static_argnames=("kind", "block_length"))
def logits_under(tokens: jax.Array, segments: jax.Array, kind: str, block_length: int | None) -> jax.Array:
    """Of every place of rows [B T]; of block_diffusion T is 2 N, and both halves stand at the same positions."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :] % N, tokens.shape)
    context = row_context(MODEL, segments, positions, kind=kind, block_length=block_length)
    hidden = apply_rack(RACK, tokens, context, MODEL, dtype=jnp.float32)
    return hidden @ output_table(RACK["head"], RACK["embedding"]).T


def halves(documents: str, block_length: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """(noised, clean) of the pass over both."""
    row, segments = np.concatenate([NOISED, CLEAN]), DOCUMENTS[documents] * 2
    out = np.asarray(logits_under(jnp.array([row]), jnp.array([segments]), "block_diffusion", block_length)[0])
    return out[:N], out[N:]


def in_turn(documents: str) -> tuple[np.ndarray, np.ndarray]:
    """(noised, clean), a row of clean blocks and one noised block at a time, and the clean row, under block_causal."""
    block = np.arange(N) // BLOCK
    rows = np.stack([np.where(block == own, NOISED, CLEAN) for own in range(N // BLOCK)] + [CLEAN])
    segments = jnp.broadcast_to(jnp.array(DOCUMENTS[documents])[None, :], rows.shape)
    out = np.asarray(logits_under(jnp.array(rows), segments, "block_causal", BLOCK))
    return out[block, np.arange(N)], out[-1]


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_one_pass_is_a_pass_for_each_block(documents: str):
    for ours, expected in zip(halves(documents), in_turn(documents), strict=True):
        np.testing.assert_allclose(ours, expected, **CLOSE)


def test_one_pass_detects_other_blocks_and_documents():
    noised, clean = in_turn("packed")
    for wrong in (halves("packed", block_length=3), halves("one document")):
        assert np.abs(wrong[0] - noised).max() > 1e-2
        assert np.abs(wrong[1] - clean).max() > 1e-2


@functools.cache
def read_in_blocks(finished_are_noised: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(noised, clean) as a sampler reads them: block after block, with the keys and values of the finished ones."""
    first, end = jnp.zeros(1, jnp.int32), jnp.full(1, N)
    read = functools.partial(
        BlockDenoiser, RACK, first=first, end=end, before=None, model=MODEL, block_length=BLOCK, dtype=jnp.float32
    )
    step = jax.jit(lambda stored, start, tokens: read(stored=stored, start=start).read(tokens))
    stored, noised, clean = init_key_values(RACK, MODEL, 1, N, dtype=jnp.float32), [], []
    for start in range(0, N, BLOCK):
        own = slice(start, start + BLOCK)
        logits, with_noise = step(stored, jnp.int32(start), jnp.array(NOISED[None, own]))
        noised.append(logits[0])
        logits, with_clean = step(stored, jnp.int32(start), jnp.array(CLEAN[None, own]))
        clean.append(logits[0])
        stored = with_noise if finished_are_noised else with_clean
    return np.concatenate(noised), np.concatenate(clean)


def test_a_sampler_reads_what_was_trained():
    for ours, expected in zip(read_in_blocks(), halves("one document"), strict=True):
        np.testing.assert_allclose(ours, expected, **CLOSE)


def test_a_sampler_detects_a_store_of_noised_blocks():
    ours, expected = read_in_blocks(finished_are_noised=True)[0], halves("one document")[0]
    np.testing.assert_allclose(ours[:BLOCK], expected[:BLOCK], **CLOSE)
    assert np.abs(ours[BLOCK:] - expected[BLOCK:]).max() > 1e-2


def test_reading_in_blocks_is_the_block_causal_mask():
    row, segments = jnp.array(CLEAN[None]), jnp.ones((1, N), jnp.int32)
    ours = read_in_blocks()[1]
    np.testing.assert_allclose(ours, logits_under(row, segments, "block_causal", BLOCK)[0], **CLOSE)
    for kind, block_length in (("causal", None), ("block_causal", 3), ("bidirectional", None)):  # the twins
        assert np.abs(ours - np.asarray(logits_under(row, segments, kind, block_length)[0])).max() > 1e-2


def test_blocks_of_one_place_predict_as_causal_reading_with_the_own_place_masked():
    """A noised place at block length 1 is what an autoregressive reader puts out for a mask after the text so far."""
    ours = halves("one document", block_length=1)[0]
    rows = np.stack([np.where(np.arange(N) == own, NOISED, CLEAN) for own in range(N)])
    segments = jnp.ones(rows.shape, jnp.int32)
    causal = np.asarray(logits_under(jnp.array(rows), segments, "causal", None))[np.arange(N), np.arange(N)]
    np.testing.assert_allclose(ours, causal, **CLOSE)
    assert np.abs(halves("one document", block_length=2)[0] - causal).max() > 1e-2
