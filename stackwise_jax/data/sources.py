"""Where text comes from: the Python standard library's own source, or files; one document at a time.

A `.txt` file is one document, a line of a `.jsonl` file is one document; both may also end in `.gz`, `.xz` or `.zst`.
Files are read as a stream, so memory is bounded by `DOCUMENT_BYTES_LIMIT` and never by the size of the source.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackwise_jax.errors import UserError, did_you_mean

EMBEDDED = "embedded"
DOCUMENT_BYTES_LIMIT = 256 * 2**20
READ_BYTES = 2**20
FORMATS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")

# Of the standard library: tests and installed packages; tables and text that programs wrote (character maps, entities,
# build settings, help topics as one literal); and whole applications that few installations carry.
_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data")
)
_SKIPPED_MODULES = frozenset(("stringprep.py", "html/entities.py", "re/_casefix.py"))


def iterate_documents(source: str, *, text_field: str, max_bytes: int | None) -> Iterator[str]:
    """Yields the documents of a source in a fixed order, without those that hold only white space.

    Args:
      source: "embedded", or files and globs (`**` recurses), comma-separated.
      text_field: the field of a `.jsonl` line that holds the text.
      max_bytes: ends after this many UTF-8 bytes, inside a document if need be, never inside a character; None: all.

    Raises:
      UserError: no such file, an unknown format, something unreadable (with file and line or byte), or no text at all.
    """
    files = source_files(source)
    left = max_bytes
    n_documents = 0
    for path in files:
        for document in _documents_of(path, text_field, left):
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
        raise UserError(f"data source {source!r} holds no text in {len(files)} file(s); give files with text")


def source_files(source: str) -> list[Path]:
    """Returns the files that a source names, in reading order, each once.

    The embedded source is ordered by a hash of the module's name, so that any prefix of it is a fair sample.
    """
    if source == EMBEDDED:
        return _embedded_files()
    files: dict[Path, None] = {}
    for entry in filter(None, map(str.strip, source.split(","))):
        files |= dict.fromkeys(_matches(entry))
    if not files:
        raise UserError(f'data source {source!r} names no file; give "{EMBEDDED}", or files and globs')
    return list(files)


def digest_source(source: str) -> str:
    """Returns the sha256 (hex) of what a source holds: formats and bytes of its files in order, not their places."""
    digest = hashlib.sha256()
    for path in source_files(source):
        try:
            with path.open("rb") as file:
                digest.update(f"{''.join(_suffixes(path))} ".encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


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
        raise UserError(f'data source "{entry}" matches no file (from {Path.cwd()})')
    for name in found:
        if _suffixes(name)[0] not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"{name} is of no known format; known: {known}, alone or with {', '.join(COMPRESSIONS)}")
    return found


def _suffixes(path: Path) -> tuple[str, str]:
    """The format and the compression of a file, by its name: ('.jsonl', '.gz'); '' for none."""
    if path.suffix in COMPRESSIONS:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def _documents_of(path: Path, text_field: str, left: int | None) -> Iterator[str]:
    """Documents of one file; a text file is read only as far as `left` bytes."""
    match _suffixes(path)[0]:
        case ".jsonl":
            yield from _json_documents(path, text_field)
        case _:
            yield _text_document(path, left)


def _text_document(path: Path, left: int | None) -> str:
    data = bytearray()
    for chunk in _chunks(path):
        data += chunk
        if left is not None and len(data) > left + 8:  # what a cut at `left` needs, with a byte order mark before it
            break
        _require_bounded(len(data), f"{path} is one document")
    is_cut = left is not None and len(data) > left + 8
    text = data.removeprefix(codecs.BOM_UTF8)
    try:
        # Reading may have stopped inside a character: then, and only then, an unfinished one at the end is no error.
        return codecs.getincrementaldecoder("utf-8")().decode(bytes(text), final=not is_cut)
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(text)
        raise UserError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {offset}") from None


def _json_documents(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{place} is not UTF-8 text: byte {line[error.start]:#04x} at {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON: {error}") from None
        yield _text_of(record, text_field, place)


def _text_of(record: Any, text_field: str, place: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f'{place} must be a JSON object with a "{text_field}" field, not {type(record).__name__}')
    if text_field not in record:
        fields = ", ".join(record) or "none"
        hint = did_you_mean(text_field, record)
        raise UserError(f'{place} has no field data.text_field="{text_field}"; its fields: {fields}.{hint}')
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f'{place}: field "{text_field}" must be text, not {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{place}: field "{text_field}" has half a character (surrogate) at {error.start}') from None
    return text


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    is_first = True
    for chunk in _chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        _require_bounded(len(rest), f"a line of {path}")
        for line in lines:
            yield line.removeprefix(codecs.BOM_UTF8) if is_first else line
            is_first = False
    yield rest.removeprefix(codecs.BOM_UTF8) if is_first else rest


def _require_bounded(n_bytes: int, what: str) -> None:
    if n_bytes > DOCUMENT_BYTES_LIMIT:
        limit = f"{DOCUMENT_BYTES_LIMIT // 2**20} MiB"
        raise UserError(
            f"{what} of more than {limit}; split it into smaller files or .jsonl lines, or set data.max_bytes"
        )


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            match _suffixes(path)[1]:
                case ".gz":
                    yield from _read(stack.enter_context(gzip.open(file)))
                case ".xz":
                    yield from _read(stack.enter_context(lzma.open(file)))
                case ".zst":
                    yield from _read_zstd(file)
                case _:
                    yield from _read(file)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:  # gzip.BadGzipFile is one
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(file: io.BufferedIOBase, n_bytes: int = READ_BYTES) -> Iterator[bytes]:
    while chunk := file.read(n_bytes):
        yield chunk


def _read_zstd(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Frame by frame, because zstandard's own reader takes a file that was cut short for a complete one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    is_complete = False
    try:
        for data in _read(file, 2**15):  # a frame may grow a thousandfold
            while data:
                if is_complete:
                    frame = decompressor.decompressobj()
                yield frame.decompress(data)
                is_complete, data = frame.eof, frame.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if not is_complete:
        raise EOFError("the file ends inside a compressed frame")
