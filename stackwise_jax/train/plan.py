"""The plan: what a run will do and cost, from shapes alone and before anything runs."""

import dataclasses
from collections.abc import Callable

from stackwise_jax.data.order import ChunkLayout, Order, chunk_layout, in_windows
from stackwise_jax.memory import budget
from stackwise_jax.models import weights
from stackwise_jax.models.adapters import adapter_parameters
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.objectives.objective import asked_share, variants
from stackwise_jax.ops.target import Target
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.machine import target_at_hand
from stackwise_jax.train.moments import CacheBytes, phase_moments
from stackwise_jax.train.phases import Branch, Name, Phase, Role, Signature, signature, stack_sizes
from stackwise_jax.train.state import carried_names

Count = Callable[[weights.Table], int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A curriculum with its costs.

    Attributes:
      phases: in order.
      signatures: of each branch of each phase; distinct ones are compiled once each.
      step_flops: FLOPs of one update of each phase, the mean over its branches.
      pass_flops: FLOPs of bringing the cache to the phase after each phase, and to new windows during it.
      layout: of the training rows in chunks and windows; None while the corpus is not known.
    """

    config: RunConfig
    phases: tuple[Phase, ...]
    signatures: tuple[tuple[Signature, ...], ...]
    step_flops: tuple[float, ...]
    pass_flops: tuple[float, ...]
    layout: ChunkLayout | None

    @property
    def rows(self) -> int | None:
        """Training rows used."""
        return None if self.layout is None else self.layout.n_rows

    @property
    def order(self) -> Order:
        """Of the training batches; only once the corpus is known."""
        assert self.layout is not None
        return Order(self.layout, self.config.training.batch_size, self.config.seed)

    @property
    def cache_bytes(self) -> int:
        """Bytes of activations that the cache holds at once; 0 where nothing is cached."""
        if self.layout is None or not any(phase.cached for phase in self.phases):
            return 0
        return budget.cache_bytes(self.config, self.layout.rows_per_window, variants(self.config.objective))

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        steps = sum(phase.steps * flops for phase, flops in zip(self.phases, self.step_flops, strict=True))
        return float(steps + sum(self.pass_flops))

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.data.seq_len

    @property
    def compilations(self) -> int:
        """Distinct train steps that are compiled."""
        return len({own for of_phase in self.signatures for own in of_phase})


def make_plan(config: RunConfig, rows: int | None) -> Plan:
    """Plans a run.

    Args:
      rows: training rows used; None while the corpus is not prepared, and then `data.max_rows` stands in for it.
    """
    rows = rows if rows is not None else config.data.max_rows
    phases = make_curriculum(config)
    signatures = tuple(tuple(signature(phase, branch, phases, config) for branch in phase.branches) for phase in phases)
    layout = None if rows is None else make_layout(config, phases, rows)
    return Plan(
        config=config,
        phases=phases,
        signatures=signatures,
        step_flops=tuple(_step_flops(config, p, s) for p, s in zip(phases, signatures, strict=True)),
        pass_flops=tuple(_pass_flops(config, phases, i, layout) for i in range(len(phases))),
        layout=layout,
    )


def make_layout(config: RunConfig, phases: tuple[Phase, ...], rows: int) -> ChunkLayout:
    """Divides `rows` training rows into chunks, and into windows where something is cached and they are asked for.

    Raises:
      UserError: fewer rows than one batch.
    """
    row_bytes = budget.cache_bytes(config, 1, 1)  # a chunk holds one variant of its rows
    layout = chunk_layout(rows, config.training.batch_size, row_bytes, config.cache.chunk_bytes)
    window = config.cache.window_gib
    if window is None or not any(phase.cached for phase in phases):
        return layout
    rows_per_window = int(window * 2**30 / (row_bytes * variants(config.objective)))
    return in_windows(layout, rows_per_window, config.cache.window_visits)


def _step_flops(config: RunConfig, phase: Phase, signatures: tuple[Signature, ...]) -> float:
    branches = zip(phase.branches, signatures, strict=True)
    return sum(branch.share * _branch_flops(config, branch, sig) for branch, sig in branches)


def _branch_flops(config: RunConfig, branch: Branch, sig: Signature) -> float:
    sizes = stack_sizes(config)
    blocks = {role: sum(size for size, own in sig.body if own is role) for role in Role}
    table_is_live = (sig.head if sig.head_has_table else sig.embedding) is Role.LIVE
    per_token = budget.step_flops_per_token(
        config.model,
        config.data.seq_len,
        live_blocks=blocks[Role.LIVE],
        passed_blocks=blocks[Role.FROZEN] + blocks[Role.ADAPTER],
        trunk_blocks=0 if branch.cached else sum(sizes[stack] for stack in branch.trunk),
        table_is_live=table_is_live,
        adapter_parameters=_adapter_parameters(config, sig),
        attention=sig.task.attention,
        loss_fraction=config.training.loss_fraction * asked_share(config.objective, sig.task, branch.band),
    )
    return per_token * config.training.batch_size * config.data.seq_len


def _adapter_parameters(config: RunConfig, sig: Signature) -> int:
    sizes = [blocks for blocks, role in sig.body if role is Role.ADAPTER]
    targets = config.training.adapters.targets
    return sum(n * adapter_parameters(config.model, rank, targets) for n, rank in zip(sizes, sig.ranks, strict=True))


def _pass_flops(config: RunConfig, phases: tuple[Phase, ...], index: int, layout: ChunkLayout | None) -> float:
    """Filling the cache for `phases[index]`, where it is the first and for every new window, and advancing it after."""
    if layout is None:
        return 0.0
    sizes = stack_sizes(config)
    tokens = layout.rows_per_window * variants(config.objective) * config.data.seq_len
    per_block = tokens * budget.block_forward_flops(config.model, config.data.seq_len)
    own = phases[index]
    trunk = next((branch.trunk for branch in own.branches if branch.cached), ())
    fills = refills(config, phases, index, layout) + (index == 0)  # trained stacks, where a run begins with such
    blocks = sum(sizes[stack] for stack in trunk) * fills
    if index + 1 < len(phases) and phases[index + 1].cached:
        following = phases[index + 1].main
        grown = own.cached and own.main.band == following.band and not set(own.live_stacks) & set(trunk)
        grown = grown and trunk == following.trunk[: len(trunk)]
        passed = [stack for stack in following.trunk if not (grown and stack in trunk)]
        blocks += sum(sizes[stack] for stack in passed)
    return blocks * per_block


def refills(config: RunConfig, phases: tuple[Phase, ...], index: int, layout: ChunkLayout) -> int:
    """Windows that a phase enters after its first."""
    if not phases[index].cached or layout.n_windows == 1:
        return 0
    stay = layout.rows_per_window // config.training.batch_size * layout.window_visits  # steps
    first = sum(phase.steps for phase in phases[:index])
    return (first + phases[index].steps - 1) // stay - first // stay


def phase_parameters(config: RunConfig, phase: Phase, sig: Signature, count: Count = weights.count) -> tuple[int, int]:
    """(live, of these in stacks or adapters) parameters of a phase, as `count` counts those of a table.

    Args:
      sig: of its first branch.
    """
    model, sizes = config.model, stack_sizes(config)
    in_stacks = count(weights.block_table(model)) * sum(sizes[stack] for stack in phase.live_stacks)
    in_stacks += _adapter_parameters(config, sig)
    live = in_stacks
    if "embedding" in phase.live_names:
        live += count(weights.embedding_table(model))
    if "head" in phase.live_names:
        live += count(weights.head_table(model, tied=not sig.head_has_table))
    return live, in_stacks


def phase_device_bytes(plan: Plan, index: int, target: Target | None = None) -> budget.DeviceBytes:
    """The most memory that a phase takes of each device, at whichever of its moments that is."""
    return max(device_moments(plan, index, target).values(), key=lambda need: need.total)


def device_moments(plan: Plan, index: int, target: Target | None = None) -> dict[str, budget.DeviceBytes]:
    """The memory that a phase takes of each device: beginning, caching, training, evaluating, settling.

    Args:
      target: the kind of device that is planned for; None: as `target_at_hand`.
    """
    config, phases = plan.config, plan.phases
    carried = carried_names(phases, index)
    planned = target or target_at_hand()
    return phase_moments(config, phases[index], plan.signatures[index], carried, _cache_on_device(plan), planned)


def phase_state_bytes(plan: Plan, index: int) -> int:
    """Bytes of weights and optimiser state that a phase trains: what a snapshot inside it holds."""
    config, sig = plan.config, plan.signatures[index][0]
    live, in_stacks = phase_parameters(config, plan.phases[index], sig)
    sizes, phase = stack_sizes(config), plan.phases[index]
    in_blocks = sum(sizes[stack] for stack in phase.live_stacks) * budget.fixed_parameters(config.model)
    is_live = "embedding" in phase.live_names
    fixed = in_blocks + (weights.count_fixed(weights.embedding_table(config.model)) if is_live else 0)
    weights_bytes, _ = budget.weight_and_gradient_bytes(config, live=live, live_in_stacks=in_stacks)
    moments = budget.optimizer_bytes(config, live=live - fixed, live_in_stacks=in_stacks - in_blocks)
    return weights_bytes + moments


def shelf_bytes(plan: Plan) -> int:
    """The most bytes of weights and moments that are laid aside at once, of parts that a later phase trains again."""
    config, lying, most = plan.config, dict[Name, int](), 0
    for phase, signatures in zip(plan.phases, plan.signatures, strict=True):
        lying = {name: count for name, count in lying.items() if name not in phase.live_names}
        for name in phase.shelves:
            live, in_stacks = _part_parameters(config, name, signatures[0])
            own, _ = budget.weight_and_gradient_bytes(config, live=live, live_in_stacks=in_stacks)
            lying[name] = own + budget.optimizer_bytes(config, live=live, live_in_stacks=in_stacks)
        most = max(most, sum(lying.values()))
    return most


def _part_parameters(config: RunConfig, name: Name, sig: Signature) -> tuple[int, int]:
    """(all, of these in stacks) parameters of a part."""
    if isinstance(name, int):
        blocks = stack_sizes(config)[name] * budget.block_parameters(config.model)
        return blocks, blocks
    if name == "embedding":
        return weights.count(weights.embedding_table(config.model)), 0
    return weights.count(weights.head_table(config.model, tied=not sig.head_has_table)), 0


def _cache_on_device(plan: Plan) -> CacheBytes:
    """The whole cache, or in other tiers the chunks on their way; `auto` counts as the device, where it begins."""
    if not plan.cache_bytes or plan.layout is None:
        return CacheBytes()
    config = plan.config
    batches = max(1, config.evaluation.rows // config.training.batch_size)
    held_out = budget.cache_bytes(config, batches * config.training.batch_size, 1)
    if config.cache.tier in ("auto", "device"):
        return CacheBytes(held=plan.cache_bytes, held_out=held_out)
    n_chunks = plan.layout.chunks_per_window * variants(config.objective)
    return CacheBytes(chunk=plan.cache_bytes // n_chunks, n_chunks=n_chunks, held_out=held_out)


def rack_bytes(config: RunConfig) -> int:
    """The finished rack as stored: blocks in trunk precision, embedding and head in float32."""
    n_blocks = config.model.n_blocks
    rest = count_parameters(config.model) - n_blocks * budget.block_parameters(config.model)
    return n_blocks * budget.stored_block_bytes(config) + 4 * rest
