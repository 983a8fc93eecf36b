"""Every way of training, small enough for a CPU: about a minute each, on the standard library's own text.

Claim: each curriculum, direction and time mode trains, continues exactly, and samples. Hardware: two cores.
Command: `python -m stackwise_jax.main --config=configs/small.py:right_to_left`, or another name of `MODES`;
`python -m stackwise_jax.main --config=configs/small.py:depth_independent --plan` says what it will do.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.errors import UserError, did_you_mean

MASKED = {"model.attention": "bidirectional", "objective.name": "diffusion"}
DEPTH = {**MASKED, "objective.time": "depth", "objective.n_bands": 2, "model.architecture.n_stacks": 4}
PROGRESSIVE = {"training.mode": "progressive"}
ALL_LIVE = {**PROGRESSIVE, "training.progressive.trunk_strategy": "full", "training.phase_budget": "400 steps"}
ALL_LIVE |= {"model.architecture.n_stacks": 4}

MODES: dict[str, dict[str, Any]] = {
    "layerwise": {},
    "end_to_end": {"training.mode": "end_to_end", "training.phase_budget": "300 steps"},
    "masked": {"objective.name": "mlm", "objective.rate_max": 0.5, "model.attention": "bidirectional"},
    "right_to_left": {"training.progressive.direction": "right_to_left", "precision.trunk": "nf4"},
    "progressive_adapters": {
        **PROGRESSIVE,
        "training.progressive.trunk_strategy": "qlora",
        "precision.trunk": "nf4",
        "training.adapters.ranks": "2,4,4,4",
    },
    "tail_adapters": {
        **PROGRESSIVE,
        "training.progressive.trunk_strategy": "qlora",
        "training.progressive.direction": "right_to_left",
        "training.adapters.merge": True,
        "training.execution": "chained",
    },
    "late_expansion": {**ALL_LIVE, "training.growth.sizes": "late", "training.growth.operator": "copy"},
    "doubling": {
        **ALL_LIVE,
        "training.growth.sizes": "doubling",
        "training.growth.operator": "interleave",
    },
    "doubling_adding_nothing": {
        **ALL_LIVE,
        "training.growth.sizes": "1,2,4",
        "training.growth.operator": "zero_output",
        "precision.optimizer": "int8",
    },
    "prepended_all_live": {**ALL_LIVE, "training.progressive.direction": "right_to_left"},
    "last_stack": {"training.progressive.last_stacks": 1},
    # Anchors move what local updates stand on: at a high rate the loss rises (docs/curricula.md).
    "anchors": {"training.progressive.anchor_every": 3, "optimizer.learning_rate": 1e-3},
    "anchors_and_cache": {
        "training.progressive.anchor_every": 4,
        "training.progressive.rebuild_every": 40,
        "optimizer.learning_rate": 1e-3,
    },
    "then_joint": {
        "training.fusion.budget": "80 steps",
        "training.fusion.trunk_learning_rate_scale": 0.3,
        "precision.trunk": "bf16",
    },
    "then_gradually": {
        "training.fusion.budget": "100 steps",
        "training.fusion.unfreeze_phases": 2,
        "training.head": "frozen",
    },
    "then_adapters": {"training.fusion.budget": "80 steps", "training.fusion.live": "adapters"},
    "diffusion_time_input": {
        **MASKED,
        "objective.time": "input",
        "training.mode": "end_to_end",
        "training.phase_budget": "300 steps",
    },
    "diffusion_in_stacks": {**MASKED, "objective.noise_schedule": "cosine", "objective.mask_variants": 2},
    "depth_independent": {
        **DEPTH,
        "training.progressive.direction": "independent",
        "training.embedding_phase": "with_first_stack",
    },
    "depth_right_to_left": {
        **DEPTH,
        "objective.time": "depth_input",
        "objective.consistency": 0.1,
        "training.progressive.direction": "right_to_left",
    },
    "depth_left_to_right": DEPTH,
    "depth_levels": {
        **DEPTH,
        "objective.levels": "linear",
        "training.progressive.direction": "right_to_left",
    },
    "three_readings": {
        "objective.name": "mixed",
        "objective.mixture": "clm@0.5; mlm@0.25; diffusion@0.25",
        "objective.shift": True,
        "training.mode": "end_to_end",
        "training.phase_budget": "300 steps",
    },
    "experts": {
        "model.experts.count": 8,
        "model.experts.shared": 1,
        "model.experts.d_ff": 64,
        "precision.trunk": "nf4",
    },
    "prefix": {"objective.name": "prefix", "training.mode": "end_to_end", "training.phase_budget": "300 steps"},
    "block_diffusion": {
        "objective.name": "block_diffusion",
        "objective.block_length": 8,
        "training.mode": "stackwise",
    },
}


def get_config(mode: str = "layerwise") -> Any:
    if mode not in MODES:
        raise UserError(f"mode={mode!r} must be one of: {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
    config = base.default()
    config.name = f"small_{mode}"
    config.model.update({"vocab_size": 1024, "d_model": 96, "n_heads": 4, "d_ff": 256})
    config.model.architecture.n_stacks = 4
    config.data.update({"max_bytes": 6_000_000, "max_rows": 4096, "seq_len": 128})
    config.training.update({"mode": "layerwise", "batch_size": 16})
    config.training.update({"embedding_budget": "100 steps", "phase_budget": "80 steps"})
    config.optimizer.learning_rate = 3e-3
    config.objective.mask_variants = 2
    config.evaluation.rows = 64
    config.generation.update({"samples": 2, "tokens": 48})
    config.update_from_flattened_dict(MODES[mode])
    return config
