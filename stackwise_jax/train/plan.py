"""The plan: what a run will do and cost, as text, from shapes alone and before anything runs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

from stackwise_jax import __version__
from stackwise_jax.checks import QUANTISED
from stackwise_jax.data.order import ChunkLayout, Order, chunk_layout, in_windows
from stackwise_jax.memory import budget
from stackwise_jax.memory.budget import readable_bytes, readable_count
from stackwise_jax.memory.tiers import CHUNKS_IN_FLIGHT
from stackwise_jax.models import weights
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.objectives.objective import variants
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.curriculum import Phase, Role, Signature, make_curriculum, signature, stack_sizes

LONGEST_RUN_SHOWN = 16
Count = Callable[[weights.Table], int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A curriculum with its costs.

    Attributes:
      phases: in order.
      signatures: of each phase; distinct ones are compiled once each.
      step_flops: FLOPs of one update of each phase.
      pass_flops: FLOPs of bringing the cache to the phase after each phase, and to new windows during it.
      layout: of the training rows in chunks and windows; None while the corpus is not known.
    """

    config: RunConfig
    phases: tuple[Phase, ...]
    signatures: tuple[Signature, ...]
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
        return steps + sum(self.pass_flops)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.data.seq_len

    @property
    def compilations(self) -> int:
        """Distinct train steps that are compiled."""
        return len(set(self.signatures))


def make_plan(config: RunConfig, rows: int | None) -> Plan:
    """Plans a run.

    Args:
      rows: training rows used; None while the corpus is not prepared, and then `data.max_rows` stands in for it.
    """
    rows = rows if rows is not None else config.data.max_rows
    phases = make_curriculum(config)
    signatures = tuple(signature(phase, phases, config) for phase in phases)
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


def _step_flops(config: RunConfig, phase: Phase, sig: Signature) -> float:
    sizes = stack_sizes(config)
    live = sum(blocks for blocks, role in sig.body if role is Role.LIVE)
    passed = sum(blocks for blocks, role in sig.body if role is Role.FROZEN)
    trunk = 0 if phase.cached else sum(sizes[stack] for stack in phase.trunk)
    table_is_live = (sig.head if sig.head_has_table else sig.embedding) is Role.LIVE
    per_token = budget.step_flops_per_token(
        config.model,
        config.data.seq_len,
        live_blocks=live,
        passed_blocks=passed,
        trunk_blocks=trunk,
        table_is_live=table_is_live,
    )
    return per_token * config.training.batch_size * config.data.seq_len


def _pass_flops(config: RunConfig, phases: tuple[Phase, ...], index: int, layout: ChunkLayout | None) -> float:
    """Advancing the cache to the phase after `phases[index]`, and refilling it in that phase for every new window."""
    if layout is None:
        return 0.0
    sizes = stack_sizes(config)
    tokens = layout.rows_per_window * variants(config.objective) * config.data.seq_len
    per_block = tokens * budget.block_forward_flops(config.model, config.data.seq_len)
    blocks = sum(sizes[stack] for stack in phases[index].trunk) * _refills(config, phases, index, layout)
    if index + 1 < len(phases) and phases[index + 1].cached:
        passed = phases[index].live_stacks if phases[index].cached else phases[index + 1].trunk
        blocks += sum(sizes[stack] for stack in passed)
    return blocks * per_block


def _refills(config: RunConfig, phases: tuple[Phase, ...], index: int, layout: ChunkLayout) -> int:
    """Windows that a phase enters after its first."""
    if not phases[index].cached or layout.n_windows == 1:
        return 0
    stay = layout.rows_per_window // config.training.batch_size * layout.window_visits  # steps
    first = sum(phase.steps for phase in phases[:index])
    return (first + phases[index].steps - 1) // stay - first // stay


def phase_parameters(config: RunConfig, phase: Phase, sig: Signature, count: Count = weights.count) -> tuple[int, int]:
    """(live, of these in stacks) parameters of a phase, as `count` counts those of a table."""
    model, sizes = config.model, stack_sizes(config)
    in_stacks = count(weights.block_table(model)) * sum(sizes[stack] for stack in phase.live_stacks)
    live = in_stacks
    if phase.embedding is Role.LIVE:
        live += count(weights.embedding_table(model))
    if phase.head is Role.LIVE:
        live += count(weights.head_table(model, tied=not sig.head_has_table))
    return live, in_stacks


