"""Reading: equal stacks as one are the stacks in turn; one program at any depth, one stack at a time on the host."""

import dataclasses
import re
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import evaluate as program
from stackwise_jax.config import resolve
from stackwise_jax.memory.precision import to_storage
from stackwise_jax.models import stack as stack_module
from stackwise_jax.models.adapters import attach, init_adapter
from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import apply_rack, init_key_values, init_rack, row_context
from stackwise_jax.models.stack import apply_stack, decode_stack, equal_runs, join_stacks, stack_size
from stackwise_jax.ops.mask import decoding_mask
from stackwise_jax.train import loop, trained
from stackwise_jax.train.trained import load_trained
from stackwise_jax.types import Params

B, T, D, F = 2, 12, 32, 48
MODEL = resolve(
    {
        "model": {"vocab_size": 64, "d_model": D, "n_heads": 4, "n_kv_heads": 2, "d_ff": F, "init_std": 0.2},
        "data": {"seq_len": T},
    }
).model
CONTEXT = row_context(MODEL, None, jnp.broadcast_to(jnp.arange(T)[None], (B, T)))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def stored(precision: str, n_stacks: int = 3) -> list[Params]:
    """Stacks of one block."""
    drawn = init_rack(jax.random.key(0), MODEL, (1,) * n_stacks)["stacks"]
    return [to_storage(stack, precision) for stack in drawn]


def merged(stacks: list[Params]) -> list[Params]:
    return [
        join_stacks([stacks[place] for place in run], stacks[run.start :].__getitem__) for run in equal_runs(stacks)
    ]


@jax.jit
def run_stack(stack: Params, x: jax.Array) -> jax.Array:
    return apply_stack(stack, x, CONTEXT, MODEL, dtype=jnp.float32)


def read(stacks: list[Params]) -> np.ndarray:
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    for stack in stacks:
        x = run_stack(stack, x)
    return np.asarray(x)


@pytest.mark.parametrize("precision", ["fp32", "fp8", "nvfp4", "nf4"])
def test_equal_stacks_are_read_as_one(precision: str):
    apart = stored(precision)
    (one,) = merged(apart)
    assert stack_size(one) == 3
    np.testing.assert_allclose(read([one]), read(apart), **CLOSE)
    assert not np.allclose(read([one]), read(apart[::-1]), **CLOSE)  # the twin: another order


def test_what_differs_stays_apart():
    plain, quantised, bf16 = stored("fp32"), stored("nf4"), stored("bf16")
    adapter = init_adapter(jax.random.key(2), MODEL, 0, 1, rank=2, targets="query")
    other = init_adapter(jax.random.key(2), MODEL, 0, 1, rank=3, targets="query")
    adapted = [attach(plain[0], adapter, 1.0), attach(plain[0], adapter, 1.0), attach(plain[0], other, 1.0)]
    assert equal_runs([*plain, *quantised, *bf16]) == [range(0, 3), range(3, 6), range(6, 9)]
    assert equal_runs([*adapted, plain[0]]) == [range(0, 2), range(2, 3), range(3, 4)]
    assert equal_runs([*adapted[:1], attach(plain[0], adapter, 2.0)]) == [range(0, 1), range(1, 2)]  # another scale
    assert equal_runs(plain, apart=[2]) == [range(0, 2), range(2, 3)]
    assert equal_runs([]) == []


def program_size(stacks: list[Params]) -> int:
    def apply(rack: Params) -> jax.Array:
        return apply_rack(rack, jnp.zeros((B, T), jnp.int32), CONTEXT, MODEL, dtype=jnp.float32)

    rack = {**init_rack(jax.random.key(0), MODEL, ()), "stacks": stacks}
    return str(jax.make_jaxpr(apply)(rack)).count("\n")


def test_the_program_is_the_same_at_any_depth():
    few, many = stored("nvfp4", 2), stored("nvfp4", 5)
    assert program_size(merged(few)) == program_size(merged(many))
    assert program_size(many) > 2 * program_size(few)  # the twin: stacks apart


