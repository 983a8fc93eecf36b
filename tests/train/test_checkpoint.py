"""Run folders: what is written is read back, what is damaged is named, what is foreign is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.train import checkpoint
from stackwise_jax.train.checkpoint import DamagedError, RunFolder

TREE = {
    "params": {"stacks": [{"kernel": jnp.arange(12.0).reshape(3, 4)}, {"kernel": jnp.ones((2,), jnp.bfloat16)}]},
    "optimizer": {"count": jnp.array(3, jnp.int32)},
}
META = {"parts": {"embedding": {}, "stacks": {}, "head": {}, "taps": {}}}


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", tiny())


def test_arrays_come_back_bitwise(folder: RunFolder) -> None:
    folder.write_step(1, 7, TREE, META, keep=2)
    step = checkpoint.latest_step(folder.path)
    assert step is not None
    assert checkpoint.read_meta(step)["step"] == 7
    restored = checkpoint.read_tree(step, TREE)
    for one, other in zip(restored["params"]["stacks"], TREE["params"]["stacks"], strict=True):
        assert one["kernel"].dtype == other["kernel"].dtype
        np.testing.assert_array_equal(np.asarray(one["kernel"]), np.asarray(other["kernel"]))
    assert int(restored["optimizer"]["count"]) == 3


def test_an_empty_tree_is_a_checkpoint_too(folder: RunFolder) -> None:
    folder.write_step(9, 9, {}, META, keep=2)
    assert checkpoint.read_tree(folder.steps / "00000009-0009", {}) == {}


def test_every_flipped_byte_is_noticed(folder: RunFolder) -> None:
    """Flips one byte in every file of a checkpoint in turn; either the numbers are right or it is called damaged."""
    folder.write_step(1, 7, TREE, META, keep=2)
    step = folder.steps / "00000007-0001"
    silent, refused = [], 0
    for file in [path for path in step.rglob("*") if path.is_file() and path.stat().st_size]:
        good = file.read_bytes()
        for place in {0, len(good) // 3, len(good) // 2, len(good) - 1}:
            file.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
            try:
                meta, tree = checkpoint.read_meta(step), checkpoint.read_tree(step, TREE)
                kernel = np.asarray(tree["params"]["stacks"][0]["kernel"])
                if meta["step"] != 7 or not np.array_equal(kernel, np.arange(12.0).reshape(3, 4)):
                    silent.append((file, place))
            except DamagedError:
                refused += 1
        file.write_bytes(good)
    assert not silent
    assert refused > 0


def test_a_wrong_shape_or_dtype_is_refused(folder: RunFolder) -> None:
    folder.write_step(1, 7, {"a": jnp.ones((2, 3))}, META, keep=2)
    step = folder.steps / "00000007-0001"
    with pytest.raises(DamagedError, match=r"a is float32\[2, 3\], expected float32\[3, 2\]"):
        checkpoint.read_tree(step, {"a": jnp.ones((3, 2))})
    with pytest.raises(DamagedError, match="expected bfloat16"):
        checkpoint.read_tree(step, {"a": jnp.ones((2, 3), jnp.bfloat16)})
    with pytest.raises(DamagedError, match="b is only on one side"):
        checkpoint.read_tree(step, {"a": jnp.ones((2, 3)), "b": jnp.ones(1)})


def test_old_steps_go_and_what_they_alone_needed(folder: RunFolder) -> None:
    parts = []
    for step, stack in ((1, 0), (2, 0), (3, 1), (4, 1)):
        parts.append(folder.write_part(f"{stack:04d}", {"a": jnp.full(2, stack)}, f"{stack}" * 64))
        folder.write_step(0, step, {}, {"parts": {**META["parts"], "stacks": {str(stack): parts[-1]}}}, keep=2)
        assert {path.name for path in folder.stacks.iterdir()} == set(parts[-2:])
    assert [path.name for path in checkpoint.committed(folder.steps)] == ["00000003-0000", "00000004-0000"]


def test_a_folder_without_a_manifest_does_not_exist(folder: RunFolder, tiny: Any) -> None:
    folder.write_step(0, 1, {"a": jnp.ones(2)}, META, keep=2)
    folder.write_step(0, 2, {"a": jnp.ones(2)}, META, keep=2)
    (folder.steps / "00000002-0000" / "manifest.json").unlink()
    folder.unlock()
    latest = checkpoint.latest_step(folder.path)
    assert latest is not None
    assert latest.name == "00000001-0000"
    RunFolder(folder.path, tiny())
    assert not (folder.steps / "00000002-0000").exists()


def test_a_part_is_written_once(folder: RunFolder) -> None:
    reference = folder.write_part("0000", {"a": jnp.ones(2)}, "a" * 64)
    written = (folder.stacks / reference / "manifest.json").stat().st_mtime_ns
    assert folder.write_part("0000", {"a": jnp.ones(2)}, "a" * 64) == reference
    assert (folder.stacks / reference / "manifest.json").stat().st_mtime_ns == written
    assert folder.write_part("0000", {"a": jnp.zeros(2)}, "b" * 64) != reference


def test_a_folder_of_another_config_is_refused_untouched(folder: RunFolder, tiny: Any) -> None:
    folder.unlock()
    RunFolder(folder.path, tiny(seed=5)).unlock()  # nothing has been saved yet: the folder is taken over
    RunFolder(folder.path, tiny()).unlock()
    folder.write_step(0, 1, {"a": jnp.ones(2)}, META, keep=2)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"seed=0 \(now 5\).*another --workdir"):
        RunFolder(folder.path, tiny(seed=5))
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    RunFolder(folder.path, tiny(checkpoint__keep=5, logging__every_steps=3))  # these may change


def test_a_run_of_another_text_is_not_continued(folder: RunFolder) -> None:
    folder.require_corpus("xyz")
    folder.require_corpus("abc")
    folder.write_step(0, 1, {"a": jnp.ones(2)}, META, keep=2)
    folder.require_corpus("abc")
    with pytest.raises(UserError, match="another corpus"):
        folder.require_corpus("abd")


@pytest.mark.parametrize("kind", ["a file", "a folder of something else"])
def test_what_is_no_run_folder_is_refused(kind: str, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if kind == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(path, tiny())
    assert not (tmp_path / "thing" / "config.json").exists()


def test_a_broken_config_json_is_one_line(folder: RunFolder, tiny: Any) -> None:
    folder.write_step(0, 1, {"a": jnp.ones(2)}, META, keep=2)
    (folder.path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a config"):
        RunFolder(folder.path, tiny())


def test_the_manifest_is_what_commits(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while the manifest is written leaves the step before it as the newest."""
    folder.write_step(0, 1, {"a": jnp.ones(2)}, META, keep=2)
    original = checkpoint.write_text

    def crash(path: Path, text: str) -> None:
        if path.name == "manifest.json":
            raise OSError("No space left on device")
        original(path, text)

    monkeypatch.setattr(checkpoint, "write_text", crash)
    with pytest.raises(OSError, match="No space left"):
        folder.write_step(0, 2, {"a": jnp.ones(2)}, META, keep=2)
    latest = checkpoint.latest_step(folder.path)
    assert latest is not None
    assert checkpoint.read_meta(latest)["step"] == 1


