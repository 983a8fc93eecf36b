"""From causal to diffusion: how far rows are open at each stage, and that such a run trains, goes on and is sampled."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from curricula import ASSEMBLED, DIFFUSION, config_of

from stackwise_jax.data.corpus import Corpus
from stackwise_jax.errors import StoppedError, UserError
from stackwise_jax.fuse import fused_config
from stackwise_jax.generate.texts import continue_texts
from stackwise_jax.models.rack import apply_rack, init_rack
from stackwise_jax.objectives.objective import Task
from stackwise_jax.train import loop
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.describe import describe
from stackwise_jax.train.phases import Branch, Role, stack_sizes
from stackwise_jax.train.plan import make_plan
from stackwise_jax.train.program import make_program
from stackwise_jax.train.trained import load_trained
from stackwise_jax.train.trunk import as_asked

OPENING = {**ASSEMBLED, **DIFFUSION, "objective.shift": True, "training.fusion.budget": "20 steps"}
OPENING |= {"training.fusion.opening": 0.5, "training.fusion.opening_stages": 4}


def test_stages_open_a_row_step_by_step_under_one_schedule() -> None:
    phases = make_curriculum(config_of(OPENING))
    assert [phase.main.opened for phase in phases] == [0.0, 0.25, 0.5, 0.75, None]
    assert [phase.main.task.attention for phase in phases] == ["prefix"] * 4 + ["bidirectional"]
    assert [phase.steps for phase in phases] == [2, 3, 3, 2, 10]
    assert [phase.schedule for phase in phases] == [(0, 20), (2, 20), (5, 20), (8, 20), (10, 20)]
    assert [bool(phase.settles) for phase in phases] == [False] * 4 + [True]  # weights and moments are carried on
    plan = make_plan(config_of(OPENING), 64)
    assert plan.compilations == 2  # all stages are one program
    assert "head live, causal but for the first 75%" in describe(plan)
    whole = {**OPENING, "training.fusion.opening": 0.0}
    assert [phase.name for phase in make_curriculum(config_of(whole))] == ["fusion_0000"]


def test_a_trunk_is_cached_once_attention_is_open() -> None:
    phases = make_curriculum(config_of({**OPENING, "training.fusion.live": "last:1"}))
    assert [phase.cached for phase in phases] == [False] * 4 + [True]


def test_a_row_opens_from_causal_to_bidirectional(tiny: Any, tiny_corpus: Corpus) -> None:
    """Nothing open is causal attention, all open is bidirectional; half open is neither."""
    masked = {"objective__name": "diffusion", "objective__shift": True, "model__attention": "bidirectional"}
    config = tiny(**masked, model__architecture__n_stacks=1)
    program = make_program(config, tiny_corpus.tokenizer, n_rows=4)
    batch = tiny_corpus.train.batch(np.arange(4), 0, isolate_documents=True)
    rack = init_rack(jax.random.key(0), config.model, stack_sizes(config))

    @functools.partial(jax.jit, static_argnums=1)
    def run(asked: Any, task: Any) -> Any:
        example = program.corrupt(task, asked)
        context = program.context(task, example, rack["embedding"])
        return apply_rack(rack, example.inputs, context, config.model, dtype=program.dtype)

    opened, outputs = Task("diffusion", "prefix"), {}
    for share in (0.0, 0.5, 1.0):
        branch = Branch((), Role.FROZEN, Role.LIVE, opened, opened=share)
        outputs[share] = np.asarray(run(as_asked(batch, branch), opened))
    for share, attention in ((0.0, "causal"), (1.0, "bidirectional")):
        whole = np.asarray(run(batch, Task("diffusion", attention)))
        np.testing.assert_allclose(outputs[share], whole, rtol=2e-5, atol=2e-6)
        assert np.abs(outputs[0.5] - whole).max() > 1e-3


def test_a_causal_run_opens_goes_on_exactly_and_is_sampled(tiny: Any, tiny_corpus: Corpus, tmp_path: Path) -> None:
    small = {"model__architecture__n_stacks": 1, "training__mode": "end_to_end", "evaluation__rows": 8}
    causal = tiny(**small, training__phase_budget="4 steps", optimizer__learning_rate=5e-3)
    loop.run(causal, tiny_corpus, tmp_path / "causal", say=lambda _: None)
    overrides = ["objective.name=diffusion", "objective.shift=True", "model.attention=bidirectional"]
    overrides += [
        "training.fusion.opening=0.5",
        "training.fusion.opening_stages=2",
        "checkpoint.every_steps=3",
        "generation.tokens=8",
    ]
    config = fused_config([str(tmp_path / "causal")], "all", "16 steps", overrides, name="opened")
    result = loop.run(config, tiny_corpus, tmp_path / "whole", say=lambda _: None)
    first, *_, last = result.held_out.values()
    assert len(result.held_out) == 3
    assert last["loss"] < first["loss"]

    run = loop.Run(config, tiny_corpus, tmp_path / "stopped", lambda _: None)
    training_batch = run.inputs.training_batch

    def until(*args: Any) -> Any:
        if run.position.step == 6:  # inside the second stage
            raise StoppedError("the test")
        return training_batch(*args)

    setattr(run.inputs, "training_batch", until)  # noqa: B010
    with pytest.raises(StoppedError):
        run.to_end()
    again = loop.run(config, tiny_corpus, tmp_path / "stopped", say=lambda _: None)
    for one, other in zip(jax.tree.leaves(result.rack), jax.tree.leaves(again.rack), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))

    trained = load_trained(tmp_path / "whole")
    assert (trained.model.attention, trained.config.objective.shift) == ("bidirectional", True)
    samples = continue_texts(trained.rack, trained.config, trained.tokenizer, ["the"], seed=0)
    assert samples.rows[0].text.startswith("the")
    assert len(samples.rows[0].text) > len("the")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective.name": "clm", "objective.shift": False, "model.attention": "causal"}, "not 'clm' with 'causal'"),
        ({"model.attention": "causal"}, "not 'diffusion' with 'causal'"),
        ({"training.fusion.unfreeze_phases": 2}, "unfreeze_phases=1, not 2"),
        ({"training.fusion.opening": 1.0}, "makes 20 of 20 updates; it must leave some"),
        ({"training.fusion.opening": 0.1}, "makes 2 of 20 updates"),
        ({"training.fusion.budget": ""}, "is a share of training.fusion.budget"),
    ],
)
def test_what_cannot_open_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of({**OPENING, **fields})
