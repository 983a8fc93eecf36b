"""Blocks of a token file: checked when first read, only then, and never trusted when damaged."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackwise_jax.data import blocks
from stackwise_jax.data.blocks import DIGEST_BYTES, BlockWriter, CheckedRows
from stackwise_jax.data.order import Order, chunk_layout
from stackwise_jax.data.pipeline import make_batches
from stackwise_jax.data.split import Part, Split
from stackwise_jax.errors import UserError

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)


def write(path: Path, tokens: np.ndarray, piece: int = 7) -> bytes:
    with BlockWriter(path) as writer:
        data = tokens.tobytes()
        for start in range(0, len(data), piece):
            writer.write(data[start : start + piece])
        return writer.digests()


def open_rows(path: Path, tokens: np.ndarray, digests: bytes) -> CheckedRows:
    return CheckedRows(path, "<u2", (tokens.shape[0], tokens.shape[1]), digests)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n_rows=st.integers(1, 30), seq_len=st.integers(1, 90), piece=st.integers(1, 200), data=st.data())
def test_rows_are_those_of_the_file_and_every_damage_is_found(
    tmp_path: Path, n_rows: int, seq_len: int, piece: int, data: st.DataObject
) -> None:
    tokens = np.arange(n_rows * seq_len, dtype=np.uint16).reshape(n_rows, seq_len)
    path = tmp_path / "tokens"
    digests = write(path, tokens, piece)
    assert len(digests) == -(-tokens.nbytes // BLOCK) * DIGEST_BYTES
    row_ids = np.array(data.draw(st.lists(st.integers(0, n_rows - 1), min_size=1, max_size=5)))
    np.testing.assert_array_equal(open_rows(path, tokens, digests)[row_ids], tokens[row_ids])
    place = data.draw(st.integers(0, tokens.nbytes - 1))
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    damaged = open_rows(path, tokens, digests)
    row = place // (2 * seq_len)
    with pytest.raises(UserError, match=rf"{path} is damaged in its bytes from {place // BLOCK * BLOCK} on; .*prepare"):
        damaged[np.array([row])]
    with pytest.raises(UserError, match="is damaged"):
        damaged.check_all()


def test_only_the_blocks_of_a_row_are_read_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(640, dtype=np.uint16).reshape(40, 16)  # two rows a block
    path = tmp_path / "tokens"
    rows = open_rows(path, tokens, write(path, tokens))
    checked: list[int] = []
    check = CheckedRows._check
    monkeypatch.setattr(CheckedRows, "_check", lambda self, block: (checked.append(block), check(self, block)))
    rows[np.array([38, 39, 2])]
    rows[np.array([3])]
    assert checked == [1, 19]
    rows[np.array([4, 2])]
    assert checked == [1, 19, 2]
    assert rows.checked_blocks == 3


def test_a_file_of_another_size_is_refused_at_once(tmp_path: Path) -> None:
    tokens = np.arange(64, dtype=np.uint16).reshape(4, 16)
    path = tmp_path / "tokens"
    digests = write(path, tokens)
    for content in (path.read_bytes()[:-2], path.read_bytes() + b"  "):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"tokens is damaged: {len(content)} bytes, not 128"):
            open_rows(path, tokens, digests)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="tokens is damaged: 0 bytes"):
        open_rows(path, tokens, digests)
    path.unlink()
    with pytest.raises(UserError, match=r"tokens cannot be read \(No such file"):
        open_rows(path, tokens, digests)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    tokens = np.arange(64, dtype=np.uint16).reshape(4, 16)
    rows = open_rows(tmp_path / "tokens", tokens, write(tmp_path / "tokens", tokens))
    rows.check_all()
    os.truncate(tmp_path / "tokens", 100)
    assert rows[np.array([2])].shape == (1, 16)
    with pytest.raises(UserError, match="tokens has been cut short while it was used"):
        rows[np.array([3])]


def make_split(path: Path, n_rows: int) -> Split:
    tokens = np.arange(n_rows * 4, dtype=np.uint16).reshape(n_rows, 4)
    part = Part(0, n_rows, n_rows * 4, 1, 0, weight=1)
    return Split(open_rows(path, tokens, write(path, tokens)), 65534, 65535, (part,), n_rows, "", seed=1)


def test_a_batch_far_out_reads_no_more_than_the_first(tmp_path: Path) -> None:
    """The work of a batch is that of its own rows: resuming at step ten million reads what starting does."""
    for start in (0, 10**7):
        split = make_split(tmp_path / "tokens", 12_000)
        layout = chunk_layout(split.n_rows, 8, 10, 1000)
        next(iter(make_batches(split, Order(layout, 8, 0), isolate_documents=True, start=start)))
        assert isinstance(split.tokens, CheckedRows)
        assert 0 < split.tokens.checked_blocks <= 8 * 12  # of 1500: the batch, and what is read ahead


def test_a_row_number_far_out_is_found_without_the_ones_before_it() -> None:
    class Untouched:
        shape = (2**31 - 1, 4)

        def __getitem__(self, places: np.ndarray) -> np.ndarray:
            assert len(places) == 3
            return np.broadcast_to(places[:, None], (3, 4)).astype(np.uint32)

    part = Part(0, 2**31 - 1, 1, 1, 0, weight=2**31 - 1)
    split = Split(np.zeros((1, 4), np.uint32), 2, 0, (part,), 2**31 - 1, "", seed=20)
    object.__setattr__(split, "tokens", Untouched())
    tokens, _, _ = split.rows(np.array([0, 10**7, 2**31 - 2]), isolate_documents=True)
    assert len(set(tokens[:, 0].tolist())) == 3


def test_damage_stops_the_stream_of_batches(tmp_path: Path) -> None:
    split = make_split(tmp_path / "tokens", 64)
    content = bytearray((tmp_path / "tokens").read_bytes())
    content[100] ^= 4
    (tmp_path / "tokens").write_bytes(content)
    batches = iter(make_batches(split, Order(chunk_layout(64, 8, 10, 1000), 8, 0), isolate_documents=True))
    with pytest.raises(UserError, match="tokens is damaged in its bytes from 64 on"):
        list(islice(batches, 8))
