"""A small source of text, a tokenizer trained on it, and configs that keep their cache in the test's own folder."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from stackwise_jax.data.corpus import Corpus, prepare_corpus
from stackwise_jax.data.tokenizer import Tokenizer, train_tokenizer
from stackwise_jax.schema import DataConfig, ModelConfig, RunConfig

VOCAB_SIZE = 320


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Sixty short, different documents with indentation, accents and characters that no piece holds."""
    rng = random.Random(0)
    words = [
        "def",
        "return",
        "caf\u00e9",
        "stack",
        "rack",
        "phase",
        "trunk",
        "self",
        "x\u2581y",
        "\U0001f642",
        "the  two",
    ]
    lines = [" " * 4 * rng.randrange(4) + " ".join(rng.choices(words, k=rng.randrange(1, 9))) for _ in range(600)]
    return [f"# {i}\n" + "\n".join(lines[10 * i : 10 * i + rng.randrange(2, 10)]) for i in range(60)]


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(documents, VOCAB_SIZE))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def make_config(tmp_path: Path, documents: list[str]) -> Callable[..., RunConfig]:
    """Returns `make(**data_fields)`: a config over the documents, a tenth or so of them held out."""
    source = write_jsonl(tmp_path / "documents.jsonl", documents)

    def make(vocab_size: int = VOCAB_SIZE, **fields: object) -> RunConfig:
        data = DataConfig(source=str(source), seq_len=32, validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
        data = dataclasses.replace(data, **fields)  # pyright: ignore[reportArgumentType]
        return RunConfig(model=ModelConfig(vocab_size=vocab_size), data=data)

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(folder / "documents.jsonl", documents)
    data = DataConfig(source=str(source), seq_len=32, validation_fraction=0.2, cache_dir=str(folder / "cache"))
    return prepare_corpus(RunConfig(model=ModelConfig(vocab_size=VOCAB_SIZE), data=data), report=lambda line: None)
