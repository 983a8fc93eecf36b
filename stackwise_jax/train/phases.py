"""A phase is data: which parts of the rack are live, frozen or adapted, on what task, for how many updates.

The loop and the step read phases and know no mode; `train/curriculum.py` builds them.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterable

import numpy as np

from stackwise_jax.checks.training import adapter_ranks
from stackwise_jax.objectives.objective import Task
from stackwise_jax.schema import RunConfig

Name = str | int
"""A part of the rack: "embedding", "head", or a stack by number."""


class Role(enum.StrEnum):
    """What training does to a part of the rack."""

    LIVE = "live"
    FROZEN = "frozen"
    ADAPTER = "adapter"  # frozen, with a live low-rank part beside it


Path = tuple[tuple[int, Role], ...]
"""(stack, role) pairs in the order that activations take; stacks of the rack may be missing."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """A path with what is asked of it. Most phases have one; the updates of a phase are divided among its branches.

    Attributes:
      embedding, head: their roles.
      band: (low, high) masked fraction that the task draws its rates from; None: the range of the config.
      opened: share of the row, from its start, that every place sees, where the task's attention is prefix and its
        objective draws none; None otherwise.
      share: of the updates of the phase.
      cached: the trunk's output comes from the activation cache.
      execution: fused or chained.
    """

    path: Path
    embedding: Role
    head: Role
    task: Task
    band: tuple[float, float] | None = None
    opened: float | None = None
    share: float = 1.0
    cached: bool = False
    execution: str = "fused"

    @property
    def trunk(self) -> tuple[int, ...]:
        """The frozen stacks before the first that is not; empty while the embedding is live."""
        if self.embedding is not Role.FROZEN:
            return ()
        return tuple(stack for stack, _ in itertools.takewhile(lambda pair: pair[1] is Role.FROZEN, self.path))

    @property
    def reads_activations(self) -> bool:
        """The step starts from what the settled embedding and the trunk put out, not from tokens."""
        return self.embedding is Role.FROZEN

    @property
    def body(self) -> Path:
        """The path after the trunk: what the train step runs."""
        return self.path[len(self.trunk) :]

    @property
    def tail(self) -> tuple[int, ...]:
        """The frozen stacks after the first live part: gradient passes through them and changes none."""
        return tuple(stack for stack, role in self.body if role is Role.FROZEN)

    def stacks_of(self, role: Role) -> tuple[int, ...]:
        """Stacks that have a role, in the order of the path."""
        return tuple(stack for stack, own in self.path if own is role)

    @property
    def live_stacks(self) -> tuple[int, ...]:
        return self.stacks_of(Role.LIVE)

    @property
    def adapter_stacks(self) -> tuple[int, ...]:
        return self.stacks_of(Role.ADAPTER)

    @property
    def live_names(self) -> tuple[Name, ...]:
        """Everything that is trained, adapters aside."""
        return (*(name for name in ("embedding", "head") if getattr(self, name) is Role.LIVE), *self.live_stacks)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One entry of a curriculum.

    Attributes:
      name: unique in the curriculum.
      branches: the paths that its updates take, in proportion to their shares; it is named after the first.
      steps: updates.
      settles: parts of which a frozen copy is made when the phase ends: "embedding", "head", and stacks by number.
      shelves: parts that a later phase, but not the next, trains on: weights and moments are laid aside for it.
      unties_head: the head gets its own copy of the tied table when the phase ends.
      grows: (new stack, the stack that it is made from) pairs, by `operator`; other new stacks are drawn.
      operator: see `models/growth.py`.
      schedule: (first update, updates) of the learning-rate schedule that the phase is a stretch of; None: its own.
      rates: learning-rate factors of parts; others have 1.
    """

    name: str
    branches: tuple[Branch, ...]
    steps: int
    settles: tuple[Name, ...] = ()
    shelves: tuple[Name, ...] = ()
    unties_head: bool = False
    grows: tuple[tuple[int, int], ...] = ()
    operator: str = "random"
    schedule: tuple[int, int] | None = None
    rates: tuple[tuple[Name, float], ...] = ()

    @property
    def main(self) -> Branch:
        """The branch that the phase is named after."""
        return self.branches[0]

    @property
    def live_stacks(self) -> tuple[int, ...]:
        """Stacks that any branch trains, from the left."""
        return _union(branch.live_stacks for branch in self.branches)

    @property
    def adapter_stacks(self) -> tuple[int, ...]:
        """Stacks whose adapter any branch trains, from the left."""
        return _union(branch.adapter_stacks for branch in self.branches)

    @property
    def live_names(self) -> tuple[Name, ...]:
        """Everything that any branch trains, adapters aside."""
        every = {name for branch in self.branches for name in branch.live_names}
        return (*(name for name in ("embedding", "head") if name in every), *self.live_stacks)

    @property
    def branch_names(self) -> tuple[str, ...]:
        """What people call its branches: by band or task; an anchor is the second of both."""
        names: list[str] = []
        for number, branch in enumerate(self.branches):
            own = branch.task.objective if branch.band is None else f"band_{number}"
            names.append(f"{own}_anchor" if own in names else own)
        return tuple(names)

    @property
    def cached(self) -> bool:
        return any(branch.cached for branch in self.branches)

    @property
    def measured(self) -> tuple[int, ...]:
        """Numbers of the branches that are evaluated: the first of each task and band.

        Not one whose cache holds a trunk that another branch has moved since.
        """
        first: dict[object, int] = {}
        for index, branch in enumerate(self.branches):
            if not (branch.cached and set(branch.trunk) & set(self.live_stacks)):
                first.setdefault((branch.task, branch.band), index)
        return tuple(first.values())

    @property
    def newest(self) -> int | None:
        """The stack that ends with this phase and up to which (or, of a tail, from which) the rack can be read.

        None where stacks are skipped on the way, or the phase ends none.
        """
        path = self.main.path
        stacks = [stack for stack, _ in path]
        if not path or stacks != list(range(stacks[0], stacks[-1] + 1)):
            return None
        appends = stacks[0] == 0 and path[-1][1] is Role.LIVE
        newest, role = path[-1] if appends else path[0]
        return newest if role is Role.LIVE and newest in self.settles else None

    def rate(self, name: Name) -> float:
        """Learning-rate factor of a part."""
        return dict(self.rates).get(name, 1.0)

    def branch_order(self) -> np.ndarray:
        """Which branch each update takes: always the one that is furthest behind its share, so that they interleave.

        Stretches of one schedule go on where the last one stopped, however short they are.
        """
        shares = np.array([branch.share for branch in self.branches])
        first = self.schedule[0] if self.schedule else 0
        done, order = np.zeros(len(shares)), np.zeros(first + self.steps, np.int64)
        if len(shares) > 1:
            for step in range(len(order)):
                # The slack keeps sums of shares from deciding by their rounding.
                order[step] = int(np.argmax(np.round(shares * (step + 1) - done, 9)))
                done[order[step]] += 1
        return order[first:]


