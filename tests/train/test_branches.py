"""Branches of a phase: which parts each moves, what is told of several, and a cache whose trunk anchors move."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.objectives.objective import Task
from stackwise_jax.train import loop
from stackwise_jax.train.branches import BranchRun, Compiled, held_out_figures
from stackwise_jax.train.phases import Branch, Role
from stackwise_jax.train.program import Program
from stackwise_jax.train.state import Frozen, TrainState, part_names, split
from stackwise_jax.types import Vocabulary

LIVE = Role.LIVE
MASKED = {"model__attention": "bidirectional", "objective__name": "diffusion"}
ANCHORS = {"training__progressive__anchor_every": 2, "training__progressive__rebuild_every": 1}


def taken(state: TrainState, names: Any) -> dict[Any, list[np.ndarray]]:
    """Copies of the weights by part: what is donated is gone afterwards."""
    parts = split(state, names)
    return {name: [np.array(leaf) for leaf in jax.tree.leaves(parts[name][0])] for name in names}


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, set[Any]]]:
    """(phase, branch, parts that moved) of every update of the runs that follow."""
    seen: list[tuple[str, int, set[Any]]] = []
    original = BranchRun.update

    def update(self: BranchRun, state: TrainState, *args: Any) -> Any:
        names = part_names(self._phase)
        before = taken(state, names)
        result = original(self, state, *args)
        after = taken(result[0], names)
        same = {n for n in names if all(map(np.array_equal, before[n], after[n]))}
        seen.append((self._phase.name, self._phase.branches.index(self.branch), set(names) - same))
        return result

    monkeypatch.setattr(BranchRun, "update", update)
    return seen


def chains(run: loop.Run) -> list[list[str]]:
    """Runs to the end; the fingerprints that the caches were brought to, phase by phase."""
    found, original = [], run.inputs.prepare

    def prepare(*args: Any) -> None:
        original(*args)
        found.append(list(run.inputs._chain))

    run.inputs.prepare = prepare
    run.to_end()
    return found


def test_anchors_move_the_trunk_and_local_steps_do_not(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    config = tiny(
        model__architecture__n_stacks=2,
        training__phase_budget="4 steps",
        training__embedding_budget="1 steps",
        **ANCHORS,
    )
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    found = chains(run)
    assert [(name, branch) for name, branch, _ in seen if name.startswith("stack_0001")] == [
        ("stack_0001_00", 0),
        ("stack_0001_01", 1),
        ("stack_0001_02", 0),
        ("stack_0001_03", 1),
    ]
    for name, branch, moved in seen:
        if name.startswith("stack_0001"):
            assert moved == ({"head", 1} if branch == 0 else {"head", 0, 1})
    # One stretch a step: the cache is computed anew after the anchor, and stands after the step that left its trunk.
    first, second, third, fourth = found[2:]
    assert first == second
    assert third == fourth
    assert first[0] == third[0]  # the embedding is settled
    assert first[1] != third[1]


def test_bands_move_their_own_stacks_and_what_is_shared(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    config = tiny(
        model__architecture__n_stacks=3,
        objective__time="depth",
        objective__n_bands=2,
        training__progressive__direction="independent",
        training__embedding_phase="with_first_stack",
        training__phase_budget="2 steps",
        **MASKED,
    )
    result = loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    shared = {"embedding", "head"}
    assert [moved for _, _, moved in seen] == [shared | {0, 1}, shared | {2}] * 2
    assert [branch for _, branch, _ in seen] == [0, 1, 0, 1]
    figures = result.held_out["bands"]
    widths = [band[1] - band[0] for band in (branch.band for branch in result.plan.phases[0].branches) if band]
    assert sum(widths) == pytest.approx(0.999)
    assert figures["loss"] == pytest.approx(widths[0] * figures["band_0"] + widths[1] * figures["band_1"])


def test_a_watch_that_sees_nothing_is_detected(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: an update that gives back what it took moves nothing."""
    metrics = dict.fromkeys(("loss", "gradient_norm"), jax.numpy.ones(()))
    monkeypatch.setattr(BranchRun, "update", lambda self, state, *args: (state, metrics))
    seen = watched(monkeypatch)
    config = tiny(training__mode="end_to_end", training__phase_budget="1 steps", model__architecture__n_stacks=1)
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    phase = run.plan.phases[0]
    run._begin_phase(phase, run.plan.signatures[0][0])
    run.inputs.prepare(phase, run.frozen, 0, lambda _: None, run._live_stack)
    branch = BranchRun(run._compiled, run.inputs, run.frozen, phase, phase.main, run.plan.signatures[0][0])
    run._step(phase, branch)
    run.folder.close()
    assert seen == [("end_to_end", 0, set())]


# --- figures ---

TASK = Task("diffusion", "bidirectional")
BAND = Branch(((0, LIVE),), LIVE, LIVE, TASK)


def bands(*edges: tuple[float, float] | None) -> list[Branch]:
    return [dataclasses.replace(BAND, band=band, share=1.0 / len(edges)) for band in edges]


def test_losses_of_bands_are_summed_by_width() -> None:
    figures = held_out_figures(bands((0.75, 1.0), (0.25, 0.75)), [(30.0, 10.0), (8.0, 4.0)], lambda _: 1)
    assert figures == {"loss": pytest.approx(0.25 * 3.0 + 0.5 * 2.0), "band_0": 3.0, "band_1": 2.0}


def test_losses_of_levels_and_tasks_are_averaged_by_share() -> None:
    levels = held_out_figures(bands((0.9, 0.9), (0.5, 0.5)), [(30.0, 10.0), (8.0, 4.0)], lambda _: 1)
    assert levels == {"loss": pytest.approx(2.5), "band_0": 3.0, "band_1": 2.0}
    tasks = [
        dataclasses.replace(BAND, share=0.75),
        dataclasses.replace(BAND, task=Task("clm", "causal"), share=0.25),
    ]
    mixed = held_out_figures(tasks, [(4.0, 1.0), (8.0, 1.0)], lambda _: 1)
    assert mixed == {"loss": pytest.approx(5.0), "diffusion": 4.0, "clm": 8.0}


def test_one_causal_branch_is_told_in_bits_per_byte() -> None:
    causal = dataclasses.replace(BAND, task=Task("clm", "causal"))
    figures = held_out_figures([causal], [(np.log(2.0) * 12.0, 4.0)], lambda task: {"clm": 6}[task.objective])
    assert figures == {"loss": pytest.approx(3.0 * np.log(2.0)), "bits_per_byte": pytest.approx(2.0)}
    assert held_out_figures([BAND], [(0.0, 0.0)], lambda _: 0) == {"loss": 0.0}


def test_a_settled_part_lies_on_the_device_once_and_not_for_ever(tiny: Any) -> None:
    compiled = Compiled(Program(tiny(), Vocabulary(320, 4, (0, 1, 2, 3, 4)), n_rows=8))
    frozen = Frozen()
    frozen.keep("stacks", "0", {"kernel": np.zeros((1, 2, 2), np.float32)}, "first")
    held = [compiled.settled(0, frozen) for _ in range(2)]
    assert held[0] is held[1]
    assert isinstance(held[0].tree["kernel"], jax.Array)
    frozen.keep("stacks", "0", {"kernel": np.ones((1, 2, 2), np.float32)}, "second")
    assert compiled.settled(0, frozen).tree["kernel"].all()  # the twin: another stack of that number
    before = len(jax.live_arrays())
    held.clear()
    assert len(jax.live_arrays()) == before - 1
