"""What a config may hold: the choices of each field, its range, what must fit together; a line for each refusal."""

import dataclasses

from stackwise_jax.checks.attention import settle_attention
from stackwise_jax.checks.choices import check_choices, require
from stackwise_jax.checks.data import check_data, check_mesh
from stackwise_jax.checks.experts import check_experts, settle_experts
from stackwise_jax.checks.generation import check_generation
from stackwise_jax.checks.model import check_model, check_objective
from stackwise_jax.checks.ranges import check_ranges
from stackwise_jax.checks.training import (
    check_adapters,
    check_embedding,
    check_fusion,
    check_progressive,
    check_training,
)
from stackwise_jax.schema import ObjectiveConfig, RunConfig


def settle(config: RunConfig) -> RunConfig:
    """Checks single fields, fills derived ones, then checks fields against each other.

    Raises:
      UserError: a value that is not allowed, or values that do not fit together; one line.
    """
    check_choices(config)
    check_ranges(config)
    model, training = config.model, config.training
    require(
        model.d_head is not None or model.d_model % model.n_heads == 0,
        f"model.d_model={model.d_model} must be a multiple of model.n_heads={model.n_heads}, or set model.d_head",
    )
    progressive = training.progressive
    mode = training.mode if progressive.enabled else "end_to_end"
    low, high = _rate_range(config.objective)
    model = dataclasses.replace(
        model,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        d_head=model.d_head or model.d_model // model.n_heads,
        max_positions=model.max_positions or config.data.seq_len,
        time_input=config.objective.time in ("input", "depth_input"),
    )
    config = dataclasses.replace(
        config,
        model=settle_experts(settle_attention(model)),
        objective=dataclasses.replace(config.objective, rate_min=low, rate_max=high),
        training=dataclasses.replace(
            training,
            mode=mode,
            progressive=dataclasses.replace(
                progressive,
                enabled=mode != "end_to_end",
                new_stack_precision=progressive.new_stack_precision or config.precision.compute,
            ),
        ),
    )
    check_model(config)
    check_experts(config)
    check_objective(config)
    check_training(config)
    check_embedding(config)
    check_progressive(config)
    check_fusion(config)
    check_adapters(config)
    check_data(config)
    check_mesh(config)
    check_generation(config)
    return config


def _rate_range(objective: ObjectiveConfig) -> tuple[float, float]:
    """The range of masked fractions: BERT's rate, or of a bound all rates from its floor on."""
    low, high = (0.15, 0.15) if objective.name in ("clm", "mlm", "prefix") else (1e-3, 1.0)
    low = low if objective.rate_min is None else objective.rate_min
    return low, high if objective.rate_max is None else objective.rate_max
