"""LLaMA 2, 3, 3.1 and 3.2 as published, in every size, a block at a time.

Claim: one recipe takes every size from a laptop's to 70B through the same program: one block live, over a cached trunk.
A trial of the shapes: no size is trained to convergence. `llama_70b.py` is the 70B shape with longer rows.
Sizes: tiny (24.4M parameters), small (134.1M), 1b (1.24B), 3b (3.21B), 7b (6.74B), 8b and 8b-3.1 (8.03B), 13b (13.02B),
70b (68.98B), 70b-3.1 (70.55B).
Hardware: one GPU of 48 GB or more, of 80 GB for 70b, whose frozen blocks take 130 GiB of host memory besides.
Rough hours: 0.4 for 1b, 1 to 2 for 3b to 13b, 7 for 70b, 11 for 70b-3.1 on an H200 (the plan's FLOPs at 400 TFLOP/s,
not measured).
Command: `python -m stackwise_jax.main --config=configs/llama.py:1b --config.data.source='text/*.jsonl'`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families

CACHE_BYTES = 32 * 2**30  # of cached activations, which decides how many rows are trained on


def get_config(size: str = "1b") -> Any:
    config = base.default()
    config.name = f"llama_{size}"
    config.model.update(families.llama(size))
    config.data.seq_len = 2048
    config.data.max_rows = min(2**15, CACHE_BYTES // (config.data.seq_len * 2 * config.model.d_model))
    config.training.mode = "layerwise"
    config.training.batch_size = 64
    config.training.accumulation_steps = 16
    config.training.remat = "dots"
    config.training.embedding_budget = "20M tokens"
    config.training.phase_budget = "20M tokens"
    config.training.head = "live" if config.model.d_model < 4096 else "frozen"
    config.optimizer.learning_rate = 3e-4
    config.precision.compute = "bf16"
    config.precision.trunk = "bf16"
    config.precision.cache = "bf16"
    config.checkpoint.keep = 1
    config.evaluation.rows = 64
    config.generation.samples = 3
    return config
