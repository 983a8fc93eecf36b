"""What must fit together in the model and its objective."""

import typing

from stackwise_jax.checks.choices import MASKED, OBJECTIVES, one_of, require
from stackwise_jax.checks.family import check_family
from stackwise_jax.schema import RunConfig


def check_model(config: RunConfig) -> None:
    """The block, and the attention that the objective needs."""
    model, objective = config.model, config.objective
    max_positions = typing.cast(int, model.max_positions)
    check_family(model)
    require(
        model.positions != "learned" or max_positions >= config.data.seq_len,
        f"model.max_positions={max_positions} must be at least data.seq_len={config.data.seq_len}",
    )
    _check_directions(config)
    require(
        (objective.name == "clm") <= (model.attention == "causal"),
        f"objective.name='clm' needs model.attention='causal', not {model.attention!r}: the answer would be visible",
    )


def _check_directions(config: RunConfig) -> None:
    """Blocks that look back alone after blocks that look both ways."""
    model, first = config.model, config.model.causal_from
    if first is None:
        return
    require(
        first < model.n_blocks,
        f"model.causal_from={first} must be below the {model.n_blocks} blocks of the rack; for none leave it out",
    )
    require(
        model.attention == "bidirectional" and set(objective_names(config)) <= {"mlm", "diffusion"},
        f"model.causal_from={first} is of racks with model.attention='bidirectional' and objectives mlm or diffusion: "
        f"with {model.attention!r} and {config.objective.name!r} the objective alone says who sees whom",
    )
    require(
        not model.is_linear_time,
        f"model.causal_from={first} cannot go with model.kernel.form='linear', which runs every block one way; set "
        "model.kernel.form='softmax'",
    )


def check_objective(config: RunConfig) -> None:
    """The objective in itself, and with the time that it has."""
    objective = config.objective
    names = objective_names(config)
    masked = [name for name in names if name in MASKED]
    low, high = typing.cast(float, objective.rate_min), typing.cast(float, objective.rate_max)
    require(not masked or high > 0.0, "objective.rate_max=0 masks nothing; a masked objective needs a rate above 0")
    require(low <= high, f"objective.rate_min={low} must not exceed objective.rate_max={high}")
    require(
        not objective.shift or bool(masked),
        f"objective.shift=True is of masked objectives, and objective.name={objective.name!r} masks nothing",
    )
    require(
        objective.shift or not masked or len(masked) == len(names) or objective.name != "mixed",
        f"objective.mixture={objective.mixture!r} asks one head for the next place and for the same one; set "
        "objective.shift=True",
    )
    require(
        "block_diffusion" not in names or config.data.seq_len % objective.block_length == 0,
        f"objective.block_length={objective.block_length} must divide data.seq_len={config.data.seq_len}",
    )
    require(
        "block_diffusion" not in names or not config.model.is_linear_time,
        "objective.name='block_diffusion' (alone or mixed) shows rows as two halves, which model.kernel.form='linear' "
        "cannot mask: it keeps sums of the past and no places; set model.kernel.form='softmax' or another objective",
    )
    require(
        not config.model.time_input or set(names) <= {"mlm", "diffusion"},
        f"objective.time={objective.time!r} tells each row's masked fraction: objectives must be mlm or diffusion, "
        f"not {', '.join(names)}",
    )
    bounds = "diffusion" in masked or "block_diffusion" in masked
    require(
        not bounds or objective.weighting == "uniform" or bool(objective.levels) or low > 0.0,
        "objective.rate_min=0 makes a place that is masked alone weigh without limit; give the bound a floor, such as "
        "0.001",
    )
    _check_depth(config)


def objective_names(config: RunConfig) -> tuple[str, ...]:
    """The objectives of a run: its one, or those of its mixture."""
    objective = config.objective
    if objective.name != "mixed":
        require(
            not objective.mixture,
            f"objective.mixture={objective.mixture!r} is of objective.name='mixed', not {objective.name!r}",
        )
        return (objective.name,)
    names = tuple(entry.partition("@")[0].strip() for entry in objective.mixture.split(";") if entry.strip())
    require(
        len(set(names)) > 1,
        f'objective.mixture={objective.mixture!r} must name two objectives or more, such as "clm@0.5; diffusion@0.5"',
    )
    for name in names:
        one_of("objective.mixture", name, OBJECTIVES)
    return names


def _check_depth(config: RunConfig) -> None:
    objective, training, n_stacks = config.objective, config.training, stack_count(config)
    depth = objective.time in ("depth", "depth_input")
    if not depth:
        for field, unset in (("n_bands", None), ("levels", ""), ("consistency", 0.0)):
            value = getattr(objective, field)
            require(value == unset, f"objective.{field}={value!r} is of objective.time='depth', not {objective.time!r}")
        require(
            training.progressive.direction != "independent",
            "training.progressive.direction='independent' trains bands of noise, each alone: it needs "
            f"objective.time='depth' or 'depth_input', not {objective.time!r}",
        )
        return
    require(
        objective.name in ("mlm", "diffusion"),
        f"objective.time={objective.time!r} gives bands of noise to depth: objective.name must be diffusion or mlm, "
        f"not {objective.name!r}",
    )
    require(
        training.mode in ("layerwise", "blockwise", "stackwise"),
        f"objective.time={objective.time!r} needs a mode that trains stacks apart (layerwise, blockwise, stackwise), "
        f"not training.mode={training.mode!r}",
    )
    most = min(n_stacks, 8)
    require(
        objective.n_bands is None or objective.n_bands <= most,
        f"objective.n_bands={objective.n_bands} must be at most {most}: the smaller of 8 and the {n_stacks} stacks",
    )
    require(
        objective.level_min <= objective.level_max,
        f"objective.level_min={objective.level_min} must not exceed objective.level_max={objective.level_max}",
    )
    pulls = objective.name == "diffusion" and training.progressive.direction == "right_to_left" and not objective.shift
    require(
        objective.consistency == 0.0 or pulls,
        f"objective.consistency={objective.consistency} needs objective.name='diffusion', "
        "training.progressive.direction='right_to_left' and objective.shift=False: what it pulls on is the input of "
        "the next band",
    )


def stack_count(config: RunConfig) -> int:
    """Stacks of the rack, as the mode groups its blocks."""
    n_blocks, training = config.model.n_blocks, config.training
    counts = {"layerwise": n_blocks, "blockwise": n_blocks // training.block_group}
    return counts.get(training.mode, config.model.architecture.n_stacks)
