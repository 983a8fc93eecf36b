"""The run folder: what is kept, what goes, what is set aside, what is refused, and what happens in the background."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.train import checkpoint
from stackwise_jax.train import folder as folder_lib
from stackwise_jax.train.checkpoint import DamagedError, StorageError
from stackwise_jax.train.folder import Part, RunFolder, committed, make_part

META = {"parts": {"embedding": {}, "stacks": {}, "head": {}, "taps": {}}}


@pytest.fixture
def lines() -> list[str]:
    """What the folder has said."""
    return []


@pytest.fixture
def folder(tiny: Any, tmp_path: Path, lines: list[str]) -> RunFolder:
    return RunFolder(tmp_path / "run", tiny(), say=lines.append)


def save(
    folder: RunFolder, step: int, part: Part | None = None, *, phase: int = 0, keep: int = 2, required: bool = True
) -> None:
    parts = {**META["parts"], "stacks": {"0": part.reference} if part else {}}
    tree = {"a": np.full(2, step, np.float32)}
    folder.save(step, phase, tree, {"parts": parts}, [part] if part else [], keep=keep, required=required)
    folder.flush()


def stack(value: int) -> Part:
    return make_part("0000", {"a": np.full(2, value, np.float32)})


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_old_steps_go_and_what_they_alone_needed(folder: RunFolder) -> None:
    parts = [stack(value) for value in (0, 0, 1, 1)]
    for step, part in enumerate(parts, start=1):
        save(folder, step, part)
        assert names(folder.stacks) == {part.reference for part in parts[max(0, step - 2) : step]}
    assert [path.name for path in committed(folder.steps)] == ["00000003-0000", "00000004-0000"]


def test_nothing_goes_before_the_new_one_is_there(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1, keep=1)

    def fail(*args: Any) -> None:
        raise StorageError("full")

    monkeypatch.setattr(folder_lib, "write_folder", fail)
    with pytest.raises(UserError, match="full; what was saved before is untouched: free space"):
        save(folder, 2, keep=1)
    assert names(folder.steps) == {folder.newest} == {"00000001-0000"}


def test_parts_stay_while_a_kept_step_cannot_say_what_it_needs(folder: RunFolder) -> None:
    save(folder, 1, stack(1))
    (folder.steps / "00000001-0000" / "meta.json").write_text("[]")
    save(folder, 2, stack(2))
    assert len(names(folder.stacks)) == 2
    save(folder, 3, stack(2))
    assert len(names(folder.stacks)) == 1


def test_what_was_half_written_is_swept(folder: RunFolder, tiny: Any) -> None:
    save(folder, 1)
    for half in (folder.steps / "00000002-0000.tmp", folder.stacks / "0000-0123456789abcdef.tmp"):
        half.mkdir()
    folder.close()
    again = RunFolder(folder.path, tiny())
    assert (names(again.steps), names(again.stacks)) == ({"00000001-0000"}, set())


def test_a_part_is_written_once_and_again_only_where_damaged(folder: RunFolder, lines: list[str]) -> None:
    part = stack(1)
    save(folder, 1, part)
    manifest = folder.stacks / part.reference / "manifest.json"
    written = manifest.stat().st_mtime_ns
    save(folder, 2, part)
    assert manifest.stat().st_mtime_ns == written
    manifest.unlink()
    save(folder, 3, part)
    assert names(folder.stacks) == {part.reference, f"{part.reference}.damaged"}
    assert ["is written again" in line for line in lines] == [True]
    assert checkpoint.read_part(folder.stacks / part.reference, part.tree)[1] == part.digest


def test_a_folder_of_another_config_is_refused_untouched(folder: RunFolder, tiny: Any) -> None:
    folder.close()
    RunFolder(folder.path, tiny(seed=5)).close()  # nothing has been saved yet: the folder is taken over
    taken = RunFolder(folder.path, tiny())
    save(taken, 1)
    taken.close()
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"seed=0 \(now 5\).*another --workdir"):
        RunFolder(folder.path, tiny(seed=5))
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    RunFolder(folder.path, tiny(checkpoint__keep=5, logging__every_steps=3))  # these may change


def test_a_run_of_another_text_is_not_continued(folder: RunFolder) -> None:
    folder.require_text("xyz", b"model", "t")
    folder.require_text("abc", b"model", "t")
    save(folder, 1)
    folder.require_text("abc", b"model", "t")
    for other in (("abd", "t"), ("abc", "u")):
        with pytest.raises(UserError, match="another corpus"):
            folder.require_text(other[0], b"model", other[1])


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
        (place / "mine.tmp").mkdir()
        (place / "00000001-0000.damaged").mkdir()
    save(folder, 1, keep=1)
    save(folder, 2, keep=1)
    stray = {".DS_Store", "mine", "mine.tmp", "00000001-0000.damaged"}
    assert names(folder.steps) == {*stray, "00000002-0000"}
    assert names(folder.stacks) == stray


def test_two_runs_do_not_share_a_folder(folder: RunFolder, tiny: Any) -> None:
    with pytest.raises(UserError, match="in use by another run"):
        RunFolder(folder.path, tiny())
    folder.close()
    RunFolder(folder.path, tiny())


def test_writing_waits_for_nobody_and_closing_for_writing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    go, original = threading.Event(), folder_lib.write_folder

    def slow(*args: Any) -> None:
        assert go.wait(timeout=30)
        original(*args)

    monkeypatch.setattr(folder_lib, "write_folder", slow)
    folder.save(1, 0, {"a": np.ones(2)}, META, [stack(1)], keep=2, required=True)
    folder.check()
    assert not folder.newest
    assert not committed(folder.steps)
    go.set()
    folder.close()
    assert folder.newest == "00000001-0000"
    assert committed(folder.steps)


def test_parts_come_before_the_step_that_refers_to_them(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    original = folder_lib.write_folder

    def note(path: Path, *args: Any) -> None:
        order.append(path.parent.name)
        original(path, *args)

    monkeypatch.setattr(folder_lib, "write_folder", note)
    save(folder, 1, stack(1))
    assert order == ["stacks", "steps"]


def test_no_error_of_the_background_is_lost(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    for surface in (folder.flush, lambda: save(folder, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(folder_lib, "write_folder", broken)
            folder.save(1, 0, {}, META, [], keep=2, required=False)
            folder._writing.exception()  # it is over
        with pytest.raises(ZeroDivisionError):
            surface()
    monkeypatch.setattr(folder_lib, "write_folder", broken)
    folder.save(3, 0, {}, META, [], keep=2, required=False)
    folder._writing.exception()
    with pytest.raises(ZeroDivisionError):
        folder.check()


def test_a_full_disk_is_said_once_and_tried_again(
    folder: RunFolder, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise StorageError("the disk is full")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(folder_lib, "write_folder", fail)
            for step in (2, 4, 6):
                save(folder, step, required=False)
        assert not committed(folder.steps)[1:]
        save(folder, 1, required=False)
    assert len(lines) == 2
    assert "the run goes on" in lines[0]


def test_an_old_format_is_refused_untouched(folder: RunFolder, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    save(folder, 1)
    folder.close()
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(UserError, match="has checkpoint format 3, this version of stackwise_jax reads 2"):
        RunFolder(folder.path, tiny())
    assert names(folder.steps) == {"00000001-0000"}


def test_what_is_damaged_says_which_folder(folder: RunFolder) -> None:
    save(folder, 1)
    (folder.steps / "00000001-0000" / "meta.json").write_text("[]")
    with pytest.raises(DamagedError, match=r"00000001-0000 is damaged: meta\.json does not match") as caught:
        checkpoint.read_meta(folder.steps / "00000001-0000")
    assert caught.value.folder == folder.steps / "00000001-0000"
