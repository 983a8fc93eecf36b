"""What is trained again later is laid aside: a joint phase goes on from the masters and their moments, at its rates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory.precision import from_storage
from stackwise_jax.train import loop
from stackwise_jax.train.state import part_names, split

# Two stacks one after another, the trunk rounded; then both together, of which the first is given no learning rate.
CONFIG = {
    "model__architecture__n_stacks": 2,
    "training__phase_budget": "2 steps",
    "training__embedding_budget": "2 steps",
    "training__fusion__budget": "2 steps",
    "training__fusion__trunk_learning_rate_scale": 0.0,
    "precision__trunk": "bf16",
    "evaluation__rows": 8,
    "checkpoint__keep": 1,
}


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


def watched(run: loop.Run, before_joint: Callable[[loop.Run], None] = lambda _: None) -> dict[str, Any]:
    """Runs to the end. What each part was when it was settled first, as the joint phase began, and as it ended."""
    seen: dict[str, Any] = {"settled": {}, "begun": {}, "ended": {}}
    begin, settle = run._begin_phase, run._settle
    joint = run.plan.phases[-1]

    def copied(phase: Any) -> dict[Any, Any]:
        parts = split(run.state, part_names(phase))
        return {name: jax.tree.map(np.array, part) for name, part in parts.items()}

    def begin_phase(phase: Any, signature: Any) -> None:
        if phase is joint:
            run.folder.flush()
            seen["folders"] = sorted(path.name for path in run.folder.stacks.iterdir())
            before_joint(run)
        begin(phase, signature)
        if phase is joint:
            seen["begun"] = copied(phase)

    def settle_phase(phase: Any) -> None:
        parts = copied(phase)
        if phase is joint:
            seen["ended"] = parts
        else:
            seen["settled"] |= {name: parts[name] for name in phase.settles}
        settle(phase)

    run._begin_phase, run._settle = begin_phase, settle_phase
    seen["result"] = run.to_end()
    return seen


@pytest.fixture(scope="module")
def joint(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("joint") / "run"
    seen = watched(loop.Run(tiny(**CONFIG), tiny_corpus, folder, lambda _: None))
    return {**seen, "folder": folder}


def test_a_joint_phase_begins_with_what_was_laid_aside(joint: dict[str, Any]) -> None:
    begun, settled = joint["begun"], joint["settled"]
    assert set(begun) == {"embedding", "head", 0, 1}
    for name in ("embedding", 0):
        assert same(begun[name], settled[name])  # weights and moments, to the bit
        assert any(np.any(leaf) for leaf in arrays(begun[name][1]))
    rounded = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32), settled[0][0])
    assert not same(begun[0][0], rounded)  # the trunk that the second stack was trained on


def test_what_was_laid_aside_detects_a_trunk_in_its_place(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, joint: dict[str, Any]
) -> None:
    """The twin: a shelf that was lost. The joint phase begins with the rounded trunk and fresh moments."""
    run = loop.Run(tiny(**CONFIG), tiny_corpus, tmp_path / "run", lambda _: None)
    seen = watched(run, before_joint=lambda run: run.frozen.shelves.clear())
    assert same(seen["settled"][0], joint["settled"][0])
    assert not same(seen["begun"][0][0], joint["begun"][0][0])
    assert not same(seen["begun"][0][1], joint["begun"][0][1])
    assert same(seen["begun"][0][0], from_storage(loop.to_storage(joint["settled"][0][0], "bf16"), jnp.float32))


def test_shelves_leave_the_folder_once_they_are_used(joint: dict[str, Any]) -> None:
    before = [name.rpartition("-")[0] for name in joint["folders"]]
    assert {"shelf-0", "shelf-embedding"} <= set(before)
    after = [path.name.rpartition("-")[0] for path in (joint["folder"] / "stacks").iterdir()]
    assert sorted(after) == ["0000", "0001", "embedding", "head", "tap-0000"]


def test_a_part_without_a_learning_rate_does_not_move(joint: dict[str, Any]) -> None:
    begun, ended = joint["begun"], joint["ended"]
    assert same(ended[0][0], begun[0][0])
    assert not same(ended[0][1], begun[0][1])  # its moments are kept all the same
    for name in ("embedding", "head", 1):
        assert not same(ended[name][0], begun[name][0])
