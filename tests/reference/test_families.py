"""BERT, ModernBERT, GPT-2 and LLaMA against `transformers`: golden files everywhere, live where it is installed."""

import dataclasses
import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, GOLDEN, Rows, chosen_entries, draw, rows_of
from live import reference_python

from stackwise_jax.config import resolve
from stackwise_jax.interop import configs, kinds, names
from stackwise_jax.models import families
from stackwise_jax.models.rack import apply_rack, count_parameters, output_table, row_context
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Params

LOGITS, GRADIENTS = 1e-4, 1e-3  # largest differences


@functools.cache
def model_of(name: str) -> tuple[str, ModelConfig]:
    family, fields = configs.to_model(CASES[name].config)
    objective = "clm" if fields["attention"] == "causal" else "mlm"
    entries = {"model": fields, "data": {"seq_len": 24}, "objective": {"name": objective}}
    return family, resolve(entries).model


def rack_of(family: str, model: ModelConfig, theirs: dict[str, tuple[int, ...]]) -> Params:
    """The drawn weights as a rack; reads exactly those of their names that it has a place for."""
    left = dict(theirs)

    def read(name: str) -> np.ndarray:
        return draw(name, left.pop(name))

    def part(name: str, block: int = 0) -> Params:
        return names.from_theirs(family, model, name, read, block)

    blocks = [part("block", block) for block in range(model.n_blocks)]
    rack = {
        "embedding": part("embedding"),
        "stacks": [jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)],
        "head": part("head"),
    }
    assert not left, f"no place for {sorted(left)}"
    return jax.tree.map(jnp.asarray, rack)


