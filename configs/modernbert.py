"""ModernBERT as published, in every size, as a masked language model at 30 percent, a block at a time.

Claim: blocks that attend to everything and blocks that attend inside a window grow by one executable over one cached,
frozen trunk, the held-out masked cross-entropy falling with every block. A trial of the shapes, not trained to the end.
Sizes: tiny (16.9M parameters), mini (32.1M), small (68.5M), base (149.7M), large (395.9M), xl (1.03B); tiny, mini,
small and xl are shapes of Ettin.
Hardware: one GPU of 48 GB or more; a smaller CACHE_BYTES fits a smaller card.
Rough hours: 0.3 for base, 0.5 for large, 1 for xl on an H200 (the plan's FLOPs at 250 TFLOP/s, not measured).
Command: `python -m stackwise_jax.main --config=configs/modernbert.py:base --config.data.source='text/*.jsonl'`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families

CACHE_BYTES = 32 * 2**30  # of cached activations, which decides how many rows are trained on


def get_config(size: str = "base") -> Any:
    config = base.default()
    config.name = f"modernbert_{size}"
    config.model.update(families.modernbert(size))
    config.objective.name = "mlm"
    config.objective.rate_min = 0.3
    config.objective.rate_max = 0.3
    config.objective.mask_variants = 2
    config.data.seq_len = 1024
    config.data.max_rows = min(2**16, CACHE_BYTES // (2 * config.data.seq_len * 2 * config.model.d_model))
    config.training.mode = "layerwise"
    config.training.batch_size = 128
    config.training.accumulation_steps = 8
    config.training.embedding_budget = "50M tokens"
    config.training.phase_budget = "50M tokens"
    config.optimizer.learning_rate = 8e-4
    config.precision.compute = "bf16"
    config.precision.trunk = "bf16"
    config.precision.cache = "bf16"
    config.evaluation.rows = 256
    return config
