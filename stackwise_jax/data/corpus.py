"""What a prepared corpus is: flat token files cut into rows, in a folder named by what went into it.

    corpora/<key>/  corpus.json  tokenizer.model  train.tokens  train.documents  validation.tokens  validation.documents

`*.tokens` holds every document as bos, ids, eos, one after another, little endian, and padding up to a whole row of
`seq_len`. Rows are numbered in an order of their own, a fixed permutation, so that any run of them (a chunk of the
cache, a bounded corpus, the held-out rows) is a fair sample of the text. `*.documents` holds where documents start
(uint64), and the end of the last. The folder is written under another name and renamed when complete; the digests in
`corpus.json` are checked at every opening.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt

from stackwise_jax.data.permutation import permutation
from stackwise_jax.data.sources import digest_source, iterate_documents
from stackwise_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.schema import DataConfig, RunConfig
from stackwise_jax.types import Batch

FORMAT_VERSION = 1
_ORDER_SEED = 20
SPLITS = ("train", "validation")
REPORT_SECONDS = 2.0
_BATCH_CHARS = 2**22
_BATCH_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one side of a corpus.

    Attributes:
      tokens: memory-mapped ids, padding included.
      documents: token index where each document starts, then where the last one ends.
      n_rows, n_tokens: rows that may be drawn, and how many ids in them are no padding.
      text_bytes: UTF-8 bytes of the whole side's text, before any bound on its rows.
      digest: sha256 (hex) of the whole token file.
      order: place in the file of each row; None: rows are numbered as they lie there.
    """

    tokens: UInt[np.ndarray, "rows T"]
    documents: Int64[np.ndarray, "_"]
    n_rows: int
    n_tokens: int
    text_bytes: int
    digest: str
    order: Int64[np.ndarray, "_"] | None = None

    @property
    def n_documents(self) -> int:
        """Documents of the whole side, before any bound on its rows."""
        return len(self.documents) - 1

    def first(self, n_rows: int) -> "Split":
        """The same split, bounded to its first rows."""
        n_rows = min(n_rows, self.n_rows)
        n_tokens = min(self.n_tokens, n_rows * self.tokens.shape[1])
        return dataclasses.replace(self, n_rows=n_rows, n_tokens=n_tokens)

    def rows(
        self, row_ids: Int[np.ndarray, "B"], *, isolate_documents: bool
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
        """Reads rows.

        Returns:
          tokens: ids; the pad id where the corpus has ended.
          segments: number of the document inside the row, from 1; 0 for padding. All 1 unless documents are isolated.
          positions: place in the document's part of this row, from 0. Place in the row unless documents are isolated.

        Raises:
          IndexError: no such row.
        """
        if len(row_ids) and not 0 <= row_ids.min() <= row_ids.max() < self.n_rows:
            raise IndexError(f"row_ids must lie in [0, {self.n_rows}), not {row_ids.min()} to {row_ids.max()}")
        seq_len = self.tokens.shape[1]
        row_ids = row_ids if self.order is None else self.order[row_ids]
        row_starts = row_ids.astype(np.int64)[:, None] * seq_len
        places = row_starts + np.arange(seq_len)[None, :]  # of the token file
        is_text = places < self.documents[-1]
        if isolate_documents:
            documents = np.searchsorted(self.documents, places, side="right") - 1
            segments = documents - documents[:, :1] + 1
            positions = places - np.maximum(self.documents[documents], row_starts)
        else:
            segments, positions = np.ones_like(places), places - row_starts
        segments, positions = np.where(is_text, segments, 0), np.where(is_text | (not isolate_documents), positions, 0)
        return self.tokens[row_ids].astype(np.int32), segments.astype(np.int32), positions.astype(np.int32)

    def batch(self, row_ids: Int[np.ndarray, "B"], visit: int, *, isolate_documents: bool) -> Batch:
        """Reads rows as a batch of int32 arrays, all on the same visit; raises as `rows`."""
        visits = np.full(len(row_ids), visit, dtype=np.int32)
        return Batch(*self.rows(row_ids, isolate_documents=isolate_documents), row_ids.astype(np.int32), visits)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus; `digest` (sha256, hex) covers tokens, tokenizer and row length, not a bound on rows."""

    directory: Path
    digest: str
    seq_len: int
    tokenizer: Tokenizer
    train: Split
    validation: Split


def prepare_corpus(config: RunConfig, *, report: Callable[[str], None]) -> Corpus:
    """Opens the prepared corpus of a config, first making it where there is none or a damaged one.

    Args:
      config: `data`, `model.vocab_size`; `data.max_rows` bounds the training rows of what is returned.
      report: is given one line at a time about long work.

    Raises:
      UserError: see `iterate_documents`, `Tokenizer`, `train_tokenizer`; a tokenizer of more pieces than
        model.vocab_size; too few documents to have both splits; a cache folder that cannot be written; a
        `data.prepared` that is missing, damaged or does not fit.
    """
    data = config.data
    corpus = _open_named(config) if data.prepared else _open_or_build(config, report)
    return corpus if data.max_rows is None else dataclasses.replace(corpus, train=corpus.train.first(data.max_rows))


def _open_named(config: RunConfig) -> Corpus:
    """Opens `data.prepared` and no source; UserError where it is no such folder or does not fit the config."""
    folder = config.data.prepared
    try:
        corpus = open_corpus(Path(folder).expanduser())
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


def _open_or_build(config: RunConfig, report: Callable[[str], None]) -> Corpus:
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
    corpus = None
    if directory.exists():
        try:
            corpus = open_corpus(directory)
        except UserError as error:
            report(f"preparing the corpus again: {error}")
            shutil.rmtree(directory, ignore_errors=True)
    if corpus is None:
        try:
            _build(config, tokenizer, directory, report)
        except OSError as error:
            raise UserError(f"data.cache_dir: {directory} cannot be written: {error.strerror or error}") from None
        corpus = open_corpus(directory)
    return corpus


def open_corpus(directory: Path) -> Corpus:
    """Opens a prepared folder and checks every digest in it; UserError when it is missing or damaged."""
    manifest = _read_manifest(directory)
    tokenizer = Tokenizer(_checked_file(directory, "tokenizer.model", manifest).read_bytes())
    train, validation = (_open_split(directory, name, manifest) for name in SPLITS)
    return Corpus(directory, manifest["digest"], manifest["seq_len"], tokenizer, train, validation)


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Reads corpus.json; once its own digest is right, its entries are as `_build` wrote them."""
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
    if digest != _manifest_digest(manifest):
        raise UserError(f"{path} is damaged; prepare the corpus again")
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    entries = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _checked_file(directory: Path, name: str, manifest: dict[str, Any]) -> Path:
    """The path of a file whose bytes are those that were written."""
    path = directory / name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); prepare the corpus again") from None
    if digest != manifest["sha256"][name]:
        raise UserError(f"{path} is damaged; prepare the corpus again")
    return path


