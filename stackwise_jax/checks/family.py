"""What must fit together in the blocks of a model."""

import typing

from stackwise_jax.checks.attention import check_attention
from stackwise_jax.checks.choices import one_of, require
from stackwise_jax.schema import ModelConfig, RopeScalingConfig


def check_family(model: ModelConfig) -> None:
    """What public families differ in: heads, windows, rotary bases, norms, token types."""
    heads, kv_heads = model.n_heads, typing.cast(int, model.n_kv_heads)
    d_head = typing.cast(int, model.d_head)
    require(heads % kv_heads == 0, f"model.n_heads={heads} must be a multiple of model.n_kv_heads={kv_heads}")
    require(
        model.positions != "rotary" or d_head % 2 == 0 or (model.has_latents and model.latent.form == "shared"),
        f"model.d_head={d_head} must be even for rotary positions; set model.d_head or model.positions",
    )
    require(
        model.is_gated or model.fixed_maps != "up_and_gate",
        f"model.fixed_maps='up_and_gate': model.ffn={model.ffn!r} has no gate; set it to 'up'",
    )
    for field, unset in (("d_embedding", None), ("fixed_table", False)):
        value = getattr(model, field)
        require(
            value == unset or not model.ties_embedding,
            f"model.{field}={value} is of a table that the head does not read; set model.ties_embedding=False",
        )
    _check_windows(model)
    check_attention(model)
    _check_scaling(model.rope_scaling)
    require(
        model.first_attention_norm or model.norm_position == "pre",
        "model.first_attention_norm=False leaves out a norm before attention: it needs model.norm_position='pre'",
    )


def _check_windows(model: ModelConfig) -> None:
    every, local = model.global_every, model.rope_theta_local
    require(
        every is None or model.window is not None,
        f"model.global_every={every} says which blocks have no model.window: give both or neither",
    )
    require(
        local is None or every is not None,
        f"model.rope_theta_local={local} is for the blocks with a window among others without: set model.window and "
        "model.global_every, or leave it at None",
    )


def _check_scaling(scaling: RopeScalingConfig) -> None:
    one_of("model.rope_scaling.kind", scaling.kind, ("none", "linear", "llama3"))
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    require(
        0.0 < low < high,
        f"model.rope_scaling.low_frequency_factor={low} must lie above 0 and below high_frequency_factor={high}",
    )
