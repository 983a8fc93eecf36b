"""A tail is never moved, not by a bit, and gradient passes through it, also where it is stored in 4 bits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory.precision import to_storage
from stackwise_jax.models.rack import init_rack
from stackwise_jax.train import loop
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.step import make_evaluation, make_gradients
from stackwise_jax.types import Batch, Params, Quantised, Vocabulary

LIVE, FROZEN = Role.LIVE, Role.FROZEN
RIGHT_TO_LEFT = {
    "training__progressive__direction": "right_to_left",
    "training__phase_budget": "2 steps",
    "training__embedding_budget": "1 steps",
    "model__architecture__n_stacks": 2,
    "precision__trunk": "nf4",
    "evaluation__rows": 8,
}


def tails(run: loop.Run) -> list[dict[int, list[np.ndarray]]]:
    """The stored stacks as they stand after every phase."""
    taken, settle = [], run._settle

    def settle_phase(phase: Any) -> None:
        settle(phase)
        stacks = run.frozen.stacks
        taken.append({number: [np.array(leaf) for leaf in jax.tree.leaves(tree)] for number, tree in stacks.items()})

    run._settle = settle_phase
    run.to_end()
    return taken


def is_kept(taken: list[dict[int, list[np.ndarray]]]) -> bool:
    return all(
        all(map(np.array_equal, leaves, taken[-1][number])) for stacks in taken for number, leaves in stacks.items()
    )


def test_a_tail_is_frozen_to_the_bit(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    run = loop.Run(tiny(**RIGHT_TO_LEFT), tiny_corpus, tmp_path / "run", lambda _: None)
    taken = tails(run)
    assert [sorted(stacks) for stacks in taken] == [[], [1], [0, 1]]
    assert is_kept(taken)
    leaves = jax.tree.leaves(run.frozen.stacks[1], is_leaf=lambda leaf: isinstance(leaf, Quantised))
    assert any(isinstance(leaf, Quantised) for leaf in leaves)
    taken[1][1][0] = taken[1][1][0] ^ 1 if taken[1][1][0].dtype.kind in "ui" else np.nextafter(taken[1][1][0], 9)
    assert not is_kept(taken)  # the twin: one bit


def setting(tiny: Any) -> tuple[Program, Signature, Params, Params, Batch, jax.Array]:
    config = tiny(**RIGHT_TO_LEFT, model__init_std=0.2)
    program = Program(config, Vocabulary(320, 4, (0, 1, 2, 3, 4)), n_rows=8)
    body = ((1, LIVE), (1, FROZEN))
    signature = Signature(True, body, FROZEN, LIVE, True, "fused", program.task)
    rack = init_rack(jax.random.key(3), config.model, (1, 1))
    live: Params = {"stacks": rack["stacks"][:1], "head": rack["head"]}
    frozen: Params = {"frozen_stacks": [to_storage(rack["stacks"][1], "nf4")]}
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 5, 320)
    positions = jnp.broadcast_to(jnp.arange(32)[None], (4, 32))
    batch = Batch(tokens, jnp.ones((4, 32), int), positions, jnp.arange(4), jnp.zeros(4, int))
    return program, signature, live, frozen, batch, jax.random.normal(jax.random.key(2), (4, 32, 32))


def slopes(tiny: Any) -> tuple[float, float]:
    """How the loss rises along the live stack's own gradient: as its norm says, and by a finite difference."""
    program, signature, live, frozen, batch, x = setting(tiny)
    gradient = jax.jit(make_gradients(program, signature))(live, frozen, batch, x, None)[0]["stacks"][0]
    loss = make_evaluation(program, signature)
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))))
    along = gradient if norm else jax.tree.map(jnp.ones_like, gradient)
    length = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(along))))
    ends = [
        jax.tree.map(lambda leaf, step, sign=sign: leaf + sign * 0.01 * step / length, live["stacks"][0], along)
        for sign in (1.0, -1.0)
    ]
    high, low = (float(loss({**live, "stacks": [end]}, frozen, batch, x)[0]) for end in ends)
    return norm, (high - low) / 0.02


def test_gradient_passes_through_a_quantised_tail(tiny: Any) -> None:
    norm, difference = slopes(tiny)
    assert norm > 1.0
    assert difference == pytest.approx(norm, rel=0.02)


def test_gradient_through_a_tail_detects_one_that_stops_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the tail's input is taken for a constant."""
    original = Program.apply_stack

    def apply_stack(self: Program, role: Role, live: Params, settled: Params, x: Any, *rest: Any) -> Any:
        return original(self, role, live, settled, jax.lax.stop_gradient(x) if role is FROZEN else x, *rest)

    monkeypatch.setattr(Program, "apply_stack", apply_stack)
    norm, difference = slopes(tiny)
    assert norm == 0.0
    assert abs(difference) > 0.3  # though the loss does depend on the stack
