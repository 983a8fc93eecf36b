"""Makes a prepared corpus: documents to tokens to rows, in memory that does not grow with the text.

The folder is written under another name and renamed when complete. While it is written its maker holds a lock in it;
what a killed process left behind has none, and is removed by the next one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int32

from stackwise_jax.checks.text import weighted_sources
from stackwise_jax.data.blocks import BlockWriter
from stackwise_jax.data.sources import iterate_documents, source_bytes
from stackwise_jax.data.split import MAX_ROWS, WEIGHT_TOTAL, Part, rows_without_repeats
from stackwise_jax.data.tokenizer import TRAINING_BYTES, Tokenizer, train_tokenizer
from stackwise_jax.errors import UserError
from stackwise_jax.schema import DataConfig, RunConfig

FORMAT_VERSION = 2
SPLITS = ("train", "validation")
REPORT_SECONDS = 2.0
_BATCH_CHARS = 2**22
_BATCH_DOCUMENTS = 1024
_LOCK = "lock"

Report = Callable[[str], None]


def build_corpus(config: RunConfig, tokenizer: Tokenizer | None, directory: Path, report: Report) -> None:
    """Writes a prepared folder; on any failure nothing stays under its name.

    Args:
      config: `data`, and `model.vocab_size` of a tokenizer to be trained.
      tokenizer: None: train one on the text.
      directory: the folder, which is not there yet.
      report: is given one line at a time.

    Raises:
      UserError: see `prepare_corpus`.
      OSError: the folder cannot be written.
    """
    data = config.data
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(directory.parent)
    with _scratch_folder(directory) as scratch:
        if tokenizer is None:
            report(f"training a tokenizer of {config.model.vocab_size} pieces")
            tokenizer = Tokenizer(train_tokenizer(_tokenizer_documents(data), config.model.vocab_size))
        (scratch / "tokenizer.model").write_bytes(tokenizer.model)
        dtype = _token_dtype(tokenizer.vocab_size)
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(_SplitWriter(scratch, name, dtype, data.seq_len)) for name in SPLITS}
            _write_parts(data, tokenizer, writers, report)
            digests = {f"{name}.digests": writer.write_digests() for name, writer in writers.items()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "seq_len": data.seq_len,
            "dtype": dtype,
            "sha256": {"tokenizer.model": tokenizer.digest, **digests},
            "train": _side(writers["train"], data.source),
            "validation": _side(writers["validation"], data.validation_source or data.source),
        }
        manifest["digest"] = json_digest(manifest)
        (scratch / "corpus.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.exists():  # otherwise another process was faster, with the same bytes
                raise
        else:
            (directory / _LOCK).unlink()  # not before: without it the folder would look like a stale one


def json_digest(value: Any) -> str:
    """sha256 (hex) of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _side(writer: "_SplitWriter", mixture: str) -> dict[str, Any]:
    """What the manifest says of a split: its parts, how many rows may be drawn, and whether sources may repeat."""
    given = [weight for _, weight in weighted_sources(mixture) if weight is not None]
    counts = [part.n_rows for part in writer.parts]
    weights = [max(1, round(WEIGHT_TOTAL * weight / sum(given))) for weight in given] or counts
    parts = [dataclasses.replace(part, weight=weight) for part, weight in zip(writer.parts, weights, strict=True)]
    return {
        "parts": [dataclasses.asdict(part) for part in parts],
        "n_rows": rows_without_repeats(counts, weights),
        "repeats": bool(given),
    }


# --- the folder ---


