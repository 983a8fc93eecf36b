"""A run whose time is depth, from its folder alone: measured, continued and reported band by band."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import evaluate, report
from stackwise_jax.command import run_command
from stackwise_jax.data.corpus import Corpus
from stackwise_jax.errors import UserError
from stackwise_jax.generate import __main__ as generate
from stackwise_jax.generate.depth import Depth
from stackwise_jax.generate.texts import continue_texts
from stackwise_jax.models.rack import apply_embedding, rack_logits, row_context
from stackwise_jax.models.stack import apply_stack
from stackwise_jax.schema import ModelConfig, ObjectiveConfig
from stackwise_jax.train import loop
from stackwise_jax.train.trained import Trained, load_trained
from stackwise_jax.types import Batch, Params

BANDS = ((0.5005, 1.0), (0.001, 0.5005))


@pytest.fixture(scope="module")
def finished(tiny: Any, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.Result]:
    """A run of two bands, trained right to left with a head that lives on."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(
        model__architecture__n_stacks=2,
        model__attention="bidirectional",
        objective__name="diffusion",
        objective__time="depth",
        training__progressive__direction="right_to_left",
        optimizer__learning_rate=1e-2,
        generation__tokens=6,
        generation__prompt="word ",
        generation__samples=2,
    )
    return folder, loop.run(config, tiny_corpus, folder, say=lambda _: None)


@pytest.fixture(scope="module")
def folder(finished: tuple[Path, loop.Result]) -> Path:
    return finished[0]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    return load_trained(folder)


def told(program: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    run_command(program.main, program.make_options(), "", ["program", *arguments])
    return capsys.readouterr().out


def with_objective(trained: Trained, **changes: Any) -> Trained:
    objective = dataclasses.replace(trained.config.objective, **changes)
    return dataclasses.replace(trained, config=dataclasses.replace(trained.config, objective=objective))


# --- measuring ---

Reading = tuple[list[Params], Params]
"""The stacks that read, and the head."""


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model: ModelConfig, embedding: Params, reading: Reading, shown: jax.Array, batch: Batch) -> jax.Array:
    stacks, head = reading
    context = row_context(model, jnp.asarray(batch.segments), jnp.asarray(batch.positions))
    x = apply_embedding(embedding, shown, context.positions, model, dtype=jnp.float32)
    for stack in stacks:
        x = apply_stack(stack, x, context, model, dtype=jnp.float32)
    return rack_logits({"embedding": embedding, "head": head}, x, model)


@pytest.fixture
def short_texts(tmp_path: Path) -> str:
    """Documents of which several share a row."""
    for number, text in enumerate(
        ["the word in it", "of and to he was that they", "all", "for this is his or one"] * 3
    ):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    return f"{tmp_path}/*.txt"


def left_to_right(trained: Trained, source: str, heavy: Reading, light: Reading) -> float:
    """Nats a token of eight rows, place by place; `heavy` reads while more than half of a row is masked."""
    data = trained.config.data
    (batch,) = evaluate.source_batches(source, trained.tokenizer, data, batch_size=8, rows=8)
    eligible = (batch.segments > 0) & ~np.isin(batch.tokens, list(trained.tokenizer.special_ids))
    assert len(set(eligible.sum(1).tolist())) > 1  # rows come to their lighter band in different turns
    assert (batch.segments.max(1) > 1).any()  # and documents share a row
    nats = 0.0
    for turn in range(eligible.sum(1).max()):
        masked = eligible & (np.cumsum(eligible, axis=1) > turn)
        shown = jnp.asarray(np.where(masked, trained.tokenizer.mask_id, batch.tokens))
        logits = [
            np.asarray(logits_of(trained.model, trained.rack["embedding"], reading, shown, batch), np.float64)
            for reading in (heavy, light)
        ]
        for row in np.flatnonzero(masked.any(1)):
            own = logits[0 if masked[row].sum() / eligible[row].sum() > BANDS[0][0] else 1][row]
            place = int(np.argmax(masked[row]))
            nats += np.log(np.exp(own[place]).sum()) - own[place, batch.tokens[row, place]]
    return nats / eligible.sum()


