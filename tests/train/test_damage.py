"""Damaged run folders: files of one are flipped, cut, emptied, zeroed, swapped or removed in turn; nothing is silent.

A reader and a run must each use the same numbers as before, or those of an older sound snapshot and say so, or refuse.
STACKWISE_DAMAGES=200 python -m pytest tests/train/test_damage.py -s takes more files than the suite has time for.
"""

import itertools
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.memory.fingerprint import tree_digest
from stackwise_jax.train import loop
from stackwise_jax.train.checkpoint import DamagedError
from stackwise_jax.train.folder import RunFolder, newest_snapshot
from stackwise_jax.train.trained import load_trained

CASES = int(os.environ.get("STACKWISE_DAMAGES", "20"))


@pytest.fixture(scope="module")
def sound(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(config, folder) of a run in its last phase: three frozen parts, two taps, and two snapshots of that phase."""
    config = tiny(checkpoint__every_steps=2, checkpoint__keep=3, logging__every_steps=1)
    folder = tmp_path_factory.mktemp("sound") / "run"
    run = loop.Run(config, tiny_corpus, folder, lambda _: None)
    for index in range(3):
        run._run_phase(run.plan.phases[index], run.plan.signatures[index])
    phase, signature = run.plan.phases[3], run.plan.signatures[3]
    run._run_phase(phase, signature)
    run.folder.close()
    shutil.rmtree(folder / "steps" / run.folder.newest)  # the end: what is left is a run under way
    return config, folder


def numbers(folder: Path) -> dict[str, str]:
    """Every number that a run would continue with, by snapshot; read past the code under test only in its order."""
    found = {}
    for step in sorted((folder / "steps").iterdir()):
        copy = folder.parent / f"only-{step.name}"
        shutil.copytree(folder, copy)
        for other in (copy / "steps").iterdir():
            if other.name != step.name:
                shutil.rmtree(other)
        snapshot, damaged = newest_snapshot(copy)
        assert snapshot is not None
        assert not damaged
        found[step.name] = digest_of(snapshot)
        shutil.rmtree(copy)
    return found


def digest_of(snapshot: Any) -> str:
    frozen = snapshot.frozen
    meta = np.frombuffer(repr((snapshot.meta["position"], snapshot.meta["parts"], snapshot.config)).encode(), np.uint8)
    return tree_digest([snapshot.state, frozen.embedding, frozen.stacks, frozen.head, meta])


def damages(folder: Path, count: int) -> Iterator[str]:
    """Damages a file of `folder`, kind by kind; yields what it did. The caller restores the folder."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    draw = random.Random(0)
    draw.shuffle(files)
    files.sort(key=lambda file: file.name != "manifest.json")  # first those whose damage is sure to matter
    kinds = ("flip", "cut", "remove", "zero", "swap", "flip", "empty")
    for file, kind, _ in zip(itertools.cycle(files), itertools.cycle(kinds), range(count), strict=False):
        path = folder / file
        good = path.read_bytes()
        if kind == "flip":
            place = draw.randrange(len(good))
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << draw.randrange(8))]) + good[place + 1 :])
        elif kind == "cut":
            path.write_bytes(good[: draw.randrange(len(good))])
        elif kind == "remove":
            path.unlink()
        elif kind == "zero":
            path.write_bytes(b"\0" * len(good))
        elif kind == "empty":
            path.write_bytes(b"")
        else:
            other = folder / draw.choice([other for other in files if other.name == file.name])
            path.write_bytes(other.read_bytes())
            other.write_bytes(good)
        yield f"{kind} {file}"


