"""GPT-2 small (124M parameters) on your text, grown in four stacks of three blocks, or block by block, or end to end.

Claim: three modes on equal text, so that the price of growing in stacks is a number: compare their held-out losses.
Hardware: one GPU of 24 GB or more. Rough hours: 1 on an H200, 2 to 6 on a 24 GB card (the plan's FLOPs at 250 and 40
TFLOP/s, not measured).
Command: `python -m stackwise_jax.main --config=configs/gpt2_small.py --config.data.source='text/*.jsonl'`; another mode
is the config's argument, `--config=configs/gpt2_small.py:layerwise` or `--config=configs/gpt2_small.py:end_to_end`.
"""

from typing import Any

from stackwise_jax import config as base
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.models import families

# Tokens a phase: about a billion over the run in every mode. Growing modes give 10 percent to the embedding.
PHASE_BUDGETS = {"layerwise": "75M tokens", "stackwise": "225M tokens", "end_to_end": "1B tokens"}


def get_config(mode: str = "stackwise") -> Any:
    if mode not in PHASE_BUDGETS:
        names = ", ".join(PHASE_BUDGETS)
        raise UserError(f"mode={mode!r} must be one of: {names}.{did_you_mean(mode, PHASE_BUDGETS)}")
    config = base.default()
    config.name = f"gpt2_small_{mode}"
    config.model.update(families.gpt2("small"))
    config.model.architecture.n_stacks = 4
    config.model.architecture.blocks_per_stack = 3
    config.data.seq_len = 1024
    config.data.max_rows = 200_000
    config.training.mode = mode
    config.training.batch_size = 128
    config.training.accumulation_steps = 16
    config.training.embedding_budget = "100M tokens"
    config.training.phase_budget = PHASE_BUDGETS[mode]
    # The trunk's output for 200 000 rows takes 586 GiB in float32, more than any card: it is recomputed.
    config.training.progressive.cache_activations = False
    config.optimizer.learning_rate = 6e-4
    config.precision.compute = "bf16"
    config.evaluation.rows = 256
    config.generation.samples = 3
    return config
