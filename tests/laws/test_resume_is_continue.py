"""A run that was stopped anywhere and started again ends with the same bits as one that was not."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.errors import StoppedError
from stackwise_jax.train import loop
from stackwise_jax.train.signals import SIGNALS
from stackwise_jax.types import Params


class PowerCutError(Exception):
    """Stands for the power cut."""


def finish(config: Any, corpus: Any, folder: Path) -> Params:
    return loop.run(config, corpus, folder, say=lambda _: None).rack


def cut() -> None:
    raise PowerCutError


def stop_at(
    config: Any,
    corpus: Any,
    folder: Path,
    moment: str,
    after: int,
    act: Callable[[], None] = cut,
    before: loop.Run | None = None,
) -> loop.Run:
    """Runs until `moment` first comes with at least `after` updates done, and acts there, once.

    Moments: "stepping", "filling", "advancing", "evaluating" (between two batches), "saving". Programs are those of the
    run `before`, if there is one.
    """
    run = loop.Run(config, corpus, folder, lambda _: None)
    if before is not None:
        run._compiled, run.inputs._forward = before._compiled, before.inputs._forward
    left = [moment]

    def arrive(name: str) -> None:
        if left == [name] and run.position.step >= after:
            left.clear()
            act()

    def watched(owner: Any, name: str, moment_of: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            arrive(moment_of(*args))
            return original(*args, **kwargs)

        setattr(owner, name, call)

    watched(run, "_note", lambda text: "filling" if "0 stack(s)" in text else "advancing")
    watched(run.inputs, "training_batch", lambda *_: "stepping")
    watched(run.folder, "save", lambda *_: "saving")
    held_out_batches = run.inputs.held_out_batches

    def batches(phase: Any) -> Iterator[Any]:
        for number, batch in enumerate(held_out_batches(phase)):
            if number == 1:
                arrive("evaluating")
            yield batch

    run.inputs.held_out_batches = batches
    with pytest.raises((PowerCutError, StoppedError)):
        run.to_end()
    assert not left
    return run


def assert_bitwise(first: Params, second: Params) -> None:
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def losses(folder: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines if "loss" in line]


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
    "weights and moments rounded stochastically, bounded": {
        "precision__weights": "bf16",
        "precision__optimizer": "int8",
        "model__architecture__n_stacks": 1,
        "training__mode": "end_to_end",
        "training__phase_budget": "14 steps",
        "model__stability__residual_gain": 0.5,
        "model__stability__spectral_norm": 0.3,
        "model__stability__z_loss": 1e-3,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_continue(mode: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(checkpoint__every_steps=3, logging__every_steps=1, **MODES[mode])
    run = loop.Run(config, tiny_corpus, tmp_path / "whole", lambda _: None)
    whole = run.to_end().rack
    # Inside a phase, past a snapshot in it.
    stop_at(config, tiny_corpus, tmp_path / "stopped", "stepping", 13, before=run)
    assert_bitwise(whole, finish(config, tiny_corpus, tmp_path / "stopped"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


# One run, stopped at each of these in turn: (moment, updates done at least). Phases end after 4, 10, 16 and 22 updates.
MOMENTS = [
    ("saving", 4),
    ("filling", 4),
    ("stepping", 5),
    ("evaluating", 6),
    ("evaluating", 10),
    ("advancing", 10),
    ("saving", 13),
    ("evaluating", 22),
]


@pytest.fixture(scope="module")
def whole(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Params]:
    """(config, folder, rack) of a run that nothing stopped."""
    config = tiny(checkpoint__every_steps=3, logging__every_steps=1, evaluation__every_steps=2)
    folder = tmp_path_factory.mktemp("whole")
    return config, folder, finish(config, tiny_corpus, folder)


def test_a_cut_anywhere_is_continued(whole: tuple[Any, Path, Params], tiny_corpus: Any, tmp_path: Path) -> None:
    config, folder, rack = whole
    run = None
    for moment, after in MOMENTS:
        run = stop_at(config, tiny_corpus, tmp_path, moment, after, before=run)
    assert_bitwise(rack, finish(config, tiny_corpus, tmp_path))
    assert losses(folder) == losses(tmp_path)


def test_a_signal_anywhere_loses_no_step(whole: tuple[Any, Path, Params], tiny_corpus: Any, tmp_path: Path) -> None:
    config, folder, rack = whole
    handlers = [signal.getsignal(number) for number in SIGNALS]
    stopped = None
    for (moment, after), number in zip(MOMENTS, itertools.cycle(SIGNALS), strict=False):
        stopped = stop_at(
            config, tiny_corpus, tmp_path, moment, after, lambda n=number: os.kill(os.getpid(), n), stopped
        )
        again = loop.Run(config, tiny_corpus, tmp_path, lambda _: None)
        assert again.position == stopped.position
        assert again.position.step >= after
        again.folder.close()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert_bitwise(rack, finish(config, tiny_corpus, tmp_path))
    assert losses(folder) == losses(tmp_path)


def test_a_signal_between_saves_is_what_a_cut_loses(
    whole: tuple[Any, Path, Params], tiny_corpus: Any, tmp_path: Path
) -> None:
    """The twin: without the save on a signal the same stop falls back to the snapshot before."""
    stop_at(whole[0], tiny_corpus, tmp_path, "stepping", 9)
    assert loop.Run(whole[0], tiny_corpus, tmp_path, lambda _: None).position.step == 7


def test_resume_detects_a_lost_data_position(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(training__mode="end_to_end", training__phase_budget="14 steps", checkpoint__every_steps=3)
    whole = finish(config, tiny_corpus, tmp_path / "whole")
    stop_at(config, tiny_corpus, tmp_path / "stopped", "stepping", 8)
    run = loop.Run(config, tiny_corpus, tmp_path / "stopped", lambda _: None)
    fresh = loop.Run(config, tiny_corpus, tmp_path / "fresh", lambda _: None)  # its stream stands at the beginning
    run.batches = fresh.batches
    with pytest.raises(AssertionError):
        assert_bitwise(whole, run.to_end().rack)
