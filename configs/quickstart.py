"""A small causal model on the Python standard library's own text, grown one block at a time, in about three minutes.

Claim: cached layer-wise training lowers held-out loss with every block and ends clearly below an add-k bigram model.
Hardware: any CPU with two cores. Command: `launch/quickstart.sh`, or
`python -m stackwise_jax.main --config=configs/quickstart.py`.
"""

from typing import Any

from stackwise_jax import config as base


def get_config() -> Any:
    config = base.default()
    config.name = "quickstart"
    config.model.vocab_size = 1024
    config.model.d_model = 128
    config.model.n_heads = 4
    config.model.d_ff = 384
    config.model.architecture.n_stacks = 4
    config.data.max_bytes = 6_000_000
    config.data.max_rows = 8192
    config.data.seq_len = 128
    config.training.mode = "layerwise"
    config.training.batch_size = 16
    config.training.embedding_budget = "150 steps"
    config.training.phase_budget = "200 steps"
    config.optimizer.learning_rate = 3e-3
    config.evaluation.rows = 128
    config.evaluation.ngrams = True
    config.evaluation.one_block_control = True
    config.generation.samples = 3
    config.generation.tokens = 96
    return config
