"""The chained execution of a path has the gradients of the fused one, and takes the same step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory.precision import to_storage
from stackwise_jax.models.adapters import init_adapter
from stackwise_jax.models.rack import init_rack
from stackwise_jax.schema import RunConfig
from stackwise_jax.train import optimizer
from stackwise_jax.train.chain_programs import ChainPrograms
from stackwise_jax.train.chained import ChainedGradients, make_chained_evaluation, make_chained_step
from stackwise_jax.train.optimizer import init_part, make_transforms
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.state import TrainState
from stackwise_jax.train.step import make_evaluation, make_gradients, make_train_step, path_loss
from stackwise_jax.types import Batch, Params, Vocabulary

LIVE, FROZEN, ADAPTER = Role.LIVE, Role.FROZEN, Role.ADAPTER
PULLED = {
    "model__attention": "bidirectional",
    "objective__name": "diffusion",
    "objective__time": "depth_input",
    "objective__consistency": 0.5,
    "training__progressive__direction": "right_to_left",
}
EXPERTS = {"model__experts__count": 4, "model__experts__balance": 0.5, "model__ffn": "gelu"}
PATHS = {
    "all live, tied": ({"model__ties_embedding": True}, ((1, LIVE), (2, LIVE)), LIVE, LIVE, False),
    "all live, dropout, accumulated": (
        {"model__dropout": 0.2, "training__accumulation_steps": 2},
        ((1, LIVE), (2, LIVE)),
        LIVE,
        LIVE,
        True,
    ),
    "frozen tail": ({}, ((1, LIVE), (2, FROZEN)), FROZEN, LIVE, True),
    "residual gain, z-loss": (
        {"model__stability__residual_gain": 0.5, "model__stability__z_loss": 0.01},
        ((2, LIVE),),
        LIVE,
        LIVE,
        True,
    ),
    "frozen head and tail, remat": ({"training__remat": "full"}, ((2, LIVE), (1, FROZEN)), FROZEN, FROZEN, True),
    "adapters before and after": ({}, ((1, ADAPTER), (2, LIVE), (1, ADAPTER)), FROZEN, LIVE, True),
    "adapters alone, 4 bits": ({"precision__trunk": "nf4"}, ((1, ADAPTER),), FROZEN, FROZEN, True),
    "experts, tail": (EXPERTS, ((1, LIVE), (1, LIVE), (1, FROZEN)), FROZEN, LIVE, True),
    "consistency, time, tail": (PULLED, ((1, LIVE), (1, LIVE), (2, FROZEN)), FROZEN, LIVE, True),
}


def setting(tiny: Any, path: str) -> tuple[Program, Signature, Params, Params, Batch, Any]:
    overrides, body, embedding, head, has_table = PATHS[path]
    config = tiny(model__architecture__n_stacks=3, **overrides)
    program = Program(config, Vocabulary(320, 4, (0, 1, 2, 3, 4)), n_rows=8)
    ranks = (4,) * sum(role is ADAPTER for _, role in body)
    signature = Signature(embedding is FROZEN, body, embedding, head, has_table, "fused", program.task, ranks)
    rack = init_rack(jax.random.key(3), config.model, tuple(blocks for blocks, _ in body))
    live: Params = {"stacks": [s for s, (_, role) in zip(rack["stacks"], body, strict=True) if role is LIVE]}
    settled = [s for s, (_, role) in zip(rack["stacks"], body, strict=True) if role is not LIVE]
    frozen: Params = {"frozen_stacks": [to_storage(stack, config.precision.trunk) for stack in settled]}
    adapted = [blocks for blocks, role in body if role is ADAPTER]
    if adapted:
        live["adapters"] = [drawn_adapter(config, number, blocks) for number, blocks in enumerate(adapted)]
    if config.objective.consistency:
        frozen["embedding"] = rack["embedding"]
    for name, role in (("embedding", embedding), ("head", head)):
        (live if role is LIVE else frozen)[name] = rack[name]
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 5, 320)
    segments = jnp.where(jnp.arange(32)[None] < jnp.array([[32], [20], [30], [11]]), 1, 0)
    positions = jnp.broadcast_to(jnp.arange(32)[None], (4, 32))
    bands = jnp.tile(jnp.array([[0.25, 0.5]]), (4, 1)) if config.objective.consistency else None
    batch = Batch(tokens, segments, positions, jnp.arange(4), jnp.zeros(4, int), bands)
    x = jax.random.normal(jax.random.key(2), (4, 32, 32)) if embedding is FROZEN else None
    return program, signature, live, frozen, batch, x


def drawn_adapter(config: RunConfig, number: int, blocks: int, rank: int = 4) -> Params:
    """An adapter that does something: none of its matrices is zero."""
    adapter = init_adapter(jax.random.key(5), config.model, number, blocks, rank=rank, targets="all")
    leaves, structure = jax.tree.flatten(adapter)
    draw = np.random.default_rng(6)
    moved = [leaf + np.float32(0.05) * draw.standard_normal(leaf.shape, np.float32) for leaf in map(np.asarray, leaves)]
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in moved])


def relative_difference(one: Any, other: Any) -> float:
    """Of NumPy's, so that nothing is compiled for the shapes of leaves."""
    pairs = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other)), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-12)) for a, b in pairs)


