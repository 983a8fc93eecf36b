"""Measuring a run folder gives the numbers that training recorded; other text is packed as a corpus is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise_jax import evaluate as program
from stackwise_jax.command import run_command
from stackwise_jax.data.corpus import Corpus, prepare_corpus
from stackwise_jax.data.pipeline import validation_batches
from stackwise_jax.errors import UserError
from stackwise_jax.train import loop
from stackwise_jax.train.trained import load_trained

RUNS = {
    "causal": {"model__architecture__n_stacks": 2},
    "causal, tied": {"model__architecture__n_stacks": 2, "model__ties_embedding": True, "training__head": "copy"},
    "causal, end to end": {"model__architecture__n_stacks": 2, "training__mode": "end_to_end"},
    "masked": {
        "model__architecture__n_stacks": 2,
        "objective__name": "mlm",
        "objective__rate_max": 0.5,
        "model__attention": "bidirectional",
    },
}


def recorded(folder: Path) -> dict[str, float]:
    """The last held-out loss of every phase in metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["phase"]: line["loss"] for line in lines if line["kind"] == "held_out"}


@pytest.fixture(scope="module")
def folder(tiny: Any, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished causal run."""
    path = tmp_path_factory.mktemp("runs") / "run"
    loop.run(tiny(**RUNS["causal"]), tiny_corpus, path, say=lambda _: None)
    return path


@pytest.mark.parametrize("name", RUNS)
def test_held_out_loss_is_the_recorded_one(name: str, tiny: Any, tiny_corpus: Corpus, tmp_path: Path):
    loop.run(tiny(**RUNS[name]), tiny_corpus, tmp_path / "run", say=lambda _: None)
    result = program.evaluate(load_trained(tmp_path / "run"), source=None, rows=None)
    last = list(recorded(tmp_path / "run").values())[-1]
    assert result["masked_cross_entropy" if name == "masked" else "loss"] == pytest.approx(last, rel=1e-5)
    assert ("perplexity" in result) == (name != "masked")


def test_bits_per_byte_are_the_recorded_ones(folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "held_out"]
    result = program.evaluate(load_trained(folder), source=None, rows=None)
    assert result["bits_per_byte"] == pytest.approx(lines[-1]["bits_per_byte"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(lines[-1]["loss"]), rel=1e-5)


def test_the_first_stacks_score_what_their_phase_recorded(folder: Path):
    first = program.evaluate(load_trained(folder, n_stacks=1), source=None, rows=None)["loss"]
    assert first == pytest.approx(recorded(folder)["stack_0000"], rel=1e-5)
    # With the last head instead of the one that was tapped after stack 0, the numbers differ.
    whole = load_trained(folder, merged=False)
    cut = dataclasses.replace(whole, rack={**whole.rack, "stacks": whole.rack["stacks"][:1]})
    assert program.evaluate(cut, source=None, rows=None)["loss"] != pytest.approx(first, rel=1e-5)


def test_the_embedding_may_be_handed_to_any_stack(folder: Path):
    whole = load_trained(folder, merged=False)
    for entry in (0, 1):
        read = load_trained(folder, entry=entry)
        by_hand = dataclasses.replace(whole, rack={**whole.rack, "stacks": whole.rack["stacks"][entry:]})
        losses = [program.evaluate(own, source=None, rows=8)["loss"] for own in (read, by_hand, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert (losses[0] == pytest.approx(losses[2], rel=1e-6)) == (entry == 0)
    with pytest.raises(UserError, match=r"--entry=7: of .* stacks 0 to \d are read; give one of these"):
        load_trained(folder, entry=7)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_source_is_packed_as_a_corpus_is(isolate: bool, batch_size: int, tiny: Any, tiny_text: Path):
    source = f"{tiny_text}/0*.txt"
    config = tiny(data__validation_source=source, data__source=f"{tiny_text}/[123]*.txt")
    data = dataclasses.replace(config.data, isolate_documents=isolate)
    corpus = prepare_corpus(config, report=lambda _: None)
    n_rows = corpus.validation.n_rows
    in_order = dataclasses.replace(corpus.validation, seed=None)
    whole = list(validation_batches(in_order, batch_size=1, rows=n_rows, isolate_documents=isolate))
    for rows in (None, 1, 4, 5, n_rows + 7):
        wanted = whole if rows is None else whole[:rows]
        batches = list(program.source_batches(source, corpus.tokenizer, data, batch_size=batch_size, rows=rows))
        assert len(batches) == -(-len(wanted) // batch_size)
        for name in ("tokens", "segments", "positions", "row_ids"):
            ours = np.concatenate([getattr(batch, name) for batch in batches])
            expected = np.concatenate([getattr(batch, name) for batch in wanted])
            np.testing.assert_array_equal(ours[: len(wanted)], expected)
            if name == "segments":
                assert not ours[len(wanted) :].any()


def test_a_source_of_the_held_out_text_scores_the_same(tiny: Any, tiny_text: Path, tmp_path: Path):
    source = f"{tiny_text}/0*.txt"
    overrides = {"data__validation_source": source, "data__source": f"{tiny_text}/[123]*.txt", "evaluation__rows": 999}
    config = tiny(**RUNS["causal"], **overrides)
    loop.run(config, prepare_corpus(config, report=lambda _: None), tmp_path / "run", say=lambda _: None)
    trained = load_trained(tmp_path / "run")
    one_by_one = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=1))
    own = program.evaluate(dataclasses.replace(trained, config=one_by_one), source=None, rows=None)  # no row left out
    assert program.evaluate(trained, source=source, rows=None) == pytest.approx(own, rel=1e-5)
    assert program.evaluate(trained, source=f"{tiny_text}/1*.txt", rows=None) != pytest.approx(own, rel=1e-5)


def test_the_command_prints_a_table_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(folder.rglob("*"))
    run_command(program.main, program.make_options(), "", ["evaluate", f"--workdir={folder}"])
    printed = capsys.readouterr().out
    assert f"{recorded(folder)['stack_0001']:.4f}" in printed
    assert "2 stack(s)" in printed
    assert sorted(folder.rglob("*")) == before


def test_changed_text_is_refused(folder: Path, tiny_text: Path, tmp_path: Path):
    trained = load_trained(folder)
    (tmp_path / "other.txt").write_text("quite another text " * 300)
    (tmp_path / "more.txt").write_text("and one more document " * 300)
    data = dataclasses.replace(trained.config.data, source=f"{tmp_path}/*.txt", validation_fraction=0.5)
    other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=data))
    with pytest.raises(UserError, match="--source"):
        program.evaluate(other, source=None, rows=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=/no/such/folder"], "is not a run folder"),
        (["--workdir=RUN", "--source=/no/such/*.txt"], "matches no file"),
        (["--workdir=RUN", "--rows=0"], "rows"),
        (["--workdir=RUN", "--stacks=9"], "--stacks=9"),
        (["--workdir=RUN", "extra"], "unexpected argument 'extra'"),
        (["--wrkdir=RUN"], "Did you mean: workdir"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["evaluate", *(argument.replace("RUN", str(folder)) for argument in arguments)]
    with pytest.raises(SystemExit) as stop:
        run_command(program.main, program.make_options(), "", argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
