"""Where a run stands, and what a finished one is."""

import dataclasses
from pathlib import Path

from stackwise_jax.train.plan import Plan
from stackwise_jax.types import Params


@dataclasses.dataclass
class Position:
    """Where a run stands: everything that is not an array."""

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    done_flops: float = 0.0
    held_out: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: its plan and rack, the held-out figures after every phase, and the folders of tapped heads."""

    plan: Plan
    rack: Params
    held_out: dict[str, dict[str, float]]
    taps: dict[int, Path]


def no_references() -> dict[str, dict[str, str]]:
    """Folders of frozen parts, by kind and name: none yet."""
    return {"embedding": {}, "stacks": {}, "head": {}, "adapters": {}, "shelves": {}, "taps": {}}
