"""Early exit: at full depth, at the first stack, and in between what reading token after token gives."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import evaluate as program
from stackwise_jax.command import run_command
from stackwise_jax.config import resolve
from stackwise_jax.data.corpus import Corpus
from stackwise_jax.errors import UserError
from stackwise_jax.evals.exits import Left, Scores, StageCosts, exit_figures, leave_early
from stackwise_jax.generate.exits import exit_heads, measure_exits, parse_thresholds
from stackwise_jax.memory.budget import stored_forward_flops
from stackwise_jax.models.rack import (
    apply_embedding,
    init_key_values,
    init_rack,
    rack_logits,
    reading_context,
    row_context,
)
from stackwise_jax.models.stack import apply_stack, decode_stack
from stackwise_jax.ops.loss import token_scores
from stackwise_jax.schema import ModelConfig
from stackwise_jax.train import loop
from stackwise_jax.train.trained import Trained, load_trained
from stackwise_jax.types import Batch, Params

SMALL = {"vocab_size": 16, "d_model": 16, "n_heads": 2, "d_ff": 24}


@pytest.fixture(scope="module")
def folder(tiny: Any, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished causal run of three stacks, with a head tapped after each."""
    path = tmp_path_factory.mktemp("exits") / "run"
    fields = {"training__embedding_phase": "with_first_stack", "optimizer__learning_rate": 1e-2, "evaluation__rows": 8}
    loop.run(tiny(**fields), tiny_corpus, path, say=lambda _: None)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    return load_trained(folder, merged=False)


def batches_of(trained: Trained) -> list[Batch]:
    return list(program._batches(trained, None, 8))


def drawn_rack() -> tuple[Params, ModelConfig]:
    """A causal rack of three stacks that is sure of some places and not of others, at every depth."""
    model = resolve({"model": {**SMALL, "init_std": 0.4, "architecture": {"n_stacks": 3}}}).model
    return init_rack(jax.random.key(0), model, (1, 1, 1)), model


@functools.partial(jax.jit, static_argnums=2)
def confidence_of(rack: Params, x: jax.Array, model: ModelConfig) -> jax.Array:
    logits = rack_logits(rack, x, model)
    return jnp.exp(jnp.max(logits, axis=2) - jax.nn.logsumexp(logits, axis=2))


