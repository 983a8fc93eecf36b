"""A new stack that begins by adding nothing: the loss of a phase begins where the phase before left it."""

from pathlib import Path
from typing import Any

import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.train import loop
from stackwise_jax.train.branches import BranchRun


def losses_around_a_boundary(config: Any, corpus: Any, folder: Path) -> tuple[float, float]:
    """Held-out loss after the first stack, and of the next phase before its first update."""
    run = loop.Run(config, corpus, folder, lambda _: None)
    for index in range(2):
        run._run_phase(run.plan.phases[index], run.plan.signatures[index])
    phase, (signature,) = run.plan.phases[2], run.plan.signatures[2]
    run._begin_phase(phase, signature)
    run.inputs.prepare(phase, run.frozen, run.position.step, lambda _: None, run._live_stack)
    branch = BranchRun(run._compiled, run.inputs, run.frozen, phase, phase.main, signature)
    total, weight = branch.held_out(run.state, lambda: None)
    run.folder.close()
    return run.position.held_out["stack_0000"]["loss"], total / weight


def test_a_silent_stack_goes_on_from_its_trunk_and_a_drawn_one_does_not(tiny: Any, tiny_corpus: Any, tmp_path: Path):
    silent = tiny(training__progressive__new_stack="silent")
    before, after = losses_around_a_boundary(silent, tiny_corpus, tmp_path / "silent")
    assert after == pytest.approx(before, abs=1e-6)
    before, after = losses_around_a_boundary(tiny(), tiny_corpus, tmp_path / "drawn")
    assert abs(after - before) > 1e-5


@pytest.mark.parametrize("change", [{"training__mode": "end_to_end"}, {"model__norm_position": "post"}], ids=str)
def test_where_it_promises_nothing_it_is_refused(change: dict[str, Any], tiny: Any):
    with pytest.raises(UserError, match=r"new_stack='silent' is of modes"):
        tiny(training__progressive__new_stack="silent", **change)
