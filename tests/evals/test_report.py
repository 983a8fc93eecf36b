"""The report: baselines on the tokens that a model is scored on, a control at equal FLOPs, the same words twice."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise_jax import report
from stackwise_jax.data.corpus import Corpus, Split
from stackwise_jax.train import loop
from stackwise_jax.train.plan import make_plan


def test_the_control_is_one_block_at_equal_flops(tiny: Any):
    config = tiny(
        training__mode="layerwise", training__phase_budget="40 steps", model__ties_embedding=True, training__head="copy"
    )
    flops = make_plan(config, 64).flops
    control = report.control_config(config, flops)
    plan = make_plan(control, 64)
    assert (control.model.n_blocks, control.training.mode, len(plan.phases)) == (1, "end_to_end", 1)
    assert abs(plan.flops - flops) <= 0.5 * plan.step_flops[0]
    assert report.control_config(config, 1.0).training.phase_budget == "1 steps"


def naive_pairs(split: Split, n_rows: int, *, isolate: bool, bos: int) -> list[tuple[int, int]]:
    """Neighbours in the first rows; a document starts with bos and nowhere else is one."""
    tokens, segments, _ = split.rows(np.arange(n_rows), isolate_documents=isolate)
    return [
        (row[place], row[place + 1])
        for row, alive in zip(tokens.tolist(), (segments > 0).tolist(), strict=True)
        for place in range(len(row) - 1)
        if alive[place + 1] and not (isolate and row[place + 1] == bos)
    ]


@pytest.mark.parametrize("isolate", [True, False])
def test_baselines_count_and_score_what_the_model_does(isolate: bool, tiny: Any, tiny_corpus: Corpus):
    bos = tiny_corpus.tokenizer.bos_id
    inputs, targets, weights = report.scored_tokens(tiny(data__isolate_documents=isolate), tiny_corpus)
    scored = list(zip(inputs[weights > 0].tolist(), targets[weights > 0].tolist(), strict=True))
    assert scored == naive_pairs(tiny_corpus.validation, 16, isolate=isolate, bos=bos)
    train = tiny_corpus.train.first(200)
    counted = [
        pair
        for first, second in report.training_pairs(train, isolate_documents=isolate)
        for pair in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert counted == naive_pairs(train, 200, isolate=isolate, bos=bos)
    assert any(after == bos for _, after in counted) == (not isolate)


def test_training_pairs_come_in_pieces(tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    whole = [
        np.concatenate(side)
        for side in zip(*report.training_pairs(tiny_corpus.train, isolate_documents=True), strict=True)
    ]
    monkeypatch.setattr(report, "PIECE_ROWS", 7)
    pieces = list(report.training_pairs(tiny_corpus.train, isolate_documents=True))
    assert len(pieces) == -(-tiny_corpus.train.n_rows // 7)
    for side, expected in zip(zip(*pieces, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(side), expected)


def test_the_report_says_the_same_again_without_training(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    config = tiny(
        model__architecture__n_stacks=2,
        evaluation__ngrams=True,
        evaluation__one_block_control=True,
        generation__samples=2,
        generation__tokens=6,
        generation__prompt="the ",
    )
    folder = tmp_path / "a run"
    report.train_and_report(config, folder)
    first = capsys.readouterr().out

    def refuse(*_: Any) -> None:
        raise AssertionError("a finished run trains again")

    monkeypatch.setattr(loop.Run, "_train", refuse)
    report.train_and_report(config, folder)
    second = capsys.readouterr().out
    assert first[first.index("held-out") :] == second[second.index("held-out ") :]

    told = first[first.index("held-out") :]
    for name in ("embedding", "stack_0000", "stack_0001", "unigram", "bigram, add", "control: one block"):
        assert re.search(rf"^{name}.* \d+\.\d{{4}} +\d+\.\d{{4}}$", told, re.MULTILINE), name
    assert told.count("--- sample") == 2
    assert f"--workdir='{folder}'" in told
    assert told.rstrip().endswith(str(folder))
    assert (folder / report.CONTROL_FOLDER / "config.json").exists()


def test_a_masked_run_has_samples_but_no_bits(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny(
        model__architecture__n_stacks=1,
        objective__name="mlm",
        model__attention="bidirectional",
        evaluation__ngrams=True,
        generation__samples=2,
        generation__tokens=5,
        generation__steps=2,
    )
    report.train_and_report(config, tmp_path / "run")
    told = capsys.readouterr().out
    told = told[told.index("held-out masked cross-entropy") :]
    assert "unigram" in told
    assert told.count("--- sample") == 2
    assert re.search(r"^2 samples: distinct-2 \d\.\d{3}, entropy \d\.\d{3} nats, 2 network evaluations$", told, re.M)
    for absent in ("bits", "bigram", "perplexity"):
        assert absent not in told
