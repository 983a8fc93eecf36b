"""Runs with a quantised trunk, in fp16 with a scaled loss and with fp8 matmuls: stored, resumed bitwise, measured."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import evaluate as program
from stackwise_jax.errors import UserError
from stackwise_jax.generate.texts import continue_texts
from stackwise_jax.memory.budget import stored_block_bytes
from stackwise_jax.memory.fingerprint import tree_digest
from stackwise_jax.memory.precision import from_storage
from stackwise_jax.models.rack import init_rack
from stackwise_jax.train import loop, scaling
from stackwise_jax.train.chain_programs import ChainPrograms
from stackwise_jax.train.chained import make_chained_step
from stackwise_jax.train.health import read_metrics
from stackwise_jax.train.optimizer import init_part, make_transforms
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.state import TrainState
from stackwise_jax.train.step import make_train_step
from stackwise_jax.train.trained import load_trained
from stackwise_jax.types import Batch, Quantised, Vocabulary


class PowerCutError(Exception):
    """Stands for the power cut."""


def stop_at(config: Any, corpus: Any, folder: Path, step: int) -> None:
    run = loop.Run(config, corpus, folder, lambda _: None)
    training_batch = run.inputs.training_batch

    def cut(*args: Any) -> Any:
        if run.position.step == step:
            raise PowerCutError
        return training_batch(*args)

    setattr(run.inputs, "training_batch", cut)  # noqa: B010
    with pytest.raises(PowerCutError):
        run.to_end()


def finish(config: Any, corpus: Any, folder: Path) -> loop.Run:
    run = loop.Run(config, corpus, folder, lambda _: None)
    run.to_end()
    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] != "phase"]


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(line["kind"], line["step"], line["loss"]) for line in lines(folder)]


TRUNKS = {
    "nvfp4": {"precision__trunk": "nvfp4"},
    "nf4, recomputed, fp8 matmuls": {
        "precision__trunk": "nf4",
        "training__progressive__cache_activations": False,
        "training__progressive__new_stack_precision": "fp8",
    },
}


@pytest.mark.parametrize("name", TRUNKS)
def test_a_quantised_trunk_is_stored_so_resumed_bitwise_and_measured(
    name: str, tiny: Any, tiny_corpus: Any, tmp_path: Path
):
    config = tiny(model__architecture__n_stacks=2, checkpoint__every_steps=3, logging__every_steps=1, **TRUNKS[name])
    whole = finish(config, tiny_corpus, tmp_path / "whole")
    stop_at(config, tiny_corpus, tmp_path / "stopped", 13)  # in the phase of the second stack, past a snapshot
    resumed = finish(config, tiny_corpus, tmp_path / "stopped")
    assert whole.frozen.digests == resumed.frozen.digests
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")

    stacks = list(whole.frozen.stacks.values())
    kernel = stacks[0]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, Quantised)
    assert kernel.kind == config.precision.trunk
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(stacks)) == 2 * stored_block_bytes(config)
    assert whole.frozen.digests["0"] == tree_digest(stacks[0])
    chain = whole.inputs.fingerprints("train", whole.plan.phases[2].main, whole.frozen)
    whole.frozen.keep("stacks", "0", stacks[0], tree_digest(from_storage(stacks[0], jnp.float32)))
    decoded_chain = whole.inputs.fingerprints("train", whole.plan.phases[2].main, whole.frozen)
    assert decoded_chain[1] != chain[1]  # what it decodes to is not meant

    trained = load_trained(tmp_path / "stopped", merged=False)
    assert tree_digest(trained.rack["stacks"][0]) == resumed.frozen.digests["0"]
    figures = program.evaluate(trained, source=None, rows=None)
    plain = {**trained.rack, "stacks": [from_storage(stack, jnp.float32) for stack in trained.rack["stacks"]]}
    decoded = program.evaluate(dataclasses.replace(trained, rack=plain), source=None, rows=None)
    assert figures["loss"] == pytest.approx(decoded["loss"], rel=1e-5)
    # The last stack was measured before it was quantised: near, and not the same.
    assert figures["loss"] == pytest.approx(lines(tmp_path / "whole")[-1]["loss"], rel=2e-2)
    assert figures["loss"] != pytest.approx(lines(tmp_path / "whole")[-1]["loss"], rel=1e-7)
    if name == "nvfp4":
        assert len(continue_texts(trained.rack, trained.config, trained.tokenizer, ["the "], seed=0).rows) == 1


# fp16.


def test_a_scaled_loss_skips_overflows_grows_and_resumes_bitwise(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaling, "FIRST_SCALE", 2.0**29)  # so that the first steps overflow
    monkeypatch.setattr(scaling, "GROWTH_STEPS", 5)
    config = tiny(
        model__architecture__n_stacks=1, training__phase_budget="14 steps", checkpoint__every_steps=3,
        logging__every_steps=1, precision__compute="fp16",
    )  # fmt: skip
    whole = finish(config, tiny_corpus, tmp_path / "whole")
    stop_at(config, tiny_corpus, tmp_path / "stopped", 11)
    resumed = finish(config, tiny_corpus, tmp_path / "stopped")
    assert whole.frozen.digests == resumed.frozen.digests
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    for name in whole.state.scaling:
        np.testing.assert_array_equal(whole.state.scaling[name], resumed.state.scaling[name])
    assert len(whole.state.scaling) == 2

    steps = [line for line in lines(tmp_path / "whole") if line["kind"] == "train"]
    skipped = [bool(line["skipped"]) for line in steps]
    assert skipped[0]
    assert not all(skipped)
    assert all(("gradient_norm" in line) != line_skipped for line, line_skipped in zip(steps, skipped, strict=True))
    scales, clean = [line["loss_scale"] for line in steps], 0
    for index in range(len(steps) - 1):
        clean = 0 if skipped[index] else clean + 1
        wanted = 0.5 if skipped[index] else 2.0 if clean == 5 else 1.0
        clean %= 5
        assert scales[index + 1] == wanted * scales[index]
    assert any(later > earlier for earlier, later in itertools.pairwise(scales))


@pytest.fixture(scope="module")
def programs(tiny: Any) -> dict[str, Any]:
    """{name: (scale) -> (state before, state after, metrics)} of one step; a scale is for the steps in fp16."""

    def stepping(make: Any, precision: str) -> Any:
        config = tiny(model__architecture__n_stacks=1, precision__compute=precision)
        own = Program(config, Vocabulary(320, 4, (0, 1, 2, 3, 4)), n_rows=8)
        step = make(own, Signature(False, ((1, Role.LIVE),), Role.LIVE, Role.LIVE, True, "fused", own.task))
        rack = init_rack(jax.random.key(3), config.model, (1,))
        transforms = make_transforms(config, scales_head=False)
        moments = {name: init_part(transforms, name, part) for name, part in rack.items()}

        def run(scale: float | None) -> tuple[TrainState, TrainState, dict[str, Any]]:
            tokens = jax.random.randint(jax.random.key(1), (4, 32), 5, 320)
            ones, places = jnp.ones((4, 32), jnp.int32), jnp.broadcast_to(jnp.arange(32)[None], (4, 32))
            batch = Batch(tokens, ones, places, jnp.arange(4), jnp.zeros(4, int))
            scaled = {"scale": jnp.float32(scale), "clean_steps": jnp.int32(7)} if scale else {}
            state = TrainState(rack, moments, scaled)
            scalars = np.full(3, 0.5, np.float32), np.array(3, np.int32)
            return state, *step(jax.tree.map(jnp.copy, state), {"frozen_stacks": []}, batch, None, *scalars)

        return run

    return {
        "fused": stepping(make_train_step, "fp16"),
        "chained": stepping(lambda program, *rest: make_chained_step(ChainPrograms(program), *rest), "fp16"),
        "fp32": stepping(make_train_step, "fp32"),
    }


@pytest.mark.parametrize("execution", ["fused", "chained"])
def test_a_step_that_overflows_changes_nothing_but_the_scale(execution: str, programs: dict[str, Any]):
    before, after, metrics = programs[execution](2.0**30)
    for tree in ("params", "optimizer"):
        assert tree_digest(getattr(before, tree)) == tree_digest(getattr(after, tree))
    assert float(after.scaling["scale"]) == 2.0**29
    assert int(after.scaling["clean_steps"]) == 0
    assert float(metrics["skipped"]) == 1.0
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("execution", ["fused", "chained"])
def test_a_scaled_step_is_the_step(execution: str, programs: dict[str, Any]):
    plain = programs["fp32"](None)[2]
    before, after, metrics = programs[execution](64.0)
    assert tree_digest(before.params) != tree_digest(after.params)
    assert (float(after.scaling["scale"]), int(after.scaling["clean_steps"])) == (64.0, 8)
    for name in ("loss", "gradient_norm"):
        assert float(metrics[name]) == pytest.approx(float(plain[name]), rel=3e-3)


def test_where_no_scale_helps_the_run_is_stopped():
    metrics = {"loss": jnp.float32(5), "gradient_norm": jnp.float32(jnp.inf), "skipped": jnp.float32(1)}
    assert "gradient_norm" not in read_metrics(3, {**metrics, "loss_scale": jnp.float32(1)})
    for wrong in ({"loss_scale": jnp.float32(2.0**-41)}, {"loss_scale": jnp.float32(1), "loss": jnp.float32(jnp.nan)}):
        with pytest.raises(UserError, match="gradient norm=inf at phase step 3"):
            read_metrics(3, {**metrics, **wrong})


def test_nothing_is_scaled_where_fp16_is_not_used(tiny: Any):
    assert scaling.init_scaling(tiny(precision__compute="bf16")) == {}
    assert scaling.next_scaling({}, jnp.float32(jnp.inf)) == {}
    live = tiny(training__progressive__new_stack_precision="fp16", training__accumulation_steps=2)
    assert float(scaling.init_scaling(live)["scale"]) == 2.0**16 / 64  # micro-batches of 2 rows of 32 tokens