def _open_split(directory: Path, name: str, manifest: dict[str, Any]) -> Split:
    counts, shape = manifest[name], (manifest[name]["n_rows"], manifest["seq_len"])
    tokens, documents = (_checked_file(directory, f"{name}.{kind}", manifest) for kind in ("tokens", "documents"))
    return Split(
        tokens=np.memmap(tokens, manifest["dtype"], mode="r", shape=shape),
        documents=np.fromfile(documents, "<u8").astype(np.int64),
        n_rows=counts["n_rows"],
        n_tokens=counts["n_tokens"],
        text_bytes=counts["text_bytes"],
        digest=manifest["sha256"][tokens.name],
        order=permutation(counts["n_rows"], _ORDER_SEED),
    )


def _cache_root(data: DataConfig) -> Path:
    return Path(data.cache_dir or os.environ.get("STACKWISE_CACHE") or "~/.cache/stackwise_jax").expanduser()


def _corpus_key(data: DataConfig, tokenizer: str) -> str:
    """Names everything that tokens depend on; the same files elsewhere, or under other names, are the same corpus."""
    held_out = digest_source(data.validation_source) if data.validation_source else data.validation_fraction
    parts = (
        FORMAT_VERSION,
        digest_source(data.source),
        held_out,
        tokenizer,
        data.seq_len,
        data.text_field,
        data.max_bytes,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is for validation: a function of its text alone, so that copies stay on one side."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8]) < fraction * 2.0**64


def _split_documents(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Yields (split, document) over everything that is read."""
    for document in iterate_documents(data.source, text_field=data.text_field, max_bytes=data.max_bytes):
        is_held_out = not data.validation_source and _is_held_out(document, data.validation_fraction)
        yield SPLITS[is_held_out], document
    if data.validation_source:
        for document in iterate_documents(data.validation_source, text_field=data.text_field, max_bytes=None):
            yield "validation", document


def _build(config: RunConfig, tokenizer: Tokenizer | None, directory: Path, report: Callable[[str], None]) -> None:
    """Writes a prepared folder; on any failure nothing stays under its name."""
    data = config.data
    scratch = directory.with_name(f"{directory.name}.partial-{secrets.token_hex(4)}")
    scratch.mkdir(parents=True)
    try:
        if tokenizer is None:
            report(f"training a tokenizer of {config.model.vocab_size} pieces")
            documents = (document for split, document in _split_documents(data) if split == "train")
            tokenizer = Tokenizer(train_tokenizer(documents, config.model.vocab_size))
        (scratch / "tokenizer.model").write_bytes(tokenizer.model)
        dtype = _token_dtype(tokenizer.vocab_size)
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(_SplitWriter(scratch, name, dtype)) for name in SPLITS}
            _tokenise(_split_documents(data), tokenizer, writers, report)
            _require_both(writers, data)
            counts = {name: writer.finish(data.seq_len, tokenizer.pad_id) for name, writer in writers.items()}
        digests = {name: digest for writer in writers.values() for name, digest in writer.digests().items()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "seq_len": data.seq_len,
            "dtype": dtype,
            "sha256": {"tokenizer.model": tokenizer.digest, **digests},
            **counts,
        }
        manifest["digest"] = _manifest_digest(manifest)
        (scratch / "corpus.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.exists():  # otherwise another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tokenise(
    documents: Iterator[tuple[str, str]],
    tokenizer: Tokenizer,
    writers: dict[str, "_SplitWriter"],
    report: Callable[[str], None],
) -> None:
    start = last = time.monotonic()
    for batch in _batches(documents):
        for (name, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            writers[name].add(ids, len(text.encode()), tokenizer)
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last, done_mb = now, sum(writer.text_bytes for writer in writers.values()) / 1e6
            report(f"tokenising: {done_mb:.1f} MB done, {done_mb / (now - start):.1f} MB/s")


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups documents up to about _BATCH_CHARS characters, so that all cores have work and memory stays bounded."""
    while batch := list(itertools.islice(documents, 1)):
        n_chars = len(batch[0][1])
        while n_chars < _BATCH_CHARS and len(batch) < _BATCH_DOCUMENTS and (item := next(documents, None)):
            batch.append(item)
            n_chars += len(item[1])
        yield batch


def _require_both(writers: dict[str, "_SplitWriter"], data: DataConfig) -> None:
    counts = {name: writer.n_documents for name, writer in writers.items()}
    if sum(counts.values()) == 1:
        raise UserError(
            f"data.source={data.source!r} is one document, which cannot be split: give more files, or name held-out "
            "files in data.validation_source"
        )
    for name, count in counts.items():
        if not count:
            raise UserError(
                f"data.validation_fraction={data.validation_fraction:g} of {sum(counts.values())} document(s) leaves "
                f"none for {name}; change it, give more documents, or name held-out files in data.validation_source"
            )


class _SplitWriter(contextlib.ExitStack):
    """Appends documents to the two files of a split."""

    def __init__(self, directory: Path, name: str, dtype: str) -> None:
        super().__init__()
        self._tokens, self._documents = f"{name}.tokens", f"{name}.documents"
        self._files = {
            file: self.enter_context((directory / file).open("wb")) for file in (self._tokens, self._documents)
        }
        self._hashes = {file: hashlib.sha256() for file in self._files}
        self._dtype = dtype
        self.n_tokens = self.n_documents = self.text_bytes = 0

    def add(self, ids: Int32[np.ndarray, "_"], text_bytes: int, tokenizer: Tokenizer) -> None:
        self._write(self._documents, np.array([self.n_tokens], "<u8"))
        self._write(self._tokens, np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(self._dtype))
        self.n_tokens += len(ids) + 2
        self.n_documents += 1
        self.text_bytes += text_bytes

    def finish(self, seq_len: int, pad_id: int) -> dict[str, int]:
        """Pads to whole rows and returns the counts of the manifest."""
        n_rows = -(-self.n_tokens // seq_len)
        self._write(self._documents, np.array([self.n_tokens], "<u8"))
        self._write(self._tokens, np.full(n_rows * seq_len - self.n_tokens, pad_id, self._dtype))
        counts = {"n_rows": n_rows, "n_tokens": self.n_tokens, "n_documents": self.n_documents}
        return {**counts, "text_bytes": self.text_bytes}

    def digests(self) -> dict[str, str]:
        """sha256 of each file, by its name."""
        return {file: digest.hexdigest() for file, digest in self._hashes.items()}

    def _write(self, file: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._hashes[file].update(data)
        self._files[file].write(data)