def test_digests_are_read_not_trusted(folder: RunFolder) -> None:
    """The twin of the flipped bytes: with the digest of the flipped array in the manifest nothing is noticed."""
    folder.write_step(0, 1, {"a": jnp.ones(4)}, META, keep=2)
    step = folder.steps / "00000001-0000"
    folder.write_step(0, 2, {"a": jnp.zeros(4)}, META, keep=2)
    other = folder.steps / "00000002-0000"
    shutil.rmtree(step / "arrays")
    shutil.copytree(other / "arrays", step / "arrays")
    with pytest.raises(DamagedError, match="digest of a"):
        checkpoint.read_tree(step, {"a": jnp.ones(4)})
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["arrays"] = json.loads((other / "manifest.json").read_text())["arrays"]
    (step / "manifest.json").write_text(json.dumps(manifest))
    assert float(checkpoint.read_tree(step, {"a": jnp.ones(4)})["a"][0]) == 0.0


def test_a_folder_of_somebody_else_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    """Not even one that has a config.json and a folder called steps."""
    (tmp_path / "steps" / "step1").mkdir(parents=True)
    (tmp_path / "steps" / "step1" / "precious.bin").write_bytes(b"mine")
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UserError, match="unknown config field architectures"):
        RunFolder(tmp_path, tiny())
    assert (tmp_path / "steps" / "step1" / "precious.bin").read_bytes() == b"mine"
    assert "GPT2" in (tmp_path / "config.json").read_text()


def test_stray_files_are_left_alone(folder: RunFolder) -> None:
    for place in (folder.steps, folder.stacks):
        (place / ".DS_Store").write_text("x")
        (place / "mine").mkdir()
    folder.write_step(0, 1, {"a": jnp.ones(2)}, META, keep=1)
    folder.write_step(0, 2, {"a": jnp.ones(2)}, META, keep=1)
    assert {path.name for path in folder.steps.iterdir()} == {".DS_Store", "mine", "00000002-0000"}
    assert {path.name for path in folder.stacks.iterdir()} == {".DS_Store", "mine"}


def test_a_part_that_a_step_needs_is_not_swept(folder: RunFolder, tiny: Any) -> None:
    part = folder.write_part("0000", {"a": jnp.ones(2)}, "c" * 64)
    folder.write_step(0, 1, {}, {"parts": {**META["parts"], "stacks": {"0": part}}}, keep=2)
    (folder.stacks / part / "manifest.json").unlink()
    folder.unlock()
    RunFolder(folder.path, tiny())
    assert (folder.stacks / part / "arrays").exists()


def test_two_runs_do_not_share_a_folder(folder: RunFolder, tiny: Any) -> None:
    with pytest.raises(UserError, match="in use by another run"):
        RunFolder(folder.path, tiny())
    folder.unlock()
    RunFolder(folder.path, tiny())


def test_what_is_damaged_comes_with_a_remedy(folder: RunFolder) -> None:
    folder.write_step(0, 1, {"a": jnp.ones(2)}, META, keep=2)
    (folder.steps / "00000001-0000" / "meta.json").write_text("[]")
    with pytest.raises(DamagedError, match="remove that folder to continue from the snapshot before it"):
        checkpoint.read_meta(folder.steps / "00000001-0000")
