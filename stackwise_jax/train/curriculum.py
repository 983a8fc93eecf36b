"""A curriculum is a list of phases, and a phase is data: which parts of the rack are live, on what budget.

Every training mode is built here and nowhere else; the loop and the step only read phases.
"""

import dataclasses
import enum

from stackwise_jax.checks import budget_steps
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

# Above this many stacks in the body of a path one compiled step is no longer worth its compile time.
FUSED_STACKS = 16


class Role(enum.StrEnum):
    """What training does to a part of the rack."""

    LIVE = "live"
    FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class Phase:
    """One entry of a curriculum.

    Attributes:
      name: unique in the curriculum.
      path: (stack, role) pairs in the order that activations take; stacks of the rack may be missing.
      embedding, head: their roles.
      steps: updates.
      settles: what freezes for good when the phase ends: "embedding", "head", and stacks by number.
      unties_head: the head gets its own copy of the tied table when the phase ends.
      cached: the trunk's output comes from the activation cache.
      execution: fused or chained.
    """

    name: str
    path: tuple[tuple[int, Role], ...]
    embedding: Role
    head: Role
    steps: int
    settles: tuple[str | int, ...] = ()
    unties_head: bool = False
    cached: bool = False
    execution: str = "fused"

    @property
    def trunk(self) -> tuple[int, ...]:
        """The frozen stacks before the first live one; empty while the embedding is live."""
        if self.embedding is not Role.FROZEN:
            return ()
        frozen: list[int] = []
        for stack, role in self.path:
            if role is not Role.FROZEN:
                break
            frozen.append(stack)
        return tuple(frozen)

    @property
    def reads_activations(self) -> bool:
        """The step starts from what the settled embedding and the trunk put out, not from tokens."""
        return self.embedding is Role.FROZEN

    @property
    def body(self) -> tuple[tuple[int, Role], ...]:
        """The path after the trunk: what the train step runs."""
        return self.path[len(self.trunk) :]

    @property
    def tail(self) -> tuple[int, ...]:
        """The frozen stacks after the first live part: gradient passes through them and changes none."""
        return tuple(stack for stack, role in self.body if role is Role.FROZEN)

    @property
    def live_stacks(self) -> tuple[int, ...]:
        return tuple(stack for stack, role in self.path if role is Role.LIVE)


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a compiled train step depends on besides the config; phases that share one share an executable."""

    reads_activations: bool
    body: tuple[tuple[int, Role], ...]  # (blocks, role) of each stack after the trunk
    embedding: Role
    head: Role
    head_has_table: bool
    execution: str


def stack_sizes(config: RunConfig) -> tuple[int, ...]:
    """Blocks in each stack of the rack, as the mode groups them."""
    whole = config.model.architecture.blocks_per_stack
    size = {"layerwise": 1, "blockwise": config.training.block_group}.get(config.training.mode, whole)
    return (size,) * (config.model.n_blocks // size)


def make_curriculum(config: RunConfig) -> tuple[Phase, ...]:
    """Builds the phases of a run.

    Raises:
      UserError: the config asks for a cache that no path of the curriculum allows.
    """
    phases = (_end_to_end(config),) if config.training.mode == "end_to_end" else _growing(config)
    wanted = config.training.progressive.cache_activations
    if wanted and not any(phase.cached for phase in phases):
        reason = uncachable(phases[-1])
        raise UserError(
            f"training.progressive.cache_activations=True, but phase {phases[-1].name} cannot be cached: {reason}; "
            "set it to False or None, or choose a mode that grows a stack per phase"
        )
    return phases


def uncachable(phase: Phase) -> str | None:
    """Says why the input of a phase's live part cannot be cached; None when it can."""
    if phase.embedding is not Role.FROZEN:
        return "its frozen prefix is empty (the embedding is live), so every update changes what a cache would hold"
    if not phase.path:
        return "its path has no stack"
    if phase.tail:
        return "its frozen stacks are a tail: every update of the live stack before it changes what a cache would hold"
    return None


def signature(phase: Phase, phases: tuple[Phase, ...], config: RunConfig) -> Signature:
    """The signature of a phase of a curriculum."""
    sizes = stack_sizes(config)
    untied_before = any(earlier.unties_head for earlier in phases[: phases.index(phase)])
    return Signature(
        reads_activations=phase.reads_activations,
        body=tuple((sizes[stack], role) for stack, role in phase.body),
        embedding=phase.embedding,
        head=phase.head,
        head_has_table=untied_before or not config.model.ties_embedding,
        execution=phase.execution,
    )


def _steps(config: RunConfig, field: str) -> int:
    tokens_per_step = config.training.batch_size * config.data.seq_len
    return budget_steps(getattr(config.training, field), tokens_per_step, field=f"training.{field}")


def _execution(config: RunConfig, n_stacks: int) -> str:
    """How a body of that many stacks, live ones and those that gradient passes through, is run."""
    if config.training.execution != "auto":
        return config.training.execution
    return "fused" if n_stacks <= FUSED_STACKS else "chained"


def _end_to_end(config: RunConfig) -> Phase:
    stacks = range(len(stack_sizes(config)))
    return Phase(
        name="end_to_end",
        path=tuple((stack, Role.LIVE) for stack in stacks),
        embedding=Role.LIVE,
        head=Role.LIVE,
        steps=_steps(config, "phase_budget"),
        settles=("embedding", *stacks, "head"),
        execution=_execution(config, len(stacks)),
    )


def _growing(config: RunConfig) -> tuple[Phase, ...]:
    """Settles the embedding, then appends a stack per phase over a frozen trunk, or prepends it to a frozen tail."""
    training = config.training
    n_stacks = len(stack_sizes(config))
    appends = training.progressive.direction == "left_to_right"
    order = range(n_stacks) if appends else range(n_stacks)[::-1]
    # A tail voids every cache, so a rack that grows one keeps none, not even for its first phase.
    caches = training.progressive.cache_activations is not False and (appends or n_stacks == 1)
    alone = training.embedding_phase == "alone"
    head_freezes = training.head == "frozen"
    at_settling: tuple[str, ...] = ("embedding", "head") if head_freezes else ("embedding",)
    phases = []
    if alone:
        phases.append(
            Phase(
                name="embedding",
                path=(),
                embedding=Role.LIVE,
                head=Role.LIVE,
                steps=_steps(config, "embedding_budget"),
                settles=at_settling,
                unties_head=training.head == "copy",
                execution=_execution(config, 0),
            )
        )
    for stack in order:
        settling = not alone and stack == order[0]
        last = stack == order[-1]
        head = Role.FROZEN if head_freezes and not settling else Role.LIVE
        settled: tuple[str | int, ...] = (*(at_settling if settling else ()), stack)
        trunk, tail = (range(stack), range(0)) if appends else (range(0), range(stack + 1, n_stacks))
        before, after = (tuple((other, Role.FROZEN) for other in others) for others in (trunk, tail))
        path = (*before, (stack, Role.LIVE), *after)
        phase = Phase(
            name=f"stack_{stack:04d}",
            path=path,
            embedding=Role.LIVE if settling else Role.FROZEN,
            head=head,
            steps=_steps(config, "phase_budget"),
            settles=(*settled, "head") if last and head is Role.LIVE and "head" not in settled else settled,
            unties_head=settling and training.head == "copy",
            execution=_execution(config, 1 + len(tail)),
        )
        phases.append(dataclasses.replace(phase, cached=caches and uncachable(phase) is None))
    return tuple(phases)
