"""Configs that differ in their curriculum: a rack of a few stacks with the fields of a mode."""

from typing import Any

from stackwise_jax.config import resolve
from stackwise_jax.schema import RunConfig

QLORA = {"training.mode": "progressive", "training.progressive.trunk_strategy": "qlora"}
RIGHT_TO_LEFT = {"training.progressive.direction": "right_to_left"}
FULL = {"training.mode": "progressive", "training.progressive.trunk_strategy": "full"}
DIFFUSION = {"objective.name": "diffusion", "model.attention": "bidirectional"}
ASSEMBLED = {"training.mode": "fusion", "training.fusion.sources": "runs/a"}
JOINT = {"training.fusion.budget": "7 steps"}


def config_of(fields: dict[str, Any], n_stacks: int = 4) -> RunConfig:
    entries: dict[str, Any] = {}
    budgets = {"training.phase_budget": "9 steps", "training.embedding_budget": "4 steps"}
    size = {"model.architecture.n_stacks": n_stacks, "model.vocab_size": 320}
    for name, value in {"training.mode": "layerwise", **budgets, **size, **fields}.items():
        *sections, field = name.split(".")
        section = entries
        for part in sections:
            section = section.setdefault(part, {})
        section[field] = value
    return resolve(entries)
