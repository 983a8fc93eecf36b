"""Every way of training: it runs to its end, continues exactly, and what it leaves behind is read back as it was."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.train import loop
from stackwise_jax.train.trained import load_trained
from tests.laws.modes import MODES


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


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_continues_and_is_read_back(mode: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(
        **{"training__phase_budget": "4 steps", "training__embedding_budget": "3 steps", **MODES[mode]},
        checkpoint__every_steps=3,
        logging__every_steps=100,
        evaluation__rows=8,
    )
    whole = loop.run(config, tiny_corpus, tmp_path / "whole", say=lambda _: None)
    n_steps = sum(phase.steps for phase in whole.plan.phases)
    for stop in (5, n_steps - 1):
        run_until(config, tiny_corpus, tmp_path / "cut", stop)
    continued = loop.run(config, tiny_corpus, tmp_path / "cut", say=lambda _: None)
    for one, other in zip(leaves(continued.rack), leaves(whole.rack), strict=True):
        np.testing.assert_array_equal(one, other)
    assert continued.held_out == whole.held_out
    assert all(math.isfinite(value) for of in whole.held_out.values() for value in of.values())
    trained = load_trained(tmp_path / "cut")
    assert trained.finished
    for one, other in zip(leaves(trained.rack), leaves(whole.rack), strict=True):
        np.testing.assert_array_equal(one, other)