def hoisted(stack: Params, n_rows: int) -> bool:
    """Whether decoded matrices enter the loop around a stack, by the compiled program.

    The loop is over tokens that are read one by one, or over passes of `n_rows` places.
    """
    store = init_key_values({"stacks": [stack]}, MODEL, 1, T, dtype=jnp.float32)[0]
    places = jnp.arange(n_rows)[None]

    def turn(stack: Params, x: jax.Array) -> jax.Array:
        if n_rows > 1:
            return apply_stack(stack, x, row_context(MODEL, None, places), MODEL, dtype=jnp.float32)
        context = Context(places, decoding_mask(places, T, jnp.zeros(1, jnp.int32)))
        return decode_stack(stack, x, context, store, MODEL, dtype=jnp.float32)[0]

    @jax.jit
    def run(stack: Params, x: jax.Array, turns: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: turn(stack, x), x)

    text = run.lower(stack, jnp.ones((1, n_rows, D)), jnp.int32(3)).compile().as_text()
    assert text is not None
    loops = re.findall(r" = \((.*)\) while\(", text)
    assert loops
    carried = re.findall(r"f32\[([\d,]+)\]", " ".join(loops))
    return any(np.prod([int(n) for n in dims.split(",")]) >= stack_size(stack) * D * F // 2 for dims in carried)


@pytest.mark.parametrize("n_rows", [1, 2])
def test_no_decoded_matrix_outlives_its_block(n_rows: int, monkeypatch: pytest.MonkeyPatch):
    assert not hoisted(merged(stored("nvfp4"))[0], n_rows)
    one = stored("nvfp4")[0]
    assert not hoisted(one, n_rows)
    # The twin: a loop of one turn that the compiler takes apart, with nothing that holds its matrices back.
    monkeypatch.setattr(stack_module, "_decoded_here", lambda params, x: (params, x))
    assert hoisted(one, n_rows)


# A run folder.


@pytest.fixture(scope="module")
def folder(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three stacks in nvfp4."""
    path = tmp_path_factory.mktemp("deep") / "run"
    fields = {"training__phase_budget": "2 steps", "training__embedding_budget": "2 steps", "evaluation__rows": 4}
    loop.run(tiny(**fields, precision__trunk="nvfp4"), tiny_corpus, path, say=lambda _: None)
    return path


def test_a_folder_is_read_merged(folder: Path):
    """The same numbers to the bit, and the same loss; stacks in another order have another."""
    one, apart = load_trained(folder), load_trained(folder, merged=False)
    assert (one.n_stacks, apart.n_stacks) == (3, 3)
    (whole,) = one.rack["stacks"]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *apart.rack["stacks"])
    assert jax.tree.structure(joined) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, whole, joined)
    losses = [
        program.evaluate(dataclasses.replace(apart, rack={**apart.rack, "stacks": stacks}), source=None, rows=None)
        for stacks in ([whole], apart.rack["stacks"], apart.rack["stacks"][::-1])
    ]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
    assert losses[0]["loss"] != pytest.approx(losses[2]["loss"], rel=1e-6)


def test_the_host_holds_a_stack_and_the_one_before_it_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What was read may still be on its way to the device when the next is read, and no longer."""
    read_tree, arrays, seen, kept = trained.read_tree, [], [], []
    keeps = False

    def watched(*arguments: Any) -> Any:
        seen.append(sum(ref() is not None for ref in arrays))
        tree = jax.tree.map(np.array, read_tree(*arguments))
        arrays.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(tree))
        if keeps:
            kept.append(tree)
        return tree

    monkeypatch.setattr(trained, "read_tree", watched)
    load_trained(folder)
    of_one = len(arrays) // 3
    assert len(seen) == 3
    assert max(seen) <= of_one
    keeps = True  # the twin: somebody holds on to what was read
    load_trained(folder)
    assert max(seen) >= 2 * of_one
