"""Every way of training one 12-block rack at the same FLOPs, beside smaller models trained end to end.

Claim: what each curriculum costs in held-out loss and saves in memory (docs/results/, the newest page of curricula).
Rows: `end_to_end`; the controls `control_1`, `control_3`, `control_6`, so many blocks end to end; `layerwise`,
`stackwise_4x3`, `stackwise_2x6`, each also with `_frozen_head`, `_joint` (then all stacks together), `_last` (the last
stack live in every phase), `_anchor` (every fourth update end to end), `_front` (most updates for the first stack, with
embedding and head), `_silent_front` (so, and every new stack begins by adding nothing);
`late_1` and `late_3`, racks of so many blocks that are expanded to twelve once; `doubling`; `diffusion_12`,
`diffusion_6`, `diffusion_3`, masked diffusion end to end; `depth_independent`, `depth_right_to_left`,
`depth_left_to_right`, four bands of three blocks. `ROW@2e-3` is a row at another rate, `ROW#1` of another seed.
Hardware: one GPU of 80 GB or more (the cache takes 36 GiB; less with data.max_rows). Hours: 0.02 a row on an H200
(640,000 tokens/s end to end).
Command: `python -m stackwise_jax.main --config=configs/comparison.py:layerwise --config.data.source='text/*.jsonl'`;
all of them, with a table: `python -m stackwise_jax.bench compare --set=data.source='text/*.jsonl'`.
"""

import dataclasses
import re
from typing import Any

from stackwise_jax import config as base
from stackwise_jax.errors import UserError, did_you_mean

TOKENS = 25_000_000  # that the row end_to_end sees; every other row takes as many FLOPs, its cache passes included
EMBEDDING_SHARE = 0.06  # of the FLOPs of a growing row: phase 0
FUSION_SHARE = 0.3  # of the FLOPs of a `_joint` row: all stacks together
DIFFUSION = {"objective.name": "diffusion", "model.attention": "bidirectional"}
DEPTH = {
    **DIFFUSION, "objective.time": "depth", "objective.n_bands": 4, "training.embedding_phase": "with_first_stack"
}  # fmt: skip
ALL_LIVE = {"training.progressive.trunk_strategy": "full", "training.growth.operator": "copy"}


@dataclasses.dataclass(frozen=True)
class Row:
    """How a row is trained."""

    mode: str
    stacks: int
    blocks_per_stack: int
    learning_rate: float
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


GROWN = {
    "layerwise": Row("layerwise", 12, 1, 1e-3),
    "stackwise_4x3": Row("stackwise", 4, 3, 7e-4),
    "stackwise_2x6": Row("stackwise", 2, 6, 5e-4),
}
WITH_FIRST = {"training.embedding_phase": "with_first_stack", "training.progressive.cache_activations": False}
# What may be added to a growing row.
REMEDIES: dict[str, dict[str, Any]] = {
    "_frozen_head": {"training.head": "frozen"},
    "_joint": {"training.fusion.budget": "1 steps", "training.fusion.learning_rate_scale": 0.5},
    "_last": {"training.progressive.last_stacks": 1},
    "_anchor": {"training.progressive.anchor_every": 4},
    "_front": WITH_FIRST,
    "_silent_front": {**WITH_FIRST, "training.progressive.new_stack": "silent"},
}
FRONT = 0.75  # of the updates, for the first stack with embedding and head; too few are left for a cache to pay
ROWS = {
    "end_to_end": Row("end_to_end", 1, 12, 4e-4),
    "control_1": Row("end_to_end", 1, 1, 1e-3),
    "control_3": Row("end_to_end", 1, 3, 7e-4),
    "control_6": Row("end_to_end", 1, 6, 5e-4),
    **GROWN,
    "late_1": Row("progressive", 12, 1, 7e-4, {**ALL_LIVE, "training.growth.sizes": "late"}),
    "late_3": Row("progressive", 4, 3, 6e-4, {**ALL_LIVE, "training.growth.sizes": "late"}),
    "doubling": Row("progressive", 12, 1, 6e-4, {**ALL_LIVE, "training.growth.sizes": "doubling"}),
    "diffusion_12": Row("end_to_end", 1, 12, 6e-4, DIFFUSION),
    "diffusion_6": Row("end_to_end", 1, 6, 8e-4, DIFFUSION),
    "diffusion_3": Row("end_to_end", 1, 3, 1e-3, DIFFUSION),
    "depth_independent": Row("stackwise", 4, 3, 1e-3, {**DEPTH, "training.progressive.direction": "independent"}),
    "depth_right_to_left": Row("stackwise", 4, 3, 1e-3, {**DEPTH, "training.progressive.direction": "right_to_left"}),
    "depth_left_to_right": Row(
        "stackwise", 4, 3, 1e-3, {**DEPTH, "training.progressive.cache_activations": False}
    ),
}  # fmt: skip
NAMES = (*ROWS, *(name + remedy for name in GROWN for remedy in REMEDIES))


def get_config(row: str = "end_to_end") -> Any:
    from stackwise_jax.bench.equal_flops import share_out, training_flops

    entries = _entries(row)
    reference = _entries("end_to_end")
    reference.training.phase_budget = f"{TOKENS} tokens"
    flops = training_flops(base.resolve(reference))
    config = share_out(base.resolve(entries), flops, EMBEDDING_SHARE, fusion_share=FUSION_SHARE)
    entries.training.embedding_budget = config.training.embedding_budget
    entries.training.phase_budget = config.training.phase_budget
    entries.training.fusion.budget = config.training.fusion.budget
    return entries


def _entries(name: str) -> Any:
    """A row without its budgets."""
    plain, rate, seed = re.fullmatch(r"([^@#]*)(?:@([^#]*))?(?:#(.*))?", name).groups()  # pyright: ignore
    if plain not in NAMES:
        raise UserError(f"row={plain!r} must be one of: {', '.join(NAMES)}.{did_you_mean(plain, NAMES)}")
    root = plain if plain in ROWS else max((grown for grown in GROWN if plain.startswith(grown)), key=len)
    row, remedy = ROWS[root], plain.removeprefix(root)
    entries = base.default()
    entries.name = f"comparison_{plain}"
    entries.model.update({"vocab_size": 16384, "d_model": 768, "n_heads": 12, "d_ff": 2048})
    entries.model.architecture.update({"n_stacks": row.stacks, "blocks_per_stack": row.blocks_per_stack})
    entries.data.update({"seq_len": 512, "max_rows": 48_832, "isolate_documents": False})  # the fast causal kernels
    entries.training.update({"mode": row.mode, "batch_size": 32})
    entries.training.loss_chunk_tokens = 4096
    entries.optimizer.learning_rate = _number(name, float, rate, row.learning_rate)
    entries.seed = _number(name, int, seed, 0)
    entries.precision.update({"compute": "bf16", "trunk": "bf16", "cache": "bf16"})
    entries.checkpoint.keep = 1
    entries.evaluation.rows = 512
    entries.update_from_flattened_dict({**row.overrides, **REMEDIES.get(remedy, {})})
    if remedy.endswith("_front"):
        others = (1.0 - FRONT) / (row.stacks - 1)
        entries.training.progressive.shares = ",".join([str(FRONT), *[f"{others:.6g}"] * (row.stacks - 1)])
    return entries


def _number(name: str, kind: Any, text: str | None, default: Any) -> Any:
    try:
        return kind(text) if text else default
    except ValueError:
        raise UserError(f"row={name} must read ROW@RATE or ROW#SEED with numbers, for example ROW@1e-3#1") from None
