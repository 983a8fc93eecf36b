"""Every way of training: it runs to its end, continues exactly, and what it leaves behind is read back as it was."""

import math
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.train import loop
from stackwise_jax.train.trained import load_trained

# The modes are those of the small configs, at a size that takes seconds.
MODES = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "small.py"))["MODES"]
TINY = {"training.fusion.budget": "6 steps", "training.progressive.rebuild_every": 2, "objective.block_length": 8}


class PowerCutError(Exception):
    """Stands for the power cut."""


def run_until(config: Any, corpus: Any, folder: Path, step: int) -> None:
    """Runs and is cut off as update number `step` begins."""
    run = loop.Run(config, corpus, folder, lambda _: None)
    original = run.inputs.training_batch

    def training_batch(branch: Any, batch: Any, index: int) -> Any:
        if index == step:
            raise PowerCutError
        return original(branch, batch, index)

    run.inputs.training_batch = training_batch
    with pytest.raises(PowerCutError):
        run.to_end()


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def at_tiny_size(mode: dict[str, Any]) -> dict[str, Any]:
    """Fields for `tiny`: a small config's, with budgets of a few steps and just as many stacks as show the mode."""
    is_whole = mode.get("training.mode") == "end_to_end" or mode.get("training.progressive.trunk_strategy") == "full"
    fields = {
        "training.mode": "layerwise",
        "training.phase_budget": "9 steps" if is_whole else "3 steps",
        "training.embedding_budget": "2 steps",
        "checkpoint.every_steps": 4,
        "logging.every_steps": 100,
        "evaluation.rows": 8,
        **{name: value for name, value in mode.items() if name != "training.phase_budget"},
        **{name: value for name, value in TINY.items() if name in mode},
    }
    if fields.get("training.adapters.ranks"):
        fields["training.adapters.ranks"] = "2,4,4"
    return {name.replace(".", "__"): value for name, value in fields.items()}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_continues_and_is_read_back(mode: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(**at_tiny_size(MODES[mode]))
    whole = loop.run(config, tiny_corpus, tmp_path / "whole", say=lambda _: None)
    n_steps = sum(phase.steps for phase in whole.plan.phases)
    run_until(config, tiny_corpus, tmp_path / "cut", n_steps - 2)
    continued = loop.run(config, tiny_corpus, tmp_path / "cut", say=lambda _: None)
    for one, other in zip(leaves(continued.rack), leaves(whole.rack), strict=True):
        np.testing.assert_array_equal(one, other)
    assert continued.held_out == whole.held_out
    assert all(math.isfinite(value) for of in whole.held_out.values() for value in of.values())
    trained = load_trained(tmp_path / "cut")
    assert trained.finished
    for one, other in zip(leaves(trained.rack), leaves(whole.rack), strict=True):
        np.testing.assert_array_equal(one, other)
