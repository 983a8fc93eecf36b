"""`bench memory` at tiny size: its pairs, its corpus, and the compiler's count where there is no device to measure."""

import re
from typing import Any

import numpy as np
import pytest
from absl import flags

from stackwise_jax.bench import memory, memory_row
from stackwise_jax.errors import UserError

TINY = ["model.d_model=64", "model.n_heads=2", "model.d_ff=128", "model.vocab_size=512", "data.seq_len=64"]
TINY += ["training.batch_size=4", "precision.compute=fp32", "precision.cache=fp32", "precision.trunk=fp32"]


def options_of(*arguments: str) -> Any:
    options = memory.make_options()
    options(["memory", *arguments])
    return options


def test_pairs_are_many_and_differ() -> None:
    configs = [memory.make_config(name, []) for name in memory.PAIRS]
    assert len(set(configs)) == len(configs) >= 12
    wide = memory.make_config("block_70b", [])
    assert (wide.model.d_model, wide.data.seq_len, wide.model.n_blocks) == (8192, 4096, 2)


def test_train_steps_are_near_the_compilers_count(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [*TINY, "model.architecture.n_stacks=1"]
    memory.main(options_of("--compiled", "--pairs=stackwise_device_cache", *(f"--set={own}" for own in changes)))
    text = capsys.readouterr().out
    errors = [float(error) for error in re.findall(r"([+-]\d+\.\d)%  \w+$", text, re.MULTILINE)]
    assert len(errors) == 2  # a step of phase 0 and one of the stack
    assert all(abs(error) < 20 for error in errors)
    assert text.splitlines()[-1].startswith("median ")


def test_the_errors_of_a_plan_are_relative_to_what_was_measured() -> None:
    rows = [memory.Row("a", 110, 100, "p"), memory.Row("b", 98, 100, "p"), memory.Row("c", 100, 100, "p")]
    assert memory.summary(rows) == "median 2.0%, from -2.0% to +10.0%, 3 comparisons"
    assert memory.line(rows[0]).split() == ["a", "110", "B", "100", "B", "+10.0%", "p"]


def test_random_rows_are_a_corpus() -> None:
    config = memory.make_config("documents_dropout", TINY)
    corpus = memory_row.random_corpus(config)
    assert (corpus.train.n_rows, corpus.validation.n_rows) == (32, 4)
    batch = corpus.train.batch(np.arange(4), 0, isolate_documents=True)
    assert batch.tokens.shape == (4, 64)
    assert batch.tokens.max() < corpus.tokenizer.vocab_size
    assert batch.segments.max() > 1
    assert (batch.segments > 0).all()


def test_a_device_without_memory_of_its_own_is_not_measured(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="no memory of its own to measure; --compiled compares"):
        memory_row.run_row(memory.make_config("end_to_end", TINY), tmp_path / "run")
    with pytest.raises(UserError, match=r'--pairs=qlor must be among: all, .*Did you mean "qlora"'):
        memory.main(options_of("--pairs=qlor"))
    assert isinstance(memory.make_options(), flags.FlagValues)
