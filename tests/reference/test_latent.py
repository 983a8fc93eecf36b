"""Latent attention against DeepSeek-V3 in `transformers`: golden files everywhere, live where it is installed.

Theirs has queries' and keys' rotary coordinates in neighbouring pairs, keys' and values' maps in one matrix, head by
head, and the latent's beside the rotary key's.
"""

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
from cases import GOLDEN, LATENT_CASES, chosen_entries, draw, rows_of
from live import reference_python

from stackwise_jax.config import resolve
from stackwise_jax.models.rack import apply_rack, output_table, row_context
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Params

LOGITS, GRADIENTS = 1e-4, 1e-3  # largest differences
D, N, R, H, P, W = 32, 4, 12, 8, 6, 4  # widths of cases.py: own and rotary part of a head, value of a head
HALVES = [*range(0, P, 2), *range(1, P, 2)]  # where a pair's coordinates lie among theirs


def model_of(name: str) -> ModelConfig:
    latent = {"kv_rank": R, "query_rank": LATENT_CASES[name].config["q_lora_rank"], "d_rope": P, "d_value": W}
    shape = {"vocab_size": 96, "d_model": D, "n_heads": N, "d_head": H, "d_ff": 48, "norm_epsilon": 1e-6}
    rack = {"attention_kind": "mla", "latent": latent, "architecture": {"n_stacks": 1, "blocks_per_stack": 2}}
    return resolve({"model": shape | rack, "data": {"seq_len": 24}}).model


def attention_of(read: Any, name: str, query_rank: int | None) -> Params:
    """Our maps out of theirs; `read` gives a matrix of theirs, of which ours is the transpose."""
    kernels = {"output": read(f"{name}.o_proj.weight").T}
    joint = read(f"{name}.kv_a_proj_with_mqa.weight").T
    kernels |= {"latent": joint[:, :R], "rotary_key": joint[:, R:][:, HALVES]}
    heads = read(f"{name}.kv_b_proj.weight").T.reshape(R, N, H + W)
    kernels |= {"key": heads[..., :H].reshape(R, -1), "value": heads[..., H:].reshape(R, -1)}
    norms = {"latent_norm": {"scale": read(f"{name}.kv_a_layernorm.weight")}}
    if query_rank is None:
        queries = read(f"{name}.q_proj.weight").T
    else:
        kernels["query_latent"] = read(f"{name}.q_a_proj.weight").T
        norms["query_norm"] = {"scale": read(f"{name}.q_a_layernorm.weight")}
        queries = read(f"{name}.q_b_proj.weight").T
    queries = queries.reshape(len(queries), N, H + P)
    queries = np.concatenate([queries[..., :H], queries[..., H:][..., HALVES]], axis=-1)
    kernels["query"] = queries.reshape(len(queries), -1)
    return norms | {key: {"kernel": kernel} for key, kernel in kernels.items()}


def rack_of(read: Any, model: ModelConfig) -> Params:
    def block(number: int) -> Params:
        name = f"model.layers.{number}"
        mlp = {key: {"kernel": read(f"{name}.mlp.{key}_proj.weight").T} for key in ("gate", "up", "down")}
        return {
            "attention_norm": {"scale": read(f"{name}.input_layernorm.weight")},
            "attention": attention_of(read, f"{name}.self_attn", model.latent.query_rank),
            "mlp_norm": {"scale": read(f"{name}.post_attention_layernorm.weight")},
            "mlp": mlp,
        }

    rack = {
        "embedding": {"tokens": read("model.embed_tokens.weight")},
        "stacks": [jax.tree.map(lambda *leaves: np.stack(leaves), block(0), block(1))],
        "head": {"norm": {"scale": read("model.norm.weight")}, "table": read("lm_head.weight")},
    }
    return jax.tree.map(jnp.asarray, rack)


def logits_of(rack: Params, rows: tuple[Any, ...], model: ModelConfig) -> jax.Array:
    tokens, _, segments, positions, _ = rows
    hidden = apply_rack(rack, tokens, row_context(model, segments, positions), model, dtype=jnp.float32)
    return hidden @ output_table(rack["head"], rack["embedding"]).T


@functools.partial(jax.jit, static_argnums=2)
def logits_and_gradients(rack: Params, rows: tuple[Any, ...], model: ModelConfig) -> Any:
    _, targets, segments, _, _ = rows

    def loss(rack: Params) -> tuple[Any, Any]:
        logits = logits_of(rack, rows, model)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], 2)[:, :, 0]
        return -jnp.sum(own * (segments > 0)), logits

    gradients, logits = jax.grad(loss, has_aux=True)(rack)
    return logits, gradients


def read_golden(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def shapes_in(expected: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return json.loads(str(expected["shapes"]))


def drawn(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[Params, tuple[Any, ...]]:
    """Rack and rows of a case; all of the drawn weights have a place."""
    left = dict(shapes)
    rack = rack_of(lambda key: draw(key, tuple(left.pop(key))), model_of(name))
    assert not left, f"no place for {sorted(left)}"
    return rack, tuple(jnp.asarray(value) for value in dataclasses.astuple(rows_of(LATENT_CASES[name])))


def theirs_as_ours(name: str, expected: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> Params:
    """Gradients of theirs laid out as ours, nan where the file has no entry."""

    def read(key: str) -> np.ndarray:
        entries, size = expected[f"gradient {key}"], int(np.prod(shapes[key]))
        whole = np.full(size, np.nan, np.float32)
        whole[chosen_entries(key, size) if f"norm {key}" in expected else np.arange(size)] = entries.reshape(-1)
        return whole.reshape(shapes[key])

    return rack_of(read, model_of(name))


def check(name: str, expected: dict[str, np.ndarray]) -> None:
    shapes, real = shapes_in(expected), rows_of(LATENT_CASES[name]).segments > 0
    logits, gradients = logits_and_gradients(*drawn(name, shapes), model_of(name))
    assert np.abs(logits - expected["logits"])[real].max() < LOGITS
    wanted = theirs_as_ours(name, expected, shapes)
    for (path, own), entries in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True):
        own, entries = np.asarray(own), np.asarray(entries)
        known = ~np.isnan(entries)
        assert known.any()
        np.testing.assert_allclose(
            own[known], entries[known], rtol=GRADIENTS, atol=GRADIENTS, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", LATENT_CASES)
def test_logits_and_gradients_are_those_of_the_golden_file(name: str):
    check(name, read_golden(GOLDEN / f"{name}.npz"))


@pytest.mark.parametrize("fields", [{"rope_theta": 1000.0}, {"norm_epsilon": 1e-2}, {"attention": "bidirectional"}])
def test_the_golden_file_detects_another_model(fields: dict[str, Any]):
    expected = read_golden(GOLDEN / "deepseek_v3.npz")
    other = dataclasses.replace(model_of("deepseek_v3"), **fields)
    logits = jax.jit(logits_of, static_argnums=2)(*drawn("deepseek_v3", shapes_in(expected)), other)
    real = rows_of(LATENT_CASES["deepseek_v3"]).segments > 0
    assert np.abs(logits - expected["logits"])[real].max() > 10 * LOGITS


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `transformers` computes now, in this interpreter or in the one that $STACKWISE_REFERENCE_PYTHON names."""
    folder = tmp_path_factory.mktemp("live")
    script = Path(__file__).with_name("make_golden.py")
    command = [reference_python(), str(script), str(folder), *LATENT_CASES]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", LATENT_CASES)
def test_logits_and_gradients_are_those_of_transformers(name: str, live: Path):
    check(name, read_golden(live / f"{name}.npz"))
