"""What a config may hold: the choices of each field, its range, what must fit together; a line for each refusal."""

import dataclasses
import math
import re
import typing
from typing import Any

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.model_checks import model_rules
from stackwise_jax.schema import AdapterConfig, ObjectiveConfig, RunConfig

PRECISIONS = ("fp32", "bf16")
CACHE_PRECISIONS = (*PRECISIONS, "fp8")
COMPUTE_PRECISIONS = (*PRECISIONS, "fp16")
LIVE_PRECISIONS = (*COMPUTE_PRECISIONS, "fp8")
QUANTISED = ("fp8", "nvfp4", "nf4")
TRUNK_PRECISIONS = (*COMPUTE_PRECISIONS, *QUANTISED)
SAMPLERS = ("autoregressive", "denoise", "blocks")
REVEAL_ORDERS = ("confidence", "margin", "entropy", "random", "left_to_right")
DIRECTIONS = ("left_to_right", "right_to_left")
GROWING_MODES = ("layerwise", "blockwise", "stackwise")
LINEAR_MAPS = ("query", "key", "value", "output", "up", "gate", "down")
RANK_PATTERNS = ("constant", "increasing", "decreasing")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _one_of(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        raise UserError(f"{field}={value!r} must be one of: {names}.{did_you_mean(str(value), map(str, allowed))}")


def settle(config: RunConfig) -> RunConfig:
    """Checks single fields, fills derived ones, then checks fields against each other.

    Raises:
      UserError: a value that is not allowed, or values that do not fit together; one line.
    """
    _check_choices(config)
    _check_ranges(config)
    model, training = config.model, config.training
    _require(
        model.d_head is not None or model.d_model % model.n_heads == 0,
        f"model.d_model={model.d_model} must be a multiple of model.n_heads={model.n_heads}, or set model.d_head",
    )
    progressive = training.progressive
    mode = training.mode if progressive.enabled else "end_to_end"
    low, high = _rate_range(config.objective)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            n_kv_heads=model.n_kv_heads or model.n_heads,
            d_head=model.d_head or model.d_model // model.n_heads,
            max_positions=model.max_positions or config.data.seq_len,
        ),
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
    _check_model(config)
    _check_training(config)
    _check_adapters(config)
    _check_data(config)
    _check_mesh(config)
    _check_generation(config)
    return config


def _rate_range(objective: ObjectiveConfig) -> tuple[float, float]:
    """The range of masked fractions: BERT's rate, or of a bound all rates from its floor on."""
    low, high = (0.15, 0.15) if objective.name in ("clm", "mlm") else (1e-3, 1.0)
    low = low if objective.rate_min is None else objective.rate_min
    return low, high if objective.rate_max is None else objective.rate_max


def _check_choices(config: RunConfig) -> None:
    model, training = config.model, config.training
    choices: dict[str, tuple[Any, tuple[str, ...]]] = {
        "model.norm": (model.norm, ("rmsnorm", "layernorm")),
        "model.norm_position": (model.norm_position, ("pre", "post")),
        "model.ffn": (model.ffn, ("swiglu", "geglu", "gelu", "geglu_erf", "gelu_erf")),
        "model.positions": (model.positions, ("rotary", "learned", "none")),
        "model.attention": (model.attention, ("causal", "bidirectional")),
        "model.attention_implementation": (model.attention_implementation, ("auto", "reference", "xla", "cudnn")),
        "objective.name": (config.objective.name, ("clm", "mlm")),
        "objective.mask_form": (config.objective.mask_form, ("bernoulli", "count")),
        "objective.replacement": (config.objective.replacement, ("bert", "mask")),
        "training.mode": (training.mode, (*GROWING_MODES, "end_to_end")),
        "training.embedding_phase": (training.embedding_phase, ("alone", "with_first_stack")),
        "training.head": (training.head, ("live", "frozen", "copy")),
        "training.remat": (training.remat, ("none", "dots", "full")),
        "training.execution": (training.execution, ("auto", "fused", "chained")),
        "training.progressive.direction": (training.progressive.direction, DIRECTIONS),
        "training.progressive.trunk_strategy": (training.progressive.trunk_strategy, ("frozen",)),
        "optimizer.name": (config.optimizer.name, ("adamw", "muon")),
        "optimizer.schedule": (config.optimizer.schedule, ("wsd", "cosine")),
        "precision.weights": (config.precision.weights, PRECISIONS),
        "precision.optimizer": (config.precision.optimizer, (*PRECISIONS, "int8")),
        "precision.compute": (config.precision.compute, COMPUTE_PRECISIONS),
        "precision.trunk": (config.precision.trunk, TRUNK_PRECISIONS),
        "precision.cache": (config.precision.cache, CACHE_PRECISIONS),
        "generation.sampler": (config.generation.sampler, ("auto", *SAMPLERS)),
        "generation.order": (config.generation.order, REVEAL_ORDERS),
        "cache.tier": (config.cache.tier, ("auto", "device", "host", "disk")),
        "cache.on_mismatch": (config.cache.on_mismatch, ("rebuild", "stop")),
    }
    for field, (value, allowed) in choices.items():
        _one_of(field, value, allowed)
    if training.progressive.new_stack_precision is not None:
        _one_of("training.progressive.new_stack_precision", training.progressive.new_stack_precision, LIVE_PRECISIONS)


