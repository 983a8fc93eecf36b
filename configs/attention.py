"""Every kind of attention, small enough for a CPU: about a minute each, on the standard library's own text.

Claim: latents and kernels train, are cached, frozen and sampled as plain attention is. No ranking: one seed, a small
model.
Hardware: two cores. Command: `python -m stackwise_jax.main --config=configs/attention.py:mla`, or another name of
`KINDS`; `python -m stackwise_jax.main --config=configs/attention.py:linear_time --plan` says what it will do.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.errors import UserError, did_you_mean

MLGKA = {"model.attention_kind": "mlgka", "model.n_kv_heads": 2, "model.latent.kv_rank": 48}
LINEAR_TIME = {"model.attention_kind": "kernel", "model.kernel.form": "linear", "model.kernel.family": "linear"}
LINEAR_TIME |= {"model.kernel.scale": 4.0}

KINDS: dict[str, dict[str, Any]] = {
    "mha": {},
    "mla": {"model.attention_kind": "mla", "model.latent.kv_rank": 48, "model.latent.query_rank": 48},
    "low_rank": {"model.attention_kind": "mla", "model.latent.form": "separate", "model.latent.kv_rank": 24},
    "gaussian": {"model.attention_kind": "kernel"},
    "laplacian": {"model.attention_kind": "kernel", "model.kernel.family": "laplacian"},
    "uniform": {"model.attention_kind": "kernel", "model.kernel.family": "uniform"},
    "mlgka": MLGKA,
    "linear_time": LINEAR_TIME,
    "gaussian_linear_time": {"model.attention_kind": "kernel", "model.kernel.form": "linear"},
    "mlgka_linear_time": {**MLGKA, "model.kernel.form": "linear"},
}


def get_config(kind: str = "mla") -> Any:
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} must be one of: {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    config = base.default()
    config.name = f"attention_{kind}"
    config.model.vocab_size = 1024
    config.model.d_model = 96
    config.model.n_heads = 4
    config.model.d_ff = 256
    config.model.architecture.n_stacks = 3
    config.data.max_bytes = 2_000_000
    config.data.max_rows = 2048
    config.data.seq_len = 128
    config.training.mode = "layerwise"
    config.training.batch_size = 16
    config.training.embedding_budget = "100 steps"
    config.training.phase_budget = "100 steps"
    config.optimizer.learning_rate = 3e-3
    config.evaluation.rows = 64
    config.generation.samples = 2
    config.generation.tokens = 48
    config.update_from_flattened_dict(KINDS[kind])
    return config
