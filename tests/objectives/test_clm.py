"""Causal targets: the next token of the same document, against a loop over places."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.objectives import clm
from stackwise_jax.types import Batch, Example

T = 12


@st.composite
def packed_rows(draw: st.DrawFn) -> np.ndarray:
    """Segments of two packed rows: documents 1, 2, ... in a row, then padding."""
    rows = []
    for _ in range(2):
        lengths = draw(st.lists(st.integers(1, 5), max_size=4))
        documents = [number for number, length in enumerate(lengths, 1) for _ in range(length)][:T]
        rows.append(documents + [0] * (T - len(documents)))
    return np.array(rows, np.int32)


def batch_of(segments: np.ndarray) -> Batch:
    tokens = np.random.default_rng(0).integers(0, 64, segments.shape).astype(np.int32)
    rows = np.arange(len(segments), dtype=np.int32)
    arrays = (tokens, segments, np.zeros_like(segments), rows, np.zeros_like(rows))
    return Batch(*map(jnp.array, arrays))


def corrupt(batch: Batch) -> Example:
    return clm.corrupt(jax.random.key(0), batch)


def expected_pairs(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, place, target) of everything that may be asked, by a loop."""
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
    return [
        (b, t, int(tokens[b, t + 1]))
        for b in range(len(tokens))
        for t in range(T - 1)
        if segments[b, t] > 0 and segments[b, t + 1] == segments[b, t]
    ]


def asked_pairs(example: Example) -> list[tuple[int, int, int]]:
    weights, targets = np.asarray(example.weights), np.asarray(example.targets)
    return [(int(b), int(t), int(targets[b, t])) for b, t in zip(*np.nonzero(weights), strict=True)]


@settings(max_examples=40, deadline=None)
@given(packed_rows())
def test_targets_shift_inside_documents_only(segments: np.ndarray):
    batch = batch_of(segments)
    example = corrupt(batch)
    assert asked_pairs(example) == expected_pairs(batch)
    assert set(np.unique(example.weights)) <= {0.0, 1.0}
    for name, original in (("inputs", batch.tokens), ("segments", segments), ("positions", batch.positions)):
        np.testing.assert_array_equal(getattr(example, name), original)


def test_targets_shift_inside_documents_only_detects_a_plain_shift():
    segments = np.array([[1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0]], np.int32)
    batch = batch_of(segments)
    one_document = batch_of(np.ones_like(segments))
    assert asked_pairs(corrupt(one_document)) != expected_pairs(batch)
