"""Costs against arithmetic done by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from stackwise_jax.checks.choices import CACHE_PRECISIONS, TRUNK_PRECISIONS
from stackwise_jax.config import resolve
from stackwise_jax.memory import budget
from stackwise_jax.memory.precision import DTYPES, item_bytes, to_storage, token_bytes
from stackwise_jax.models import families
from stackwise_jax.models.stack import init_stack
from stackwise_jax.schema import ModelConfig, RunConfig


def config_of(model: dict[str, Any], **sections: Any) -> RunConfig:
    return resolve({"model": model, **sections})


LLAMA_70B = config_of(families.llama("70b"), data={"seq_len": 4096}).model
TINY: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


def test_one_block_of_the_70b_shape():
    d, kv, hidden = 8192, 8 * 128, 28672
    by_hand = 2 * d * d + 2 * d * kv + 3 * d * hidden + 2 * d
    assert budget.block_parameters(LLAMA_70B) == by_hand == 855_654_400
    without_attention = budget.block_forward_flops(LLAMA_70B, 0)
    assert without_attention == 2 * (by_hand - 2 * d)  # norms are no matmul
    assert 3 * without_attention == pytest.approx(5.13e9, rel=1e-3)
    # Scores and mixing: 2 * 2 * 8192 for each of half of 4096 places.
    assert budget.block_forward_flops(LLAMA_70B, 4096) - without_attention == 4 * 8192 * 2048


def test_bidirectional_attention_costs_the_whole_square():
    both = dataclasses.replace(LLAMA_70B, attention="bidirectional")
    linear = budget.block_forward_flops(LLAMA_70B, 0)
    causal, full = budget.block_forward_flops(LLAMA_70B, 4096), budget.block_forward_flops(both, 4096)
    assert full - linear == 2 * (causal - linear)


def test_a_window_costs_what_it_sees():
    model = config_of(families.modernbert("base"), objective={"name": "mlm"}).model
    linear, width = budget.block_forward_flops(model, 0), 12 * 64
    seen = (8 * 4096 + 14 * 129) / 22  # eight global blocks of twenty-two
    assert budget.block_forward_flops(model, 4096) - linear == pytest.approx(4 * seen * width)
    assert budget.block_forward_flops(model, 64) - linear == pytest.approx(4 * 64 * width)  # the window sees all
    causal = dataclasses.replace(model, attention="causal", global_every=None)
    assert budget.block_forward_flops(causal, 4096) - linear == pytest.approx(4 * 65 * width)


@pytest.mark.parametrize(
    ("fields", "matrices"),
    [
        ({}, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48),
        ({"ffn": "gelu"}, 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 * 48),
        ({"use_bias": True, "norm": "layernorm"}, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48),
        ({"d_head": 16}, 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48),
    ],
)
def test_forward_flops_count_matrices_only(fields: dict[str, Any], matrices: int):
    model = config_of({**TINY, **fields}).model
    assert budget.block_forward_flops(model, 0) == 2 * matrices


def test_latents_count_their_maps_and_the_widths_that_meet():
    """DeepSeek-V2's shape on a small width: heads of 8 + 4 against values of 6."""
    latent = {"kv_rank": 10, "query_rank": 5, "d_rope": 4, "d_value": 6}
    model = config_of({**TINY, "n_kv_heads": 4, "attention_kind": "mla", "latent": latent}).model
    maps = 32 * 5 + 5 * 4 * 12 + 32 * (10 + 4) + 10 * 4 * (8 + 6) + 4 * 6 * 32
    linear = budget.block_forward_flops(model, 0)
    assert linear == 2 * (maps + 3 * 32 * 48)
    assert budget.block_forward_flops(model, 64) - linear == 2 * 32 * 4 * (12 + 6)


def test_kernels_count_features_and_linear_time_no_places():
    def flops(seq_len: int, **kernel: Any) -> float:
        model = config_of({**TINY, "attention_kind": "kernel", "kernel": kernel}, data={"seq_len": 64}).model
        return budget.block_forward_flops(model, seq_len) - budget.block_forward_flops(config_of(TINY).model, 0)

    features = 2 * 6 * 8 * 10  # of four query heads and two key heads of width 8
    assert flops(64, n_features=20) == features + 2 * 32 * 4 * (20 + 8)
    assert flops(64, family="linear") == 2 * 32 * 4 * (8 + 8)
    in_linear_time = features + 2 * 6 * 12 * (20 + 9)
    assert flops(64, form="linear", n_features=20, positive_features=12) == in_linear_time
    assert flops(4096, form="linear", n_features=20, positive_features=12) == in_linear_time


