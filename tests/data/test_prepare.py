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
