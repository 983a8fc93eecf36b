"""The plan: what a run will do and cost, as text, from shapes alone and before anything runs."""

import dataclasses

from stackwise_jax import __version__
from stackwise_jax.memory import budget
from stackwise_jax.memory.budget import readable_bytes, readable_count
from stackwise_jax.models import weights
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.objectives.objective import variants
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.curriculum import Phase, Role, Signature, make_curriculum, signature, stack_sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A curriculum with its costs.

    Attributes:
      phases: in order.
      signatures: of each phase; distinct ones are compiled once each.
      step_flops: FLOPs of one update of each phase.
      pass_flops: FLOPs of filling or advancing the cache after each phase; 0 where nothing is cached next.
    """

    config: RunConfig
    phases: tuple[Phase, ...]
    signatures: tuple[Signature, ...]
    step_flops: tuple[float, ...]
    pass_flops: tuple[float, ...]
    rows: int | None

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
    return Plan(
        config=config,
        phases=phases,
        signatures=signatures,
        step_flops=tuple(_step_flops(config, p, s) for p, s in zip(phases, signatures, strict=True)),
        pass_flops=tuple(_pass_flops(config, phases, i, rows or 0) for i in range(len(phases))),
        rows=rows,
    )


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


def _pass_flops(config: RunConfig, phases: tuple[Phase, ...], index: int, rows: int) -> float:
    """Advancing the cache through the stacks that `phases[index]` froze, when the next phase reads it."""
    if index + 1 == len(phases) or not phases[index + 1].cached:
        return 0.0
    sizes = stack_sizes(config)
    passed = phases[index].live_stacks if phases[index].cached else phases[index + 1].trunk
    blocks = sum(sizes[stack] for stack in passed)
    tokens = rows * variants(config.objective) * config.data.seq_len
    return blocks * tokens * budget.block_forward_flops(config.model, config.data.seq_len)


def phase_parameters(config: RunConfig, phase: Phase, sig: Signature) -> tuple[int, int]:
    """(live, frozen on the device) parameters of a phase."""
    model, sizes = config.model, stack_sizes(config)
    block = budget.block_parameters(model)
    parts = [
        (weights.count(weights.embedding_table(model)), phase.embedding),
        (weights.count(weights.head_table(model, tied=not sig.head_has_table)), phase.head),
        *((block * sizes[stack], role) for stack, role in phase.path),
    ]
    live = sum(count for count, role in parts if role is Role.LIVE)
    return live, sum(count for count, role in parts if role is Role.FROZEN)


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
        f"{'phase':<12} {'steps':>7} {'tokens':>8} {'FLOPs':>8} {'live':>8} {'device':>10} {'cache':>10}  "
        "path and rules",
    ]
    for phase, sig, flops in zip(plan.phases, plan.signatures, plan.step_flops, strict=True):
        live, frozen = phase_parameters(config, phase, sig)
        rows = (plan.rows or 0) if phase.cached else 0
        device = budget.phase_device_bytes(
            config,
            live=live,
            frozen=frozen,
            live_blocks=sum(sizes[stack] for stack in phase.live_stacks),
            cached_rows=rows,
            variants=variants(config.objective),
        )
        lines.append(
            f"{phase.name:<12} {phase.steps:>7} {readable_count(phase.steps * plan.tokens_per_step):>8} "
            f"{readable_count(phase.steps * flops):>8} {readable_count(live):>8} {readable_bytes(device.total):>10} "
            f"{readable_bytes(device.cache):>10}  {_path_text(phase)}"
        )
    disk = budget.readable_bytes(_disk_bytes(config))
    lines += [
        "",
        f"total    {sum(p.steps for p in plan.phases)} steps, {readable_count(plan.flops)} FLOPs "
        f"({readable_count(sum(plan.pass_flops))} of them advancing the cache), {plan.compilations} distinct train "
        f"step(s) to compile; about {disk} on disk at the end",
    ]
    return "\n".join(lines)


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
    roles.append(f"head {phase.head}")
    if phase.live_stacks and phase.execution == "chained":
        roles.append("chained")
    return ", ".join(roles)


def _disk_bytes(config: RunConfig) -> int:
    """The finished rack: frozen parts in trunk precision (embedding and head in float32)."""
    blocks = config.model.n_blocks * budget.block_parameters(config.model)
    rest = count_parameters(config.model) - blocks
    return blocks * budget.item_bytes(config.precision.trunk) + 4 * rest
