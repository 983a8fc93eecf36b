"""BERT as published, in every size, as a masked language model at the classic 15 percent, a block at a time.

Claim: one recipe grows every size over a cached, frozen trunk, its held-out masked cross-entropy falling with every
block. Without the next-sentence task; it is a trial of the shapes, and no size is trained to convergence.
Sizes: tiny (4.4M parameters), mini (11.2M), small (28.8M), medium (41.4M), base (109.5M), large (335.2M).
Hardware: one GPU of 48 GB or more; a smaller CACHE_BYTES fits a smaller card.
Rough hours: 0.1 for base, 0.3 for large, minutes below them, on an H200 (the plan's FLOPs at 250 TFLOP/s, not
measured).
Command: `python -m stackwise_jax.main --config=configs/bert.py:base --config.data.source='text/*.jsonl'`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families

CACHE_BYTES = 32 * 2**30  # of cached activations, which decides how many rows are trained on


def get_config(size: str = "base") -> Any:
    config = base.default()
    config.name = f"bert_{size}"
    config.model.update(families.bert(size))
    config.model.dropout = 0.0  # a frozen trunk has none, and no row is seen often enough to need it
    config.objective.name = "mlm"
    config.objective.mask_variants = 2
    config.data.seq_len = 512
    config.data.max_rows = min(2**17, CACHE_BYTES // (2 * config.data.seq_len * 2 * config.model.d_model))
    config.training.mode = "layerwise"
    config.training.batch_size = 256
    config.training.accumulation_steps = 8
    config.training.embedding_budget = "50M tokens"
    config.training.phase_budget = "50M tokens"
    config.optimizer.learning_rate = 5e-4
    config.precision.compute = "bf16"
    config.precision.cache = "bf16"
    config.evaluation.rows = 512
    return config
