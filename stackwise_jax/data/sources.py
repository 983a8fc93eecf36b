"""Where text comes from: the Python standard library's own source, files, or TensorFlow Datasets; document by document.

One source is "embedded", or entries separated by commas: files, globs, and `tfds:NAME`. (Several sources make a
mixture: `checks.weighted_sources` takes that apart.)
"""

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from stackwise_jax.data.catalog import PREFIX, Dataset, open_dataset
from stackwise_jax.data.digests import DigestMemo
from stackwise_jax.data.files import COMPRESSIONS, FORMATS, OnRead, documents_of_file, suffixes
from stackwise_jax.errors import UserError

EMBEDDED = "embedded"

# Of the standard library: tests and installed packages; tables and text that programs wrote (character maps, entities,
# build settings, help topics as one literal); and whole applications that few installations carry.
_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data")
)
_SKIPPED_MODULES = frozenset(("stringprep.py", "html/entities.py", "re/_casefix.py"))


def iterate_documents(
    source: str,
    *,
    text_field: str,
    max_bytes: int | None,
    tfds_dir: str = "",
    on_read: OnRead = lambda n_bytes: None,
) -> Iterator[str]:
    """Yields the documents of one source in a fixed order, without those that hold only white space.

    Args:
      source: "embedded", or files, globs (`**` recurses) and `tfds:NAME`, comma-separated.
      text_field: the field of a `.jsonl` line or of a data set's example that holds the text.
      max_bytes: ends after this many UTF-8 bytes, inside a document if need be, never inside a character; None: all.
      tfds_dir: where TensorFlow Datasets are; empty: its own default.
      on_read: see `OnRead`; in all it is told `source_bytes`, if everything is read.

    Raises:
      UserError: no such file or data set, an unknown format, something unreadable (with file and line or byte), or no
        text at all.
    """
    items = source_items(source, tfds_dir)
    left = max_bytes
    n_documents = 0
    for item in items:
        for document in _documents_of(item, text_field, left, on_read):
            if left is not None:
                encoded = document.encode()
                document = encoded[:left].decode(errors="ignore")  # drops at most the character that was cut
                left -= min(left, len(encoded))
            if document.strip():
                n_documents += 1
                yield document
            if left == 0:
                break
        if left == 0:
            break
    if not n_documents:
        raise UserError(f"data source {source!r} holds no text in {len(items)} file(s); give files with text")


def _documents_of(item: Path | Dataset, text_field: str, left: int | None, on_read: OnRead) -> Iterator[str]:
    if isinstance(item, Dataset):
        return item.documents(text_field, on_read)
    return documents_of_file(item, text_field, left, on_read)


def source_items(source: str, tfds_dir: str = "") -> list[Path | Dataset]:
    """Returns the files and data sets that a source names, in reading order, each once.

    The embedded source is ordered by a hash of the module's name, so that any prefix of it is a fair sample.
    """
    if source == EMBEDDED:
        return [*_embedded_files()]
    items: dict[Path | Dataset, None] = {}
    for entry in filter(None, map(str.strip, source.split(","))):
        found = [open_dataset(entry, tfds_dir)] if entry.startswith(PREFIX) else _matches(entry)
        items |= dict.fromkeys(found)
    if not items:
        raise UserError(f'data source {source!r} names no file; give "{EMBEDDED}", files and globs, or tfds:NAME')
    return list(items)


def source_bytes(source: str, tfds_dir: str = "") -> int:
    """Bytes of everything that a source names, as they lie on the disk."""
    try:
        return sum(path.stat().st_size for item in source_items(source, tfds_dir) for path in _files_of(item))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}") from None


def digest_source(source: str, memo: DigestMemo, tfds_dir: str = "") -> str:
    """Returns the sha256 (hex) of what a source holds: formats and bytes of its files in order, not their places.

    Files that `memo` knows are not read again.
    """
    items = source_items(source, tfds_dir)
    known = memo.digests([path for item in items for path in _files_of(item)])
    digest = hashlib.sha256()
    for item in items:
        form = item.split if isinstance(item, Dataset) else "".join(suffixes(item))
        digest.update(f"{form} ".encode() + b"".join(known[path] for path in _files_of(item)))
    return digest.hexdigest()


def _files_of(item: Path | Dataset) -> list[Path]:
    return item.files if isinstance(item, Dataset) else [item]


def _embedded_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
        and not path.relative_to(root).parts[0].startswith(("config-", "_sysconfigdata"))
        and path.relative_to(root).as_posix() not in _SKIPPED_MODULES
    ]
    if not names:
        raise UserError(f'data source "{EMBEDDED}" found no modules in {root}; give files of text in data.source')
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [root / name for name in names]


def _matches(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        raise UserError(f'data source "{entry}" is a folder; name its files, such as "{entry.rstrip("/")}/**/*.txt"')
    if path.exists():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if not Path(name).is_dir()]
    if not found:
        hint = "; mixtures are not read here: separate files by commas" if ";" in entry else ""
        raise UserError(f'data source "{entry}" matches no file (from {Path.cwd()}){hint}')
    for name in found:
        if suffixes(name)[0] not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"{name} is of no known format; known: {known}, alone or with {', '.join(COMPRESSIONS)}")
    return found
