"""A run that grows by zero_output is, right after the expansion, the run that it was; new stacks carry moments."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.models.growth import grow_moments
from stackwise_jax.train import loop
from stackwise_jax.train.branches import BranchRun
from stackwise_jax.train.state import part_names, split

GROWS = {
    "training__mode": "progressive",
    "training__progressive__trunk_strategy": "full",
    "training__growth__sizes": "1,2",
    "training__phase_budget": "6 steps",
    "model__architecture__n_stacks": 2,
    "evaluation__rows": 8,
}


def expanded(config: Any, corpus: Any, folder: Path) -> tuple[float, float, dict[Any, Any]]:
    """(held-out loss before the expansion, right after it, parts after it)."""
    run = loop.Run(config, corpus, folder, lambda _: None)
    first, second = run.plan.phases
    run._run_phase(first, run.plan.signatures[0])
    before = run.position.held_out[first.name]["loss"]
    assert (run.position.phase, run.position.phase_step) == (1, 0)
    signatures = run.plan.signatures[1]
    run._begin_phase(second, signatures[0])
    run.inputs.prepare(second, run.frozen, run.position.step, lambda _: None, run._live_stack)
    branches = [BranchRun(run._compiled, run.inputs, run.frozen, second, second.main, signatures[0])]
    after = run._evaluate(second, branches)["loss"]
    run.folder.close()
    return before, after, split(run.state, part_names(second))


@pytest.mark.parametrize("operator", ["zero_output", "interleave"])
def test_growing_by_zero_output_keeps_the_loss(operator: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    """Interleaving is the twin: it repeats what a stack adds."""
    config = tiny(**GROWS, training__growth__operator=operator, optimizer__learning_rate=1e-2)
    before, after, parts = expanded(config, tiny_corpus, tmp_path / "run")
    if operator == "zero_output":
        assert after == before
    else:
        assert abs(after - before) > 1e-3
    (weights, moments), (new_weights, new_moments) = parts[0], parts[1]
    wanted = grow_moments(moments, operator)
    assert jax.tree.structure(new_moments) == jax.tree.structure(moments)
    for own, source in zip(jax.tree.leaves(new_moments), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(own, source)
    assert sum(bool(np.any(leaf)) for leaf in jax.tree.leaves(new_moments)) > 10  # none of them fresh
    is_equal = [np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (weights, new_weights)), strict=True)]
    assert all(is_equal) == (operator == "interleave")
    assert any(is_equal)