@pytest.mark.parametrize("path", PATHS)
def test_chained_gradients_are_fused_gradients(path: str, tiny: Any) -> None:
    program, signature, live, frozen, batch, x = setting(tiny, path)
    key = program.dropout_key(jnp.int32(7))
    fused = jax.jit(make_gradients(program, signature))(live, frozen, batch, x, key)
    chained = ChainedGradients(ChainPrograms(program), signature)(live, frozen, batch, x, key)
    assert relative_difference(chained, fused) < 2e-5


def test_chained_gradients_detect_a_missing_boundary(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: every stack is pulled back at the first stack's input."""
    program, signature, live, frozen, batch, x = setting(tiny, "all live, tied")
    fused = jax.jit(make_gradients(program, signature))(live, frozen, batch, x, None)
    chain = ChainedGradients(ChainPrograms(program), signature)
    first: list[Any] = []
    forward: Any = chain.programs.forward
    pull: Any = chain.programs.pull
    monkeypatch.setattr(chain.programs, "forward", lambda *args: first.append(args[3]) or forward(*args))
    monkeypatch.setattr(chain.programs, "pull", lambda *args: pull(*args[:3], first[0], *args[4:]))
    assert relative_difference(chain(live, frozen, batch, x, None), fused) > 1e-3


@pytest.mark.parametrize(
    ("path", "changed"), [("adapters before and after", "adapters"), ("consistency, time, tail", "stacks")]
)
def test_the_law_reaches_adapters_and_the_penalty(path: str, changed: str, tiny: Any) -> None:
    """Twins: an adapter that is scaled otherwise, and a penalty that one of the two leaves out."""
    program, signature, live, frozen, batch, x = setting(tiny, path)
    fused = jax.jit(make_gradients(program, signature))(live, frozen, batch, x, None)
    training, objective = program.config.training, program.config.objective
    other = dataclasses.replace(
        program.config,
        training=dataclasses.replace(training, adapters=dataclasses.replace(training.adapters, alpha=1.0)),
        objective=dataclasses.replace(objective, consistency=objective.consistency / 100.0),
    )
    chained = ChainedGradients(ChainPrograms(dataclasses.replace(program, config=other)), signature)(
        live, frozen, batch, x, None
    )
    assert relative_difference(chained[0][changed], fused[0][changed]) > 1e-3


def test_a_routers_penalty_is_in_no_loss(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added to what is differentiated alone: what is reported of a step and of held-out rows has none of it.

    The twin of equal gradients: a chain that leaves it out.
    """
    program, signature, live, frozen, batch, x = setting(tiny, "experts, tail")
    total, weight, penalty = jax.jit(path_loss, static_argnums=(0, 1))(program, signature, live, frozen, batch, x, None)
    measured = make_evaluation(program, signature)(live, frozen, batch, x)
    assert 0.9 * 2 * 0.5 < float(penalty / weight) < 1.2 * 2 * 0.5  # of two live blocks, none of the frozen one
    chain = ChainedGradients(ChainPrograms(program), signature)
    chained = chain(live, frozen, batch, x, None)
    pull: Any = chain.programs.pull
    monkeypatch.setattr(chain.programs, "pull", lambda *args: pull(*args[:-1], (jnp.float32(0.0), None)))
    assert relative_difference(chain(live, frozen, batch, x, None)[0]["stacks"], chained[0]["stacks"]) > 1e-2
    assert relative_difference((total, weight), measured) < 1e-6
    assert relative_difference(chained[1:], measured) < 1e-5


def test_chained_evaluation_is_fused_evaluation(tiny: Any) -> None:
    """And the twin: one of other adapters is not."""
    program, signature, live, frozen, batch, x = setting(tiny, "adapters before and after")
    fused = make_evaluation(program, signature)(live, frozen, batch, x)
    evaluate = make_chained_evaluation(ChainPrograms(program), signature)
    assert relative_difference(evaluate(live, frozen, batch, x), fused) < 2e-6
    larger = {**live, "adapters": jax.tree.map(lambda leaf: 10.0 * leaf, live["adapters"])}
    assert relative_difference(evaluate(larger, frozen, batch, x), fused) > 2e-4


def test_depth_compiles_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward, one backward and one update are traced for adapters of a rank; the twin: another rank."""
    traced: list[str] = []
    for owner, name in ((Program, "apply_stack"), (optimizer, "update_part")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, f=original, n=name: traced.append(n) or f(*args))
    program, signature, _, frozen, batch, x = setting(tiny, "adapters alone, 4 bits")
    programs, transforms = ChainPrograms(program), make_transforms(program.config, scales_head=False)

    def step(ranks: list[int]) -> None:
        depth = len(ranks)
        own = dataclasses.replace(signature, body=signature.body * depth, ranks=tuple(ranks))
        adapters = [drawn_adapter(program.config, 0, 1, rank) for rank in ranks]
        state = TrainState({"adapters": adapters}, {"adapters": init_part(transforms, "adapters", adapters)})
        stacks = {**frozen, "frozen_stacks": frozen["frozen_stacks"] * depth}
        numbers = np.ones(depth, np.float32), np.array(0, np.int32)
        state, _ = make_chained_step(programs, own)(state, stacks, batch, x, *numbers)
        make_chained_evaluation(programs, own)(state.params, stacks, batch, x)

    step([4])
    assert sorted(traced) == ["apply_stack", "apply_stack", "update_part"]
    step([4, 4, 4])
    assert len(traced) == 3
    step([4, 2])
    assert len(traced) == 6


@pytest.mark.parametrize("keeps", [False, True])
def test_boundaries_are_let_go_as_they_are_used(keeps: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each stack is pulled back there is one array of activations less; the twin keeps what it has seen."""
    program, signature, live, frozen, batch, x = setting(tiny, "adapters alone, 4 bits")
    own = dataclasses.replace(signature, body=signature.body * 4, ranks=signature.ranks * 4)
    live, frozen = {"adapters": live["adapters"] * 4}, {**frozen, "frozen_stacks": frozen["frozen_stacks"] * 4}
    programs = ChainPrograms(program)
    pull: Any = programs.pull
    seen: list[Any] = []
    counts = []

    def watched(*args: Any) -> Any:
        counts.append(sum(array.shape == x.shape for array in jax.live_arrays()) - others)
        seen.extend(args[3:4] * keeps)
        return pull(*args)

    monkeypatch.setattr(programs, "pull", watched)
    others = sum(array.shape == x.shape for array in jax.live_arrays()) - 1  # x is the first boundary
    ChainedGradients(programs, own)(live, frozen, batch, x, None)
    assert counts == ([5, 5, 5, 5] if keeps else [5, 4, 3, 2])


def test_chained_step_is_fused_step(tiny: Any) -> None:
    program, signature, live, frozen, batch, x = setting(tiny, "all live, tied")
    transforms = make_transforms(program.config, scales_head=False)
    results = []
    for make in (make_train_step, lambda program, *rest: make_chained_step(ChainPrograms(program), *rest)):
        params = jax.tree.map(jnp.copy, live)
        state = TrainState(params, {name: init_part(transforms, name, part) for name, part in params.items()})
        execution = dataclasses.replace(signature, execution="chained")
        results.append(
            make(program, execution)(
                state,
                frozen,
                batch,
                x,
                np.full(len(live) - 1 + len(live["stacks"]), 0.5, np.float32),
                np.array(3, np.int32),
            )
        )
    (fused_state, fused), (chained_state, chained) = results
    for name in fused:
        np.testing.assert_allclose(chained[name], fused[name], rtol=1e-5)
    # Adam divides by the gradient's size, so a gradient near zero may move either way: compare where it is not.
    pairs = (jax.tree.leaves(jax.device_get(state.params)) for state in (fused_state, chained_state))
    assert max(float(np.mean(np.abs(a - b) > 1e-5)) for a, b in zip(*pairs, strict=True)) < 0.01
