"""Documents out of one file: a `.txt` file is one, a line of a `.jsonl` file is one; both may be compressed.

Files are read as a stream, so memory is bounded by `DOCUMENT_BYTES_LIMIT` and never by the size of a file.
"""

import codecs
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stackwise_jax.errors import UserError, did_you_mean

DOCUMENT_BYTES_LIMIT = 256 * 2**20
READ_BYTES = 2**20
FORMATS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")

OnRead = Callable[[int], None]
"""Is told how many more bytes of a source on disk have been read."""


def suffixes(path: Path) -> tuple[str, str]:
    """The format and the compression of a file, by its name: ('.jsonl', '.gz'); '' for none."""
    if path.suffix in COMPRESSIONS:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def documents_of_file(path: Path, text_field: str, left: int | None, on_read: OnRead) -> Iterator[str]:
    """Yields the documents of one file; a text file is read only as far as `left` bytes.

    Raises:
      UserError: something unreadable, with file and line or byte.
    """
    match suffixes(path)[0]:
        case ".jsonl":
            yield from _json_documents(path, text_field, on_read)
        case _:
            yield _text_document(path, left, on_read)


def _text_document(path: Path, left: int | None, on_read: OnRead) -> str:
    data = bytearray()
    for chunk in _chunks(path, on_read):
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


def _json_documents(path: Path, text_field: str, on_read: OnRead) -> Iterator[str]:
    for number, line in enumerate(_lines(path, on_read), start=1):
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


def _lines(path: Path, on_read: OnRead) -> Iterator[bytes]:
    rest = b""
    is_first = True
    for chunk in _chunks(path, on_read):
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


def _chunks(path: Path, on_read: OnRead) -> Iterator[bytes]:
    """The decompressed bytes of a file."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            n_read = 0
            for chunk in _decompressed(file, suffixes(path)[1], stack):
                on_read(file.tell() - n_read)
                n_read = file.tell()
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:  # gzip.BadGzipFile is one
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _decompressed(file: io.BufferedReader, compression: str, stack: contextlib.ExitStack) -> Iterator[bytes]:
    match compression:
        case ".gz":
            return _read(stack.enter_context(gzip.open(file)))
        case ".xz":
            return _read(stack.enter_context(lzma.open(file)))
        case ".zst":
            return _read_zstd(file)
        case _:
            return _read(file)


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
