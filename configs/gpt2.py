"""GPT-2 as published, in every size, a block at a time; `gpt2_small.py` compares ways of training the small one.

Claim: one recipe grows every size over a cached, frozen trunk, its held-out loss falling with every block. A trial of
the shapes: no size is trained to convergence.
Sizes: nano (2.5M parameters), small (124.4M), medium (354.8M), large (774.0M), xl (1.56B).
Hardware: one GPU of 48 GB or more; a smaller CACHE_BYTES fits a smaller card.
Rough hours: 0.2 for small, 0.4 for medium, 0.8 for large, 1.5 for xl on an H200 (the plan's FLOPs at 250 TFLOP/s, not
measured).
Command: `python -m stackwise_jax.main --config=configs/gpt2.py:small --config.data.source='text/*.jsonl'`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families

CACHE_BYTES = 32 * 2**30  # of cached activations, which decides how many rows are trained on


def get_config(size: str = "small") -> Any:
    config = base.default()
    config.name = f"gpt2_{size}"
    config.model.update(families.gpt2(size))
    config.data.seq_len = 1024
    config.data.max_rows = min(2**16, CACHE_BYTES // (config.data.seq_len * 2 * config.model.d_model))
    config.training.mode = "layerwise"
    config.training.batch_size = 128
    config.training.accumulation_steps = 8
    config.training.embedding_budget = "50M tokens"
    config.training.phase_budget = "50M tokens"
    config.optimizer.learning_rate = 6e-4
    config.precision.compute = "bf16"
    config.precision.trunk = "bf16"
    config.precision.cache = "bf16"
    config.evaluation.rows = 256
    config.generation.samples = 3
    return config
