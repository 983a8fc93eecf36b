"""How a run can be read, and what must fit together in `generation`."""

from stackwise_jax.checks.choices import require
from stackwise_jax.schema import RunConfig


def samplers(config: RunConfig) -> tuple[str, ...]:
    """How a run can be read, its default first; `generation.sampler` chooses among them."""
    if config.objective.name == "clm":
        return ("autoregressive",)
    return ("denoise",) if config.model.attention == "causal" else ("denoise", "blocks")


def check_generation(config: RunConfig) -> None:
    generation, possible = config.generation, samplers(config)
    run = f"objective.name={config.objective.name!r}, model.attention={config.model.attention!r}"
    require(
        generation.sampler in ("auto", *possible),
        f"generation.sampler={generation.sampler!r} cannot read this run ({run}); it can be read by: "
        + ", ".join(possible),
    )
    sampler = possible[0] if generation.sampler == "auto" else generation.sampler
    require(generation.repetition_penalty > 0.0, "generation.repetition_penalty=0 must be above 0; 1 is no penalty")
    defaults = {"steps": None, "order": "confidence", "remask": 0.0, "threshold": None, "block_length": None}
    for name, default in defaults.items():
        value = getattr(generation, name)
        require(
            sampler != "autoregressive" or value == default,
            f"generation.{name}={value!r} is for samplers that unmask, and this run ({run}) is read one token after "
            f"another; leave it at {default!r}",
        )
    require(
        generation.threshold is None or (generation.order == "confidence" and generation.remask == 0.0),
        f"generation.threshold={generation.threshold} needs generation.order='confidence' and generation.remask=0, not "
        f"{generation.order!r} and {generation.remask}",
    )
    require(
        sampler != "blocks" or generation.block_length is not None,
        "generation.sampler='blocks' needs generation.block_length; give the number of places of a block",
    )
