"""A causal run becomes a masked-diffusion model: attention opens while its weights go on, and masks take over.

Claim: the trained causal weights are a better start than none. Hardware: two CPU cores, a minute or two.
The source is any finished causal run of the same shape, such as:

    python -m stackwise_jax.main --config=configs/small.py:layerwise --workdir=/tmp/layerwise
    python -m stackwise_jax.main --config=configs/causal_to_diffusion.py --workdir=/tmp/opened

Of a checkpoint that `convert` brought in, `fuse` takes the shapes: docs/curricula.md, "From causal to diffusion".
"""

from typing import Any

from stackwise_jax import config as base


def get_config() -> Any:
    config = base.default()
    config.name = "causal_to_diffusion"
    config.model.update({"vocab_size": 1024, "d_model": 96, "n_heads": 4, "d_ff": 256, "attention": "bidirectional"})
    config.model.architecture.n_stacks = 4
    config.data.update({"max_bytes": 6_000_000, "max_rows": 4096, "seq_len": 128})
    # A causal head predicts the next place; shifted, it goes on doing so.
    config.objective.update({"name": "diffusion", "shift": True})
    config.training.update({"mode": "fusion", "batch_size": 16})
    config.training.fusion.update({"sources": "/tmp/layerwise", "budget": "300 steps", "opening": 0.5})
    config.optimizer.learning_rate = 3e-3
    config.evaluation.rows = 64
    config.generation.update({"samples": 2, "tokens": 48})
    return config