def phase_device_bytes(plan: Plan, index: int) -> budget.DeviceBytes:
    """Estimates the memory of a phase on each device.

    Frozen parts rest on the host; on the device are those that the phase runs through: a recomputed trunk, or the one
    stack that the cache advances through, the frozen body, a frozen head, and the embedding where something reads it.
    """
    config, phase, sig = plan.config, plan.phases[index], plan.signatures[index]
    model, sizes = config.model, stack_sizes(config)
    count = functools.partial(budget.parameters_per_device, fsdp=config.mesh.fsdp)
    live, in_stacks = phase_parameters(config, phase, sig, count)
    trunk = phase.trunk[-1:] if phase.cached else phase.trunk
    stacks = [*trunk, *(stack for stack, role in phase.body if role is Role.FROZEN)]
    blocks = sum(sizes[stack] for stack in stacks)
    frozen = blocks * budget.stored_block_bytes(config, config.mesh.fsdp)
    if phase.head is Role.FROZEN:
        frozen += 4 * count(weights.head_table(model, tied=not sig.head_has_table))
    if phase.embedding is Role.FROZEN and not (phase.cached and sig.head_has_table):
        frozen += 4 * count(weights.embedding_table(model))
    live_bytes, gradient_bytes = budget.weight_and_gradient_bytes(config, live=live, live_in_stacks=in_stacks)
    return budget.DeviceBytes(
        weights=live_bytes,
        optimizer=budget.optimizer_bytes(config, live=live, live_in_stacks=in_stacks),
        gradients=gradient_bytes,
        frozen=frozen,
        gathered=_gathered_bytes(config) if config.mesh.fsdp > 1 else _decoded_bytes(config) if stacks else 0,
        activations=budget.activation_bytes(config, sum(blocks for blocks, _ in sig.body)),
        cache=_cache_bytes_on_device(plan) if phase.cached else 0,
    )


def _gathered_bytes(config: RunConfig) -> int:
    """A block and the next one, and the output table, which are whole while they are used."""
    whole = 2 * budget.block_parameters(config.model) + config.model.vocab_size * config.model.d_model
    return whole * budget.item_bytes(config.precision.compute)


def _decoded_bytes(config: RunConfig) -> int:
    """A quantised block, decoded for its matmuls; 0 where the trunk is not quantised."""
    if config.precision.trunk not in QUANTISED:
        return 0
    return budget.block_parameters(config.model) * budget.item_bytes(config.precision.compute)


def _cache_bytes_on_device(plan: Plan) -> int:
    """A device's share of the whole cache, or in other tiers of the chunks on their way."""
    config, count = plan.config.cache, plan.cache_bytes
    if config.tier not in ("auto", "device"):
        count = min(count, CHUNKS_IN_FLIGHT * config.chunk_bytes)
    return count // plan.config.mesh.n_devices


def rack_bytes(config: RunConfig) -> int:
    """The finished rack as stored: blocks in trunk precision, embedding and head in float32."""
    n_blocks = config.model.n_blocks
    rest = count_parameters(config.model) - n_blocks * budget.block_parameters(config.model)
    return n_blocks * budget.stored_block_bytes(config) + 4 * rest


def describe(plan: Plan) -> str:
    """The plan as text: the model, each phase with its path and parameter rules, tokens, FLOPs, memory per tier."""
    config, model = plan.config, plan.config.model
    sizes = stack_sizes(config)
    lines = [
        f"stackwise_jax {__version__}   run {config.name}   seed {config.seed}",
        f"model    {readable_count(count_parameters(model))} parameters: {len(sizes)} stacks of {sizes[0]} block(s), "
        f"width {model.d_model}, {model.n_heads}/{model.n_kv_heads} heads, ffn {model.d_ff}, "
        f"vocabulary {model.vocab_size}, {model.attention}, {config.objective.name}",
        f"rows     {plan.rows if plan.rows is not None else 'known when the corpus is prepared'} "
        f"of {config.data.seq_len} tokens; {plan.tokens_per_step} tokens a step",
        "",
        f"{'phase':<12} {'steps':>7} {'tokens':>8} {'FLOPs':>8} {'live':>8}  path and rules",
        *_phase_lines(plan),
        "",
        *_memory_lines(plan),
        *_cache_lines(plan),
        "",
        f"total    {sum(p.steps for p in plan.phases)} steps, {readable_count(plan.flops)} FLOPs "
        f"({readable_count(sum(plan.pass_flops))} of them advancing the cache), {plan.compilations} distinct train "
        "step(s) to compile",
    ]
    return "\n".join(lines)


