"""The program that prepares a corpus says what it prepared."""

from collections.abc import Callable

import pytest

from stackwise_jax import prepare
from stackwise_jax.data.corpus import prepare_corpus
from stackwise_jax.schema import RunConfig


def test_prepare_prints_the_numbers_of_the_corpus(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.main(make_config(max_rows=7))
    output = capsys.readouterr().out
    corpus = prepare_corpus(make_config(max_rows=7), report=lambda line: pytest.fail(line))
    assert str(corpus.directory) in output
    assert f"320 pieces, sha256 {corpus.tokenizer.digest[:16]}" in output
    assert "7 rows of 32 (224 tokens)" in output
    assert f"{corpus.validation.n_rows} rows of 32 ({32 * corpus.validation.n_rows:,} tokens)" in output
    assert f"{corpus.train.parts[0].text_bytes:,} bytes of text" in output


def test_prepare_says_how_often_a_mixture_repeats_its_sources(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_config().data.source
    corpus = prepare_corpus(make_config(), report=lambda line: None)
    n_rows = corpus.train.n_rows
    prepare.main(make_config(source=f"{source}@3; {source}@1", max_rows=4 * n_rows))
    output = capsys.readouterr().out
    assert f"train       {4 * n_rows:,} rows of 32" in output
    assert "source 1 (75.0 %): " in output
    assert output.count("drawn 3.0 times an epoch") == 1
    assert output.count("times an epoch") == 1
