"""Sources: what is a document, in which order, where it ends, and what a person is told when something is wrong."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackwise_jax.data import files
from stackwise_jax.data.digests import DigestMemo
from stackwise_jax.data.sources import digest_source, iterate_documents, source_items
from stackwise_jax.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(source: object, text_field: str = "text", max_bytes: int | None = None) -> list[str]:
    return list(iterate_documents(str(source), text_field=text_field, max_bytes=max_bytes))


@pytest.mark.parametrize("compression", COMPRESS)
def test_every_format_gives_its_documents_exactly(tmp_path: Path, compression: str) -> None:
    text = "first\r\nsecond \u6f22\n"
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + text.encode()))
    lines = (
        b"\xef\xbb\xbf"
        + json.dumps({"text": text}).encode()
        + b'\r\n\n{"text": ""}\n{"text": "  \\n"}\n{"text": "end"}'
    )
    (tmp_path / f"b.jsonl{compression}").write_bytes(COMPRESS[compression](lines))
    assert read(tmp_path / f"*{compression or '[tl]'}") == [text, text, "end"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_files_of_several_frames_are_read_whole_and_cut_ones_are_detected(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    frames = [COMPRESS[compression](f"{i} text".encode() * 1000) for i in range(2)]
    path.write_bytes(frames[0] + frames[1])
    assert read(path) == ["0 text" * 1000 + "1 text" * 1000]
    for damaged in (frames[0] + frames[1][:-9], b"no such format"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.txt\..* (is damaged|cannot be read): "):
            read(path)


def test_globs_recurse_in_sorted_order_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "[odd].txt").write_text("odd")
    assert read(f"{tmp_path}/**/?.txt, {tmp_path}/3.txt,{tmp_path}/[odd].txt") == ["3.txt", "a/1.txt", "b/2.txt", "odd"]


def test_digest_depends_on_bytes_and_format_not_on_place(tmp_path: Path) -> None:
    def digest(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return digest_source(str(path), DigestMemo(tmp_path / "memo"))

    same = digest("a.txt", "one")
    assert digest("folder/b.txt", "one") == same
    assert len({same, digest("c.txt", "two"), digest("d.jsonl", "one")}) == 3


def test_embedded_text_is_the_same_every_time_and_without_tables() -> None:
    modules = [item for item in source_items("embedded") if isinstance(item, Path)]
    names = {path.name for path in modules}
    assert modules == source_items("embedded")
    assert modules != sorted(modules)
    assert {"argparse.py", "textwrap.py"} <= names
    assert not {"topics.py", "cp1252.py", "entities.py", "stringprep.py"} & names
    assert not [path for path in modules if "test" in path.parts or "site-packages" in path.parts]
    sample = read("embedded", max_bytes=200_000)
    assert sum(len(text.encode()) for text in sample) == 200_000
    assert "".join(sample) == "".join(read("embedded", max_bytes=400_000))[: len("".join(sample))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), min_size=1), min_size=1, max_size=4),
    max_bytes=st.integers(1, 40),
    is_text=st.booleans(),
)
def test_max_bytes_cuts_at_a_character(tmp_path: Path, texts: list[str], max_bytes: int, is_text: bool) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    if is_text:
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_bytes(text.encode())
        source = tmp_path / "*.txt"
    else:
        source = tmp_path / "a.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    whole = "".join(texts)
    if len(whole[0].encode()) > max_bytes:
        with pytest.raises(UserError, match="holds no text"):
            read(source, max_bytes=max_bytes)
        return
    got = "".join(read(source, max_bytes=max_bytes))
    assert whole.startswith(got)
    assert len(got.encode()) <= max_bytes
    assert got == whole or len(whole[: len(got) + 1].encode()) > max_bytes


def test_only_as_much_of_a_text_file_is_read_as_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DOCUMENT_BYTES_LIMIT", 1000)
    monkeypatch.setattr(files, "READ_BYTES", 100)
    (tmp_path / "a.txt").write_text("\u00e9" * 5000)
    assert read(tmp_path / "a.txt", max_bytes=501) == ["\u00e9" * 250]
    (tmp_path / "b.jsonl").write_text('{"text": "' + "e" * 5000 + '"}')
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(UserError, match=f"{name}.* of more than .* MiB; split it"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xffdef", r"a\.txt is not UTF-8 text: byte 0xff at offset 3$"),
        ("a.txt", b"\xef\xbb\xbfabc\xe6\xbc", r"a\.txt is not UTF-8 text: byte 0xe6 at offset 6$"),
        ("a.txt", b" \n", r"holds no text in 1 file\(s\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2 is not JSON: "),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON: "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl:2 is not UTF-8 text: byte 0xff at 10"),
        (
            "a.jsonl",
            b'{"txet": "a", "id": 1}',
            r'a\.jsonl:1 has no field .*="text"; .*: txet, id\. Did you mean "txet"\?',
        ),
        ("a.jsonl", b"[1]", r'a\.jsonl:1 must be a JSON object with a "text" field, not list'),
        ("a.jsonl", b'{"text": null}', r'a\.jsonl:1: field "text" must be text, not NoneType'),
        ("a.jsonl", b'{"text": "\\ud800"}', r'a\.jsonl:1: field "text" has half a character'),
        ("a.md", b"text", r"a\.md is of no known format; known: \.txt, \.jsonl"),
        ("a.gz", b"text", r"a\.gz is of no known format"),
    ],
)
def test_errors_say_where_and_what(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_sources_that_name_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matches no file \(from .*\)$"):
        read(tmp_path / "*.txt")
    with pytest.raises(UserError, match=r"matches no file .*; mixtures are not read here"):
        read("a.txt; b.txt")
    with pytest.raises(UserError, match=r"is a folder; name its files, such as .*\*\*/\*\.txt"):
        read(tmp_path)
    with pytest.raises(UserError, match="names no file"):
        read(" , ")