def _union(numbers: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({number for some in numbers for number in some}))


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a compiled train step depends on besides the config; branches that share one share an executable.

    Attributes:
      body: (blocks, role) of each stack after the trunk.
      ranks: of the adapters in it, in the order of the path.
    """

    reads_activations: bool
    body: tuple[tuple[int, Role], ...]
    embedding: Role
    head: Role
    head_has_table: bool
    execution: str
    task: Task
    ranks: tuple[int, ...] = ()


def stack_sizes(config: RunConfig) -> tuple[int, ...]:
    """Blocks in each stack of the rack, as the mode groups them."""
    whole = config.model.architecture.blocks_per_stack
    size = {"layerwise": 1, "blockwise": config.training.block_group}.get(config.training.mode, whole)
    return (size,) * (config.model.n_blocks // size)


def uncachable(branch: Branch) -> str | None:
    """Says why the input of a branch's live part cannot be cached; None when it can."""
    if branch.embedding is not Role.FROZEN:
        return "its frozen prefix is empty (the embedding is live), so every update changes what a cache would hold"
    if not branch.path:
        return "its path has no stack"
    if branch.tail or (branch.body and branch.body[0][1] is Role.LIVE and branch.adapter_stacks):
        return "its settled stacks are a tail: every update of the live stack before it changes what a cache would hold"
    if branch.body and branch.body[0][1] is Role.ADAPTER:
        return "its trunk is trained through adapters, so every update changes what a cache would hold"
    return None


def signature(phase: Phase, branch: Branch, phases: tuple[Phase, ...], config: RunConfig) -> Signature:
    """The signature of a branch of a phase of a curriculum."""
    sizes = stack_sizes(config)
    untied_before = any(earlier.unties_head for earlier in phases[: phases.index(phase)])
    ranks = adapter_ranks(config.training.adapters, len(sizes)) if branch.adapter_stacks else ()
    return Signature(
        reads_activations=branch.reads_activations,
        body=tuple((sizes[stack], role) for stack, role in branch.body),
        ranks=tuple(ranks[stack] for stack in branch.adapter_stacks),
        embedding=branch.embedding,
        head=branch.head,
        head_has_table=untied_before or not config.model.ties_embedding,
        task=branch.task,
        execution=branch.execution,
    )
