"""The held-out sums against NumPy and against what the numbers mean."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from stackwise_jax.evals.likelihood import held_out_loss
from stackwise_jax.types import Batch


def batches(n: int, size: int) -> Iterator[Batch]:
    for i in range(n):
        row_ids = np.arange(i * size, (i + 1) * size, dtype=np.int32)
        tokens = np.zeros((size, 4), np.int32)
        yield Batch(tokens, tokens, tokens, row_ids, np.zeros_like(row_ids))


def table_model(losses: np.ndarray, weights: np.ndarray) -> Callable[[Batch], tuple[np.ndarray, np.ndarray]]:
    return lambda batch: (losses[batch.row_ids], weights[batch.row_ids])


def drawn(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 9, n).astype(np.float32)
    return (weights * rng.normal(2.0, 0.3, n)).astype(np.float32), weights


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary():
    weights = np.full(8, 3.0)
    model = table_model(weights * math.log(256), weights)
    result = held_out_loss(model, batches(2, 4), target_bytes=lambda batch: 12)  # a byte a token
    assert result["loss"] == pytest.approx(math.log(256))
    assert result["perplexity"] == pytest.approx(256)
    assert result["bits_per_byte"] == pytest.approx(8)
    assert result["tokens"] == 24
    assert result["standard_error"] == pytest.approx(0.0, abs=1e-12)


def test_every_token_counts_the_same_whatever_the_batches():
    losses, weights = drawn(12)
    results = [
        held_out_loss(table_model(losses, weights), batches(12 // size, size), target_bytes=lambda b: len(b.row_ids))
        for size in (1, 3, 12)
    ]
    assert results[0]["loss"] == pytest.approx(losses.sum(dtype=np.float64) / weights.sum())
    assert results[0]["loss"] != pytest.approx(np.mean(losses[weights > 0] / weights[weights > 0]), rel=1e-4)
    for result in results[1:]:
        assert result == pytest.approx(results[0])


def test_standard_error_is_the_spread_of_repeated_draws():
    rows = 400
    results = [
        held_out_loss(table_model(*drawn(rows, seed)), batches(4, 100), target_bytes=None) for seed in range(1, 60)
    ]
    spread = np.std([result["masked_cross_entropy"] for result in results], ddof=1)
    assert np.mean([result["standard_error"] for result in results]) == pytest.approx(spread, rel=0.3)


def test_a_masked_objective_has_no_perplexity_and_no_bits_per_byte():
    result = held_out_loss(table_model(*drawn(4)), batches(1, 4), target_bytes=None)
    assert set(result) == {"masked_cross_entropy", "tokens", "standard_error"}


def test_rows_of_padding_change_nothing_and_no_rows_give_no_number():
    losses, weights = drawn(8)
    padded = table_model(np.append(losses, np.zeros(4)), np.append(weights, np.zeros(4)))
    result = held_out_loss(padded, batches(3, 4), target_bytes=None)
    assert result == pytest.approx(held_out_loss(table_model(losses, weights), batches(2, 4), target_bytes=None))
    nothing = held_out_loss(padded, [], target_bytes=None)
    assert nothing["tokens"] == 0
    assert math.isnan(nothing["masked_cross_entropy"])
    assert math.isnan(held_out_loss(table_model(*drawn(1)), batches(1, 1), target_bytes=None)["standard_error"])
