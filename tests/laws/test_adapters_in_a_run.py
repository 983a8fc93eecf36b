"""A run that trains adapters beside its trunk: the base stays, adapters are parts of their own, merging is equal."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory.fingerprint import tree_digest
from stackwise_jax.models.adapters import merge
from stackwise_jax.models.rack import apply_rack, row_context
from stackwise_jax.schema import ModelConfig
from stackwise_jax.train import loop
from stackwise_jax.train.trained import load_trained
from stackwise_jax.types import Params

CONFIG = {
    "training__mode": "progressive",
    "training__progressive__trunk_strategy": "qlora",
    "training__adapters__learning_rate_scale": 30.0,
    "training__adapters__ranks": "2,4,4",
    "training__phase_budget": "4 steps",
    "training__embedding_budget": "1 steps",
    "model__init_std": 0.1,
    "evaluation__rows": 8,
}


@pytest.fixture(scope="module")
def adapted(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[loop.Run, loop.Result, Any]:
    """A finished run, its result, and what was stored of each stack when it settled."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    run = loop.Run(tiny(**CONFIG), tiny_corpus, folder, lambda _: None)
    bases: dict[int, Params] = {}
    settle = run._settle

    def settle_phase(phase: Any) -> None:
        settle(phase)
        for stack, tree in run.frozen.stacks.items():
            bases.setdefault(stack, jax.tree.map(np.array, tree))

    run._settle = settle_phase
    return run, run.to_end(), bases


def outputs(rack: Params, model: ModelConfig) -> np.ndarray:
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 5, 300)
    context = row_context(model, None, jnp.broadcast_to(jnp.arange(16)[None], (2, 16)))
    run_rack = jax.jit(lambda rack: apply_rack(rack, tokens, context, model, dtype=jnp.float32))
    return np.asarray(run_rack(jax.tree.map(jnp.asarray, rack)))


def test_the_base_stays_to_the_bit_and_adapters_move(adapted: Any) -> None:
    run, _, bases = adapted
    assert {stack: tree_digest(tree) for stack, tree in run.frozen.stacks.items()} == {
        stack: tree_digest(tree) for stack, tree in bases.items()
    }
    assert sorted(run.frozen.adapters) == [0, 1]  # nothing was grown on top of the last stack
    for stack, adapter in run.frozen.adapters.items():
        assert adapter["mlp"]["down"]["kernel"]["a"].shape[-1] == (2, 4, 4)[stack]
        assert np.abs(adapter["mlp"]["down"]["kernel"]["b"]).max() > 1e-3  # it began at zero
    moved = jax.tree.map(np.array, bases[0])
    moved["mlp"]["down"]["kernel"][0, 0, 0] += 1e-6
    assert tree_digest(moved) != tree_digest(bases[0])  # the twin


def test_attached_adapters_equal_merged_weights(adapted: Any) -> None:
    run, result, bases = adapted
    config, adapters = run.config, run.frozen.adapters

    def rack(alpha: float) -> Params:
        stacks = jax.tree.map(jnp.asarray, bases)
        merged = [merge(own, adapters[n], alpha) if n in adapters else own for n, own in sorted(stacks.items())]
        return {**result.rack, "stacks": merged}

    attached = outputs(result.rack, config.model)
    np.testing.assert_allclose(outputs(rack(config.training.adapters.alpha), config.model), attached, atol=1e-5)
    assert np.abs(outputs(rack(1.0), config.model) - attached).max() > 1e-3  # the twin: another scale
    assert np.abs(outputs(rack(0.0), config.model) - attached).max() > 1e-3  # and none of it


def test_adapters_are_parts_of_the_folder(adapted: Any) -> None:
    run, result, _ = adapted
    assert sorted(run.references["adapters"]) == ["0", "1"]
    for stack, reference in run.references["adapters"].items():
        assert reference.startswith(f"adapter-{int(stack):04d}-")
        assert (run.folder.path / "stacks" / reference).is_dir()
    read = load_trained(run.folder.path, merged=False).rack
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(result.rack), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_merged_run_equals_the_unmerged_one(adapted: Any, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    _, result, _ = adapted
    config = tiny(**CONFIG, training__adapters__merge=True)
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    merged = run.to_end()
    assert run.frozen.adapters == {}
    assert not list((tmp_path / "run" / "stacks").glob("adapter-*"))
    assert merged.held_out == result.held_out
    np.testing.assert_allclose(outputs(merged.rack, config.model), outputs(result.rack, config.model), atol=1e-5)


def test_a_joint_phase_after_adapters_begins_with_them_merged(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    fields = {**CONFIG, "model__architecture__n_stacks": 2, "training__adapters__ranks": "2,4"}
    config = tiny(**fields, training__adapters__merge=True, training__fusion__budget="1 steps")
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    begin, seen = run._begin_phase, []

    def begin_phase(phase: Any, signature: Any) -> None:
        begin(phase, signature)
        live = run.state.params.get("stacks", [{}])[0]
        seen.append([tree_digest(tree) for tree in (live, run.frozen.stacks.get(0, {}))])

    run._begin_phase = begin_phase
    run.to_end()
    (_, alone), (live, merged) = seen[2], seen[3]  # the second stack's phase, and the joint one
    assert live == merged
    assert live != alone  # the stack as it was before its adapter
