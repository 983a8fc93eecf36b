"""The prepared corpus: documents stay on one side, folders are whole or made again, nothing damaged is used."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stackwise_jax import prepare
from stackwise_jax.data import blocks, build
from stackwise_jax.data import corpus as corpus_module
from stackwise_jax.data.blocks import CheckedRows
from stackwise_jax.data.build import SPLITS
from stackwise_jax.data.corpus import Corpus, open_corpus, prepare_corpus
from stackwise_jax.data.sources import iterate_documents
from stackwise_jax.data.split import Split
from stackwise_jax.data.tokenizer import Tokenizer, train_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

FILES = ("corpus.json", "tokenizer.model", *(f"{name}.{kind}" for name in SPLITS for kind in ("tokens", "digests")))
MakeConfig = Callable[..., RunConfig]


def quiet(line: str) -> None:
    del line


def flat_tokens(split: Split) -> np.ndarray:
    return split.tokens[np.arange(split.tokens.shape[0])].reshape(-1)


def texts_of(split: Split, tokenizer: Tokenizer) -> list[str]:
    flat = flat_tokens(split)
    pieces = np.split(
        flat[flat != tokenizer.pad_id], np.flatnonzero(flat[flat != tokenizer.pad_id] == tokenizer.bos_id)
    )
    assert not pieces[0].size
    assert all(piece[0] == tokenizer.bos_id and piece[-1] == tokenizer.eos_id for piece in pieces[1:])
    return [tokenizer.decode(piece) for piece in pieces[1:]]


def test_the_files_hold_every_document_once(corpus: Corpus, documents: list[str]) -> None:
    train, validation = (texts_of(split, corpus.tokenizer) for split in (corpus.train, corpus.validation))
    assert sorted(train + validation) == sorted(documents)
    assert train == [text for text in documents if text in set(train)]  # in their order
    assert 0.05 < len(validation) / len(documents) < 0.4
    for split in (corpus.train, corpus.validation):
        flat, (part,) = flat_tokens(split), split.parts
        assert (flat[part.n_tokens :] == corpus.tokenizer.pad_id).all()
        assert 0 <= flat.size - part.n_tokens < corpus.seq_len == 32
        assert corpus.tokenizer.piece_bytes[flat].sum() == part.text_bytes
        assert part.n_documents == len(texts_of(split, corpus.tokenizer))
        assert part.n_rows == split.n_rows == split.tokens.shape[0]
        assert flat.dtype == np.uint16
    assert build._token_dtype(2**16) == "<u2"
    assert build._token_dtype(2**16 + 1) == "<u4"


def test_no_document_is_on_both_sides(make_config: MakeConfig, documents: list[str], tmp_path: Path) -> None:
    config = make_config()
    path = Path(config.data.source)
    path.write_bytes(path.read_bytes() * 2)  # every document twice
    corpus = prepare_corpus(config, report=quiet)
    train, validation = (texts_of(split, corpus.tokenizer) for split in (corpus.train, corpus.validation))
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 2 * len(documents)


def test_no_document_on_both_sides_detects_a_split_by_number(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    path = Path(config.data.source)
    path.write_bytes(path.read_bytes() * 2)
    numbers = iter(range(10**6))
    monkeypatch.setattr(build, "_is_held_out", lambda document, fraction: next(numbers) % 7 == 0)
    corpus = prepare_corpus(config, report=quiet)
    train, validation = (texts_of(split, corpus.tokenizer) for split in (corpus.train, corpus.validation))
    assert set(train) & set(validation)


def test_a_second_run_opens_what_is_there(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    first = prepare_corpus(make_config(), report=lines.append)
    assert lines == [f"training a tokenizer of {first.tokenizer.vocab_size} pieces"]
    monkeypatch.setattr(corpus_module, "build_corpus", lambda *args: pytest.fail("prepared again"))
    second = prepare_corpus(make_config(), report=lines.append)
    assert len(lines) == 1
    assert (second.digest, second.directory) == (first.digest, first.directory)
    assert open_corpus(first.directory).digest == first.digest


def test_preparing_elsewhere_gives_the_same_bytes(make_config: MakeConfig, tmp_path: Path) -> None:
    first = prepare_corpus(make_config(), report=quiet)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(make_config().data.source).read_bytes())
    config = make_config(source=str(moved), cache_dir=str(tmp_path / "other"))
    second = prepare_corpus(config, report=quiet)
    assert second.directory.name == first.directory.name
    assert {path.name for path in first.directory.iterdir()} == set(FILES)
    for name in FILES:
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()


def test_what_tokens_depend_on_names_the_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("return self")
    base = prepare_corpus(make_config(), report=quiet)
    model = str(base.directory / "tokenizer.model")
    changes = [
        {}, {"seq_len": 16}, {"validation_fraction": 0.3}, {"max_bytes": 3000}, {"vocab_size": 310},
        {"tokenizer": model}, {"validation_source": str(tmp_path / "held_out.txt")},
    ]  # fmt: skip
    corpora = [prepare_corpus(make_config(**change), report=quiet) for change in changes]
    assert len({corpus.directory for corpus in corpora}) == len(changes)
    assert (
        len({corpus.digest for corpus in corpora}) == len(changes) - 1
    )  # the same tokenizer, from a file, same tokens
    assert prepare_corpus(make_config(max_rows=3), report=quiet).directory == base.directory
    assert texts_of(corpora[-1].validation, corpora[-1].tokenizer) == ["return self"]
    assert corpora[-1].train.parts[0].n_documents == 60


def test_changed_text_is_another_corpus(make_config: MakeConfig) -> None:
    first = prepare_corpus(make_config(), report=quiet)
    path = Path(make_config().data.source)
    path.write_text(path.read_text().replace("return", "retune", 1))
    assert prepare_corpus(make_config(), report=quiet).directory != first.directory


def test_max_rows_bounds_training_rows_only(make_config: MakeConfig) -> None:
    whole = prepare_corpus(make_config(), report=quiet)
    bounded = prepare_corpus(make_config(max_rows=5), report=quiet)
    assert bounded.train.n_rows == 5 < whole.train.n_rows
    assert bounded.validation.n_rows == whole.validation.n_rows
    assert (bounded.digest, bounded.train.digest) == (whole.digest, whole.train.digest)
    rows = [split.rows(np.arange(5), isolate_documents=True) for split in (whole.train, bounded.train)]
    np.testing.assert_array_equal(rows[0], rows[1])


def test_an_interrupted_preparation_is_harmless(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    root = Path(make_config().data.cache_dir) / "corpora"
    with monkeypatch.context() as patch:
        patch.setattr(build, "_tokenise", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(make_config(), report=quiet)
    assert list(root.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from stackwise_jax.data import build
with build._scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "train.tokens").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_preparation_left_is_removed_and_what_a_living_one_writes_is_not(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    root = tmp_path / "cache" / "corpora"
    root.mkdir(parents=True)
    command = [sys.executable, "-c", KILLED, str(root / "other")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        with pytest.raises(UserError, match=r"is not a prepared corpus: corpus\.json is missing"):
            open_corpus(folder)
        prepare_corpus(make_config(), report=quiet)
        assert (folder / "train.tokens").read_bytes() == b"half"
        process.kill()
    corpus = prepare_corpus(make_config(seq_len=16), report=quiet)
    assert not folder.exists()
    assert corpus.directory in root.iterdir()


def test_a_faster_process_wins(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference = prepare_corpus(make_config(cache_dir=str(tmp_path / "other")), report=quiet)
    tokenise = build._tokenise

    def with_a_rival(*args: object) -> None:
        tokenise(*args)  # pyright: ignore[reportArgumentType]
        with monkeypatch.context() as patch:
            patch.setattr(build, "_tokenise", tokenise)
            prepare_corpus(make_config(), report=quiet)

    monkeypatch.setattr(build, "_tokenise", with_a_rival)
    corpus = prepare_corpus(make_config(), report=quiet)
    assert corpus.digest == reference.digest
    assert [path.name for path in corpus.directory.parent.iterdir()] == [corpus.directory.name]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_folder_is_prepared_again(make_config: MakeConfig, name: str, damage: str) -> None:
    corpus = prepare_corpus(make_config(), report=quiet)
    path = corpus.directory / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:20] + bytes([content[20] ^ 64]) + content[21:])
    with pytest.raises(UserError, match=corpus.directory.name):
        open_corpus(corpus.directory, check_all=True)
    lines: list[str] = []
    again = prepare_corpus(make_config(), report=lines.append, check_all=True)
    assert lines[0].startswith("preparing the corpus again: ")
    assert path.read_bytes() == content
    assert again.digest == corpus.digest


def test_opening_reads_no_tokens_and_a_batch_reads_its_own_blocks(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)  # four rows
    config = make_config()
    prepare_corpus(config, report=quiet)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, n, begin: (read.append(n), pread(file, n, begin))[1])
    train = prepare_corpus(config, report=lambda line: pytest.fail(line)).train
    assert read == []
    assert isinstance(train.tokens, CheckedRows)
    train.rows(np.array([3, 0]), isolate_documents=True)
    assert train.tokens.checked_blocks <= 2 < train.n_rows // 4
    assert read == [256] * train.tokens.checked_blocks + [64, 64]


def test_damaged_tokens_are_never_trained_on(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    path = prepare_corpus(config, report=quiet).directory / "train.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:1000] + b"?" + content[1001:])
    corpus = prepare_corpus(config, report=lambda line: pytest.fail(line))
    with pytest.raises(
        UserError, match=rf"^{path} is damaged in its bytes from 0 on; `python -m stackwise_jax\.prepare`"
    ):
        corpus.train.rows(np.array([2]), isolate_documents=True)
    prepare.main(config)
    assert "preparing the corpus again" in capsys.readouterr().out
    assert path.read_bytes() == content


def test_a_folder_of_another_format_is_prepared_again(make_config: MakeConfig) -> None:
    corpus = prepare_corpus(make_config(), report=quiet)
    path = corpus.directory / "corpus.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 99'))
    lines: list[str] = []
    prepare_corpus(make_config(), report=lines.append)
    assert "has format 99, not 2" in lines[0]


def test_errors_name_the_field(make_config: MakeConfig, tmp_path: Path, documents: list[str]) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(train_tokenizer(documents, 310))
    assert prepare_corpus(make_config(tokenizer=str(model)), report=quiet).tokenizer.vocab_size == 310
    with pytest.raises(UserError, match=r"^model\.vocab_size=309 must be at least the 310 pieces of data\.tokenizer="):
        prepare_corpus(make_config(tokenizer=str(model), vocab_size=309), report=quiet)
    with pytest.raises(
        UserError, match=r"^data\.validation_fraction=1e-09 of 60 document\(s\) leaves none for validation"
    ):
        prepare_corpus(make_config(validation_fraction=1e-9), report=quiet)
    with pytest.raises(UserError, match=r"^data\.validation_fraction=1 of 60 document\(s\) leaves none for train"):
        prepare_corpus(make_config(tokenizer=str(model), validation_fraction=1.0), report=quiet)
    with pytest.raises(UserError, match=r"^data\.cache_dir: .* cannot be written: Not a directory"):
        prepare_corpus(make_config(cache_dir=str(model)), report=quiet)
    with pytest.raises(UserError, match=r"^model\.vocab_size=9000 is more than this corpus allows"):
        prepare_corpus(make_config(vocab_size=9000), report=quiet)
    with pytest.raises(UserError, match="missing"):
        prepare_corpus(make_config(tokenizer="missing.model"), report=quiet)
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1  # failures leave nothing behind


def test_the_cache_folder_is_the_one_that_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STACKWISE_CACHE", str(tmp_path / "by_environment"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (tmp_path / "cache") in prepare_corpus(make_config(), report=quiet).directory.parents
    assert (tmp_path / "by_environment") in prepare_corpus(make_config(cache_dir=""), report=quiet).directory.parents
    monkeypatch.delenv("STACKWISE_CACHE")
    corpus = prepare_corpus(make_config(cache_dir=""), report=quiet)
    assert Path(os.environ["HOME"]) / ".cache" / "stackwise_jax" in corpus.directory.parents


def test_progress_is_reported(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(build, "_BATCH_DOCUMENTS", 25)
    lines: list[str] = []
    corpus = prepare_corpus(make_config(), report=lines.append)
    assert [line.split(":")[0] for line in lines[1:]] == ["tokenising"] * 3
    total_mb = (corpus.train.parts[0].text_bytes + corpus.validation.parts[0].text_bytes) / 1e6
    assert lines[-1].startswith(f"tokenising: {total_mb:.1f} MB done, ")
    assert lines[-1].endswith(", 100 %, about 0 s left")


def test_progress_knows_its_end_from_files_or_from_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "REPORT_SECONDS", 0.0)
    clock = iter([0.0, 5.0, 10.0])
    monkeypatch.setattr(build.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    progress = build._Progress(total_bytes=1000, most_text_bytes=10_000_000, report=lines.append)
    progress.on_read(250)
    progress.text_bytes = 1_000_000
    progress.say()
    progress.text_bytes = 5_000_000
    progress.say()
    assert lines == [
        "tokenising: 1.0 MB done, 0.2 MB/s, 25 %, about 15 s left",
        "tokenising: 5.0 MB done, 0.5 MB/s, 50 %, about 10 s left",
    ]


def test_embedded_text_can_be_prepared(make_config: MakeConfig) -> None:
    config = make_config(source="embedded", max_bytes=150_000, vocab_size=600)
    corpus = prepare_corpus(config, report=quiet)
    texts = [text for split in (corpus.train, corpus.validation) for text in texts_of(split, corpus.tokenizer)]
    assert sorted(texts) == sorted(iterate_documents("embedded", text_field="text", max_bytes=150_000))
    assert corpus.train.parts[0].text_bytes / corpus.train.parts[0].n_tokens > 1.8