def test_each_place_is_predicted_by_its_band_in_its_own_document(trained: Trained, short_texts: str):
    """The suffix of the band that holds the share, through the head that its phase ended with, on packed rows."""
    tap, (first, second), head = trained.tap(1), trained.rack["stacks"], trained.rack["head"]
    assert tap is not None
    found = evaluate.evaluate(trained, source=short_texts, rows=8, order="left_to_right")
    assert set(found) == {"loss", "standard_error", "perplexity", "bits_per_byte", "bits_per_byte_error", "tokens"}
    whole = ([first, second], head)
    assert found["loss"] == pytest.approx(left_to_right(trained, short_texts, whole, ([second], tap)), rel=1e-5)
    for wrong in (whole, ([second], head), ([first, second], tap)):
        assert found["loss"] != pytest.approx(left_to_right(trained, short_texts, whole, wrong), rel=1e-5)
    local = evaluate.evaluate(trained, source=short_texts, rows=8, order="left_to_right", form="step_local")
    assert local["loss"] != pytest.approx(found["loss"], rel=1e-5)


def test_a_bound_is_the_sum_of_its_bands(trained: Trained, folder: Path, capsys: pytest.CaptureFixture[str]):
    found = evaluate.evaluate(trained, source=None, rows=16, draws=2)
    assert found["loss"] == pytest.approx(sum(band["loss"] for band in found["bands"]), rel=1e-6)
    assert [(band["low"], band["high"]) for band in found["bands"]] == list(BANDS)
    assert found["perplexity_bound"] == pytest.approx(np.exp(found["loss"]))
    assert 0 < found["bits_per_byte_error"] < 0.1 * found["bits_per_byte"]
    # Every place costs about as much wherever it is masked: the model has hardly learned yet.
    exact = evaluate.evaluate(trained, source=None, rows=16, order="random")
    assert found["tokens"] == exact["tokens"]
    assert found["loss"] == pytest.approx(exact["loss"], rel=0.05)
    printed = told(evaluate, capsys, f"--workdir={folder}", "--rows=16", "--draws=2")
    assert f"{found['bits_per_byte']:.4f}" in printed
    table = printed.split("masked fraction")[1].splitlines()
    assert table[0].split() == ["loss", "masked", "cross-entropy", "standard", "error"]
    heavy = found["bands"][0]
    figures = (heavy["loss"], heavy["masked_cross_entropy"], heavy["standard_error"])
    assert table[1].split() == ["0.5005", "to", "1", *(f"{figure:.4f}" for figure in figures)]


def test_levels_and_short_ranges_have_masked_cross_entropy_alone(trained: Trained):
    levels = with_objective(trained, levels="0.9,0.15")
    found = evaluate.evaluate(levels, source=None, rows=4, draws=2)
    assert set(found) == {"tokens", "bands"}
    assert [band["low"] for band in found["bands"]] == [0.9, 0.15]
    assert all("loss" not in band and band["masked_cross_entropy"] > 0 for band in found["bands"])
    short = with_objective(trained, time="none", rate_min=0.15, rate_max=1.0)
    figures = evaluate.evaluate(short, source=None, rows=4, draws=2)
    assert set(figures) == {"masked_cross_entropy", "standard_error", "tokens"}
    for text in (evaluate.describe(found), evaluate.describe(figures)):
        assert "masked cross" in text.replace("-", " ").replace("_", " ")
        assert "perplexity" not in text
        assert "bits" not in text
    for run, rates in ((levels, "0.9, 0.15"), (short, "0.15 to 1")):
        with pytest.raises(UserError, match=f"a likelihood takes all masked fractions.*trained at {rates};"):
            evaluate.evaluate(run, source=None, rows=4, order="random")


