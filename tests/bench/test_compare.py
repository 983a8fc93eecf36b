"""The comparison: rows of equal FLOPs, one row trained, and a table that survives what fails."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from stackwise_jax.bench import compare, compare_row
from stackwise_jax.bench.equal_flops import share_out, training_flops
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

CONFIG = Path(__file__).resolve().parents[2] / "configs/comparison.py"


def options_of(*arguments: str) -> flags.FlagValues:
    options = compare.make_options()
    options(["compare", f"--config={CONFIG}", *arguments])
    return options


def test_every_row_of_the_comparison_takes_equal_flops():
    source = compare.load_rows(CONFIG)
    flops = {name: training_flops(compare.make_row(source, name, [])) for name in source["NAMES"]}
    assert all(abs(of / flops["end_to_end"] - 1) < 0.005 for of in flops.values()), flops
    assert len(flops) == 34


def test_flops_stay_equal_under_overrides_and_another_corpus():
    source, options = compare.load_rows(CONFIG), options_of("--set=training.batch_size=64", "--tokens=30_000_000")
    configs = compare.equal_configs(source, list(source["NAMES"]), options, 20_000)
    flops = {name: training_flops(config, 20_000) for name, config in configs.items()}
    reference = training_flops(compare.make_row(source, "end_to_end", ["training.phase_budget=30M tokens"]))
    assert all(abs(of / reference - 1) < 0.006 for of in flops.values()), flops
    alone = configs["layerwise"].training.embedding_budget
    assert alone != compare.make_row(source, "layerwise", []).training.embedding_budget


def test_a_row_that_cannot_be_equal_is_refused(tiny: Callable[..., RunConfig]):
    config = tiny(training__mode="layerwise", data__max_rows=64)
    with pytest.raises(UserError, match="leave no step"):
        share_out(config, 0.5 * sum_of_passes(config), 0.05)
    with pytest.raises(UserError, match="window_gib"):
        share_out(tiny(cache__window_gib=1.0), 1e12, 0.05)
    with pytest.raises(UserError, match="give more tokens"):
        compare.equal_configs(compare.load_rows(CONFIG), ["layerwise"], options_of("--tokens=700_000"), 1024)


def sum_of_passes(config: RunConfig) -> float:
    from stackwise_jax.train.plan import make_plan

    return sum(make_plan(config, None).pass_flops)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows=layerwize"], ["--rows=layerwize", 'Did you mean "layerwise"']),
        (["--rows=layerwise@fast"], ["layerwise@fast", "ROW@RATE"]),
        (["--rows=layerwise@1e-3", "--learning_rates=1e-3"], ["layerwise@1e-3", "--learning_rates"]),
        (["--learning_rates=high"], ["--learning_rates=high", "numbers"]),
        (["--config=nowhere.py"], ["--config=nowhere.py", "no such file"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: list[str]):
    with pytest.raises(UserError) as caught:
        compare.main(options_of("--plan", *arguments))
    assert all(word in str(caught.value) for word in words)


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a tiny layer-wise row."""
    folder = tmp_path_factory.mktemp("row")
    config = tiny(training__mode="layerwise", logging__every_steps=2, logging__peak_flops=1e12)
    found = compare_row.run_row(config, folder)
    assert json.loads((folder / compare_row.RESULT).read_text()) == json.loads(json.dumps(found))
    return json.loads((folder / compare_row.RESULT).read_text())


def test_a_row_says_what_came_out(trained: dict[str, Any]):
    assert (trained["steps"], trained["tokens"]) == (4 + 3 * 6, (4 + 3 * 6) * 4 * 32)
    assert set(trained["phases"]) == {"embedding", "stack"}
    assert all(rates["tokens_per_second"] > 0 and rates["mfu"] > 0 for rates in trained["phases"].values())
    losses = [held_out["loss"] for held_out in trained["held_out"].values()]
    assert len(losses) == 4
    assert all(0 < loss < 2 * math.log(320) for loss in losses)


def fake_row(result: dict[str, Any]) -> list[str]:
    """A process that writes a result for layer-wise rows and dies of the others."""
    code = (
        "import json, sys, pathlib; config = json.loads(sys.argv[1]); folder = pathlib.Path(sys.argv[2])\n"
        "assert config['training']['mode'] == 'layerwise', 'no | memory'\n"
        f"folder.mkdir(parents=True); result = {result!r}; result['config'] = config\n"
        "(folder / 'result.json').write_text(json.dumps(result))"
    )
    return [sys.executable, "-c", code]


def test_the_table_survives_a_row_that_fails_and_keeps_rows_that_are_done(
    trained: dict[str, Any], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    sets = [f"data.source={tiny_text}/*.txt", f"data.cache_dir={tmp_path}", "model.vocab_size=320"]
    sets += ["data.validation_fraction=0.2", "data.seq_len=32", "training.batch_size=4"]
    arguments = ["--rows=control_1,layerwise", "--tokens=400_000", f"--workdir={tmp_path}/runs"]
    options = options_of(*arguments, *(f"--set={field}" for field in sets))
    monkeypatch.setattr(compare, "ROW_COMMAND", fake_row(trained))
    compare.main(options)
    written = (tmp_path / "runs/comparison.md").read_text()
    assert "| control_1, failed | AssertionError: no / memory |" in written
    done = next(line for line in written.splitlines() if line.startswith("| layerwise"))
    assert "| 0.001 |" in done
    assert f"{trained['held_out']['stack_0002']['loss']:.4f}" in done
    assert "- layerwise: " in written
    assert capsys.readouterr().out.count("control_1, failed") == 2
    assert json.loads((tmp_path / "runs/comparison.json").read_text())["control_1"]["failed"]
    monkeypatch.setattr(compare, "ROW_COMMAND", [sys.executable, "-c", "raise SystemExit('again')"])
    compare.main(options)
    assert (tmp_path / "runs/comparison.md").read_text() == written.replace("AssertionError: no / memory", "again")


def test_a_row_that_hangs_is_given_up(tiny: Callable[..., RunConfig], tmp_path: Path):
    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    found = compare.run_row(tiny(), tmp_path, timeout_seconds=1, command=hangs)
    assert found["failed"].startswith("not done after 1 s")
