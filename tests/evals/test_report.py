"""The report: baselines on the tokens that a model is scored on, a control at equal FLOPs, the same words twice."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise_jax import report
from stackwise_jax.data.corpus import Corpus
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


@pytest.mark.parametrize("isolate", [True, False])
def test_scored_tokens_are_those_that_training_measures(isolate: bool, tiny: Any, tiny_corpus: Corpus, tmp_path: Path):
    config = tiny(model__architecture__n_stacks=1, data__isolate_documents=isolate)
    inputs, targets, weights = report.scored_tokens(config, tiny_corpus)
    rows = np.asarray(tiny_corpus.validation.tokens[:16]).astype(int)
    np.testing.assert_array_equal(inputs.reshape(16, -1), rows)
    is_pair = np.ones((16, 31), bool) if not isolate else rows[:, 1:] != tiny_corpus.tokenizer.bos_id
    np.testing.assert_array_equal(weights.reshape(16, -1)[:, :-1], is_pair)
    np.testing.assert_array_equal(targets.reshape(16, -1)[:, :-1][is_pair], rows[:, 1:][is_pair])


def test_training_tokens_leave_out_padding_and_know_their_documents(tiny_corpus: Corpus):
    ids, starts = report.training_tokens(tiny_corpus.train, isolate_documents=True)
    assert len(ids) == tiny_corpus.train.documents[-1]
    assert set(np.asarray(ids)[starts].tolist()) == {tiny_corpus.tokenizer.bos_id}
    few, _ = report.training_tokens(tiny_corpus.train.first(3), isolate_documents=True)
    assert len(few) == 3 * 32
    assert report.training_tokens(tiny_corpus.train, isolate_documents=False)[1].tolist() == [0]


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


def test_a_masked_run_has_neither_bits_nor_samples(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny(
        model__architecture__n_stacks=1,
        objective__name="mlm",
        model__attention="bidirectional",
        evaluation__ngrams=True,
        generation__samples=2,
    )
    report.train_and_report(config, tmp_path / "run")
    told = capsys.readouterr().out
    told = told[told.index("held-out masked cross-entropy") :]
    assert "unigram" in told
    for absent in ("bits", "bigram", "sample", "generate", "perplexity"):
        assert absent not in told