# Smallest allowed value of every number that has one; fractions are checked against [0, 1] besides.
_AT_LEAST: dict[str, float] = {
    "model.vocab_size": 16, "model.d_model": 1, "model.n_heads": 1, "model.n_kv_heads": 1, "model.d_head": 1,
    "model.d_ff": 1, "model.max_positions": 1, "model.norm_epsilon": 0, "model.rope_theta": 1, "model.init_std": 0,
    "model.stability.residual_gain": 0, "model.stability.z_loss": 0,
    "model.architecture.n_stacks": 1, "model.architecture.blocks_per_stack": 1,
    "data.seq_len": 2, "data.max_bytes": 1, "data.max_rows": 1, "objective.mask_variants": 1, "seed": 0,
    "training.block_group": 1, "training.batch_size": 1, "training.accumulation_steps": 1,
    "training.loss_chunk_tokens": 1, "training.unroll_blocks": 1,
    "training.adapters.rank": 1, "training.adapters.alpha": 0, "training.adapters.learning_rate_scale": 0,
    "optimizer.learning_rate": 0, "optimizer.muon_learning_rate": 0, "optimizer.head_learning_rate_scale": 0,
    "optimizer.epsilon": 0, "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "cache.chunk_bytes": 1, "cache.window_gib": 0, "cache.window_visits": 1,
    "checkpoint.every_minutes": 0, "checkpoint.every_steps": 1,
    "checkpoint.keep": 1, "evaluation.rows": 1, "evaluation.every_steps": 1, "generation.samples": 0,
    "generation.tokens": 1, "generation.temperature": 0, "generation.top_k": 0, "generation.steps": 1,
    "generation.block_length": 1, "logging.every_steps": 1,
    "logging.peak_flops": 1, "mesh.data": 1, "mesh.fsdp": 1, "mesh.processes": 1, "mesh.process_id": 0,
}  # fmt: skip
_FRACTIONS = (
    "model.dropout", "data.validation_fraction", "objective.rate_min", "objective.rate_max", "optimizer.beta1",
    "optimizer.beta2", "optimizer.warmup_fraction", "optimizer.decay_fraction", "optimizer.final_fraction",
    "generation.top_p", "generation.remask", "generation.threshold",
)  # fmt: skip


def _check_ranges(config: RunConfig) -> None:
    def value_of(field: str) -> Any:
        value: Any = config
        for part in field.split("."):
            value = getattr(value, part)
        return value

    for field, least in _AT_LEAST.items():
        value = value_of(field)
        _require(value is None or value >= least, f"{field}={value} must be at least {least:g}")
    for field in _FRACTIONS:
        value = value_of(field)
        _require(value is None or 0.0 <= value <= 1.0, f"{field}={value} must lie between 0 and 1")
    limit = config.model.stability.spectral_norm
    _require(limit is None or limit > 0.0, f"model.stability.spectral_norm={limit} must be above 0, or None for none")
    _require(config.seed < 2**32, f"seed={config.seed} must be below 2**32")
    for field in (
        "model.dropout",
        "optimizer.beta1",
        "optimizer.beta2",
        "data.validation_fraction",
        "generation.remask",
    ):
        _require(value_of(field) < 1.0, f"{field}={value_of(field)} must be below 1")


def _check_model(config: RunConfig) -> None:
    model, objective = config.model, config.objective
    for holds, message in model_rules(model):
        _require(holds, message)
    max_positions = typing.cast(int, model.max_positions)
    _require(
        model.positions != "learned" or max_positions >= config.data.seq_len,
        f"model.max_positions={max_positions} must be at least data.seq_len={config.data.seq_len}",
    )
    _require(
        (objective.name == "clm") <= (model.attention == "causal"),
        f"objective.name='clm' needs model.attention='causal', not {model.attention!r}: the answer would be visible",
    )
    _require(
        (objective.name == "mlm") <= (objective.rate_max > 0.0),
        "objective.rate_max=0 masks nothing; a masked objective needs a rate above 0",
    )
    _require(
        objective.rate_min <= objective.rate_max,
        f"objective.rate_min={objective.rate_min} must not exceed objective.rate_max={objective.rate_max}",
    )


