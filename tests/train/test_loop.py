"""The loop: what is compiled, what is logged, what a user's mistake does to a run folder."""

import copy
import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.train import loop
from stackwise_jax.train.plan import make_plan
from stackwise_jax.train.trained import load_trained


def run(config: Any, corpus: Any, folder: Path) -> loop.Result:
    return loop.run(config, corpus, folder, say=lambda _: None)


@pytest.fixture(scope="module")
def finished(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loop.Result]:
    """(folder, result) of a run of `tiny()`; who changes the folder copies it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(tiny(), tiny_corpus, folder)


class Compilations:
    """Counts programs by the name of the function, through JAX's own events."""

    def __init__(self) -> None:
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event: str, seconds: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(facts["fun_name"])

    def count(self, name: str) -> int:
        return self.names.count(f"jit({name})")


@pytest.fixture
def compilations() -> Any:
    counter = Compilations()
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"training__mode": "layerwise"}, 2),
        ({"training__embedding_phase": "with_first_stack"}, 2),
        ({"training__head": "frozen", "training__progressive__cache_activations": False}, 2),
        ({"training__mode": "end_to_end"}, 1),
    ],
)
def test_train_steps_compile_once_per_signature(
    overrides: dict[str, Any], expected: int, tiny: Any, tiny_corpus: Any, tmp_path: Path, compilations: Compilations
) -> None:
    config = tiny(training__phase_budget="2 steps", training__embedding_budget="3 steps", **overrides)
    result = run(config, tiny_corpus, tmp_path / "run")
    assert result.plan.compilations == expected
    assert f"{expected} distinct train step(s)" in (tmp_path / "run" / "plan.txt").read_text()
    assert compilations.count("train_step") == expected
    assert compilations.count("evaluate") == expected


def test_compilations_are_counted(compilations: Compilations) -> None:
    """The twin: a program whose shape changes with depth is seen."""

    @jax.jit
    def train_step(x: Any) -> Any:
        return x + 1

    for depth in range(3):
        train_step(np.zeros(depth + 5))
    assert compilations.count("train_step") == 3


