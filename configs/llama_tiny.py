"""A LLaMA of 4.7M parameters on the Python standard library's own text, for a laptop's CPU or a free Colab machine.

Claim: the LLaMA family (RMSNorm, SwiGLU, rotary positions, grouped queries) grows block by block like any other, and
its held-out loss falls with every block.
Hardware: any CPU with two cores, or any GPU or TPU. Rough hours: 0.1 on two cores (by arithmetic, not measured).
Command: `python -m stackwise_jax.main --config=configs/llama_tiny.py`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families


def get_config() -> Any:
    config = base.default()
    config.name = "llama_tiny"
    config.model.update(families.llama("tiny"))
    config.model.vocab_size = 2048  # what six megabytes of text can teach
    config.model.n_kv_heads = 2
    config.model.architecture.n_stacks = 4
    config.data.max_bytes = 6_000_000
    config.data.seq_len = 128
    config.training.mode = "layerwise"
    config.training.batch_size = 16
    config.training.embedding_budget = "200 steps"
    config.training.phase_budget = "300 steps"
    config.optimizer.learning_rate = 2e-3
    config.evaluation.rows = 128
    config.evaluation.ngrams = True
    config.generation.samples = 3
    return config
