"""A run that was stopped anywhere and started again ends with the same bits as one that was not."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.train import loop
from stackwise_jax.types import Params


class PowerCutError(Exception):
    """Stands for the power cut."""


def finish(config: Any, corpus: Any, folder: Path) -> Params:
    return loop.run(config, corpus, folder, say=lambda _: None).rack


def stop_after(config: Any, corpus: Any, folder: Path, steps: int) -> None:
    """Runs until `steps` updates are done and dies before anything else is written."""
    run = loop.Run(config, corpus, folder, lambda _: None)
    original = loop.schedule_fraction

    def count(*args: Any) -> float:
        if run.position.step == steps:
            raise PowerCutError
        return original(*args)

    loop.schedule_fraction = count
    try:
        with pytest.raises(PowerCutError):
            run.to_end()
    finally:
        loop.schedule_fraction = original


def assert_bitwise(first: Params, second: Params) -> None:
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def losses(folder: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


MODES = {
    "layerwise, cached": {"training__mode": "layerwise"},
    "layerwise, not cached": {"training__progressive__cache_activations": False},
    "end to end": {"training__mode": "end_to_end", "training__phase_budget": "14 steps"},
    "masked, tied, first stack with the embedding": {
        "objective__name": "mlm",
        "model__attention": "bidirectional",
        "model__ties_embedding": True,
        "training__embedding_phase": "with_first_stack",
        "training__head": "copy",
        "model__dropout": 0.1,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_continue(mode: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(checkpoint__every_steps=3, logging__every_steps=1, **MODES[mode])
    whole = finish(config, tiny_corpus, tmp_path / "whole")
    for steps in (2, 8, 13):  # before the first snapshot, inside a phase, and again further on
        stop_after(config, tiny_corpus, tmp_path / "stopped", steps)
    assert_bitwise(whole, finish(config, tiny_corpus, tmp_path / "stopped"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_resume_detects_a_lost_data_position(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(training__mode="end_to_end", training__phase_budget="14 steps", checkpoint__every_steps=3)
    whole = finish(config, tiny_corpus, tmp_path / "whole")
    stop_after(config, tiny_corpus, tmp_path / "stopped", 8)
    run = loop.Run(config, tiny_corpus, tmp_path / "stopped", lambda _: None)
    fresh = loop.Run(config, tiny_corpus, tmp_path / "fresh", lambda _: None)  # its stream stands at the beginning
    run.batches = fresh.batches
    with pytest.raises(AssertionError):
        assert_bitwise(whole, run.to_end().rack)