def in_one_pass(tokens: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The last stage of every place of one row, and how sure the head was there."""
    rack, model = drawn_rack()
    context = row_context(model, None, jnp.arange(len(tokens))[None, :])

    def judge(x: Any) -> Scores:
        confidence = confidence_of(rack, x, model)
        return Scores(confidence, confidence, confidence > 1.0)

    stages = [functools.partial(in_row, stack, context=context, model=model) for stack in rack["stacks"]]
    x = apply_embedding(rack["embedding"], jnp.array(tokens)[None, :], context.positions, model, dtype=jnp.float32)
    left = leave_early(stages, [judge] * 3, x, threshold)
    return np.asarray(left.stage)[0], np.asarray(left.loss)[0]


@functools.partial(jax.jit, static_argnames="model")
def in_row(stack: Params, x: Any, *, context: Any, model: ModelConfig) -> Any:
    return apply_stack(stack, x, context, model, dtype=jnp.float32)


def token_by_token(tokens: np.ndarray, threshold: float, *, stays: bool) -> tuple[np.ndarray, np.ndarray]:
    """As `in_one_pass`, read place after place with stores.

    Args:
      stays: stacks store what they make of the state that a place left with; False: of what full depth makes of it.
    """
    rack, model = drawn_rack()
    stored = init_key_values(rack, model, 1, len(tokens), dtype=jnp.float32)
    run = jax.jit(functools.partial(decode_stack, dtype=jnp.float32), static_argnums=4)
    stages, sure = [], []
    for place, token in enumerate(tokens):
        context = reading_context(stored, jnp.full((1, 1), place), jnp.zeros(1, jnp.int32))
        x = apply_embedding(rack["embedding"], jnp.full((1, 1), token), context.positions, model, dtype=jnp.float32)
        left: int | None = None
        for depth, stack in enumerate(rack["stacks"]):
            y, stored[depth] = run(stack, x, context, stored[depth], model)
            x = y if left is None or not stays else x
            confidence = float(confidence_of(rack, x, model)[0, 0])
            if left is None and (confidence >= threshold or depth == 2):
                left = depth
                stages.append(left)
                sure.append(confidence)
    return np.array(stages), np.array(sure)


def test_one_pass_over_a_row_is_reading_it_token_by_token() -> None:
    tokens = np.random.default_rng(1).integers(0, 16, 14)
    stages, sure = in_one_pass(tokens, 0.35)
    assert set(stages) == {0, 1, 2}
    by_token = token_by_token(tokens, 0.35, stays=True)
    np.testing.assert_array_equal(stages, by_token[0])
    np.testing.assert_allclose(sure, by_token[1], rtol=2e-5, atol=2e-6)
    assert np.abs(sure - token_by_token(tokens, 0.35, stays=False)[1]).max() > 1e-3


def test_nobody_leaves_is_full_depth_and_everybody_leaves_is_the_first_stack(folder: Path, trained: Trained) -> None:
    never, always = measure_exits(trained, batches_of(trained), [1e-9])
    whole = program.evaluate(load_trained(folder), source=None, rows=8)["loss"]
    first = program.evaluate(load_trained(folder, n_stacks=1), source=None, rows=8)["loss"]
    assert (never.loss, never.stages, never.block_share_saved) == pytest.approx((whole, 3.0, 0.0), rel=1e-5)
    assert (always.loss, always.stages) == pytest.approx((first, 1.0), rel=1e-5)
    assert abs(first - whole) > 1e-3
    # Two of three stacks are skipped, but for their keys and values.
    assert 0.5 < always.block_share_saved < 2.0 / 3.0


def test_figures_are_those_counted_by_hand() -> None:
    """Three places asked for: two leave after the first stage and one stays; the fourth is nobody's question."""
    left = Left(*map(jnp.array, ([[0, 0, 1, 0]], [[1.0, 2.0, 6.0, 99.0]], [[True, False, True, True]])))
    asked = np.array([[True, True, True, False]])
    own = exit_figures([(left, asked)], 0.5, StageCosts((10.0, 30.0), (2.0, 5.0), 4.0))
    blocks, judged = (2 * (10 + 5) + 40) / 3, (2 * 4 + 8) / 3
    assert (own.loss, own.accuracy, own.stages) == pytest.approx((3.0, 2 / 3, 4 / 3))
    assert (own.block_share_saved, own.share_saved) == pytest.approx((1 - blocks / 40, 1 - (blocks + judged) / 44))
    assert exit_figures([(left, asked)], 0.5, StageCosts((10.0, 30.0), (0.0, 0.0), 4.0)) != own  # the twin
    assert math.isnan(exit_figures([(left, asked & False)], 0.5, StageCosts((1.0, 1.0), (0.0, 0.0), 1.0)).loss)


def test_a_place_that_has_left_stays_as_it_is() -> None:
    """A judge that is sure of what is above 1: the first place leaves before the second stage doubles it."""
    stages = [lambda x: 2.0 * x] * 3

    def judge(x: Any) -> Scores:
        state = x[:, :, 0]
        return Scores(state, (state > 1.0).astype(jnp.float32), state > 0)

    left = leave_early(stages, [judge] * 3, jnp.array([[[0.6], [0.3], [0.05]]]), 0.5)
    assert left.stage.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(left.loss, [[1.2, 1.2, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(leave_early(stages, [judge] * 3, jnp.full((1, 1, 1), 0.6), 2.0).loss, 4.8, rtol=1e-6)


def test_a_place_is_scored_as_its_softmax_says() -> None:
    """Also the places of a chunk that is filled up."""
    draw = np.random.default_rng(0)
    hidden, table = (draw.normal(size=(n, 4)).astype(np.float32) for n in (7, 9))
    targets = np.array([0, 3, 8, 2, 2, 5, 1])
    odds = np.exp(hidden.astype(np.float64) @ table.T)
    p = odds / odds.sum(axis=1, keepdims=True)
    losses, confidence, is_right = token_scores(*map(jnp.array, (hidden, table, targets)), chunk_tokens=3)
    np.testing.assert_allclose(losses, -np.log(p[np.arange(7), targets]), rtol=1e-5)
    np.testing.assert_allclose(confidence, p.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(is_right, p.argmax(axis=1) == targets)


def test_what_is_stored_of_a_place_is_counted_from_the_maps() -> None:
    model = ModelConfig(d_model=32, n_heads=4, n_kv_heads=2, d_head=8)
    assert stored_forward_flops(model) == 2 * 2 * 32 * 16


def test_the_command_prints_a_line_a_threshold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(program.main, program.make_options(), "", ["evaluate", f"--workdir={folder}", "--exit=0.01,0.9"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["never", "0.01", "0.9"]


def test_what_cannot_leave_early_is_refused(trained: Trained) -> None:
    for text in ("", "0", "1.5", "0.5;0.9", "nan"):
        with pytest.raises(UserError, match="must be probabilities"):
            parse_thresholds(text)
    with pytest.raises(UserError, match="has none for depth 1, 2"):
        exit_heads(dataclasses.replace(trained, taps={}))
    config = trained.config
    masked = dataclasses.replace(config, objective=dataclasses.replace(config.objective, name="diffusion"))
    with pytest.raises(UserError, match="not 'diffusion'; leave it out"):
        exit_heads(dataclasses.replace(trained, config=masked))
