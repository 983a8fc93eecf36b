"""The 70B shape (68.98B parameters, 80 blocks of width 8192) trained from scratch on one H200, a block at a time.

Claim: it fits, learns and runs near the card's limit; one block of 856M parameters is live at a time, over a cached
trunk. It is not a compute-optimal 70B model: that takes decades on one card.
Hardware: one H200 (141 GB). Rough hours: 5, by the plan's FLOPs at 600 TFLOP/s.
It plans and shape-checks, and has not been trained. To train it to the end the host must hold the frozen blocks,
129.5 GiB in bfloat16 (34.8 GiB with `--config.precision.trunk=nf4`): the plan says so.
Command: `python -m stackwise_jax.main --config=configs/llama_70b.py --config.data.source='text/*.jsonl' --plan`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families


def get_config() -> Any:
    config = base.default()
    config.name = "llama_70b"
    config.model.update(families.llama("70b"))
    config.data.seq_len = 4096
    config.data.max_rows = 1024  # 64 GiB of cached activations
    config.training.mode = "layerwise"
    config.training.embedding_phase = "alone"
    config.training.head = "frozen"
    config.training.batch_size = 8
    config.training.accumulation_steps = 2
    config.training.remat = "dots"
    config.training.embedding_budget = "20M tokens"
    config.training.phase_budget = "20M tokens"
    config.training.progressive.cache_activations = True
    config.optimizer.learning_rate = 3e-4
    config.precision.compute = "bf16"
    config.precision.trunk = "bf16"
    config.precision.cache = "bf16"
    config.checkpoint.keep = 1
    config.evaluation.rows = 64
    return config
