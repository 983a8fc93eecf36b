"""What a prepared corpus is: flat token files cut into rows, in a folder named by what went into it.

    corpora/<key>/  corpus.json  tokenizer.model  train.tokens  train.digests  validation.tokens  validation.digests

`*.tokens` holds every document as bos, ids, eos, one after another, little endian; each source of a mixture ends in
padding up to a whole row of `seq_len`. Rows are numbered in an order of their own (`Split`), so that any run of them (a
chunk of the cache, a bounded corpus, the held-out rows) is a fair sample of the text. `*.digests` holds a sha256 of
every block of the tokens. `corpus.json` holds the digest of itself and of everything but the tokens, whose blocks are
checked when they are first read (`CheckedRows`): opening takes the same time for every corpus.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stackwise_jax.checks.text import weighted_sources
from stackwise_jax.data.blocks import CheckedRows
from stackwise_jax.data.build import FORMAT_VERSION, SPLITS, build_corpus, json_digest
from stackwise_jax.data.digests import DigestMemo
from stackwise_jax.data.sources import digest_source
from stackwise_jax.data.split import Part, Split
from stackwise_jax.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.schema import DataConfig, RunConfig

_ORDER_SEED = 20


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus; `digest` (sha256, hex) covers tokens, weights, tokenizer, row length, not a bound on rows."""

    directory: Path
    digest: str
    seq_len: int
    tokenizer: Tokenizer
    train: Split
    validation: Split


def prepare_corpus(config: RunConfig, *, report: Callable[[str], None], check_all: bool = False) -> Corpus:
    """Opens the prepared corpus of a config, first making it where there is none or a damaged one.

    Args:
      config: `data`, `model.vocab_size`; `data.max_rows` bounds the training rows of what is returned.
      report: is given one line at a time about long work.
      check_all: read all tokens now, instead of each block when it is first used.

    Raises:
      UserError: see `iterate_documents`, `Tokenizer`, `train_tokenizer`; a tokenizer of more pieces than
        model.vocab_size; too few documents to have both splits; a cache folder that cannot be written; a
        `data.prepared` that is missing, damaged or does not fit.
    """
    data = config.data
    corpus = _open_named(config, check_all) if data.prepared else _open_or_build(config, report, check_all)
    return corpus if data.max_rows is None else dataclasses.replace(corpus, train=corpus.train.first(data.max_rows))


def _open_named(config: RunConfig, check_all: bool) -> Corpus:
    """Opens `data.prepared` and no source; UserError where it is no such folder or does not fit the config."""
    folder = config.data.prepared
    try:
        corpus = open_corpus(Path(folder).expanduser(), check_all=check_all)
    except UserError as error:
        raise UserError(f"data.prepared={folder!r}: {error}") from None
    if corpus.seq_len != config.data.seq_len:
        raise UserError(f"data.prepared={folder!r} has rows of {corpus.seq_len}; set data.seq_len={corpus.seq_len}")
    if (n_pieces := corpus.tokenizer.vocab_size) > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} must be at least the {n_pieces} pieces of "
            f"data.prepared={folder!r}"
        )
    return corpus


def _open_or_build(config: RunConfig, report: Callable[[str], None], check_all: bool) -> Corpus:
    """Opens what the source and its settings name in the cache folder, first making it where need be."""
    data = config.data
    tokenizer = load_tokenizer(Path(data.tokenizer).expanduser()) if data.tokenizer else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} must be at least the {tokenizer.vocab_size} pieces of "
            f"data.tokenizer={data.tokenizer!r}"
        )
    key = _corpus_key(data, tokenizer.digest if tokenizer else f"bpe {config.model.vocab_size}")
    directory = _cache_root(data) / "corpora" / key[:32]
    if directory.exists():
        try:
            return open_corpus(directory, check_all=check_all)
        except UserError as error:
            report(f"preparing the corpus again: {error}")
            shutil.rmtree(directory, ignore_errors=True)
    try:
        build_corpus(config, tokenizer, directory, report)
    except OSError as error:
        raise UserError(f"data.cache_dir: {directory} cannot be written: {error.strerror or error}") from None
    return open_corpus(directory)


def open_corpus(directory: Path, *, check_all: bool = False) -> Corpus:
    """Opens a prepared folder.

    Raises:
      UserError: it is missing, or damaged: in its tokens only when `check_all`, otherwise when those are read.
    """
    manifest = _read_manifest(directory)
    tokenizer = open_tokenizer(_checked_bytes(directory, "tokenizer.model", manifest))
    splits = [_open_split(directory, name, manifest, tokenizer) for name in SPLITS]
    if check_all:
        for split in splits:
            assert isinstance(split.tokens, CheckedRows)
            split.tokens.check_all()
    return Corpus(directory, manifest["digest"], manifest["seq_len"], tokenizer, *splits)


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Reads corpus.json; once its own digest is right, its entries are as `build_corpus` wrote them."""
    path = directory / "corpus.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, digest = manifest["format_version"], manifest["digest"]
    except FileNotFoundError:
        raise UserError(f"{directory} is not a prepared corpus: {path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; prepare the corpus again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, not {FORMAT_VERSION}; prepare the corpus again")
    if digest != json_digest({name: value for name, value in manifest.items() if name != "digest"}):
        raise UserError(f"{path} is damaged; prepare the corpus again")
    return manifest


def _checked_bytes(directory: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """The content of a small file, as it was written."""
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); prepare the corpus again") from None
    if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
        raise UserError(f"{path} is damaged; prepare the corpus again")
    return content


def _open_split(directory: Path, name: str, manifest: dict[str, Any], tokenizer: Tokenizer) -> Split:
    side = manifest[name]
    parts = tuple(Part(**part) for part in side["parts"])
    shape = (sum(part.n_rows for part in parts), manifest["seq_len"])
    digests = _checked_bytes(directory, f"{name}.digests", manifest)
    return Split(
        tokens=CheckedRows(directory / f"{name}.tokens", manifest["dtype"], shape, digests),
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        parts=parts,
        n_rows=side["n_rows"],
        digest=json_digest([side, manifest["seq_len"], manifest["dtype"], manifest["sha256"][f"{name}.digests"]]),
        repeats=side["repeats"],
        seed=_ORDER_SEED,
    )


def _cache_root(data: DataConfig) -> Path:
    return Path(data.cache_dir or os.environ.get("STACKWISE_CACHE") or "~/.cache/stackwise_jax").expanduser()


def _corpus_key(data: DataConfig, tokenizer: str) -> str:
    """Names everything that tokens and rows depend on; the same files elsewhere, or renamed, are the same corpus."""
    memo = DigestMemo(_cache_root(data) / "digests")

    def digest(mixture: str) -> list[tuple[str, float | None]]:
        return [(digest_source(source, memo, data.tfds_dir), weight) for source, weight in weighted_sources(mixture)]

    held_out = digest(data.validation_source) if data.validation_source else data.validation_fraction
    fields = (tokenizer, data.seq_len, data.text_field, data.max_bytes)
    return json_digest([FORMAT_VERSION, digest(data.source), held_out, *fields])
