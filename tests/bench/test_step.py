"""`bench step` at tiny size: what it prints, what it refuses, and that it survives what fails."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from absl import flags
from live import reference_python

from stackwise_jax.bench import step, torch_step
from stackwise_jax.bench.__main__ import BENCHMARKS
from stackwise_jax.bench.__main__ import main as bench_main
from stackwise_jax.bench.live_step import random_batch
from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.models import families
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.train.plan import make_plan

ROOT = Path(__file__).parents[2]
TINY = ["--seq_len=16", "--batch_size=2", "--steps=2", "--set=model.vocab_size=64"]
SMALLEST = ["gpt2:nano", "bert:tiny", "modernbert:tiny", "llama:tiny"]
ONE_BLOCK, TWO_BLOCKS = (f"--set=model.architecture.blocks_per_stack={n}" for n in (1, 2))


def options_of(*arguments: str) -> flags.FlagValues:
    options = step.make_options()
    options(["step", *TINY, *arguments])
    return options


def test_it_measures_and_writes_and_survives_a_variant_that_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(step, "VARIANTS", {"cudnn": ["model.attention_implementation=cudnn"]})
    written = tmp_path / "out" / "step.json"
    models = ["gpt2:nano", "bert:tiny"]
    asked = [f"--model={','.join(models)}", "--notorch", "--variants=all", ONE_BLOCK, f"--json={written}"]
    step.main(options_of(*asked))
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed if " parameters; 2 rows of 16 tokens" in line] == [
        "gpt2",
        "bert",
    ]
    wide, narrow, cudnn = printed[-3:]
    assert wide.startswith("stackwise_jax, float32 weights ")
    assert narrow.startswith("stackwise_jax, bfloat16 weights ")
    assert cudnn.startswith("cudnn ")
    assert "failed: model.attention_implementation" in cudnn
    for name, found in zip(models, json.loads(written.read_text())["models"], strict=True):
        plan = make_plan(step.make_config(name, options_of(ONE_BLOCK), []), None)
        assert found["model"] == name
        assert found["flops_per_step"] == plan.step_flops[0]
        assert found["tokens_per_step"] == 32
        row, small, failed = found["rows"]
        assert row["failed"] is None
        assert row["step_seconds"] > 0
        assert row["peak_bytes"] > 16 * count_parameters(plan.config.model)  # weights, two moments, gradients
        assert small["step_seconds"] > 0
        assert failed["step_seconds"] is None


def test_local_attention_is_measured(capsys: pytest.CaptureFixture[str]):
    step.main(options_of("--model=modernbert:tiny", "--notorch", TWO_BLOCKS, "--set=precision.weights=bf16"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("stackwise_jax, bfloat16 weights ")


@pytest.mark.parametrize("name", SMALLEST)
def test_every_variant_is_a_config_of_its_own(name: str):
    configs = step.chosen_configs(name, options_of("--variants=all"))
    assert len(set(configs.values())) == len(configs) == len(step.VARIANTS) + 2


@pytest.mark.parametrize(
    ("name", "rows", "tokens", "rate"),
    [
        ("gpt2:small", 16, 1024, None),
        ("bert:base", 64, 512, 0.15),
        ("modernbert:base", 16, 1024, 0.3),
        ("llama:1b", 4, 2048, None),
    ],
)
def test_models_are_those_published_at_their_usual_shapes(name: str, rows: int, tokens: int, rate: float | None):
    options = step.make_options()
    options(["step"])
    assert name in options.model
    config = step.make_config(name, options, [])
    family, _, size = name.partition(":")
    objective = {"name": "clm" if rate is None else "mlm"}
    published = resolve({"model": getattr(families, family)(size), "objective": objective}).model
    changed = {"architecture": config.model.architecture, "dropout": 0.0}
    assert config.model == dataclasses.replace(published, **changed)
    assert (config.model.architecture.n_stacks, config.model.n_blocks) == (1, published.n_blocks)
    assert (config.training.batch_size, config.data.seq_len) == (rows, tokens)
    assert rate is None or config.objective.rate_min == config.objective.rate_max == rate


def test_random_rows_hold_documents_only_where_they_are_kept_apart():
    whole = random_batch(step.make_config("gpt2:nano", options_of("--seq_len=128"), []))
    apart = options_of("--seq_len=128", "--set=data.isolate_documents=True")
    parts = random_batch(step.make_config("gpt2:nano", apart, []))
    assert whole.segments.max() == 1
    assert (whole.positions == range(128)).all()
    assert parts.segments.max() > 1
    starts = parts.positions == 0
    assert (starts.cumsum(axis=1) == parts.segments).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model="], ["--model=", "gpt2:small"]),
        (["--model=gpt:small"], ["--model=gpt:small", 'Did you mean "gpt2"']),
        (["--model=gpt2"], ["--model=gpt2 ", "FAMILY:SIZE"]),
        (["--model=bert:bas"], ["bert size 'bas'", 'Did you mean "base"']),
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


def entry(kind: torch_step.Kind, parameters: int, seconds: float = 0.5) -> dict[str, Any]:
    figures = {"step_seconds": seconds, "compile_seconds": 1.0, "peak_bytes": None, "parameters": parameters}
    return {"name": kind.name, **figures, "versions": "torch 0"}


def fake(*lines: str, then: str = "") -> list[str]:
    """A process in the place of PyTorch's."""
    return [sys.executable, "-c", "".join(f"print({line!r}, flush=True)\n" for line in lines) + then]


