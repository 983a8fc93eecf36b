"""A mixture of experts: against a loop over tokens and experts in float64, in storage, in costs, in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stackwise_jax.checks.attention import linear_maps
from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.interop.kinds import family_of
from stackwise_jax.memory import budget
from stackwise_jax.memory.precision import as_master, to_storage
from stackwise_jax.models import weights
from stackwise_jax.models.adapters import adapter_table
from stackwise_jax.models.experts import ExpertFeedForward
from stackwise_jax.models.rack import (
    count_parameters,
    decode_rack,
    init_key_values,
    init_rack,
    rack_logits,
    reading_context,
    row_context,
)
from stackwise_jax.models.stack import apply_penalised_stack, apply_stack, init_stack
from stackwise_jax.schema import ModelConfig
from stackwise_jax.train.optimizer import init_part, make_transforms, update_part
from stackwise_jax.types import Quantised

B, T, D, F, E, A = 2, 9, 16, 12, 4, 2
SHAPE: dict[str, Any] = {"vocab_size": 64, "d_model": D, "n_heads": 2, "d_ff": 20, "init_std": 0.4}
EXPERTS: dict[str, Any] = {"count": E, "active": A, "shared": 1, "d_ff": F, "balance": 0.3, "z_loss": 0.05}


def entries(experts: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"model": {**SHAPE, **fields, "experts": {**EXPERTS, **(experts or {})}}, "data": {"seq_len": T}}


def model_of(experts: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    return resolve(entries(experts, **fields)).model


MODEL = model_of()
X = jax.random.normal(jax.random.key(1), (B, T, D))
COUNTED = jnp.arange(T)[None] < jnp.array([[T], [5]])
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gelu, one, by its share": {"ffn": "gelu", "experts": {"active": 1, "normalises": False, "shared": 0}},
    "three of them, two shared": {"experts": {"active": 3, "shared": 2, "normalises": False}},
}


def weights_of(model: ModelConfig) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], init_stack(jax.random.key(0), model, 0, 1)["mlp"])


# --- the other implementation ---


def dense(p: Any, x: np.ndarray, gated: bool) -> np.ndarray:
    up = x @ p["up"]["kernel"]
    if not gated:
        return 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) @ p["down"]["kernel"]
    gate = x @ p["gate"]["kernel"]
    return gate / (1 + np.exp(-gate)) * up @ p["down"]["kernel"]


def by_loops(p: Any, x: np.ndarray, counted: np.ndarray, model: ModelConfig) -> tuple[np.ndarray, float]:
    """Outputs and the penalty, token by token and expert by expert."""
    own, out = model.experts, np.zeros_like(x)
    sent, shares, squares = np.zeros(own.count), np.zeros(own.count), 0.0
    for row, place in np.ndindex(x.shape[:2]):
        token = x[row, place]
        logits = token @ p["router"]
        share = np.exp(logits) / np.exp(logits).sum()
        chosen = sorted(range(own.count), key=lambda e, share=share: -share[e])[: own.active]
        for expert in chosen:
            matrices = {name: {"kernel": part["kernel"][expert]} for name, part in p["experts"].items()}
            weight = share[expert] / (share[chosen].sum() if own.normalises else 1.0)
            out[row, place] += weight * dense(matrices, token, model.is_gated)
        if own.shared:
            out[row, place] += dense(p["shared"], token, model.is_gated)
        if counted[row, place]:
            sent[chosen] += 1.0 / own.active
            shares, squares = shares + share, squares + np.log(np.exp(logits).sum()) ** 2
    n = counted.sum()
    return out, own.balance * own.count * float(sent @ shares) / n**2 + own.z_loss * squares / n


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_penalty_and_slopes_are_those_of_loops(kind: str):
    """Slopes: of outputs and penalty along a random direction of all weights and inputs, by central differences."""
    model = model_of(**KINDS[kind])
    params, probe = weights_of(model), np.random.default_rng(0).standard_normal((B, T, D))

    def apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return ExpertFeedForward(model, jnp.float32).apply({"params": params}, x, COUNTED)  # type: ignore

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        out, penalty = apply(params, x)
        return jnp.sum(out * probe.astype(np.float32)) + 10.0 * penalty, (out, penalty)

    (_, (out, penalty)), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, X)
    expected, asked = by_loops(wide(params), wide(X), np.asarray(COUNTED), model)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    assert float(penalty) == pytest.approx(asked, rel=1e-5)

    leaves, structure = jax.tree.flatten((params, X))
    drawn = [np.random.default_rng(i).standard_normal(leaf.shape) for i, leaf in enumerate(leaves)]

    def moved(size: float) -> float:
        ends = [np.asarray(leaf, np.float64) + size * step for leaf, step in zip(leaves, drawn, strict=True)]
        out, asked = by_loops(*jax.tree.unflatten(structure, ends), np.asarray(COUNTED), model)
        return float((out * probe).sum() + 10.0 * asked)

    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    ours = [float(np.sum(grad * step)) for grad, step in zip(jax.tree.leaves(grads), drawn, strict=True)]
    assert sum(ours) == pytest.approx(slope, rel=1e-3)
    assert all(abs(part) > 1e-3 * abs(slope) for part in ours)  # so that no gradient could be missing


def test_a_token_is_answered_as_if_it_were_alone():
    """No load drops it: whoever else is there, and if all go where it goes. The twin: another token is another."""
    apply = jax.jit(lambda x: ExpertFeedForward(MODEL, jnp.float32).apply({"params": weights_of(MODEL)}, x)[0])  # type: ignore
    alone, among, crowd = apply(X[:1, :1]), apply(X), apply(jnp.broadcast_to(X[:1, :1], X.shape))
    np.testing.assert_allclose(among[0, 0], alone[0, 0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(crowd[1, 3], alone[0, 0], rtol=2e-5, atol=2e-6)
    assert float(jnp.abs(among[1, 3] - alone[0, 0]).max()) > 0.1


def test_stored_texts_are_read_as_whole_ones():
    rack = init_rack(jax.random.key(0), MODEL, (2,))
    tokens = jax.random.randint(jax.random.key(2), (B, T), 0, 64)
    places = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x = rack["embedding"]["tokens"][tokens]
    context = row_context(MODEL, None, places)
    run = jax.jit(lambda x: apply_stack(rack["stacks"][0], x, context, MODEL, dtype=jnp.float32))
    whole = rack_logits(rack, run(x), MODEL)
    stored = init_key_values(rack, MODEL, B, T, dtype=jnp.float32)
    read = jax.jit(lambda tokens, own, stored: decode_rack(rack, tokens, own, stored, MODEL, dtype=jnp.float32))
    for at in (slice(0, T - 1), slice(T - 1, T)):
        logits, stored = read(tokens[:, at], reading_context(stored, places[:, at], jnp.zeros(B, int)), stored)
    np.testing.assert_allclose(logits, whole[:, -1], rtol=1e-4, atol=1e-5)


def test_a_dense_rack_has_no_penalty():
    dense_model = dataclasses.replace(MODEL, experts=dataclasses.replace(MODEL.experts, count=0))
    context = row_context(dense_model, None, jnp.broadcast_to(jnp.arange(T)[None], (B, T)))
    for model, has in ((dense_model, False), (MODEL, True)):
        stack = init_stack(jax.random.key(0), model, 0, 2)
        penalty = jax.eval_shape(
            lambda stack, m=model: apply_penalised_stack(stack, X, context, m, dtype=jnp.float32)[1], stack
        )
        assert (penalty is not None) == has


# --- what follows from the table ---


def test_parameters_and_flops_by_hand():
    attention, norms = 4 * D * D, 2 * D
    expert, router = 3 * D * F, D * E
    assert budget.block_parameters(MODEL) == attention + norms + (E + 1) * expert + router
    assert budget.block_forward_flops(MODEL, 0) == 2 * (attention + (A + 1) * expert + router)
    every = model_of({"active": E})
    assert budget.block_forward_flops(every, 0) - budget.block_forward_flops(MODEL, 0) == 2 * (E - A) * expert
    assert count_parameters(every) == count_parameters(MODEL)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8", "nvfp4", "nf4"])
def test_frozen_experts_take_the_bytes_that_are_counted_and_their_router_is_whole(precision: str):
    config = resolve(entries() | {"precision": {"trunk": precision}})
    stack = jax.eval_shape(lambda: to_storage(init_stack(jax.random.key(0), config.model, 0, 3), precision))
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stack))
    assert found == 3 * budget.stored_block_bytes(config)
    kernel = stack["mlp"]["experts"]["up"]["kernel"]
    assert isinstance(kernel, Quantised) == (precision not in ("bf16", "fp16"))
    assert stack["mlp"]["router"].dtype == (jnp.bfloat16 if precision == "bf16" else jnp.float32)
    masters = jax.eval_shape(lambda: as_master(init_stack(jax.random.key(0), config.model, 0, 3), "bf16"))
    assert masters["mlp"]["experts"]["up"]["kernel"].dtype == jnp.bfloat16
    assert masters["mlp"]["router"].dtype == jnp.float32


@pytest.mark.parametrize("fields", [{"name": "adamw"}, {"name": "muon"}, {"name": "muon", "spectral": 0.3}])
def test_experts_are_moved_one_by_one(fields: dict[str, Any]):
    """As stacks of one matrix each would be; the router by AdamW without decay, whatever moves matrices."""
    stability = {"spectral_norm": fields.get("spectral")}
    config = resolve(entries(stability=stability) | {"optimizer": {"name": fields["name"], "weight_decay": 0.5}})
    transform = make_transforms(config, scales_head=False)["stacks"]
    params, grads = (init_stack(jax.random.key(seed), config.model, 0, 2)["mlp"] for seed in (0, 1))
    step = jax.jit(lambda p, g: update_part(transform, g, init_part({"s": transform}, "s", p), p, jnp.float32(1.0))[0])
    moved = step(params, grads)
    one = [{"down": {"kernel": tree["experts"]["down"]["kernel"][:, 1]}} for tree in (params, grads)]
    if "spectral" not in fields:  # whose first directions are drawn by shape
        alone = step(*one)["down"]["kernel"]
        np.testing.assert_allclose(moved["experts"]["down"]["kernel"][:, 1], alone, rtol=1e-4, atol=1e-6)
        assert float(jnp.abs(alone - one[0]["down"]["kernel"]).max()) > 1e-5
    rate, own = config.optimizer.learning_rate, config.optimizer
    plain = optax.adam(rate, b1=own.beta1, b2=own.beta2, eps=own.epsilon)
    updates = plain.update(grads["router"], plain.init(params["router"]))[0]
    np.testing.assert_allclose(moved["router"], params["router"] + updates, rtol=1e-5, atol=1e-7)


def test_adapters_are_of_attention_and_of_what_is_shared():
    table = adapter_table(MODEL, 2, "all")
    assert set(table["mlp"]) == {"shared"}
    names = [weights.count(table["attention"]), weights.count(table["mlp"]["shared"])]
    assert names == [4 * 2 * (D + D), 3 * 2 * (D + F)]
    assert "up" in linear_maps(MODEL)
    assert "up" not in linear_maps(model_of({"shared": 0}))
    with pytest.raises(UserError, match=r"training.adapters.targets"):
        resolve(entries({"shared": 0}) | {"training": {"adapters": {"targets": "up"}}})


# --- what is refused ---

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "one": ({"count": 1, "active": 1, "normalises": False}, {}, "no choice"),
    "more than there are": ({"active": 5}, {}, "active=5 must be at most model.experts.count=4"),
    "one that weighs 1": ({"active": 1}, {}, "normalises=True"),
    "none, and a field": ({"count": 0}, {}, "set model.experts.count"),
    "biases": ({}, {"model": {"use_bias": True}}, "model.use_bias=True"),
    "a trunk in fp8": ({}, {"precision": {"trunk_compute": "fp8", "compute": "bf16"}}, "trunk_compute='fp8'"),
    "a new stack in fp8": (
        {},
        {"training": {"progressive": {"new_stack_precision": "fp8"}}, "precision": {"compute": "bf16"}},
        "new_stack_precision='fp8'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_cannot_be_is_one_line(case: str):
    experts, sections, words = REFUSED[case]
    asked = entries(experts)
    for name, fields in sections.items():
        asked[name] = {**asked.get(name, {}), **fields}
    with pytest.raises(UserError, match=words) as caught:
        resolve(asked)
    assert "\n" not in str(caught.value)


def test_no_family_of_transformers_has_them():
    with pytest.raises(UserError, match=r"model.experts.count=0"):
        family_of(MODEL)
