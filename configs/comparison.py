"""Every way of training one 12-block LLaMA at the same FLOPs, beside smaller models trained end to end.

Claim: what growing in stacks costs in held-out loss and saves in memory. On 25M tokens three blocks end to end are best
(3.833 nats a token), twelve end to end 4.045, two stacks of six 4.112, twelve of one 4.427
(docs/results/2026-11-24-equal-flops.md).
Rows: `end_to_end`; `layerwise`, `stackwise_4x3`, `stackwise_2x6`, each also as `..._frozen_head`; the controls
`control_1`, `control_3`, `control_6`, so many blocks end to end. `ROW@2e-3` is a row at another learning rate.
Hardware: one GPU of 80 GB or more (the cache takes 36 GiB; less with data.max_rows). Hours: 0.02 a row on an H200
(640,000 tokens/s end to end).
Command: `python -m stackwise_jax.main --config=configs/comparison.py:layerwise --config.data.source='text/*.jsonl'`;
all of them, with a table: `python -m stackwise_jax.bench compare --set=data.source='text/*.jsonl'`.
"""

import dataclasses
from typing import Any

from stackwise_jax import config as base
from stackwise_jax.errors import UserError, did_you_mean

TOKENS = 25_000_000  # that the row end_to_end sees; every other row takes as many FLOPs, its cache passes included
EMBEDDING_SHARE = 0.06  # of the FLOPs of a growing row: phase 0
FROZEN_HEAD = "_frozen_head"


@dataclasses.dataclass(frozen=True)
class Row:
    """How a row is trained."""

    mode: str
    stacks: int
    blocks_per_stack: int
    learning_rate: float


ROWS = {
    "end_to_end": Row("end_to_end", 1, 12, 4e-4),
    "layerwise": Row("layerwise", 12, 1, 1e-3),
    "stackwise_4x3": Row("stackwise", 4, 3, 7e-4),
    "stackwise_2x6": Row("stackwise", 2, 6, 5e-4),
    "control_1": Row("end_to_end", 1, 1, 1e-3),
    "control_3": Row("end_to_end", 1, 3, 7e-4),
    "control_6": Row("end_to_end", 1, 6, 5e-4),
}
NAMES = (*ROWS, *(name + FROZEN_HEAD for name, row in ROWS.items() if row.mode != "end_to_end"))


def get_config(row: str = "end_to_end") -> Any:
    from stackwise_jax.bench.equal_flops import share_out, training_flops

    entries = _entries(row)
    reference = _entries("end_to_end")
    reference.training.phase_budget = f"{TOKENS} tokens"
    config = share_out(base.resolve(entries), training_flops(base.resolve(reference)), EMBEDDING_SHARE)
    entries.training.embedding_budget = config.training.embedding_budget
    entries.training.phase_budget = config.training.phase_budget
    return entries


def _entries(name: str) -> Any:
    """A row without its budgets."""
    name, _, rate = name.partition("@")
    if name not in NAMES:
        raise UserError(f"row={name!r} must be one of: {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")
    row = ROWS[name.removesuffix(FROZEN_HEAD)]
    entries = base.default()
    entries.name = f"comparison_{name}"
    entries.model.update({"vocab_size": 16384, "d_model": 768, "n_heads": 12, "d_ff": 2048})
    entries.model.architecture.update({"n_stacks": row.stacks, "blocks_per_stack": row.blocks_per_stack})
    entries.data.update({"seq_len": 512, "max_rows": 48_832, "isolate_documents": False})  # the fast causal kernels
    entries.training.update({"mode": row.mode, "batch_size": 32})
    entries.training.head = "frozen" if name.endswith(FROZEN_HEAD) else "live"
    entries.training.loss_chunk_tokens = 4096
    try:
        entries.optimizer.learning_rate = float(rate) if rate else row.learning_rate
    except ValueError:
        raise UserError(f"row={name}@{rate} must read ROW@RATE, for example {name}@1e-3") from None
    entries.precision.update({"compute": "bf16", "trunk": "bf16", "cache": "bf16"})
    entries.checkpoint.keep = 1
    entries.evaluation.rows = 512
    return entries