def test_figures_of_another_process_are_read_and_its_failures_told():
    shape, kinds = {"model": {"model_type": "gpt2"}}, torch_step.kinds_of("gpt2")
    both = [json.dumps(entry(kind, 1)) for kind in kinds]
    assert torch_step.run(shape, timeout_seconds=60, command=fake("a warning", *both)) == list(map(json.loads, both))
    dies = fake(both[0], then="raise MemoryError('no more')")
    first, second = torch_step.run(shape, timeout_seconds=60, command=dies)
    assert first == json.loads(both[0])
    assert second == {"name": kinds[1].name, "failed": "MemoryError: no more"}
    hangs = fake(both[0], then="import time; time.sleep(60)")
    first, second = torch_step.run(shape, timeout_seconds=2, command=hangs)
    assert first == json.loads(both[0])
    assert second["failed"] == "not done after 2 s"


def test_another_model_is_no_comparison(monkeypatch: pytest.MonkeyPatch):
    config = step.make_config("bert:tiny", options_of(), [])
    right = count_parameters(config.model)
    shapes = []

    def run(shape: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        shapes.append(shape)
        wide, narrow = torch_step.kinds_of("bert")
        return [entry(wide, right), entry(narrow, right + 1)]

    monkeypatch.setattr(torch_step, "run", run)
    rows = step.torch_rows(config, 2)
    (same,), (other,) = rows["float32"], rows["bfloat16"]
    assert (same.step_seconds, same.failed) == (0.5, None)
    assert other.step_seconds is None
    assert shapes[0]["model"]["intermediate_size"] == config.model.d_ff
    assert shapes[0]["masked_share"] == 0.15
    assert step.speedups({step.our_name("bfloat16"): step.Row("", 0.25)}, rows) == {}


def test_like_weights_are_compared_and_of_theirs_the_fastest(capsys: pytest.CaptureFixture[str]):
    seconds = {"sdpa": 0.5, "flex_attention": 0.4}
    kinds = torch_step.kinds_of("modernbert")
    theirs = {
        weights: [step.Row(kind.name, seconds[kind.attention]) for kind in kinds if kind.weights == weights]
        for weights in torch_step.WEIGHTS
    }
    theirs["bfloat16"][1] = step.Row("", failed="no such kernel")
    ours = {step.our_name(weights): step.Row("", own) for weights, own in (("float32", 0.2), ("bfloat16", 0.1))}
    assert step.speedups(ours, theirs) == {"float32": 0.4 / 0.2, "bfloat16": 0.5 / 0.1}
    assert "2.000 times the tokens a second of transformers with flex_attention, float32 weights" in (
        capsys.readouterr().out
    )


def shape_of(name: str) -> tuple[dict[str, Any], int]:
    """(what PyTorch's process is told of a tiny model, our number of its parameters)."""
    told = []

    def run(shape: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        told.append(shape)
        return [{"name": "", "failed": "not run"} for _ in torch_step.kinds_of(shape["model"]["model_type"])]

    config = step.make_config(name, options_of(TWO_BLOCKS, "--seq_len=256"), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_step, "run", run)
        step.torch_rows(config, 1)
    return told[0], count_parameters(config.model)


LIVE = """
import json, sys, torch
from stackwise_jax.bench import torch_step
torch.compile = lambda model: model  # minutes on a CPU
for shape in json.loads(sys.argv[-1]):
    attention = torch_step.ATTENTIONS[shape["model"]["model_type"]][0]
    step, parameters = torch_step.make_step(attention, shape, "float32", "cpu")
    losses = [float(step().detach()) for _ in range(10)]
    print(json.dumps([parameters, losses[0], losses[-1]]))
"""


def test_transformers_has_the_same_models_and_trains_them():
    python, shapes = reference_python(), [shape_of(name) for name in SMALLEST]
    told = json.dumps([shape for shape, _ in shapes])
    done = subprocess.run([python, "-c", LIVE, told], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE)
    for (_, right), line in zip(shapes, done.stdout.splitlines(), strict=True):
        parameters, first, last = json.loads(line)
        assert parameters == right
        assert last < first


def test_the_list_of_benchmarks_is_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_main(["bench"])
    assert "|".join(BENCHMARKS) in capsys.readouterr().err
    assert jax.errors.JaxRuntimeError  # what a step that does not fit raises
