"""The range of every number."""

from typing import Any

from stackwise_jax.checks.choices import require
from stackwise_jax.schema import RunConfig

# Smallest allowed value of every number that has one; fractions are checked against [0, 1] besides.
_AT_LEAST: dict[str, float] = {
    "model.vocab_size": 16, "model.d_model": 1, "model.n_heads": 1, "model.n_kv_heads": 1, "model.d_head": 1,
    "model.d_ff": 1, "model.max_positions": 1, "model.norm_epsilon": 0, "model.rope_theta": 1, "model.init_std": 0,
    "model.window": 1, "model.global_every": 1, "model.rope_theta_local": 1, "model.token_types": 0,
    "model.causal_from": 1, "model.rope_scaling.factor": 1, "model.rope_scaling.original_positions": 1,
    "model.latent.kv_rank": 1, "model.latent.query_rank": 1, "model.latent.d_rope": 2, "model.latent.d_value": 1,
    "model.kernel.n_features": 2, "model.kernel.positive_features": 1, "model.kernel.seed": 0,
    "model.experts.count": 0, "model.experts.active": 1, "model.experts.shared": 0, "model.experts.d_ff": 1,
    "model.experts.balance": 0, "model.experts.z_loss": 0, "model.d_embedding": 1,
    "model.stability.residual_gain": 0, "model.stability.z_loss": 0,
    "model.architecture.n_stacks": 1, "model.architecture.blocks_per_stack": 1,
    "data.seq_len": 2, "data.max_bytes": 1, "data.max_rows": 1, "objective.mask_variants": 1, "seed": 0,
    "objective.max_weight": 0, "objective.block_length": 1, "objective.n_bands": 1, "objective.consistency": 0,
    "training.progressive.last_stacks": 0, "training.progressive.anchor_every": 2,
    "training.progressive.rebuild_every": 1, "training.fusion.unfreeze_phases": 1,
    "training.fusion.opening_stages": 1,
    "training.fusion.trunk_learning_rate_scale": 0, "training.fusion.learning_rate_scale": 0,
    "training.block_group": 1, "training.batch_size": 1, "training.accumulation_steps": 1,
    "training.embedding_learning_rate_scale": 0, "training.loss_chunk_tokens": 1, "training.unroll_blocks": 1,
    "training.adapters.rank": 1, "training.adapters.alpha": 0, "training.adapters.learning_rate_scale": 0,
    "optimizer.learning_rate": 0, "optimizer.muon_learning_rate": 0, "optimizer.head_learning_rate_scale": 0,
    "optimizer.epsilon": 0, "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "cache.chunk_bytes": 1, "cache.window_gib": 0, "cache.window_visits": 1,
    "checkpoint.host_gib": 0, "checkpoint.every_minutes": 0, "checkpoint.every_steps": 1,
    "checkpoint.keep": 1, "evaluation.rows": 1, "evaluation.every_steps": 1, "generation.samples": 0,
    "generation.tokens": 1, "generation.temperature": 0, "generation.top_k": 0, "generation.steps": 1,
    "generation.block_length": 1, "logging.every_steps": 1,
    "logging.peak_flops": 1, "mesh.data": 1, "mesh.fsdp": 1, "mesh.processes": 1, "mesh.process_id": 0,
}  # fmt: skip
_FRACTIONS = (
    "model.dropout", "data.validation_fraction", "objective.rate_min", "objective.rate_max",
    "objective.prefix_share", "objective.level_min", "objective.level_max", "optimizer.beta1",
    "optimizer.beta2", "optimizer.warmup_fraction", "optimizer.decay_fraction", "optimizer.final_fraction",
    "training.progressive.learning_rate_decay", "generation.top_p", "generation.remask", "generation.threshold",
    "training.fusion.opening",
)  # fmt: skip


def check_ranges(config: RunConfig) -> None:
    """Every number lies in its range."""

    def value_of(field: str) -> Any:
        value: Any = config
        for part in field.split("."):
            value = getattr(value, part)
        return value

    for field, least in _AT_LEAST.items():
        value = value_of(field)
        require(value is None or value >= least, f"{field}={value} must be at least {least:g}")
    for field in _FRACTIONS:
        value = value_of(field)
        require(value is None or 0.0 <= value <= 1.0, f"{field}={value} must lie between 0 and 1")
    limit = config.model.stability.spectral_norm
    require(limit is None or limit > 0.0, f"model.stability.spectral_norm={limit} must be above 0, or None for none")
    require(config.seed < 2**32, f"seed={config.seed} must be below 2**32")
    for field in (
        "model.dropout",
        "optimizer.beta1",
        "optimizer.beta2",
        "data.validation_fraction",
        "generation.remask",
    ):
        require(value_of(field) < 1.0, f"{field}={value_of(field)} must be below 1")