def shapes_of(family: str, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of theirs, by our tables."""
    shapes = {}
    for part, blocks in (("embedding", 1), ("block", model.n_blocks), ("head", 1)):
        table = names.part_table(model, part)
        for block in range(blocks):
            for entry in names.part_entries(family, model, part, block):
                shape = (*table[entry.ours[0]].shape[:-1], sum(table[name].shape[-1] for name in entry.ours))
                shapes[entry.theirs] = shape[::-1] if entry.transposed else shape
    return shapes


@functools.partial(jax.jit, static_argnums=3)
def logits_and_gradients(rack: Params, rows: tuple[Any, ...], weight: Any, model: ModelConfig) -> Any:
    tokens, targets, segments, positions, types = rows

    def loss(rack: Params) -> tuple[Any, Any]:
        context = row_context(model, segments, positions)
        hidden = apply_rack(rack, tokens, context, model, dtype=jnp.float32, token_types=types)
        table = output_table(rack["head"], rack["embedding"])
        logits = jnp.einsum("BTD,VD->BTV", hidden, table, precision="highest")
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], 2)[:, :, 0]
        return -jnp.sum(own * weight), logits

    gradients, logits = jax.grad(loss, has_aux=True)(rack)
    return logits, gradients


def ours(name: str, theirs: dict[str, tuple[int, ...]], model: ModelConfig | None = None) -> Any:
    """(logits, gradients by their names) of a case by this package."""
    rows, (family, published) = rows_of(CASES[name]), model_of(name)
    model = model or published
    rack = rack_of(family, published, theirs)
    given = tuple(jnp.asarray(value) for value in dataclasses.astuple(rows))
    logits, gradients = logits_and_gradients(rack, given, jnp.asarray(rows.segments > 0, jnp.float32), model)
    named = dict(names.to_theirs(family, published, "embedding", gradients["embedding"]))
    named |= names.to_theirs(family, published, "head", gradients["head"])
    for block in range(published.n_blocks):
        own = jax.tree.map(lambda leaf, i=block: leaf[i], gradients["stacks"][0])
        named |= names.to_theirs(family, published, "block", own, block)
    return np.asarray(logits), named


def largest_difference(a: np.ndarray, b: np.ndarray, rows: Rows) -> float:
    """Between logits of places that are not padding."""
    return float(np.abs(a - b)[rows.segments > 0].max())


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def golden(name: str) -> dict[str, np.ndarray]:
    return read(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_the_golden_file(name: str):
    expected, shapes = golden(name), shapes_of(*model_of(name))
    assert {f"gradient {weight}" for weight in shapes} == {key for key in expected if key.startswith("gradient ")}
    logits, gradients = ours(name, shapes)
    assert largest_difference(logits, expected["logits"], rows_of(CASES[name])) < LOGITS
    for weight, gradient in gradients.items():
        chosen, entries = gradient.reshape(-1)[chosen_entries(weight, gradient.size)], expected[f"gradient {weight}"]
        np.testing.assert_allclose(chosen, entries, rtol=GRADIENTS, atol=GRADIENTS, err_msg=weight)
        norm = expected[f"norm {weight}"]
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=GRADIENTS, atol=GRADIENTS, err_msg=weight)


@functools.partial(jax.jit, static_argnums=6)
def logits_of(rack: Params, tokens: Any, _: Any, segments: Any, positions: Any, types: Any, model: ModelConfig) -> Any:
    context = row_context(model, segments, positions)
    hidden = apply_rack(rack, tokens, context, model, dtype=jnp.float32, token_types=types)
    return hidden @ output_table(rack["head"], rack["embedding"]).T


# One thing left out or done otherwise, for everything in which a family differs from another.
TWINS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"token_types": 0}),
    ("bert", {"ffn": "gelu"}),
    ("bert", {"head_transform": False}),
    ("bert", {"norm_epsilon": 1e-3}),
    ("modernbert", {"first_attention_norm": True}),
    ("modernbert", {"window": 3}),
    ("modernbert", {"global_every": 2}),
    ("modernbert", {"rope_theta_local": None}),
    ("modernbert", {"ffn": "geglu"}),
    ("gpt2", {"ffn": "gelu_erf"}),
    ("llama3_grouped", {"rope_theta": 10_000.0}),
    ("llama31_scaled", {"rope_scaling": ModelConfig().rope_scaling}),
    ("llama_linear_tied_biases", {"rope_scaling": ModelConfig().rope_scaling}),
]


@pytest.mark.parametrize(("name", "fields"), TWINS)
def test_golden_files_detect_another_model(name: str, fields: dict[str, Any]):
    shapes, (family, model) = shapes_of(*model_of(name)), model_of(name)
    other = dataclasses.replace(model, **fields)
    rack = rack_of(family, model, shapes)
    if "global_every" in fields or fields.get("first_attention_norm"):  # facts lie among the weights
        facts = [names.weights.block_facts(other, block) for block in range(model.n_blocks)]
        own = {key: jnp.stack([fact[key] for fact in facts]) for key in facts[0]}
        rack["stacks"][0] = {k: v for k, v in rack["stacks"][0].items() if k not in ("is_local", "is_first")} | own
    rows = rows_of(CASES[name])
    logits = logits_of(rack, *(jnp.asarray(value) for value in dataclasses.astuple(rows)), other)
    assert largest_difference(np.asarray(logits), golden(name)["logits"], rows) > 10 * LOGITS


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `transformers` computes now, in this interpreter or in the one that $STACKWISE_REFERENCE_PYTHON names."""
    folder = tmp_path_factory.mktemp("live")
    script = Path(__file__).with_name("make_golden.py")
    subprocess.run([reference_python(), str(script), str(folder), *CASES], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name: str, live: Path):
    expected = read(live / f"{name}.npz")
    gradients = {key.removeprefix("gradient "): value for key, value in expected.items() if key.startswith("gradient ")}
    logits, own = ours(name, {weight: gradient.shape for weight, gradient in gradients.items()})
    assert largest_difference(logits, expected["logits"], rows_of(CASES[name])) < LOGITS
    assert own.keys() == gradients.keys()
    for weight, gradient in gradients.items():
        np.testing.assert_allclose(own[weight], gradient, rtol=GRADIENTS, atol=GRADIENTS, err_msg=weight)


def test_every_size_has_as_many_parameters_as_in_transformers():
    python, models = reference_python(), {}
    for family, sizes in families.SIZES.items():
        for size in sizes:
            fields = getattr(families, family)(size)
            objective = {"name": "clm" if family in ("gpt2", "llama") else "mlm"}
            models[f"{family} {size}"] = resolve({"model": fields, "objective": objective}).model
    theirs = {
        name: configs.to_theirs(kinds.family_of(model), model, dtype="float32", ids={})
        for name, model in models.items()
    }
    script = Path(__file__).with_name("count_sizes.py")
    done = subprocess.run(
        [python, str(script)], input=json.dumps(theirs), text=True, check=True, stdout=subprocess.PIPE
    )
    assert json.loads(done.stdout) == {name: count_parameters(model) for name, model in models.items()}


@pytest.mark.parametrize("name", CASES)
def test_configs_come_back_as_they_went(name: str):
    family, model = model_of(name)
    assert kinds.family_of(model) == family
    back, fields = configs.to_model(configs.to_theirs(family, model, dtype="float32", ids={}))
    objective = "clm" if model.attention == "causal" else "mlm"
    entries = {"model": fields, "data": {"seq_len": 24}, "objective": {"name": objective}}
    assert (back, resolve(entries).model) == (family, model)
