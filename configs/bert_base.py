"""BERT base (109M parameters) as a masked language model at the classic 15 percent, in four stacks of three blocks.

Claim: an encoder grows over a cached, frozen trunk as a decoder does, its held-out masked cross-entropy falling with
every stack. It is BERT without next-sentence prediction, so its scores are not BERT's.
Hardware: one GPU of 80 GB or more (the cache takes 48 GiB). Rough hours: 0.2 on an H200 (the plan's FLOPs at 250
TFLOP/s, not measured).
Command: `python -m stackwise_jax.main --config=configs/bert_base.py --config.data.source='text/*.jsonl'`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families


def get_config() -> Any:
    config = base.default()
    config.name = "bert_base"
    config.model.update(families.bert("base"))
    config.model.architecture.n_stacks = 4
    config.model.architecture.blocks_per_stack = 3
    config.model.dropout = 0.0  # a frozen trunk has none, and no row is seen often enough to need it
    config.objective.name = "mlm"
    config.objective.rate_min = 0.15
    config.objective.rate_max = 0.15
    config.objective.mask_variants = 2
    config.data.seq_len = 512
    config.data.max_rows = 32_768
    config.training.mode = "stackwise"
    config.training.batch_size = 256
    config.training.accumulation_steps = 8
    config.training.embedding_budget = "50M tokens"
    config.training.phase_budget = "150M tokens"
    config.optimizer.learning_rate = 5e-4
    config.precision.compute = "bf16"
    config.precision.cache = "bf16"
    config.evaluation.rows = 512
    return config
