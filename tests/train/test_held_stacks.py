"""Frozen stacks that need not lie in host memory."""

from typing import Any

import numpy as np
import pytest

from stackwise_jax.train import loop
from stackwise_jax.train.folder import newest_snapshot
from stackwise_jax.train.state import HeldStacks


def stack(value: float) -> dict[str, Any]:
    return {"kernel": np.full((1, 16, 16), value, np.float32)}  # 1024 bytes


def test_the_lowest_numbers_go_first_and_are_read_when_they_are_asked_for():
    read: list[int] = []
    held = HeldStacks()
    for number in range(4):
        held.hold(number, stack(number), lambda own=number: (read.append(own), stack(own))[1])
    held[4] = stack(4.0)  # of which the disk has no copy
    held.release(3000, unwritten=[1])
    assert list(held) == [0, 1, 2, 3, 4]
    assert [int(held[number]["kernel"][0, 0, 0]) for number in held] == [0, 1, 2, 3, 4]
    assert read == [0, 2, 3]
    del held[1]
    assert 0 in held


@pytest.mark.parametrize("host_gib", [0.0, 8.0])
def test_a_run_that_holds_none_ends_as_one_that_holds_all(host_gib: float, tiny: Any, tiny_corpus: Any, tmp_path: Any):
    config = tiny(model__architecture__n_stacks=3, checkpoint__host_gib=host_gib, precision__trunk="nvfp4")
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    result = run.to_end()
    run.frozen.stacks.release(host_gib * 2**30)
    held = sum(tree is not None for tree in run.frozen.stacks._trees.values())
    assert held == (3 if host_gib else 0)
    assert [len(own) for own in (result.rack["stacks"], result.frozen.stacks)] == [3, 3]
    snapshot, _ = newest_snapshot(tmp_path / "run")
    assert snapshot is not None
    again = snapshot.frozen
    assert again.digests == run.frozen.digests
    for number in range(3):
        for found, wanted in zip(_leaves(again.stacks[number]), _leaves(result.rack["stacks"][number]), strict=True):
            np.testing.assert_array_equal(found, wanted)


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)
