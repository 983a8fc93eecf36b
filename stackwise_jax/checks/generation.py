"""How a run can be read, and what must fit together in `generation`."""

from stackwise_jax.checks.choices import require
from stackwise_jax.checks.model import objective_names
from stackwise_jax.schema import RunConfig


def samplers(config: RunConfig) -> tuple[str, ...]:
    """How a run can be read, its default first; `generation.sampler` chooses among them."""
    names = sorted(objective_names(config), key=lambda name: name != "clm")
    unmasking = ("denoise", "blocks")
    by_depth = config.objective.time in ("depth", "depth_input")
    # Blocks are read from stored places: attention in linear time keeps none, and what blocks that look both ways make
    # of them, for others that look back, changes with every place to come.
    stores = not config.model.is_linear_time and config.model.causal_from is None
    if by_depth or reading_attention(config, "denoise") == "causal" or not stores:
        unmasking = ("denoise",)
    ways = {"clm": ("autoregressive",), "prefix": ("autoregressive",), "block_diffusion": ("blocks", "denoise")}
    return tuple(dict.fromkeys(way for name in names for way in ways.get(name, unmasking)))


def reading_attention(config: RunConfig, sampler: str) -> str:
    """The attention under which a sampler reads a run, which may have been trained under several."""
    if sampler == "autoregressive":
        return "causal"
    return config.model.attention if config.objective.name in ("mlm", "diffusion") else "bidirectional"


def block_length(config: RunConfig) -> int | None:
    """Places of a block, of samplers that unmask in blocks; None: all places together."""
    own = config.objective.block_length if "block_diffusion" in objective_names(config) else None
    return config.generation.block_length or own


def check_generation(config: RunConfig) -> None:
    """The sampler fits the run, and its fields fit the sampler."""
    generation, possible = config.generation, samplers(config)
    run = f"objective.name={config.objective.name!r}, model.attention={config.model.attention!r}"
    run += "" if config.objective.time == "none" else f", objective.time={config.objective.time!r}"
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
        sampler != "blocks" or block_length(config) is not None,
        "generation.sampler='blocks' needs generation.block_length; give the number of places of a block",
    )
