"""`bench step` at tiny size: what it prints, what it refuses, and that it survives what fails."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from absl import flags

from stackwise_jax.bench import step, torch_step
from stackwise_jax.bench.__main__ import BENCHMARKS
from stackwise_jax.bench.__main__ import main as bench_main
from stackwise_jax.bench.live_step import random_batch
from stackwise_jax.errors import UserError
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.train.plan import make_plan

TINY = ["--blocks=2", "--d_model=64", "--vocab_size=64", "--seq_len=16", "--batch_size=2", "--steps=2"]


def options_of(*arguments: str) -> flags.FlagValues:
    options = step.make_options()
    options(["step", *TINY, *arguments])
    return options


def test_it_measures_and_writes_and_survives_a_variant_that_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(step, "VARIANTS", {"cudnn": ["model.attention_implementation=cudnn"]})
    written = tmp_path / "out" / "step.json"
    step.main(options_of("--notorch", "--variants=all", f"--json={written}"))
    ours, cudnn = capsys.readouterr().out.splitlines()[-2:]
    assert ours.startswith("stackwise_jax")
    assert cudnn.startswith("cudnn ")
    assert "failed: model.attention_implementation" in cudnn
    found = json.loads(written.read_text())
    plan = make_plan(step.make_config(options_of(), []), None)
    assert found["flops_per_step"] == plan.step_flops[0]
    assert found["tokens_per_step"] == 32
    row, failed = found["rows"]
    assert row["failed"] is None
    assert row["step_seconds"] > 0
    assert row["peak_bytes"] > 16 * count_parameters(plan.config.model)  # weights, two moments, gradients
    assert failed["step_seconds"] is None


@pytest.mark.parametrize("family", step.FAMILIES)
def test_every_variant_is_a_config_of_its_own(family: str):
    options = options_of(f"--family={family}")
    configs = [step.make_config(options, changes) for changes in step.VARIANTS.values()]
    assert len(set(configs)) == len(configs)


def test_families_have_the_shapes_that_they_are_compared_in():
    def parameters(*arguments: str) -> int:
        options = step.make_options()
        options(["step", *arguments])
        return count_parameters(step.make_config(options, []).model)

    d, v, blocks = 768, 16384, 12
    assert parameters() == 2 * v * d + d + blocks * (4 * d * d + 3 * d * 2048 + 2 * d)
    gpt2 = v * d + 512 * d + 2 * d + blocks * (4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d)
    assert parameters("--family=gpt2") == gpt2


def test_random_rows_hold_documents_only_where_they_are_kept_apart():
    whole = random_batch(step.make_config(options_of("--seq_len=128"), []))
    parts = random_batch(step.make_config(options_of("--seq_len=128", "--set=data.isolate_documents=True"), []))
    assert whole.segments.max() == 1
    assert (whole.positions == range(128)).all()
    assert parts.segments.max() > 1
    starts = parts.positions == 0
    assert (starts.cumsum(axis=1) == parts.segments).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--d_model=100"], ["--d_model=100", "multiple of 64"]),
        (["--blocks_per_stack=3"], ["--blocks_per_stack=3", "--blocks=2"]),
        (["--variants=lop"], ["--variants=lop", 'Did you mean "loop"']),
        (["--set=training.mode=layerwise"], ["training.mode=layerwise", "end_to_end"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str]):
    with pytest.raises(UserError) as caught:
        step.main(options_of("--notorch", *arguments))
    assert all(word in str(caught.value) for word in words)


def test_torch_that_is_asked_for_and_missing_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_step, "missing_packages", lambda: ["transformers"])
    with pytest.raises(UserError, match="--torch needs transformers"):
        step.main(options_of("--torch"))


def entry(weights: str, parameters: int) -> dict[str, Any]:
    figures = {"step_seconds": 0.5, "compile_seconds": 1.0, "peak_bytes": None, "parameters": parameters}
    return {"name": torch_step.row_name(weights), **figures, "versions": "torch 0"}


def fake(*lines: str, then: str = "") -> list[str]:
    """A process in the place of PyTorch's."""
    return [sys.executable, "-c", "".join(f"print({line!r}, flush=True)\n" for line in lines) + then]


def test_figures_of_another_process_are_read_and_its_failures_told():
    both = [json.dumps(entry(weights, 1)) for weights in torch_step.WEIGHTS]
    assert torch_step.run({}, timeout_seconds=60, command=fake("a warning", *both)) == list(map(json.loads, both))
    dies = fake(both[0], then="raise MemoryError('no more')")
    first, second = torch_step.run({}, timeout_seconds=60, command=dies)
    assert first == json.loads(both[0])
    assert second == {"name": torch_step.row_name("bfloat16"), "failed": "MemoryError: no more"}
    hangs = fake(both[0], then="import time; time.sleep(60)")
    first, second = torch_step.run({}, timeout_seconds=2, command=hangs)
    assert first == json.loads(both[0])
    assert second["failed"] == "not done after 2 s"


def test_another_model_is_no_comparison(monkeypatch: pytest.MonkeyPatch):
    options = options_of()
    config = step.make_config(options, [])
    right = count_parameters(config.model)
    shapes = []

    def run(shape: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        shapes.append(shape)
        return [entry("float32", right), entry("bfloat16", right + 1)]

    monkeypatch.setattr(torch_step, "run", run)
    same, other = step.torch_rows(config, options)
    assert (same.step_seconds, same.failed) == (0.5, None)
    assert other.step_seconds is None
    assert shapes[0]["d_ff"] == config.model.d_ff


def test_the_list_of_benchmarks_is_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_main(["bench"])
    assert "|".join(BENCHMARKS) in capsys.readouterr().err
    assert jax.errors.JaxRuntimeError  # what a step that does not fit raises