def _check_training(config: RunConfig) -> None:
    model, training, optimizer = config.model, config.training, config.optimizer
    for field in ("phase_budget", "embedding_budget"):
        budget_steps(getattr(training, field), 1, field=f"training.{field}")
    _require(
        training.mode != "blockwise" or model.n_blocks % training.block_group == 0,
        f"training.block_group={training.block_group} must divide the {model.n_blocks} blocks of the rack",
    )
    _require(
        training.mode != "end_to_end" or training.progressive.direction == "left_to_right",
        f"training.progressive.direction={training.progressive.direction!r} needs a mode that grows a stack per phase; "
        f"training.mode='end_to_end' trains all at once: choose one of {', '.join(GROWING_MODES)}",
    )
    _require(
        training.batch_size % training.accumulation_steps == 0,
        f"training.batch_size={training.batch_size} must be a multiple of "
        f"training.accumulation_steps={training.accumulation_steps}",
    )
    _require(
        training.head != "copy" or (model.ties_embedding and training.progressive.enabled),
        "training.head='copy' unties a tied table when the embedding freezes: it needs model.ties_embedding=True "
        f"and a mode that grows, not ties_embedding={model.ties_embedding} with mode={training.mode!r}",
    )
    _require(
        optimizer.schedule != "wsd" or optimizer.warmup_fraction + optimizer.decay_fraction <= 1.0,
        f"optimizer.warmup_fraction={optimizer.warmup_fraction} and decay_fraction={optimizer.decay_fraction} "
        "must not exceed 1 together",
    )


