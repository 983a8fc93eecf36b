"""A token table at a width of its own, a trained map after it, and a table that stays as it was given."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import evaluate
from stackwise_jax.config import resolve
from stackwise_jax.data.corpus import Corpus
from stackwise_jax.errors import UserError
from stackwise_jax.interop.kinds import family_of
from stackwise_jax.memory.fingerprint import named_leaves
from stackwise_jax.models.rack import apply_embedding, count_parameters, init_embedding
from stackwise_jax.schema import RunConfig
from stackwise_jax.train import loop
from stackwise_jax.train.describe import describe
from stackwise_jax.train.optimizer import init_part, make_transforms, update_part
from stackwise_jax.train.plan import make_plan, phase_device_bytes, phase_state_bytes
from stackwise_jax.train.trained import load_trained
from stackwise_jax.types import Params

V, R, D, T = 64, 12, 16, 8
SHORT = {"training__phase_budget": "3 steps", "training__embedding_budget": "3 steps", "evaluation__rows": 8}
SHORT |= {"model__architecture__n_stacks": 2, "checkpoint__keep": 1}
NARROW = {"model__d_model": 48, "model__d_embedding": 32}  # after the source's 32 columns


def config_of(**sections: dict[str, Any]) -> RunConfig:
    own = {"vocab_size": V, "d_model": D, "n_heads": 2, "d_ff": 24, "d_embedding": R, **sections.pop("model", {})}
    return resolve({"model": own, "data": {"seq_len": T}, **sections})


def inputs() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, T), 0, V // 2)  # half of the rows are never met


def embed(embedding: Params, config: RunConfig) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    return apply_embedding(embedding, inputs(), positions, config.model, dtype=jnp.float32)


def test_rows_go_through_the_map_before_anything_is_added() -> None:
    config = config_of(model={"positions": "learned", "embedding_norm": True, "norm": "layernorm"})
    embedding = init_embedding(jax.random.key(0), config.model)
    tree = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(embedding).items()}
    x = tree["tokens"][np.asarray(inputs())] @ tree["projection/kernel"] + tree["positions"][None]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.model.norm_epsilon)
    np.testing.assert_allclose(embed(embedding, config), x, rtol=1e-4, atol=1e-5)


def test_it_begins_as_large_as_without_a_map_and_has_the_parameters_that_it_says() -> None:
    wide = config_of(model={"d_model": 256, "d_embedding": 128, "vocab_size": 512})
    plain = dataclasses.replace(wide.model, d_embedding=None)
    embedding = init_embedding(jax.random.key(0), wide.model)
    x = embedding["tokens"] @ embedding["projection"]["kernel"]
    assert float(jnp.std(x)) == pytest.approx(wide.model.init_std, rel=0.05)
    assert count_parameters(wide.model) - count_parameters(plain) == 512 * 128 + 128 * 256 - 512 * 256


@pytest.mark.parametrize("fixed", [True, False])
def test_one_update_by_hand(fixed: bool) -> None:
    """AdamW from nothing: the sign of the gradient, up to epsilon, and the decay; a fixed table has neither."""
    config = config_of(model={"fixed_table": fixed}, optimizer={"learning_rate": 0.01, "weight_decay": 0.5})
    params = init_embedding(jax.random.key(0), config.model)
    asked = np.asarray(jax.random.normal(jax.random.key(2), (2, T, D)))
    grads = jax.grad(lambda tree: jnp.sum(asked * embed(tree, config)))(params)

    table, kernel = np.asarray(params["tokens"]), np.asarray(params["projection"]["kernel"])
    rows, by_hand = np.asarray(inputs()).reshape(-1), np.zeros_like(table)
    if not fixed:
        np.add.at(by_hand, rows, asked.reshape(-1, D) @ kernel.T)
    np.testing.assert_allclose(grads["tokens"], by_hand, rtol=1e-4, atol=1e-5)
    of_map = table[rows].T @ asked.reshape(-1, D)
    np.testing.assert_allclose(grads["projection"]["kernel"], of_map, rtol=1e-4, atol=1e-6)

    transform = make_transforms(config, scales_head=False)["embedding"]
    state = init_part({"embedding": transform}, "embedding", params)
    moved, _ = update_part(transform, grads, state, params, jnp.float32(0.5))

    def after(weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return weight - 0.5 * 0.01 * (gradient / (np.abs(gradient) + 1e-8) + 0.5 * weight)

    np.testing.assert_allclose(moved["projection"]["kernel"], after(kernel, of_map), rtol=1e-4, atol=1e-6)
    wanted = table if fixed else after(table, by_hand)
    np.testing.assert_allclose(moved["tokens"], wanted, rtol=0.0 if fixed else 1e-4, atol=0.0 if fixed else 1e-6)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_bit_of_a_fixed_table_changes_and_no_moment_is_kept(precision: str) -> None:
    """Whatever gradient there is: -0.0 stays -0.0. The twin is a table that is trained."""
    for fixed in (True, False):
        config = config_of(model={"fixed_table": fixed}, precision={"optimizer": precision})
        params = init_embedding(jax.random.key(0), config.model)
        params["tokens"] = params["tokens"].at[3].set(-0.0)
        before = np.asarray(params["tokens"]).tobytes()
        transform = make_transforms(config, scales_head=False)["embedding"]
        state = init_part({"embedding": transform}, "embedding", params)
        update = jax.jit(lambda *args, own=transform: update_part(own, *args, jnp.float32(1.0)))
        moved, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        assert (np.asarray(moved["tokens"]).tobytes() == before) == fixed
        assert (not [name for name in named_leaves(state) if name.endswith("tokens")]) == fixed
        assert [name for name in named_leaves(state) if name.endswith("projection/kernel")]


def test_costs_and_what_the_plan_says() -> None:
    """Two moments of the table are spared, in the snapshot and on the device."""
    held = {}
    for fixed in (False, True):
        plan = make_plan(config_of(model={"fixed_table": fixed}), 64)
        assert plan.phases[0].name == "embedding"
        held[fixed] = np.array([phase_state_bytes(plan, 0), phase_device_bytes(plan, 0).optimizer])
        said = f"vocabulary {V} (table {R} wide, with a map after it{', fixed' if fixed else ''})"
        assert said in describe(plan)
    np.testing.assert_array_equal(held[False] - held[True], 2 * 4 * V * R)


@pytest.fixture
def begun(tiny: Any, source: Path) -> Callable[..., Any]:
    """Configs that begin with it, at its width."""
    return lambda **fields: tiny(**{**SHORT, **NARROW, "training__embedding_from": str(source), **fields})


def stored_table(folder: Path) -> bytes:
    return np.asarray(load_trained(folder).rack["embedding"]["tokens"]).tobytes()


RUNS: dict[str, dict[str, Any]] = {
    "alone": {},
    "with the first stack, chained": {
        "training__embedding_phase": "with_first_stack",
        "training__execution": "chained",
        "training__accumulation_steps": 2,
    },
    "trained together again": {"training__fusion__budget": "3 steps", "precision__compute": "bf16"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_the_map_and_leaves_the_table(
    name: str, begun: Callable[..., Any], source: Path, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """Read back from the disk, the rack measures what the run recorded."""
    config = begun(model__fixed_table=True, **RUNS[name])
    result = loop.run(config, tiny_corpus, tmp_path / "run", say=lambda _: None)
    assert stored_table(tmp_path / "run") == stored_table(source)
    drawn = init_embedding(jax.random.key(config.seed), config.model)["projection"]["kernel"]
    read = load_trained(tmp_path / "run")
    assert np.abs(np.asarray(read.rack["embedding"]["projection"]["kernel"]) - np.asarray(drawn)).max() > 1e-4
    last = list(result.held_out.values())[-1]["loss"]
    tolerance = 1e-5 if config.precision.compute == "fp32" else 2e-3
    assert evaluate.evaluate(read, source=None, rows=None)["loss"] == pytest.approx(last, rel=tolerance)


def test_a_live_table_of_its_own_width_moves(
    begun: Callable[..., Any], source: Path, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """The twin; a rate of next to nothing shows that it begins where the source ended."""
    loop.run(begun(), tiny_corpus, tmp_path / "run", say=lambda _: None)
    assert stored_table(tmp_path / "run") != stored_table(source)
    still = begun(optimizer__learning_rate=1e-12, training__mode="end_to_end")
    loop.run(still, tiny_corpus, tmp_path / "still", say=lambda _: None)
    tables = [np.frombuffer(stored_table(folder), np.float32) for folder in (tmp_path / "still", source)]
    np.testing.assert_allclose(*tables, atol=1e-9)


class PowerCutError(Exception):
    """Stands for the power cut."""


def test_it_goes_on_from_inside_phase_0_to_the_same_bits(
    begun: Callable[..., Any], tiny_corpus: Corpus, tmp_path: Path
) -> None:
    config = begun(model__fixed_table=True, checkpoint__every_steps=1, model__architecture__n_stacks=1)
    whole = loop.run(config, tiny_corpus, tmp_path / "whole", say=lambda _: None).rack
    run = loop.Run(config, tiny_corpus, tmp_path / "cut", lambda _: None)
    batch = run.inputs.training_batch

    def until_the_third(*args: Any) -> Any:
        if run.position.step == 2:
            raise PowerCutError
        return batch(*args)

    run.inputs.training_batch = until_the_third
    with pytest.raises(PowerCutError):
        run.to_end()
    rest = loop.run(config, tiny_corpus, tmp_path / "cut", say=lambda _: None).rack
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"d_embedding": 0}, ["model.d_embedding=0", "at least 1"]),
        ({"ties_embedding": True}, ["model.d_embedding=12", "model.ties_embedding=False"]),
        (
            {"d_embedding": None, "positions": "learned", "fixed_table": True, "ties_embedding": True},
            ["model.fixed_table=True", "model.ties_embedding=False"],
        ),
        ({"d_embedding": None, "fixed_table": True}, ["nothing of this embedding", "embedding_phase='given'"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config_of(model=fields)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_what_goes_with_no_map_is_refused_too() -> None:
    with pytest.raises(UserError, match=r"model.d_embedding=12 it has more.* model.fixed_table=True"):
        config_of(training={"embedding_from": "runs/a", "embedding_phase": "given"})
    with pytest.raises(UserError, match=r"mesh.fsdp=8 must divide model.d_embedding=12"):
        config_of(mesh={"fsdp": 8})
    with pytest.raises(UserError, match=r"nearest is llama, which needs model.d_embedding=None, not 12"):
        family_of(config_of().model)
    assert family_of(config_of(model={"d_embedding": None}).model) == "llama"
    learned = config_of(model={"fixed_table": True, "d_embedding": None, "positions": "learned"})
    assert learned.model.fixed_table
