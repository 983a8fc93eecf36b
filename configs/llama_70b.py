"""The 70B shape (68.98B parameters, 80 blocks of width 8192) trained from scratch on one H200, a block at a time.

Claim: it fits, learns and runs near the card's limit; one block of 856M parameters is live at a time, over a cached
trunk, and the finished ones rest as nvfp4, 38.5 GB for all 80. It is not a compute-optimal 70B model: that takes
decades on one card (docs/memory.md has the arithmetic).
Result: all 80 stacks in nine and a half minutes on an H100, 18.4 GiB at the peak (docs/results/2026-11-27-70b.md).
Hardware: one H200 (141 GB), 128 GiB of host memory, 64 GB of disk; the card's part is below 22 GiB, so a card of 24 GB
takes it with data.max_rows by its host. Rough hours: 4, by the plan's FLOPs at 900 TFLOP/s.
Sizes: `70b`, `13b`, `7b`; `tiny` is the same run with small numbers, for a try on a CPU.
Command: `python -m stackwise_jax.main --config=configs/llama_70b.py --config.data.source='text/*.jsonl' --plan`; all
80 stacks in about eight minutes, on 1.5M tokens: without --plan and with `--config.data.max_rows=368
--config.training.phase_budget='29 steps' --config.training.embedding_budget='120 steps'`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.models import families


def get_config(size: str = "70b") -> Any:
    config = base.default()
    config.name = f"llama_{size}"
    config.model.update(families.llama(size))
    config.data.seq_len = 4096
    config.data.isolate_documents = False  # the fast causal kernels; a row is one document to them
    config.data.max_rows = 2560  # 10.5M tokens, 80 GiB of cached activations in fp8
    config.training.mode = "layerwise"
    config.training.embedding_phase = "alone"
    config.training.head = "frozen"
    config.training.batch_size = 4
    config.training.loss_fraction = 0.25  # so that the head stays below a tenth of the step
    config.training.loss_chunk_tokens = 4096
    config.training.embedding_budget = "20M tokens"
    config.training.embedding_learning_rate_scale = 10.0
    config.training.phase_budget = "20M tokens"
    config.training.progressive.new_stack = "silent"
    config.training.progressive.learning_rate_decay = 0.96  # late stacks have less left to learn than to memorise
    config.training.progressive.new_stack_precision = "fp8"
    config.training.progressive.cache_activations = True
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_fraction = 0.2  # a silent stack's first updates all point one way
    config.precision.compute = "bf16"
    config.precision.trunk = "nvfp4"
    config.precision.trunk_compute = "fp8"
    config.precision.cache = "fp8"
    config.cache.tier = "host"
    config.checkpoint.keep = 1
    config.checkpoint.host_gib = 2.0
    config.evaluation.rows = 8
    if size == "tiny":
        _shrink(config)
    return config


def _shrink(config: Any) -> None:
    """Small enough for a minute on a CPU."""
    config.model.vocab_size = 2048
    config.data.seq_len = 128
    config.data.max_rows = 1024
    config.training.batch_size = 16
    config.training.embedding_budget = "200 steps"
    config.training.phase_budget = "60 steps"
    config.optimizer.learning_rate = 2e-3
    config.evaluation.rows = 64
