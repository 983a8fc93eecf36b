"""What the choices of a model must fulfil together, beside those that `checks.py` knows from the rest of a config."""

import typing

from stackwise_jax.schema import ModelConfig


def model_rules(model: ModelConfig) -> list[tuple[bool, str]]:
    """(holds, what to say where it does not) of a model whose derived fields are filled in."""
    heads, kv_heads = model.n_heads, typing.cast(int, model.n_kv_heads)
    d_head = typing.cast(int, model.d_head)
    scaling, kinds = model.rope_scaling, ("none", "linear", "llama3")
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    has_globals = model.window is not None and model.global_every is not None
    return [
        (heads % kv_heads == 0, f"model.n_heads={heads} must be a multiple of model.n_kv_heads={kv_heads}"),
        (
            model.positions != "rotary" or d_head % 2 == 0,
            f"model.d_head={d_head} must be even for rotary positions; set model.d_head or model.positions",
        ),
        (model.window is None or model.window >= 1, f"model.window={model.window} must be at least 1"),
        (
            model.global_every is None or (model.window is not None and model.global_every >= 1),
            f"model.global_every={model.global_every} must be at least 1, and says which blocks have no model.window: "
            "give both or neither",
        ),
        (
            model.rope_theta_local is None or (has_globals and model.rope_theta_local >= 1),
            f"model.rope_theta_local={model.rope_theta_local} is for the blocks with a window among others without, "
            "and at least 1: set model.window and model.global_every, or leave it at None",
        ),
        (
            scaling.kind in kinds,
            f"model.rope_scaling.kind={scaling.kind!r} must be one of: {', '.join(kinds)}",
        ),
        (scaling.factor >= 1.0, f"model.rope_scaling.factor={scaling.factor} must be at least 1"),
        (
            0.0 < low < high,
            f"model.rope_scaling.low_frequency_factor={low} must lie above 0 and below high_frequency_factor={high}",
        ),
        (
            scaling.original_positions >= 1,
            f"model.rope_scaling.original_positions={scaling.original_positions} must be at least 1",
        ),
        (
            model.first_attention_norm or model.norm_position == "pre",
            "model.first_attention_norm=False leaves out a norm before attention: it needs model.norm_position='pre'",
        ),
        (model.token_types >= 0, f"model.token_types={model.token_types} must be at least 0"),
    ]
