"""Folders of arrays: what is written is read back, what is damaged is named, what is half written does not exist."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory.fingerprint import tree_digest
from stackwise_jax.train import checkpoint
from stackwise_jax.train.checkpoint import DamagedError, FormatError, StorageError, write_folder

TREE = {
    "params": {"stacks": [{"kernel": jnp.arange(12.0).reshape(3, 4)}, {"kernel": jnp.ones((2,), jnp.bfloat16)}]},
    "optimizer": {"count": jnp.array(3, jnp.int32)},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds TREE and {"step": 7}."""
    write_folder(tmp_path / "one", TREE, {"step": 7})
    return tmp_path / "one"


def test_arrays_come_back_bitwise(folder: Path) -> None:
    assert checkpoint.read_meta(folder)["step"] == 7
    restored, digest = checkpoint.read_part(folder, TREE)
    for one, other in zip(restored["params"]["stacks"], TREE["params"]["stacks"], strict=True):
        assert one["kernel"].dtype == other["kernel"].dtype
        np.testing.assert_array_equal(np.asarray(one["kernel"]), np.asarray(other["kernel"]))
    assert int(restored["optimizer"]["count"]) == 3
    assert digest == tree_digest(TREE)


def test_an_empty_tree_is_a_checkpoint_too(tmp_path: Path) -> None:
    write_folder(tmp_path / "empty", {}, {})
    assert checkpoint.read_tree(tmp_path / "empty", {}) == {}


def test_every_flipped_byte_is_noticed(folder: Path) -> None:
    """Flips one byte in every file of a checkpoint in turn; either the numbers are right or it is called damaged."""
    silent, refused = [], 0
    for file in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]:
        good = file.read_bytes()
        for place in {0, len(good) // 3, len(good) // 2, len(good) - 1}:
            file.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
            try:
                meta, tree = checkpoint.read_meta(folder), checkpoint.read_tree(folder, TREE)
                kernel = np.asarray(tree["params"]["stacks"][0]["kernel"])
                if meta["step"] != 7 or not np.array_equal(kernel, np.arange(12.0).reshape(3, 4)):
                    silent.append((file, place))
            except DamagedError:
                refused += 1
        file.write_bytes(good)
    assert not silent
    assert refused > 0


def test_a_wrong_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"a": jnp.ones((2, 3))}, {})
    with pytest.raises(DamagedError, match=r"a is float32\[2, 3\], expected float32\[3, 2\]"):
        checkpoint.read_tree(tmp_path / "a", {"a": jnp.ones((3, 2))})
    with pytest.raises(DamagedError, match="expected bfloat16"):
        checkpoint.read_tree(tmp_path / "a", {"a": jnp.ones((2, 3), jnp.bfloat16)})
    with pytest.raises(DamagedError, match="b is only on one side"):
        checkpoint.read_tree(tmp_path / "a", {"a": jnp.ones((2, 3)), "b": jnp.ones(1)})


def test_a_copy_under_another_name_is_refused(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("two"))
    with pytest.raises(DamagedError, match="it is a copy of one"):
        checkpoint.read_meta(folder.with_name("two"))


def test_another_format_is_refused_but_not_called_damaged(tmp_path: Path) -> None:
    """A folder as the first format had it: no number and no name in meta.json."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "meta.json").write_text('{"step": 3}')
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({"format": 1, "meta": "0" * 64, "arrays": {}}))
    with pytest.raises(DamagedError, match="does not match"):
        checkpoint.read_meta(tmp_path / "old")
    digest = hashlib.sha256(b'{"step": 3}').hexdigest()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({"format": 1, "meta": digest, "arrays": {}}))
    with pytest.raises(FormatError, match=r"format 1, this version of stackwise_jax reads 3; .* another --workdir"):
        checkpoint.read_meta(tmp_path / "old")


def test_digests_are_read_not_trusted(tmp_path: Path) -> None:
    """The twin of the flipped bytes: with the digest of the other array in the manifest nothing is noticed."""
    one, other = tmp_path / "one", tmp_path / "other"
    write_folder(one, {"a": jnp.ones(4)}, {})
    write_folder(other, {"a": jnp.zeros(4)}, {})
    shutil.rmtree(one / "arrays")
    shutil.copytree(other / "arrays", one / "arrays")
    with pytest.raises(DamagedError, match="digest of a"):
        checkpoint.read_tree(one, {"a": jnp.ones(4)})
    manifest = json.loads((one / "manifest.json").read_text())
    manifest["arrays"] = json.loads((other / "manifest.json").read_text())["arrays"]
    (one / "manifest.json").write_text(json.dumps(manifest))
    assert float(checkpoint.read_tree(one, {"a": jnp.ones(4)})["a"][0]) == 0.0


class PowerCutError(Exception):
    """Stands for the power cut: no handler of ours may clean up after it."""


def test_a_cut_anywhere_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies at every fsync and rename of our own in turn; under its own name the folder is whole or absent."""
    calls = [0]
    at = [0]

    def dying(original: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at[0]:
                raise PowerCutError
            return original(*args)

        return call

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # a dead process removes nothing
    outcomes = set()
    for number in range(1, 100):
        folder = tmp_path / str(number)
        calls[0], at[0] = 0, number
        try:
            write_folder(folder, {"a": jnp.ones(4)}, {})
        except PowerCutError:
            outcomes.add(folder.exists())
        else:
            break
        if folder.exists():
            checkpoint.verify(folder)
    assert number > 10
    assert outcomes == {False, True}  # only the last, the parent folder's own sync, comes after the renaming


def full(*args: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_and_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(StorageError, match=r"No space left on device \(needs about 8.0 KiB, .* are free\)"):
        write_folder(tmp_path / "a", {"a": jnp.ones(2048)}, {})
    assert list(tmp_path.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(checkpoint, "_write_contents", lambda *args: pytest.fail("it could have known"))
    with pytest.raises(StorageError, match=r"No space left on device .* 100 B are free"):
        write_folder(tmp_path / "a", {"a": jnp.ones(2048)}, {})


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from stackwise_jax.train.checkpoint import StorageError, write_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    write_folder(Path(sys.argv[1]), {"a": np.random.default_rng(0).normal(size=100_000)}, {})
except StorageError as error:
    print(error)
"""


def test_what_the_system_refuses_to_write_is_one_line(tmp_path: Path) -> None:
    """Not a stand-in: a process that may write files of 100 kB at most, through Orbax and all."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large (needs about 781.2 KiB" in done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.ones(4, np.float32)
    with pytest.raises(StorageError, match="reads back other bytes"):
        write_folder(tmp_path / "a", {"a": right}, {}, {"a": "0" * 64})
    assert not (tmp_path / "a").exists()


def test_a_small_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_text(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_text(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