def test_a_mixture_is_measured_by_one_of_its_objectives(trained: Trained):
    mixed = with_objective(trained, time="none", name="mixed", mixture="clm@0.5; diffusion@0.5", shift=True)
    own = evaluate.evaluate(mixed, source=None, rows=4)
    assert own == evaluate.evaluate(mixed, source=None, rows=4, objective="clm")
    assert own["perplexity"] == pytest.approx(np.exp(own["loss"]))
    bound = evaluate.evaluate(mixed, source=None, rows=4, objective="diffusion", draws=2)
    alone = with_objective(trained, time="none", shift=True)
    assert bound == pytest.approx(evaluate.evaluate(alone, source=None, rows=4, draws=2))
    with pytest.raises(UserError, match="--objective=mlm: the run was trained on clm, diffusion"):
        evaluate.evaluate(mixed, source=None, rows=4, objective="mlm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "upwards"}, "--order=upwards must be one of: left_to_right, right_to_left, random, confidence"),
        ({"order": "random", "draws": 2}, "--draws=2 is for the bound of a diffusion run, not for --order=random"),
        ({"form": "prefix"}, "direction='right_to_left' can be run as: suffix, step_local"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str, trained: Trained):
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(trained, source=None, rows=4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random"}, "--order=random is for runs that unmask.*objective.name='clm'"),
        ({"draws": 2}, "--draws=2 is for the bound of a diffusion run, not for objective.name='clm'"),
        ({"form": "suffix"}, "--form=suffix is for runs whose time is depth, and this one has objective.time='none'"),
    ],
)
def test_a_causal_run_has_none_of_it(options: dict[str, Any], message: str, trained: Trained):
    causal = dataclasses.replace(trained, config=dataclasses.replace(trained.config, objective=ObjectiveConfig()))
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(causal, source=None, rows=4, **options)


# --- reading ---


def by_hand(trained: Trained, form: str) -> str:
    depth = Depth(BANDS, ((0,), (1,)), form, (None, trained.tap(1)))
    (sample,) = continue_texts(trained.rack, trained.config, trained.tokenizer, ["word "], seed=0, depth=depth).rows
    return sample.text + "\n"


def test_a_prompt_is_continued_band_by_band(trained: Trained, folder: Path, capsys: pytest.CaptureFixture[str]):
    printed = told(generate, capsys, f"--workdir={folder}")
    assert printed == by_hand(trained, "suffix")
    local = told(generate, capsys, f"--workdir={folder}", "--form=step_local")
    assert local == by_hand(trained, "step_local")
    whole = continue_texts(trained.rack, trained.config, trained.tokenizer, ["word "], seed=0)
    shifted = by_hand(with_objective(trained, shift=True), "suffix")
    assert len({printed, local, shifted, whole.rows[0].text + "\n"}) == 4
    filled = told(generate, capsys, f"--workdir={folder}", "--infill=the [MASK:3] of")
    assert filled.startswith("the ")
    assert filled.endswith(" of\n")


def test_samples_at_the_end_of_a_run_are_read_by_bands(
    finished: tuple[Path, loop.Result], trained: Trained, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Depth | None] = []
    real = report.continue_texts

    def spy(*args: Any, depth: Depth | None, **options: Any) -> Any:
        asked.append(depth)
        return real(*args, depth=depth, **options)

    monkeypatch.setattr(report, "continue_texts", spy)
    report.print_samples(trained.config, tiny_corpus, finished[1])
    (depth,) = asked
    assert depth is not None
    assert (depth.bands, depth.stacks, depth.form) == (BANDS, ((0,), (1,)), "suffix")
    assert depth.heads is not None
    assert depth.heads[0] is None
    for own, other in zip(jax.tree.leaves(depth.heads[1]), jax.tree.leaves(trained.tap(1)), strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--form=prefix"], "can be run as: suffix, step_local"),
        (["--sampler=blocks", "--block_length=2"], "objective.time='depth'); it can be read by: denoise"),
        (["--block_length=2"], "unmasks all places together, band by band"),
        (["--stacks=1"], "1 of 2 stacks are there, and a run whose time is depth is read band by band"),
        (["--steps=1"], "steps=1 is too few for 2 bands"),
    ],
)
def test_what_a_depth_run_cannot_do_is_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        told(generate, capsys, f"--workdir={folder}", *arguments)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
