"""Digests are remembered as long as a file is what it was, and not a moment too early."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from stackwise_jax.data import digests
from stackwise_jax.data.digests import DigestMemo
from stackwise_jax.errors import UserError


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    digest = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path: (names.append(path.name), digest(path))[1])
    return names


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets some seconds pass."""
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 10**10)


def test_a_file_is_read_again_only_when_it_has_changed(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    memo = DigestMemo(tmp_path / "memo")
    settle(monkeypatch)
    for _ in range(3):
        assert memo.digests(paths) == {path: hashlib.sha256(path.name.encode()).digest() for path in paths}
    assert reads == ["a", "b", "c"]
    paths[1].write_text("B")
    os.utime(paths[2], (1, 1))
    assert memo.digests(paths)[paths[1]] == hashlib.sha256(b"B").digest()
    assert reads[3:] == ["b", "c"]
    memo.digests(paths)
    assert len(reads) == 5
    assert DigestMemo(tmp_path / "memo").digests(paths[:1])  # another list of files
    assert len(reads) == 6


def test_a_file_that_may_still_change_within_its_clock_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    memo = DigestMemo(tmp_path / "memo")
    memo.digests([path])
    memo.digests([path])
    assert reads == ["a", "a"]


@pytest.mark.parametrize(
    "content", ["", "[1]", "3", '{"a": 1}', "not json", '{"PATH": ["x"]}', '{"PATH": [1, 2, 3, "zz"]}']
)
def test_a_damaged_memo_only_costs_time(
    tmp_path: Path, reads: list[str], content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("a")
    memo = DigestMemo(tmp_path / "memo")
    settle(monkeypatch)
    memo.digests([path])
    (store,) = (tmp_path / "memo").iterdir()
    stamp = json.dumps(digests._stamp(path))[1:-1]
    store.write_text(content.replace("PATH", str(path)).replace("1, 2, 3", stamp))
    assert memo.digests([path])[path] == hashlib.sha256(b"a").digest()
    assert reads == ["a", "a"]
    assert memo.digests([path])[path] == hashlib.sha256(b"a").digest()
    assert len(reads) == 2


def test_a_memo_that_cannot_be_written_and_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("a")
    assert DigestMemo(path / "memo").digests([path])[path] == hashlib.sha256(b"a").digest()
    with pytest.raises(UserError, match="b cannot be read: No such file"):
        DigestMemo(tmp_path / "memo").digests([tmp_path / "b"])