def _phase_lines(plan: Plan) -> list[str]:
    """A line a phase; of a long run of phases with one signature the first two and the last."""
    lines = []
    for _, group in itertools.groupby(range(len(plan.phases)), key=lambda index: plan.signatures[index]):
        run = list(group)
        shown = run if len(run) <= LONGEST_RUN_SHOWN else [*run[:2], run[-1]]
        for index in shown:
            if index == run[-1] and len(shown) < len(run):
                lines.append(f"{'...':<12} {len(run) - len(shown)} more phases like these")
            lines.append(_phase_line(plan, index))
    return lines


def _phase_line(plan: Plan, index: int) -> str:
    phase, flops = plan.phases[index], plan.step_flops[index]
    live, _ = phase_parameters(plan.config, phase, plan.signatures[index])
    return (
        f"{phase.name:<12} {phase.steps:>7} {readable_count(phase.steps * plan.tokens_per_step):>8} "
        f"{readable_count(phase.steps * flops):>8} {readable_count(live):>8}  {_path_text(phase)}"
    )


def _memory_lines(plan: Plan) -> list[str]:
    """Device memory of the phase that needs most, by what fills it, then host and disk."""
    largest = max(range(len(plan.phases)), key=lambda index: phase_device_bytes(plan, index).total)
    device = phase_device_bytes(plan, largest)
    parts = ", ".join(f"{name} {readable_bytes(count)}" for name, count in dataclasses.asdict(device).items() if count)
    if plan.rows is None and any(phase.cached for phase in plan.phases):
        parts += "; and the cache, known when the corpus is prepared or data.max_rows is set"
    rack = readable_bytes(rack_bytes(plan.config))
    each = f"each of {plan.config.mesh.n_devices} " if plan.config.mesh.n_devices > 1 else ""
    return [
        f"device   {each}about {readable_bytes(device.total)} in {plan.phases[largest].name}: {parts}",
        f"host     {rack} of frozen parts at the end, besides the program",
        f"disk     {rack} of frozen parts at the end, and {plan.config.checkpoint.keep} snapshot(s) of the live state",
    ]


def _cache_lines(plan: Plan) -> list[str]:
    """What the cache holds, where, and what it costs to fill it again."""
    config, layout = plan.config, plan.layout
    if layout is None or not plan.cache_bytes:
        return []
    last = plan.phases[-1]
    blocks = sum(stack_sizes(config)[stack] for stack in last.trunk)
    tokens = layout.rows_per_window * variants(config.objective) * config.data.seq_len
    refill = blocks * tokens * budget.block_forward_flops(config.model, config.data.seq_len)
    per_window = layout.chunks_per_window * variants(config.objective)
    lines = [
        f"cache    {readable_bytes(plan.cache_bytes)} in {config.precision.cache}, tier {config.cache.tier}, "
        f"{per_window} chunk(s) of {readable_bytes(plan.cache_bytes / per_window)}; filling it anew in {last.name} "
        f"takes {readable_count(refill)} FLOPs ({100 * refill / plan.flops:.1f}% of the run)"
    ]
    if layout.n_windows > 1:
        refills = [_refills(config, plan.phases, index, layout) for index in range(len(plan.phases))]
        lines.append(
            f"windows  {layout.n_windows} of {layout.rows_per_window} rows, {layout.window_visits} passes each; "
            f"{sum(refills)} refills in all"
        )
    return lines


def _path_text(phase: Phase) -> str:
    roles = [f"embedding {phase.embedding}"]
    if phase.trunk:
        trunk = phase.trunk
        span = f"{trunk[0]}" if len(trunk) == 1 else f"{trunk[0]}-{trunk[-1]}"
        roles.append(f"trunk {span} frozen ({'cached' if phase.cached else 'recomputed'})")
    elif phase.cached:
        roles.append("its output cached")
    live = phase.live_stacks
    if live:
        roles.append(f"stack {live[0]} live" if len(live) == 1 else f"stacks {live[0]}-{live[-1]} live")
    if tail := phase.tail:
        roles.append(f"tail {tail[0]} frozen" if len(tail) == 1 else f"tail {tail[0]}-{tail[-1]} frozen")
    roles.append(f"head {phase.head}")
    if phase.live_stacks and phase.execution == "chained":
        roles.append("chained")
    return ", ".join(roles)
