"""What must fit together in a mixture of experts, and what experts cannot have."""

import dataclasses

from stackwise_jax.checks.choices import require
from stackwise_jax.schema import ExpertsConfig, ModelConfig, RunConfig


def settle_experts(model: ModelConfig) -> ModelConfig:
    """A model with the width of its experts, if any, filled in."""
    if not model.has_experts:
        return model
    return dataclasses.replace(model, experts=dataclasses.replace(model.experts, d_ff=model.experts.d_ff or model.d_ff))


def check_experts(config: RunConfig) -> None:
    """Numbers of experts, and precisions and biases that they have none of."""
    model, own, defaults = config.model, config.model.experts, ExpertsConfig()
    if not model.has_experts:
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            require(
                value == getattr(defaults, field.name),
                f"model.experts.{field.name}={value!r} is of a mixture of experts; set model.experts.count to their "
                "number, or leave it out",
            )
        return
    require(own.count > 1, "model.experts.count=1 leaves a router no choice; set it to 0 (dense) or to 2 or more")
    require(
        own.active <= own.count,
        f"model.experts.active={own.active} must be at most model.experts.count={own.count}",
    )
    require(
        own.active > 1 or not own.normalises,
        "model.experts.normalises=True makes the weight of model.experts.active=1 expert always 1, which teaches a "
        "router nothing; set it to False",
    )
    require(not model.use_bias, "model.use_bias=True is not for experts, whose maps have none; set it to False")
    for field, value in (
        ("precision.trunk_compute", config.precision.trunk_compute),
        ("training.progressive.new_stack_precision", config.training.progressive.new_stack_precision),
    ):
        require(
            value != "fp8",
            f"{field}='fp8' has no form for experts (model.experts.count={own.count}); leave it out, or set bf16",
        )
