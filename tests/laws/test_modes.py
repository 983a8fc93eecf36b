"""Every way of training: it runs to its end, continues exactly, and what it leaves behind is read back as it was."""

import math
import runpy
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.train import loop
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.trained import load_trained

# The modes are those of the small configs, at a size that takes seconds.
MODES = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "small.py"))["MODES"]
TINY = {"training.fusion.budget": "6 steps", "training.progressive.rebuild_every": 2, "objective.block_length": 8}
# Stacks, where two do not show the mode: frozen ones on both sides of a cache or of adapters of unlike ranks, a stack
# that is passed over, a band of two stacks and one of one, growth by one stack, by as many as there are and by more.
N_STACKS = {
    **dict.fromkeys(("layerwise", "right_to_left", "progressive_adapters", "tail_adapters", "last_stack"), 3),
    **dict.fromkeys(("depth_independent", "depth_right_to_left", "depth_left_to_right", "depth_levels"), 3),
    **dict.fromkeys(("prepended_all_live", "late_expansion"), 3),
    **dict.fromkeys(("doubling", "doubling_adding_nothing"), 4),
}


def run_and_copy(config: Any, corpus: Any, folder: Path, copy: Path, step: int) -> tuple[loop.Run, loop.Result]:
    """Runs to the end; the copy is the folder as a power cut leaves it when update number `step` begins."""
    run = loop.Run(config, corpus, folder, lambda _: None)
    original = run.inputs.training_batch

    def training_batch(branch: Any, batch: Any, index: int) -> Any:
        if index == step:
            run.folder.flush()
            shutil.copytree(folder, copy)
        return original(branch, batch, index)

    run.inputs.training_batch = training_batch
    return run, run.to_end()


def continued(config: Any, corpus: Any, folder: Path, first: loop.Run) -> tuple[int, loop.Result]:
    """(the update that it goes on after, result) of a run that takes over the programs that another compiled."""
    run = loop.Run(config, corpus, folder, lambda _: None)
    begun = run.position.step
    run._compiled, run.inputs._forward = first._compiled, first.inputs._forward
    return begun, run.to_end()


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def at_tiny_size(name: str) -> dict[str, Any]:
    """Fields for `tiny`: a small config's, with budgets of a few steps and just as many stacks as show the mode."""
    mode = MODES[name]
    is_whole = mode.get("training.mode") == "end_to_end" or mode.get("training.progressive.trunk_strategy") == "full"
    fields = {
        "training.mode": "layerwise",
        "training.phase_budget": "9 steps" if is_whole else "3 steps",
        "training.embedding_budget": "2 steps",
        "checkpoint.every_steps": 4,
        "logging.every_steps": 100,
        "evaluation.rows": 8,
        **{field: value for field, value in mode.items() if field != "training.phase_budget"},
        **{field: value for field, value in TINY.items() if field in mode},
        "model.architecture.n_stacks": N_STACKS.get(name, 2),
    }
    if fields.get("training.adapters.ranks"):
        fields["training.adapters.ranks"] = "2,4,4"
    return {field.replace(".", "__"): value for field, value in fields.items()}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_continues_and_is_read_back(mode: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(**at_tiny_size(mode))
    n_steps = sum(phase.steps for phase in make_curriculum(config))
    run, whole = run_and_copy(config, tiny_corpus, tmp_path / "whole", tmp_path / "cut", n_steps - 2)
    begun, again = continued(config, tiny_corpus, tmp_path / "cut", run)
    assert 0 < begun <= n_steps - 2
    for one, other in zip(leaves(again.rack), leaves(whole.rack), strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.held_out == whole.held_out
    assert all(math.isfinite(value) for of in whole.held_out.values() for value in of.values())
    trained = load_trained(tmp_path / "cut", merged=False)
    assert trained.finished
    for one, other in zip(leaves(trained.rack), leaves(whole.rack), strict=True):
        np.testing.assert_array_equal(one, other)