def test_no_damage_is_silent(sound: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = sound
    right = numbers(folder)
    newest = max(right)
    silent, outcomes = [], {"right": 0, "fell back": 0, "refused": 0}
    copy = tmp_path / "run"
    pristine = tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    shutil.copytree(folder, copy)
    for case in damages(copy, CASES):
        capsys.readouterr()
        try:
            opened = RunFolder(copy, config, say=print)
            try:
                snapshot = opened.restore()
            finally:
                opened.close()
        except UserError as error:
            outcomes["refused"] += 1
            if "\n" in str(error):
                silent.append(f"{case}: {error}")
        else:
            said = capsys.readouterr().out
            assert snapshot is not None, case
            is_newest = snapshot.folder.name == newest
            outcomes["right" if is_newest else "fell back"] += 1
            if digest_of(snapshot) != right[snapshot.folder.name] or (not is_newest and "is damaged" not in said):
                silent.append(f"{case}: {said}")
        shutil.rmtree(copy)
        shutil.copytree(pristine, copy)
    assert not silent, "\n".join(silent)
    print(outcomes)
    assert all(outcomes.values()), outcomes


@pytest.mark.parametrize(
    ("file", "outcome"),
    [
        ("config.json", "right"),  # each snapshot holds its own
        ("tokenizer.model", "refused"),
        ("steps/00000020-0003/meta.json", "fell back"),
        ("steps/00000018-0003/meta.json", "right"),
        ("stacks/tap-0001-*/manifest.json", "refused"),
    ],
)
def test_readers_are_told_too(
    file: str, outcome: str, sound: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generation and evaluation read the tokenizer and the heads of every depth besides; they rename nothing."""
    _, folder = sound
    n_stacks = 2 if "tap" in file else None
    whole = load_trained(folder, n_stacks=n_stacks)
    copy = shutil.copytree(folder, tmp_path / "run")
    (place,) = copy.glob(file)
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 4
    place.write_bytes(bytes(content))
    before = sorted(copy.rglob("*"))
    if outcome == "refused":
        with pytest.raises(UserError, match=re.escape(place.parent.name if n_stacks else "tokenizer.model")):
            load_trained(copy, n_stacks=n_stacks)
    else:
        read = load_trained(copy)
        assert (read.step == whole.step) == (outcome == "right")
        assert ("is damaged" in capsys.readouterr().err) == (outcome == "fell back")
        assert read.config == whole.config
        assert (tree_digest(read.rack) == tree_digest(whole.rack)) == (outcome == "right")
    assert sorted(copy.rglob("*")) == before


def test_a_run_goes_on_from_the_last_sound_snapshot(
    sound: tuple[Any, Path], tiny_corpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = sound
    whole = loop.run(config, tiny_corpus, shutil.copytree(folder, tmp_path / "whole"), say=lambda _: None)
    copy = shutil.copytree(folder, tmp_path / "copy")
    newest = max((copy / "steps").iterdir())
    (newest / "manifest.json").unlink()
    capsys.readouterr()
    again = loop.run(config, tiny_corpus, copy, say=lambda _: None)
    said = capsys.readouterr().err
    assert f"warning: {newest} is damaged: manifest.json: No such file" in said
    assert newest.with_name(f"{newest.name}.damaged").exists()
    for one, other in zip(jax.tree.leaves(whole.rack), jax.tree.leaves(again.rack), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_part_takes_the_run_back_before_it(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    """It and the snapshots that need it are set aside, and the run writes them all again."""
    config = tiny(checkpoint__keep=9)
    whole = loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    (part,) = (tmp_path / "run" / "stacks").glob("0001-*")
    (part / "meta.json").write_text("{}")
    again = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    assert again.position.phase == 2
    assert part.with_name(f"{part.name}.damaged").exists()
    for one, other in zip(jax.tree.leaves(whole.rack), jax.tree.leaves(again.to_end().rack), strict=True):
        np.testing.assert_array_equal(one, other)
    assert part.exists()


def test_without_a_sound_snapshot_nothing_is_touched(sound: tuple[Any, Path], tiny_corpus: Any, tmp_path: Path) -> None:
    config, folder = sound
    copy = shutil.copytree(folder, tmp_path / "copy")
    for step in (copy / "steps").iterdir():
        (step / "manifest.json").write_text("{}")
    names = sorted(copy.rglob("*"))
    for _ in range(2):  # and not taken for a new run the second time
        with pytest.raises(UserError, match=r"holds no sound snapshot: .* restore the folder from a copy"):
            loop.Run(config, tiny_corpus, copy, lambda _: None)
    with pytest.raises(UserError, match="holds no sound snapshot"):
        load_trained(copy)
    assert sorted(copy.rglob("*")) == names


def test_the_error_names_the_folder() -> None:
    assert DamagedError(Path("a"), ValueError("x\ny")).folder == Path("a")
    assert str(DamagedError(Path("a"), ValueError("x\ny"))) == "a is damaged: x"
