"""The figures of a large run, from the records of a small one, and the commands that make them."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from stackwise_jax.bench import run70b
from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.overrides import apply_overrides
from stackwise_jax.train import loop


def options_of(*arguments: str) -> Any:
    options = run70b.make_options()
    options(["run70b", *arguments])
    return options


def test_figures_are_those_of_the_records(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny(
        training__mode="layerwise",
        training__head="frozen",
        model__architecture__n_stacks=3,
        logging__every_steps=1,
        data__max_rows=64,
    )
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    run.to_end()
    figures = run70b.run_figures(tmp_path / "run")
    assert list(figures["phases"]) == ["embedding", "stack_0000", "stack_0001", "stack_0002"]
    assert figures["held_out"] == {name: values["loss"] for name, values in run.position.held_out.items()}
    assert figures["visit_ratio"] > 0
    steps = sum(phase.steps for phase in run.plan.phases[1:])
    assert figures["flops"]["steps"] == pytest.approx(steps * run.plan.step_flops[1])
    assert figures["rack_bytes"] > sum(file.stat().st_size for file in (tmp_path / "run" / "stacks").glob("stack*"))

    figures["bare_step"] = [{"name": "fp8, with head", "flops": 1e9, "step_seconds": 1e-3}]
    run70b.report(figures)
    text = capsys.readouterr().out
    assert f"{figures['held_out']['stack_0002']:.4f} after the last" in text
    assert "% of the bare step's" in text


def test_the_run_is_the_config_with_the_flags_put_over_it():
    options = options_of("--size=tiny", "--workdir=x", "--stacks=2", "--steps=7", "--set=data.seq_len=64")
    entries = runpy.run_path(str(run70b.CONFIG))["get_config"]("tiny")
    path, *changes = run70b.config_flags(options)
    assert path == f"--config={run70b.CONFIG}:tiny"
    apply_overrides(entries, [change.removeprefix("--config.") for change in changes])
    config = resolve(entries)
    assert config.model.architecture.n_stacks == 2
    assert (config.training.phase_budget, config.data.seq_len, config.data.max_rows) == ("7 steps", 64, 368)
    assert "--set=data.seq_len=64" in run70b.step_command(options, Path("step.json"))


def test_a_folder_that_exists_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="exists"):
        run70b.main(options_of(f"--workdir={tmp_path}"))


def test_a_program_that_fails_is_named():
    with pytest.raises(UserError, match="exit status 3"):
        run70b._run(["python", "-c", "raise SystemExit(3)"])


def test_a_workdir_is_asked_for():
    with pytest.raises(flags.IllegalFlagValueError):
        options_of()
