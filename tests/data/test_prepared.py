"""A folder that was prepared elsewhere is opened by name: no source is read, and it must fit the config."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stackwise_jax.data import corpus as corpus_module
from stackwise_jax.data.corpus import prepare_corpus
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

MakeConfig = Callable[..., RunConfig]


def quiet(line: str) -> None:
    del line


@pytest.fixture
def folder(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A prepared corpus, moved; its source and its cache are gone."""
    config = make_config()
    moved = shutil.move(prepare_corpus(config, report=quiet).directory, tmp_path / "carried")
    shutil.rmtree(tmp_path / "cache")
    Path(config.data.source).unlink()
    return Path(moved)


def test_a_prepared_folder_needs_no_source(
    make_config: MakeConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(prepared=str(folder), max_rows=4)
    monkeypatch.setattr(corpus_module, "build_corpus", lambda *args: pytest.fail("prepared again"))
    corpus = prepare_corpus(config, report=lambda line: pytest.fail(line))
    assert (corpus.directory, corpus.train.n_rows) == (folder, 4)
    assert corpus.train.rows(np.arange(4), isolate_documents=True)[0].shape == (4, 32)
    assert not (tmp_path / "cache").exists()


def test_a_prepared_folder_that_does_not_fit_is_one_line(make_config: MakeConfig, folder: Path) -> None:
    refusals = {
        r"^data\.prepared='missing': missing is not a prepared corpus": {"prepared": "missing"},
        r"has rows of 32; set data\.seq_len=32$": {"prepared": str(folder), "seq_len": 16},
        r"^model\.vocab_size=319 must be at least the 320 pieces of data\.prepared=": {
            "prepared": str(folder),
            "vocab_size": 319,
        },
    }
    for message, fields in refusals.items():
        with pytest.raises(UserError, match=message):
            prepare_corpus(make_config(**fields), report=quiet)
    (folder / "train.tokens").write_bytes(b"")
    with pytest.raises(UserError, match=r"^data\.prepared=.*train\.tokens"):
        prepare_corpus(make_config(prepared=str(folder)), report=quiet)