def _check_adapters(config: RunConfig) -> None:
    adapters = config.training.adapters
    for name in adapters.targets.split(","):
        _one_of("training.adapters.targets", name.strip(), ("all", *LINEAR_MAPS))
    _require(
        config.model.is_gated or "gate" not in adapters.targets,
        f"training.adapters.targets={adapters.targets!r}: model.ffn={config.model.ffn!r} has no gate; leave it out",
    )
    if adapters.ranks not in RANK_PATTERNS:
        sizes = {"layerwise": config.model.n_blocks, "blockwise": config.model.n_blocks // config.training.block_group}
        adapter_ranks(adapters, sizes.get(config.training.mode, config.model.architecture.n_stacks))


def adapter_ranks(config: AdapterConfig, n_stacks: int) -> tuple[int, ...]:
    """The rank of the adapter of every stack, from the left.

    >>> adapter_ranks(AdapterConfig(rank=8, ranks="increasing"), 4)
    (2, 4, 6, 8)

    Raises:
      UserError: a list that is none, or not of one rank a stack.
    """
    if config.ranks == "constant":
        return (config.rank,) * n_stacks
    if config.ranks in RANK_PATTERNS:
        rising = [max(1, (2 * config.rank * (i + 1) + n_stacks) // (2 * n_stacks)) for i in range(n_stacks)]
        return tuple(rising if config.ranks == "increasing" else rising[::-1])
    entries = [entry.strip() for entry in config.ranks.split(",")]
    patterns = ", ".join(RANK_PATTERNS)
    _require(
        all(re.fullmatch(r"[1-9][0-9]{0,5}", entry) for entry in entries),
        f'training.adapters.ranks={config.ranks!r} must be one of {patterns}, or a list like "4,8,8,16"',
    )
    _require(
        len(entries) == n_stacks,
        f"training.adapters.ranks={config.ranks!r} lists {len(entries)} rank(s) for {n_stacks} stacks; give each one",
    )
    return tuple(map(int, entries))


def _check_data(config: RunConfig) -> None:
    data = config.data
    weighted_sources(data.source)
    if data.validation_source:
        weighted_sources(data.validation_source, field="data.validation_source")
    _require(
        bool(data.validation_source) or data.validation_fraction > 0.0,
        "data.validation_fraction=0 leaves nothing to evaluate on; set it above 0 or give data.validation_source",
    )
    _require(
        data.max_rows is None or data.max_rows < 2**31,
        f"data.max_rows={data.max_rows} must be below 2**31, which is all rows that can be numbered",
    )


def samplers(config: RunConfig) -> tuple[str, ...]:
    """How a run can be read, its default first; `generation.sampler` chooses among them."""
    if config.objective.name == "clm":
        return ("autoregressive",)
    return ("denoise",) if config.model.attention == "causal" else ("denoise", "blocks")


def _check_generation(config: RunConfig) -> None:
    generation, possible = config.generation, samplers(config)
    run = f"objective.name={config.objective.name!r}, model.attention={config.model.attention!r}"
    _require(
        generation.sampler in ("auto", *possible),
        f"generation.sampler={generation.sampler!r} cannot read this run ({run}); it can be read by: "
        + ", ".join(possible),
    )
    sampler = possible[0] if generation.sampler == "auto" else generation.sampler
    _require(generation.repetition_penalty > 0.0, "generation.repetition_penalty=0 must be above 0; 1 is no penalty")
    defaults = {"steps": None, "order": "confidence", "remask": 0.0, "threshold": None, "block_length": None}
    for name, default in defaults.items():
        value = getattr(generation, name)
        _require(
            sampler != "autoregressive" or value == default,
            f"generation.{name}={value!r} is for samplers that unmask, and this run ({run}) is read one token after "
            f"another; leave it at {default!r}",
        )
    _require(
        generation.threshold is None or (generation.order == "confidence" and generation.remask == 0.0),
        f"generation.threshold={generation.threshold} needs generation.order='confidence' and generation.remask=0, not "
        f"{generation.order!r} and {generation.remask}",
    )
    _require(
        sampler != "blocks" or generation.block_length is not None,
        "generation.sampler='blocks' needs generation.block_length; give the number of places of a block",
    )


def weighted_sources(mixture: str, *, field: str = "data.source") -> list[tuple[str, float | None]]:
    """Takes a mixture apart into sources and their weights, all given or all None.

    >>> weighted_sources("books/*.txt@0.3; wiki/*.jsonl.xz@0.7")
    [('books/*.txt', 0.3), ('wiki/*.jsonl.xz', 0.7)]
    """
    sources: list[tuple[str, float | None]] = []
    for entry in filter(None, map(str.strip, mixture.split(";"))):
        name, _, last = entry.rpartition("@")
        try:
            weight = float(last) if name else None
        except ValueError:  # the @ is part of a name
            weight = None
        if weight is not None:
            in_range = 1e-6 <= weight <= 1e6
            _require(in_range, f"{field}={mixture!r} weighs {name!r} by {last}; weights lie between 1e-6 and 1e6")
        sources.append((entry if weight is None else name.strip(), weight))
    _require(bool(sources), f'{field}={mixture!r} names no source; give "embedded", files and globs, or tfds:NAME')
    weights = [weight for _, weight in sources]
    if None in weights and any(weights):
        lacking = sources[weights.index(None)][0]
        raise UserError(f"{field}={mixture!r} gives {lacking!r} no weight but others one; end all in @WEIGHT, or none")
    return sources


def _check_mesh(config: RunConfig) -> None:
    mesh, training = config.mesh, config.training
    devices, sizes = mesh.n_devices, f"mesh.data={mesh.data} times mesh.fsdp={mesh.fsdp} must divide"
    rows = training.batch_size // training.accumulation_steps
    _require(rows % devices == 0, f"{sizes} the {rows} rows of training.batch_size / training.accumulation_steps")
    appends = training.mode != "end_to_end" and training.progressive.direction == "left_to_right"
    caches = appends and training.progressive.cache_activations is not False
    _require(
        not caches or config.data.seq_len % devices == 0,
        f"{sizes} data.seq_len={config.data.seq_len}, by which the activation cache is divided",
    )
    _require(
        config.model.d_model % mesh.fsdp == 0,
        f"mesh.fsdp={mesh.fsdp} must divide model.d_model={config.model.d_model}, so that every matrix can be divided",
    )
    trunk = config.precision.trunk
    _require(
        mesh.fsdp == 1 or trunk not in QUANTISED,
        f"mesh.fsdp={mesh.fsdp} divides matrices, and quantised ones stay whole: precision.trunk={trunk!r} needs "
        "mesh.fsdp=1 (mesh.data is free), or precision.trunk='bf16'",
    )
    named = (mesh.coordinator or None, mesh.processes, mesh.process_id)
    _require(
        named == (None, None, None) or (mesh.distributed and None not in named),
        "mesh.coordinator, mesh.processes and mesh.process_id go together, and with mesh.distributed=True; "
        f"they are {mesh.coordinator!r}, {mesh.processes} and {mesh.process_id}",
    )
    _require(
        not mesh.distributed or config.cache.tier != "disk",
        "cache.tier='disk' is for one process; with mesh.distributed=True set it to 'host', 'device' or 'auto'",
    )


_BUDGET = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)([kMB]?) +(steps?|tokens?)")
_SCALE = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def budget_steps(budget: str, tokens_per_step: int, *, field: str = "budget") -> int:
    """Converts a budget to whole update steps, rounding tokens up.

    >>> budget_steps("200 steps", 4096), budget_steps("1M tokens", 4096)
    (200, 245)
    """
    match = _BUDGET.fullmatch(budget.strip())
    if match is None:
        raise UserError(f'{field}={budget!r} must read like "200 steps", "5M tokens" or "1.2B tokens"')
    number, scale, unit = match.groups()
    amount = float(number.replace("_", "")) * _SCALE[scale]
    _require(math.isfinite(amount), f"{field}={budget!r} is too large")
    count = round(amount)
    steps = count if unit.startswith("step") else math.ceil(count / tokens_per_step)
    _require(steps >= 1, f"{field}={budget!r} must be at least one step")
    return steps
