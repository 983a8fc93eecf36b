"""What is known of blocks while tracing changes no number: a stack without a loop is the stack that reads its facts."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models import families, weights
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import apply_penalised_stack, init_stack, placed
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train import loop
from stackwise_jax.train.program import Program
from stackwise_jax.types import Params, Vocabulary

B, T, L = 2, 512, 3  # long enough that a window of 64 is cut into blocks
SMALL = {"d_model": 32, "n_heads": 2, "d_ff": 48, "init_std": 0.2, "dropout": 0.1, "architecture": {"n_stacks": 4}}
OTHERS = {"data": {"seq_len": T}, "objective": {"name": "mlm"}}
MODEL: ModelConfig = resolve({"model": {**families.modernbert("tiny"), **SMALL, "global_every": 2}, **OTHERS}).model
X = jax.random.normal(jax.random.key(5), (B, T, 32))
PLACES = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
STACK = init_stack(jax.random.key(0), MODEL, 0, L)
ALL = weights.known_facts(MODEL, (0,), L)


def value_and_gradients(
    known: Sequence[dict[str, bool]], model: ModelConfig = MODEL, stack: Params = STACK, **how: Any
) -> list[np.ndarray]:
    segments = jnp.broadcast_to(jnp.where(PLACES[:1] < 200, 1, 2), (B, T)) if how.pop("packed", False) else None
    context = dataclasses.replace(row_context(model, segments, PLACES), cuts_rows=how.pop("cuts_rows", True))

    @jax.jit
    def run(stack: Params, x: jax.Array) -> Any:
        def loss(stack: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, _ = apply_penalised_stack(
                stack, x, context, model, dtype=jnp.float32, unroll=L, known=known, key=jax.random.key(3), **how
            )
            return jnp.mean(out * jnp.cos(jnp.arange(32.0))[None, None]), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(stack, x)

    return [np.asarray(leaf) for leaf in jax.tree.leaves(run(stack, X))]


@functools.cache
def as_read() -> list[np.ndarray]:
    """Those of the stack that reads its facts."""
    return value_and_gradients(())


def differ(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return any(
        not np.allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    "how", [{}, {"packed": True}, {"remat": "full"}, {"remat": "dots", "cuts_rows": False}], ids=lambda how: str(how)
)
def test_known_facts_are_those_among_the_weights(how: dict[str, Any]):
    assert [{"is_local": n % 2 != 0, "is_first": n == 0} for n in range(L)] == ALL
    expected = value_and_gradients((), **how) if how else as_read()
    assert not differ(value_and_gradients(ALL, **how), expected)
    some = [{"is_local": facts["is_local"]} for facts in ALL]
    assert not differ(value_and_gradients(some, **how), expected)


def test_known_facts_detect_those_of_another_rack():
    expected = as_read()
    for other in ({"global_every": 3}, {"first_attention_norm": True}):
        known = weights.known_facts(dataclasses.replace(MODEL, **other), (0,), L)
        known = [{"is_first": False, **facts} for facts in known]
        assert differ(value_and_gradients(known), expected)
    assert differ(value_and_gradients(weights.known_facts(MODEL, (3,), L)), expected)  # another place: none is first
    assert differ(value_and_gradients(weights.known_facts(MODEL, (4,), L)), expected)


def test_blocks_that_look_back_alone_are_known_too():
    model = dataclasses.replace(MODEL, causal_from=2, window=None, global_every=None, rope_theta_local=None)
    stack = init_stack(jax.random.key(0), model, 0, L)
    known = weights.known_facts(model, (0,), L)
    assert [facts["is_causal"] for facts in known] == [False, False, True]
    expected = value_and_gradients((), model, stack)
    assert not differ(value_and_gradients(known, model, stack), expected)
    other = weights.known_facts(dataclasses.replace(model, causal_from=1), (0,), L)
    assert differ(value_and_gradients(other, model, stack), expected)


def program_of(n_stacks: int, blocks_per_stack: int, **training: Any) -> Program:
    model = {**families.modernbert("tiny"), **SMALL}
    model["architecture"] = {"n_stacks": n_stacks, "blocks_per_stack": blocks_per_stack}
    config: RunConfig = resolve({"model": model, "training": training, **OTHERS})
    return Program(config, Vocabulary(300, 0, (0,)), 4)


CUT = [  # stacks, blocks of each, how they are trained, what is known of the blocks of a stack
    (1, 4, {}, [{"is_local", "is_first"}] * 4),
    (2, 3, {}, [{"is_local"}, {"is_local", "is_first"}, {"is_local", "is_first"}]),
    (4, 1, {}, [set()]),
    (2, 2, {}, [set(), {"is_first"}]),  # block 1 is local, block 3 is not
    (1, 4, {"mode": "layerwise"}, [set()]),
    (2, 3, {"mode": "blockwise", "block_group": 2}, [set(), {"is_first"}]),
]


@pytest.mark.parametrize(("n_stacks", "size", "training", "names"), CUT)
def test_what_is_known_holds_for_every_stack(n_stacks: int, size: int, training: dict[str, Any], names: list[set]):
    program = program_of(n_stacks, size, **training)
    model, first_blocks = program.config.model, program._first_blocks
    known = weights.known_facts(model, first_blocks, len(names))
    assert [set(facts) for facts in known] == names
    for first in first_blocks:
        for place, facts in enumerate(known):
            own = weights.block_facts(model, first + place)
            assert all(float(own[name]) == fact for name, fact in facts.items())
    merged = weights.known_facts(model, first_blocks, model.n_blocks)  # stacks joined begin where one of them did
    assert all(
        float(weights.block_facts(model, n)[name]) == f for n, own in enumerate(merged) for name, f in own.items()
    )
    here = init_stack(jax.random.key(0), model, 0, len(names))
    for first in first_blocks:
        there = placed(here, model, first)
        assert all(np.all(there[name][n] == fact) for n, facts in enumerate(known) for name, fact in facts.items())


@pytest.mark.parametrize("execution", ["fused", "chained"])
def test_training_is_the_same_with_what_is_known(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerance: dict, execution: str
):
    """Two stacks of two blocks, every second of which has no window; one executable serves both stacks of a chain."""
    config = tiny(training__mode="end_to_end", training__execution=execution, training__phase_budget="3 steps")
    architecture = dataclasses.replace(config.model.architecture, n_stacks=2, blocks_per_stack=2)
    unlike = {"window": 2, "global_every": 2, "rope_theta_local": 100.0, "first_attention_norm": False, "init_std": 0.2}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, architecture=architecture, **unlike))

    def losses(name: str) -> np.ndarray:
        loop.run(config, tiny_corpus, tmp_path / name, say=lambda _: None)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return np.array([line["loss"] for line in lines if "loss" in line])

    known = losses("known")
    assert len(known) == 2
    monkeypatch.setattr(weights, "known_facts", lambda *_: [])
    np.testing.assert_allclose(losses("read"), known, **tolerance["float32"])
    # The twin: all are told the same.
    wrong = {"is_local": True, "is_first": False}
    monkeypatch.setattr(weights, "known_facts", lambda _model, _first, n_blocks: [wrong] * n_blocks)
    assert not np.allclose(losses("wrong"), known, **tolerance["float32"])
