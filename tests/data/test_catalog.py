"""TensorFlow Datasets, offline, through a builder of ours: no TensorFlow, no connection, one line for every mistake."""

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from stackwise_jax import prepare
from stackwise_jax.data import catalog
from stackwise_jax.data.builders import LocalText
from stackwise_jax.data.catalog import download_datasets, open_dataset
from stackwise_jax.data.corpus import Corpus, prepare_corpus
from stackwise_jax.data.sources import iterate_documents, source_bytes
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

MakeConfig = Callable[..., RunConfig]
Connections = list[tuple[object, ...]]


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connections]:
    """Every attempt to reach a network; there is none to reach."""
    tried: Connections = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried
    assert tried == []
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"caf\u00e9 {i} " + "the stack of the rack " * 9)
    return folder


@pytest.fixture(scope="module")
def tfds_dir(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of data sets with one prepared."""
    folder = tmp_path_factory.mktemp("datasets")
    LocalText(root=str(texts), data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def read(source: str, tfds_dir: str, text_field: str = "text") -> list[str]:
    return list(iterate_documents(source, text_field=text_field, max_bytes=None, tfds_dir=tfds_dir))


def test_every_example_is_a_document(texts: Path, tfds_dir: str) -> None:
    expected = sorted(path.read_text() for path in texts.iterdir())
    assert sorted(read("tfds:local_text", tfds_dir)) == expected
    assert sorted(read("tfds:local_text:1.0.0#train", tfds_dir, "name")) == sorted(p.name for p in texts.iterdir())
    first, rest = read("tfds:local_text#train[:25%]", tfds_dir), read("tfds:local_text#train[25%:]", tfds_dir)
    assert len(first) == 15
    assert sorted(first + rest) == expected
    assert len(read(f"tfds:local_text, {texts}/0*.txt", tfds_dir)) == 70


def test_reading_is_told_in_bytes_of_the_files(tfds_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_EXAMPLES_AT_ONCE", 7)
    told: list[int] = []
    list(
        iterate_documents("tfds:local_text", text_field="text", max_bytes=None, tfds_dir=tfds_dir, on_read=told.append)
    )
    assert len(told) == 9
    assert sum(told) == source_bytes("tfds:local_text", tfds_dir)


def test_a_data_set_becomes_a_corpus_alone_and_in_a_mixture(
    make_config: MakeConfig, texts: Path, tfds_dir: str
) -> None:
    def corpus(source: str) -> Corpus:
        config = make_config(source=source, tfds_dir=tfds_dir, vocab_size=300)
        return prepare_corpus(config, report=lambda line: None)

    alone, half = corpus("tfds:local_text"), corpus("tfds:local_text#train[:50%]")
    mixed = corpus(f"tfds:local_text@1; {texts}/*.txt@1")
    assert alone.train.parts[0].n_documents + alone.validation.parts[0].n_documents == 60
    assert half.train.parts[0].n_documents + half.validation.parts[0].n_documents == 30
    assert len(mixed.train.parts) == 2
    assert len({alone.directory, half.directory, mixed.directory}) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:local_txt", r'tfds:local_txt is not in .* nor in the catalog .* Did you mean "local_text"\?'),
        ("tfds:glue/cola", r"tfds:glue/cola is not prepared in .*python -m stackwise_jax\.prepare --download"),
        ("tfds:local_text:9.0.0", r"tfds:local_text:9\.0\.0 is not prepared in"),
        ("tfds:local_text#tran", r'has no split \'tran\' .*its splits: train\. Did you mean "train"\?'),
        ("tfds:local_text#train[:x]", r"has no split 'train\[:x\]' "),
        ("tfds:local_text#train[:0]", r"tfds:local_text#train\[:0\] holds no examples"),
        ("tfds:", r"must read tfds:NAME\[/CONFIG\]\[:VERSION\]\[#SPLIT\]"),
        ("tfds:../x", r"must read tfds:NAME"),
    ],
)
def test_mistakes_are_one_line(source: str, message: str, tfds_dir: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(source, tfds_dir)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_not_there_or_no_text(texts: Path, tfds_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'no field data\.text_field="txt"; its fields: .*Did you mean "text"\?'):
        read("tfds:local_text", tfds_dir, "txt")
    with pytest.raises(UserError, match=r"examples 0 to 1: data\.text_field must name text, not int"):
        list(map(catalog._text_of, [b"good", 3], ["examples 0 to 1"] * 2))
    with pytest.raises(UserError, match="is not UTF-8 text: byte 0xff at 1"):
        catalog._text_of(b"a\xff", "example 0")


def test_other_file_formats_are_refused(texts: Path, tfds_dir: str, tmp_path: Path) -> None:
    folder = Path(tfds_dir) / "local_text" / "1.0.0"
    other = tmp_path / "local_text" / "1.0.0"
    other.mkdir(parents=True)
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    info = json.loads((other / "dataset_info.json").read_text())
    (other / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"as tfrecord, which cannot be read without TensorFlow; name another"):
        read("tfds:local_text", str(tmp_path))


def test_damaged_files_are_an_error(tfds_dir: str, tmp_path: Path) -> None:
    folder, other = Path(tfds_dir) / "local_text" / "1.0.0", tmp_path / "local_text" / "1.0.0"
    other.mkdir(parents=True)
    for path in folder.iterdir():
        content = path.read_bytes()
        cut = len(content) // 2 if "array_record" in path.name else len(content)
        (other / path.name).write_bytes(content[:cut])
    with pytest.raises(UserError, match="cannot be read"):
        read("tfds:local_text", str(tmp_path))


def test_preparing_is_asked_for(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not prepared"):
        read("tfds:local_text", str(tmp_path))
    with pytest.raises(UserError, match="tfds:local_text cannot be prepared: local_text needs root"):
        download_datasets(["tfds:local_text"], str(tmp_path), print)
    builder = tfds.builder

    def with_root(name: str, **settings: object) -> object:
        return builder(name, root=str(texts), **settings)

    monkeypatch.setattr(tfds, "builder", with_root)
    lines: list[str] = []
    for _ in range(2):
        download_datasets([f"{texts}/*.txt, tfds:local_text#train"], str(tmp_path), lines.append)
    assert lines == [f"preparing tfds:local_text in {tmp_path}", "tfds:local_text is prepared"]
    assert len(read("tfds:local_text", str(tmp_path))) == 60


def test_a_builder_that_needs_tensorflow_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"super_glue/boolq cannot be prepared: .*pip install tensorflow"):
        download_datasets(["tfds:super_glue/boolq"], str(tmp_path), lambda line: None)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, **settings: object) -> None:
        raise ConnectionError("unreachable\nsecond line")

    monkeypatch.setattr(LocalText, "download_and_prepare", fail)
    with pytest.raises(UserError, match=r"tfds:local_text cannot be prepared: unreachable$"):
        download_datasets(["tfds:local_text"], str(tmp_path), lambda line: None)


def test_the_program_downloads_only_when_asked(
    make_config: MakeConfig, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(catalog, "download_datasets", lambda sources, *rest: asked.append(sources))
    config = make_config(source=f"{texts}/*.txt@1; tfds:local_text@1", tfds_dir=str(tmp_path), vocab_size=300)
    with pytest.raises(UserError, match="tfds:local_text is not prepared"):
        prepare.main(config)
    assert asked == []
    monkeypatch.setattr(prepare.FLAGS["download"], "value", True)
    with contextlib.suppress(UserError):
        prepare.main(config)
    assert asked == [[f"{texts}/*.txt", "tfds:local_text"]]


@pytest.mark.parametrize("name", ["tensorflow_datasets", "tensorflow_datasets.text"])
def test_without_the_extra_the_remedy_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r'needs TensorFlow Datasets: pip install "stackwise-jax\[tfds\]"'):
        open_dataset("tfds:local_text", "anywhere")