@contextlib.contextmanager
def _scratch_folder(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory`, locked as long as it is used; gone afterwards unless it was renamed."""
    scratch = lock = None
    while lock is None:  # another process may take a folder for stale that is not locked yet
        scratch = directory.with_name(f"{directory.name}.partial-{secrets.token_hex(4)}")
        scratch.mkdir()
        lock = _taken_lock(scratch)
    assert scratch is not None
    with lock:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _taken_lock(folder: Path) -> IO[bytes] | None:
    """The lock of a folder; None when another process has it, or has removed the folder."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((folder / _LOCK).open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), (folder / _LOCK).stat()):
                stack.pop_all()
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
    return None


def _remove_stale(root: Path) -> None:
    """Removes the folders of preparations that were killed."""
    for folder in root.glob("*.partial-*"):
        if lock := _taken_lock(folder):
            with lock:
                shutil.rmtree(folder, ignore_errors=True)


# --- documents ---


def _is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is for validation: a function of its text alone, so that copies stay on one side."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8]) < fraction * 2.0**64


def _documents(
    data: DataConfig, source: str, on_read: Callable[[int], None] = lambda n_bytes: None
) -> Iterator[tuple[str, str]]:
    """Yields (split, document) over one source of `data.source`."""
    documents = iterate_documents(
        source, text_field=data.text_field, max_bytes=data.max_bytes, tfds_dir=data.tfds_dir, on_read=on_read
    )
    for document in documents:
        is_held_out = not data.validation_source and _is_held_out(document, data.validation_fraction)
        yield SPLITS[is_held_out], document


def _tokenizer_documents(data: DataConfig) -> Iterator[str]:
    """What a tokenizer is trained on: of each source as much as its share, which without weights is that of its bytes.

    A mixture's sources follow one another.
    """
    sources = weighted_sources(data.source)
    sizes = [source_bytes(source, data.tfds_dir) if weight is None else weight for source, weight in sources]
    for (source, _), size in zip(sources, sizes, strict=True):
        left = TRAINING_BYTES if len(sources) == 1 else round(TRAINING_BYTES * size / sum(sizes))
        for split, document in _documents(data, source):
            if left <= 0:
                break
            if split == "train":
                yield document[:left]
                left -= len(document.encode())


def _write_parts(data: DataConfig, tokenizer: Tokenizer, writers: dict[str, "_SplitWriter"], report: Report) -> None:
    """Tokenises every source; each becomes one part of every split that it fills."""
    sources = [source for source, _ in weighted_sources(data.source)]
    held_out = [source for source, _ in weighted_sources(data.validation_source)] if data.validation_source else []
    total = sum(source_bytes(source, data.tfds_dir) for source in [*sources, *held_out])
    progress = _Progress(total, None if data.max_bytes is None else data.max_bytes * len(sources), report)
    filled = SPLITS[: 1 if held_out else 2]
    for source in sources:
        _tokenise(_documents(data, source, progress.on_read), tokenizer, writers, progress)
        _require_documents({name: writers[name].n_documents for name in filled}, source, data)
        for name in filled:
            writers[name].end_part(tokenizer.pad_id)
    for source in held_out:
        documents = iterate_documents(
            source, text_field=data.text_field, max_bytes=None, tfds_dir=data.tfds_dir, on_read=progress.on_read
        )
        _tokenise((("validation", document) for document in documents), tokenizer, writers, progress)
        writers["validation"].end_part(tokenizer.pad_id)


def _require_documents(counts: dict[str, int], source: str, data: DataConfig) -> None:
    """UserError when a source leaves a split empty that it has to fill."""
    if len(counts) > 1 and sum(counts.values()) == 1:
        raise UserError(
            f"data.source={source!r} is one document, which cannot be split: give more files, or name held-out "
            "files in data.validation_source"
        )
    for name, count in counts.items():
        if not count:
            raise UserError(
                f"data.validation_fraction={data.validation_fraction:g} of {sum(counts.values())} document(s) leaves "
                f"none for {name} of data.source={source!r}; change it, give more documents, or name held-out files "
                "in data.validation_source"
            )


def _tokenise(
    documents: Iterator[tuple[str, str]],
    tokenizer: Tokenizer,
    writers: dict[str, "_SplitWriter"],
    progress: "_Progress",
) -> None:
    for batch in _batches(documents):
        for (name, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            n_bytes = len(text.encode())
            writers[name].add(ids, n_bytes, tokenizer)
            progress.text_bytes += n_bytes
        progress.say()


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups documents up to about _BATCH_CHARS characters, so that all cores have work and memory stays bounded."""
    while batch := list(itertools.islice(documents, 1)):
        n_chars = len(batch[0][1])
        while n_chars < _BATCH_CHARS and len(batch) < _BATCH_DOCUMENTS and (item := next(documents, None)):
            batch.append(item)
            n_chars += len(item[1])
        yield batch


class _Progress:
    """How much of the text is tokenised, and when the rest will be."""

    def __init__(self, total_bytes: int, most_text_bytes: int | None, report: Report) -> None:
        self._total_bytes, self._most_text_bytes, self._report = total_bytes, most_text_bytes, report
        self._start = self._last = time.monotonic()
        self._read_bytes = self.text_bytes = 0

    def on_read(self, n_bytes: int) -> None:
        self._read_bytes += n_bytes

    def say(self) -> None:
        """Reports, when the last time was long enough ago."""
        now = time.monotonic()
        if now - self._last < REPORT_SECONDS:
            return
        self._last, seconds, done_mb = now, now - self._start, self.text_bytes / 1e6
        share = self._read_bytes / max(self._total_bytes, 1)
        if self._most_text_bytes is not None:
            share = max(share, self.text_bytes / self._most_text_bytes)
        left = f", {100 * share:.0f} %, about {seconds * (1 / share - 1):,.0f} s left" if 0 < share <= 1 else ""
        self._report(f"tokenising: {done_mb:,.1f} MB done, {done_mb / seconds:.1f} MB/s{left}")


# --- tokens ---


def _token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


class _SplitWriter(contextlib.ExitStack):
    """Appends documents to the token file of a split, source after source."""

    def __init__(self, directory: Path, name: str, dtype: str, seq_len: int) -> None:
        super().__init__()
        self._file = self.enter_context(BlockWriter(directory / f"{name}.tokens"))
        self._digests = directory / f"{name}.digests"
        self._dtype, self._seq_len = dtype, seq_len
        self.parts: list[Part] = []
        self.n_tokens = self.n_documents = self.text_bytes = 0  # of the part that is being written

    def add(self, ids: Int32[np.ndarray, "_"], text_bytes: int, tokenizer: Tokenizer) -> None:
        """Appends a document."""
        self._write(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]))
        self.n_tokens += len(ids) + 2
        self.n_documents += 1
        self.text_bytes += text_bytes

    def end_part(self, pad_id: int) -> None:
        """Pads to whole rows; what follows is another source."""
        n_rows = -(-self.n_tokens // self._seq_len)
        self._write(np.full(n_rows * self._seq_len - self.n_tokens, pad_id))
        first_row = sum(part.n_rows for part in self.parts)
        if first_row + n_rows > MAX_ROWS:
            raise UserError(
                f"data.seq_len={self._seq_len} cuts the text into more than {MAX_ROWS:,} rows, which is all that can "
                "be numbered; raise it, or bound the text with data.max_bytes"
            )
        part = Part(first_row, n_rows, self.n_tokens, self.n_documents, self.text_bytes, weight=n_rows)
        self.parts.append(part)
        self.n_tokens = self.n_documents = self.text_bytes = 0

    def write_digests(self) -> str:
        """Writes the digests of all blocks; returns the sha256 (hex) of that file."""
        digests = self._file.digests()
        self._digests.write_bytes(digests)
        return hashlib.sha256(digests).hexdigest()

    def _write(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
