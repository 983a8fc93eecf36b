"""Where a run stands, and what a finished one is."""

import dataclasses
from pathlib import Path

from stackwise_jax.train.plan import Plan
from stackwise_jax.train.state import Frozen
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
    """A finished run: its plan, its settled parts, held-out figures after every phase, the folders of tapped heads."""

    plan: Plan
    frozen: Frozen
    held_out: dict[str, dict[str, float]]
    taps: dict[int, Path]

    @property
    def rack(self) -> Params:
        """The whole rack on the host; stacks that lie on the disk only are read."""
        return self.frozen.rack(self.plan.config.training.adapters.alpha)


def no_references() -> dict[str, dict[str, str]]:
    """Folders of frozen parts, by kind and name: none yet."""
    return {"embedding": {}, "stacks": {}, "head": {}, "adapters": {}, "shelves": {}, "taps": {}}
