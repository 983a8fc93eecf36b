"""What a phase freezes, no later phase moves, not by a bit; what is live does move."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory.fingerprint import named_leaves
from stackwise_jax.train import loop
from stackwise_jax.train.state import PartSource
from stackwise_jax.types import Params


def snapshots(run: loop.Run) -> list[dict[str, np.ndarray]]:
    """The frozen rack as it stands after every phase."""
    taken = []
    plan = run.plan
    while run.position.phase < len(plan.phases):
        index = run.position.phase
        run._run_phase(plan.phases[index], plan.signatures[index])
        tree: Params = {"stacks": dict(run.frozen.stacks), "embedding": run.frozen.embedding, "head": run.frozen.head}
        taken.append({name: np.array(leaf) for name, leaf in named_leaves(tree).items()})
    return taken


def assert_only_grows(taken: list[dict[str, np.ndarray]]) -> None:
    for before, after in itertools.pairwise(taken):
        assert set(before) < set(after)
        for name, value in before.items():
            np.testing.assert_array_equal(value, after[name], err_msg=name)


@pytest.mark.parametrize("head", ["live", "frozen"])
def test_frozen_is_frozen(head: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    taken = snapshots(loop.Run(tiny(training__head=head), tiny_corpus, tmp_path / "run", lambda _: None))
    assert_only_grows(taken)
    assert not any(name.startswith("stacks") for name in taken[0])
    assert any(name.startswith("head") for name in taken[0]) == (head == "frozen")


def test_frozen_is_frozen_detects_a_drift(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    run = loop.Run(tiny(), tiny_corpus, tmp_path / "run", lambda _: None)
    original = run._settle

    def drifting(phase: Any) -> None:
        original(phase)
        run.frozen.embedding = jax.tree.map(lambda leaf: jnp.nextafter(leaf, 2.0), run.frozen.embedding)

    run._settle = drifting
    with pytest.raises(AssertionError):
        assert_only_grows(snapshots(run))


def test_live_parts_move(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny()
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    source = PartSource(config, run.program.key)
    drawn = {name: source.fresh(name, True)[0] for name in ("embedding", "head")}
    before = {name: np.array(leaf) for name, leaf in named_leaves(drawn).items()}
    assert before
    rack = run.to_end().rack
    after = named_leaves({"embedding": rack["embedding"], "head": rack["head"]})
    assert all(not np.array_equal(value, after[name]) for name, value in before.items())
