"""The choices of every field that has a list of them."""

from typing import Any

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.schema import RunConfig

PRECISIONS = ("fp32", "bf16")
CACHE_PRECISIONS = (*PRECISIONS, "fp8")
COMPUTE_PRECISIONS = (*PRECISIONS, "fp16")
LIVE_PRECISIONS = (*COMPUTE_PRECISIONS, "fp8")
QUANTISED = ("fp8", "nvfp4", "nf4")
TRUNK_PRECISIONS = (*COMPUTE_PRECISIONS, *QUANTISED)
SAMPLERS = ("autoregressive", "denoise", "blocks")
REVEAL_ORDERS = ("confidence", "margin", "entropy", "random", "left_to_right")
DIRECTIONS = ("left_to_right", "right_to_left", "independent")
TRUNK_STRATEGIES = ("frozen", "qlora", "full")
GROWING_MODES = ("layerwise", "blockwise", "stackwise", "progressive")
OBJECTIVES = ("clm", "mlm", "prefix", "diffusion", "block_diffusion")
MASKED = ("mlm", "diffusion", "block_diffusion")
OPERATORS = ("random", "copy", "interleave", "zero_output")
ATTENTION_KINDS = ("mha", "mla", "kernel", "mlgka")
KERNEL_FAMILIES = ("gaussian", "laplacian", "uniform", "linear")
RANK_PATTERNS = ("constant", "increasing", "decreasing")


def require(holds: bool, message: str) -> None:
    """Refuses a config with a message, unless something holds."""
    if not holds:
        raise UserError(message)


def one_of(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a value that is none of those allowed; suggests the nearest."""
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        raise UserError(f"{field}={value!r} must be one of: {names}.{did_you_mean(str(value), map(str, allowed))}")


def check_choices(config: RunConfig) -> None:
    """Every field that has a list of choices holds one of them."""
    model, training = config.model, config.training
    choices: dict[str, tuple[Any, tuple[str | None, ...]]] = {
        "model.norm": (model.norm, ("rmsnorm", "layernorm")),
        "model.norm_position": (model.norm_position, ("pre", "post")),
        "model.ffn": (model.ffn, ("swiglu", "geglu", "gelu", "geglu_erf", "gelu_erf")),
        "model.fixed_maps": (model.fixed_maps, ("none", "up", "up_and_gate")),
        "model.positions": (model.positions, ("rotary", "learned", "none")),
        "model.attention": (model.attention, ("causal", "bidirectional")),
        "model.attention_kind": (model.attention_kind, ATTENTION_KINDS),
        "model.latent.form": (model.latent.form, ("shared", "separate")),
        "model.kernel.form": (model.kernel.form, ("softmax", "linear")),
        "model.attention_implementation": (model.attention_implementation, ("auto", "reference", "xla", "cudnn")),
        "objective.name": (config.objective.name, (*OBJECTIVES, "mixed")),
        "objective.rate_draw": (config.objective.rate_draw, ("low_discrepancy", "stratified", "independent")),
        "objective.noise_schedule": (config.objective.noise_schedule, ("linear", "cosine", "polynomial")),
        "objective.weighting": (config.objective.weighting, ("bound", "uniform")),
        "objective.time": (config.objective.time, ("none", "input", "depth", "depth_input")),
        "objective.noise_order": (config.objective.noise_order, ("high_to_low", "low_to_high")),
        "objective.mask_form": (config.objective.mask_form, ("bernoulli", "count")),
        "objective.replacement": (config.objective.replacement, ("bert", "mask")),
        "training.mode": (training.mode, (*GROWING_MODES, "fusion", "end_to_end")),
        "training.embedding_phase": (training.embedding_phase, ("alone", "with_first_stack", "given")),
        "training.head": (training.head, ("live", "frozen", "copy")),
        "training.remat": (training.remat, ("none", "dots", "full")),
        "training.execution": (training.execution, ("auto", "fused", "chained")),
        "training.progressive.direction": (training.progressive.direction, DIRECTIONS),
        "training.progressive.trunk_strategy": (training.progressive.trunk_strategy, TRUNK_STRATEGIES),
        "training.progressive.new_stack": (training.progressive.new_stack, ("drawn", "silent")),
        "training.growth.operator": (training.growth.operator, OPERATORS),
        "training.fusion.embedding": (training.fusion.embedding, ("live", "frozen")),
        "optimizer.name": (config.optimizer.name, ("adamw", "muon")),
        "optimizer.schedule": (config.optimizer.schedule, ("wsd", "cosine")),
        "precision.weights": (config.precision.weights, PRECISIONS),
        "precision.optimizer": (config.precision.optimizer, (*PRECISIONS, "int8")),
        "precision.compute": (config.precision.compute, COMPUTE_PRECISIONS),
        "precision.trunk": (config.precision.trunk, TRUNK_PRECISIONS),
        "precision.trunk_compute": (config.precision.trunk_compute, (None, "fp8")),
        "precision.cache": (config.precision.cache, CACHE_PRECISIONS),
        "generation.sampler": (config.generation.sampler, ("auto", *SAMPLERS)),
        "generation.order": (config.generation.order, REVEAL_ORDERS),
        "cache.tier": (config.cache.tier, ("auto", "device", "host", "disk")),
        "cache.on_mismatch": (config.cache.on_mismatch, ("rebuild", "stop")),
    }
    for field, (value, allowed) in choices.items():
        one_of(field, value, allowed)
    if training.progressive.new_stack_precision is not None:
        one_of("training.progressive.new_stack_precision", training.progressive.new_stack_precision, LIVE_PRECISIONS)