def step_flops(model: ModelConfig, live: int, passed: int, trunk: int, *, table_is_live: bool) -> float:
    return budget.step_flops_per_token(
        model, 0, live_blocks=live, passed_blocks=passed, trunk_blocks=trunk, table_is_live=table_is_live
    )


def test_a_step_costs_three_two_or_one_forward():
    model = config_of(TINY).model
    block, head = budget.block_forward_flops(model, 0), 2.0 * 32 * 64
    assert step_flops(model, 0, 0, 0, table_is_live=True) == 3 * head
    assert step_flops(model, 0, 0, 0, table_is_live=False) == 2 * head
    assert step_flops(model, 2, 3, 5, table_is_live=False) == (6 + 6 + 5) * block + 2 * head


@pytest.mark.parametrize(("cache", "item"), [("fp32", 4), ("bf16", 2)])
def test_cache_bytes(cache: str, item: int):
    config = config_of(TINY, data={"seq_len": 16}, precision={"cache": cache})
    assert budget.cache_bytes(config, 10, 3) == 10 * 3 * 16 * 32 * item


def test_a_70b_token_takes_16_kib_in_bf16():
    config = config_of(families.llama("70b"), data={"seq_len": 4096}, precision={"cache": "bf16"})
    assert budget.cache_bytes(config, 1, 1) == 4096 * 16 * 1024


def test_muon_keeps_one_moment_of_what_is_in_stacks():
    adamw, muon = (config_of(TINY, optimizer={"name": name}) for name in ("adamw", "muon"))
    assert budget.optimizer_bytes(adamw, live=1000, live_in_stacks=600) == 8000
    assert budget.optimizer_bytes(muon, live=1000, live_in_stacks=600) == 8000 - 4 * 600


@pytest.mark.parametrize(("optimizer", "moment"), [("fp32", 4.0), ("bf16", 2.0), ("int8", 1 + 4 / 256)])
def test_moments_weights_and_gradients_follow_their_precision(optimizer: str, moment: float):
    narrow = {"precision": {"optimizer": optimizer, "weights": "bf16"}}
    once, summed = config_of(TINY, **narrow), config_of(TINY, **narrow, training={"accumulation_steps": 2})
    assert budget.optimizer_bytes(once, live=1024, live_in_stacks=512) == moment * 2048
    in_16_bits = 2 * 512 + 4 * 512
    assert budget.weight_and_gradient_bytes(once, live=1024, live_in_stacks=512) == (in_16_bits, in_16_bits)
    assert budget.weight_and_gradient_bytes(summed, live=1024, live_in_stacks=512) == (in_16_bits, 4096)


def test_a_share_of_the_places_costs_that_share_of_the_head():
    model = config_of(TINY).model
    whole, quarter = (
        budget.step_flops_per_token(
            model, 0, live_blocks=1, passed_blocks=0, trunk_blocks=0, table_is_live=True, loss_fraction=share
        )
        for share in (1.0, 0.25)
    )
    assert whole - quarter == 0.75 * 3 * 2.0 * 32 * 64


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (64 * 2**30, "64.0 GiB"), (5 * 2**40, "5.0 TiB")],
)
def test_bytes_for_people(count: int, text: str):
    assert budget.readable_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (1000, "1.00k"), (68_976_648_192, "68.98B"), (2_560_000, "2.56M"), (3.2e18, "3200.00Q")],
)
def test_counts_for_people(count: float, text: str):
    assert budget.readable_count(count) == text


def test_storage_casts_every_array():
    stored = to_storage({"mlp": {"up": jnp.ones((2, 2))}, "scale": jnp.full(2, 1 + 2**-10)}, "bf16")
    assert stored["mlp"]["up"].dtype == stored["scale"].dtype == jnp.bfloat16
    assert float(stored["scale"][0]) == 1.0  # rounded, as a trunk's numbers are
    assert {name: item_bytes(name) for name in DTYPES} == {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    assert {name: token_bytes(name, 8) for name in CACHE_PRECISIONS} == {"fp32": 32, "bf16": 16, "fp8": 12}


@pytest.mark.parametrize("precision", TRUNK_PRECISIONS)
def test_a_stored_block_has_the_bytes_that_are_planned(precision: str):
    config = resolve({"model": {"use_bias": True, "n_kv_heads": 2, "d_ff": 200}, "precision": {"trunk": precision}})
    stack = jax.eval_shape(lambda: to_storage(init_stack(jax.random.key(0), config.model, 0, 2), precision))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stack)) == 2 * budget.stored_block_bytes(
        config
    )