def test_every_phase_lowers_held_out_loss(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(training__phase_budget="30 steps", training__embedding_budget="30 steps")
    losses = [figures["loss"] for figures in run(config, tiny_corpus, tmp_path / "run").held_out.values()]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("execution", ["fused", "chained"])
def test_optimizers_and_executions_train(
    optimizer: str, execution: str, tiny: Any, tiny_corpus: Any, tmp_path: Path
) -> None:
    config = tiny(
        training__mode="end_to_end",
        training__phase_budget="20 steps",
        training__execution=execution,
        optimizer__name=optimizer,
        optimizer__learning_rate=3e-3,
    )
    run(config, tiny_corpus, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_bfloat16_trains_near_float32(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, finished: tuple[Path, loop.Result]
) -> None:
    precise = finished[1]
    low = {f"precision__{name}": "bf16" for name in ("compute", "trunk", "cache")}
    coarse = run(tiny(**low), tiny_corpus, tmp_path / "bf16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(coarse.rack["stacks"])} == {"bfloat16"}
    for phase, figures in precise.held_out.items():
        assert abs(figures["loss"] - coarse.held_out[phase]["loss"]) < 0.02


def test_the_same_seed_gives_the_same_weights(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, finished: tuple[Path, loop.Result]
) -> None:
    racks = [finished[1].rack, run(tiny(), tiny_corpus, tmp_path / "again").rack]
    for one, other in zip(*map(jax.tree.leaves, racks), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    other_seed = run(tiny(seed=1), tiny_corpus, tmp_path / "other").rack
    assert not np.array_equal(racks[0]["embedding"]["tokens"], other_seed["embedding"]["tokens"])


def test_a_number_that_is_none_stops_before_it_is_stored(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(optimizer__learning_rate=1e30, optimizer__warmup_fraction=0.0, optimizer__clip_norm=0.0)
    with pytest.raises(UserError, match=r"lower optimizer.learning_rate"):
        run(config, tiny_corpus, tmp_path / "run")
    for step in (tmp_path / "run" / "steps").iterdir():
        assert "NaN" not in (step / "meta.json").read_text()


def test_a_finished_run_is_read_back(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, finished: tuple[Path, loop.Result]
) -> None:
    result = finished[1]
    folder = shutil.copytree(finished[0], tmp_path / "run")
    trained = load_trained(folder, merged=False)
    assert trained.finished
    for one, other in zip(jax.tree.leaves(trained.rack), jax.tree.leaves(result.rack), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    again = run(tiny(), tiny_corpus, folder)
    assert again.held_out == result.held_out


def test_any_depth_can_be_read(finished: tuple[Path, loop.Result]) -> None:
    folder, rack = finished[0], finished[1].rack
    shallow = load_trained(folder, n_stacks=1).rack
    assert len(shallow["stacks"]) == 1
    assert not np.array_equal(shallow["head"]["table"], rack["head"]["table"])  # the head as it was then
    with pytest.raises(UserError, match="heads for depth 1, 2 and for all 3 stacks"):
        load_trained(folder, n_stacks=7)


def test_a_run_under_way_is_read_as_it_stands(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_trained(folder)
    started = loop.Run(tiny(), tiny_corpus, folder, lambda _: None)
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_trained(folder)
    for index in range(2):
        started._run_phase(started.plan.phases[index], started.plan.signatures[index])
    started.folder.flush()
    trained = load_trained(folder)
    assert (len(trained.rack["stacks"]), trained.finished) == (1, False)


def test_damage_is_named_not_trained_on(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, finished: tuple[Path, loop.Result]
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "run")
    part = next((folder / "stacks").glob("0000-*"))
    manifest = json.loads((part / "manifest.json").read_text())
    name = next(iter(manifest["arrays"]))
    manifest["arrays"][name] = "0" * 64
    (part / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{part.name} is damaged: the digest of {name}"):
        load_trained(folder)
    with pytest.raises(UserError, match="is damaged"):
        run(tiny(), tiny_corpus, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"model__rope_theta": 500.0},
        {"precision__cache": "bf16"},
        {"objective__name": "mlm", "model__attention": "bidirectional"},
    ],
)
def test_what_a_cache_came_from_is_in_its_fingerprint(
    change: dict[str, Any], tiny: Any, tiny_corpus: Any, tmp_path: Path
) -> None:
    def fingerprints(config: Any, name: str) -> list[str]:
        started = loop.Run(config, tiny_corpus, tmp_path / name, lambda _: None)
        started.frozen.digests = {"embedding": "e", "0": "a", "1": "b"}
        return started.inputs.fingerprints("train", started.plan.phases[3].main, started.frozen)

    base, changed = fingerprints(tiny(), "base"), fingerprints(tiny(**change), "changed")
    assert base == fingerprints(tiny(), "again")
    assert not set(base) & set(changed)


def test_a_changed_trunk_invalidates_the_cache(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    started = loop.Run(tiny(), tiny_corpus, tmp_path / "run", lambda _: None)
    for index in range(3):
        started._run_phase(started.plan.phases[index], started.plan.signatures[index])
    last = started.plan.phases[3]
    batch = started.inputs.held_out[0]

    def read() -> np.ndarray:
        started.inputs.prepare(last, started.frozen, started.position.step, lambda _: None)
        return np.asarray(started.inputs._caches["held_out"].read(batch))

    before = read()
    np.testing.assert_array_equal(read(), before)
    started.frozen.keep("stacks", "1", jax.tree.map(lambda leaf: leaf + 0.01, started.frozen.stacks[1]), "changed")
    assert not np.array_equal(before, read())


def test_another_tokenizer_invalidates_the_cache(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    tokenizer = copy.copy(tiny_corpus.tokenizer)
    tokenizer.digest = "another"
    corpora = (tiny_corpus, dataclasses.replace(tiny_corpus, tokenizer=tokenizer))
    roots = []
    for number, corpus in enumerate(corpora):
        started = loop.Run(tiny(), corpus, tmp_path / str(number), lambda _: None)
        started.frozen.digests = {"embedding": "e"}
        roots.append(started.inputs.fingerprints("train", started.plan.phases[1].main, started.frozen))
    assert roots[0] != roots[1]


def test_plan_needs_no_corpus_and_states_the_costs(tiny: Any) -> None:
    plan = make_plan(tiny(data__max_rows=None), None)
    cached = make_plan(tiny(data__max_rows=None), 984)
    assert plan.flops < cached.flops
    assert sum(cached.pass_flops) == pytest.approx(cached.flops - plan.flops)


def test_rates_leave_saving_and_evaluating_out(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    """Neither snapshots nor evaluations inside a phase may make a step look faster than it can be."""
    config = tiny(
        training__phase_budget="12 steps",
        logging__every_steps=1,
        checkpoint__every_steps=2,
        evaluation__every_steps=3,
    )
    run(config, tiny_corpus, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    assert min(rates) > 0
    assert max(rates) < 50 * sorted(rates)[len(rates) // 2]
    held_out = [(line["phase"], line["step"]) for line in lines if line["kind"] == "held_out"]
    assert len(held_out) == len(set(held_out)) == 1 + 3 * 4 + 1  # 3, 6, 9 and the end of each stack; 3 and 4 at first
    assert {line["phase_step"] for line in lines if line["phase"] == "stack_0002" and "phase_step" in line} == set(
        range(1, 13)
    )


def test_nothing_stays_on_the_device(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        before = sum(array.nbytes for array in jax.live_arrays())
        result = run(tiny(), tiny_corpus, tmp_path / "run")
        left = sum(array.nbytes for array in jax.live_arrays()) - before
    finally:
        gc.enable()
    assert result.plan.rows is not None
    assert left < 984 * 32 * 32 * 4 / 4  # a quarter of what the cache alone held
