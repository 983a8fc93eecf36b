"""Mixtures: every source keeps its own rows, rows follow the weights, both splits hold all sources."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stackwise_jax.data import build
from stackwise_jax.data.corpus import Corpus, open_corpus, prepare_corpus
from stackwise_jax.data.split import Split
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig
from tests.data.conftest import write_jsonl

MakeConfig = Callable[..., RunConfig]
WORDS = {"a": ("xy", "yyx", "xxxy"), "b": ("pq", "qqp", "pppq")}


def quiet(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources without a letter in common; the second has three times the text."""
    folder = tmp_path_factory.mktemp("sources")
    for name, n_documents in (("a", 40), ("b", 120)):
        rng = np.random.default_rng(n_documents)
        texts = [" ".join(rng.choice(WORDS[name], 60)) for _ in range(n_documents)]
        write_jsonl(folder / f"{name}.jsonl", texts)
    return folder


@pytest.fixture
def prepared(make_config: MakeConfig, folder: Path) -> Callable[..., Corpus]:
    def prepare(mixture: str, **fields: object) -> Corpus:
        mixture = mixture.replace("A", f"{folder}/a.jsonl").replace("B", f"{folder}/b.jsonl")
        return prepare_corpus(make_config(source=mixture, vocab_size=274, **fields), report=quiet)

    return prepare


def sources_of(corpus: Corpus, split: Split, n_rows: int | None = None, order: str = "ab") -> str:
    """For every row, in their order, the source that it comes from; its letters must be that source's."""
    row_ids = np.arange(n_rows or split.n_rows)
    first_rows = [part.first_row for part in split.parts]
    names = [order[i] for i in np.searchsorted(first_rows, split.places(row_ids), side="right") - 1]
    tokens, _, _ = split.rows(row_ids, isolate_documents=True)
    for name, row in zip(names, tokens, strict=True):
        assert set(corpus.tokenizer.decode(row)) <= {*"".join(WORDS[name]), " "}
    return "".join(names)


def test_rows_follow_the_weights_from_the_first_on(prepared: Callable[..., Corpus]) -> None:
    corpus = prepared("A@0.5; B@0.5")
    for split in (corpus.train, corpus.validation):
        names = sources_of(corpus, split)
        assert all(names[i] != names[i + 1] for i in range(len(names) - 1))
        assert [part.weight for part in split.parts] == [2**29, 2**29]
    assert 0 <= 2 * corpus.train.parts[0].n_rows - corpus.train.n_rows <= 1  # it ends with the smaller source
    quarter = prepared("A@1; B@3")
    names = sources_of(quarter, quarter.train)
    assert names.count("a") == round(len(names) / 4)


def test_without_weights_sources_are_mixed_by_their_size(prepared: Callable[..., Corpus]) -> None:
    corpus, plain = prepared("A; B"), prepared("A, B")
    names = sources_of(corpus, corpus.train)
    assert corpus.train.n_rows == sum(part.n_rows for part in corpus.train.parts)
    for begin in range(0, len(names) - 40, 13):
        share = corpus.train.parts[1].n_rows / corpus.train.n_rows
        assert names[begin : begin + 40].count("b") == pytest.approx(40 * share, abs=2)
    assert len(plain.train.parts) == 1
    assert plain.digest != corpus.digest
    assert corpus.train.first(10**6).n_rows == corpus.train.n_rows


def test_a_larger_bound_repeats_the_source_that_has_ended(prepared: Callable[..., Corpus]) -> None:
    whole, corpus = prepared("A@0.5; B@0.5"), prepared("A@0.5; B@0.5", max_rows=100_000)
    assert corpus.train.n_rows == 100_000 > whole.train.n_rows
    assert corpus.digest == whole.digest
    n_rows = whole.train.n_rows
    ids = np.arange(3 * n_rows)
    np.testing.assert_array_equal(
        whole.train.rows(ids[:n_rows], isolate_documents=True), corpus.train.rows(ids[:n_rows], isolate_documents=True)
    )
    assert sources_of(corpus, corpus.train, 3 * n_rows).count("a") == pytest.approx(1.5 * n_rows, abs=1)
    assert prepared("A@0.5; B@0.5", max_rows=7).train.n_rows == 7


def test_weights_and_sources_name_the_corpus(prepared: Callable[..., Corpus]) -> None:
    mixtures = ["A@1; B@2", "A@1; B@3", "A; B", "B; A", "A@1", "A"]
    corpora = [prepared(mixture) for mixture in mixtures]
    assert len({corpus.directory for corpus in corpora}) == len({corpus.digest for corpus in corpora}) == len(mixtures)
    assert len({corpus.train.digest for corpus in corpora}) == len(mixtures)
    reopened = open_corpus(corpora[0].directory, check_all=True)
    assert (reopened.digest, reopened.train.digest) == (corpora[0].digest, corpora[0].train.digest)


def test_the_tokenizer_sees_the_sources_in_their_shares(
    make_config: MakeConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "TRAINING_BYTES", 4000)

    def seen(mixture: str) -> list[int]:
        texts = list(build._tokenizer_documents(make_config(source=mixture).data))
        by_source = [sum(len(t) for t in texts if any(word in t for word in WORDS[name])) for name in "ab"]
        assert sum(by_source) == sum(map(len, texts))
        return by_source

    assert seen(f"{folder}/a.jsonl@3; {folder}/b.jsonl@1") == [3000, 1000]
    assert seen(f"{folder}/a.jsonl; {folder}/b.jsonl") == [pytest.approx(1000, abs=100), pytest.approx(3000, abs=100)]
    assert seen(f"{folder}/a.jsonl") == [4000, 0]


def test_a_validation_source_may_be_a_mixture_too(prepared: Callable[..., Corpus], folder: Path) -> None:
    held_out = f"{folder}/b.jsonl@1; {folder}/a.jsonl@1"
    corpus = prepared("B", validation_source=held_out)
    assert len(corpus.train.parts) == 1
    assert corpus.train.parts[0].n_documents == 120
    assert set(sources_of(corpus, corpus.train, order="b")) == {"b"}
    assert sources_of(corpus, corpus.validation, 10, order="ba") in ("ab" * 5, "ba" * 5)


def test_every_source_must_fill_both_splits(prepared: Callable[..., Corpus], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("xy")
    with pytest.raises(UserError, match=r"^data\.source='.*one\.txt' is one document, which cannot be split"):
        prepared(f"B@1; {tmp_path}/one.txt@1")
    with pytest.raises(UserError, match=r"leaves none for validation of data\.source='.*a\.jsonl'"):
        prepared("A; B", validation_fraction=1e-9)
