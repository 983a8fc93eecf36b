"""A plan as text: the model, every phase with its paths and rules, tokens, FLOPs, memory per tier, time, a verdict."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from stackwise_jax import __version__
from stackwise_jax.memory import budget
from stackwise_jax.memory.budget import readable_bytes, readable_count
from stackwise_jax.memory.placement import device_limit
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.objectives.objective import variants
from stackwise_jax.ops.target import Target
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.machine import Machine, target_at_hand
from stackwise_jax.train.metrics import readable_time
from stackwise_jax.train.needs import Needs, disk_bytes, host_bytes, needs_of, settings_that_fit, shortages, with_tier
from stackwise_jax.train.phases import Branch, Phase, stack_sizes
from stackwise_jax.train.plan import Plan, device_moments, phase_parameters, refills

LONGEST_RUN_SHOWN = 16
FIRST_TOUCH = 2.4e9  # bytes a second of pinned memory when it is first used (docs/results, an H200's host)


def describe(plan: Plan, machine: Machine | None = None) -> str:
    """The whole text.

    Args:
      machine: also says how long the run takes there, and whether it fits. None: the device at hand, whose memory is
        counted if it has any of its own.
    """
    if machine is not None:
        plan = with_tier(plan, machine)
    target = target_at_hand() if machine is None else machine.target
    is_counted = plan.phases and (machine is not None or device_limit() is not None)
    needs = needs_of(plan, target) if is_counted else None
    config, model = plan.config, plan.config.model
    sizes = stack_sizes(config)
    lines = [
        f"stackwise_jax {__version__}   run {config.name}   seed {config.seed}",
        f"model    {readable_count(count_parameters(model))} parameters: {len(sizes)} stacks of {sizes[0]} block(s), "
        f"width {model.d_model}, {model.n_heads}/{model.n_kv_heads} heads{_attention_kind(config)}, {_ffn(model)}, "
        f"vocabulary {model.vocab_size}{_table(model)}, {model.attention}, {config.objective.name}",
        f"rows     {plan.rows if plan.rows is not None else 'known when the corpus is prepared'} "
        f"of {config.data.seq_len} tokens; {plan.tokens_per_step} tokens a step",
        "",
        *_phase_lines(plan),
        *_memory_lines(plan, needs, target),
        *_cache_lines(plan),
        "",
        f"total    {sum(p.steps for p in plan.phases)} steps, {readable_count(plan.flops)} FLOPs "
        f"({readable_count(sum(plan.pass_flops))} of them advancing the cache), {plan.compilations} distinct train "
        "step(s) to compile",
    ]
    if machine is not None:
        lines += _time_lines(plan, machine)
        lines += [] if needs is None else _verdict_lines(plan, needs, machine)
    return "\n".join(lines)


def _attention_kind(config: RunConfig) -> str:
    """Of the line about the model; nothing for plain attention."""
    model, kernel = config.model, config.model.kernel
    words = "" if model.attention_kind == "mha" else f" of {model.attention_kind}"
    words += f" ({kernel.family} kernel, {kernel.form})" if model.has_kernel else ""
    return words


def _table(model: ModelConfig) -> str:
    """Of the line about the model: how its token table is not as wide as the rack, or not trained; mostly nothing."""
    words = [] if model.d_embedding is None else [f"{model.d_embedding} wide, with a map after it"]
    words += ["fixed"] if model.fixed_table else []
    return f" (table {', '.join(words)})" if words else ""


def _ffn(model: ModelConfig) -> str:
    """Of the line about the model: the hidden width, or the experts and how many parameters a token meets."""
    own = model.experts
    if not model.has_experts:
        return f"ffn {model.d_ff}"
    active = count_parameters(model) - model.n_blocks * budget.idle_parameters(model)
    shared = f" and {own.shared} shared" if own.shared else ""
    return (
        f"{own.active} of {own.count} experts{shared} of ffn {own.d_ff} ({readable_count(active)} parameters a token)"
    )


def _name_width(plan: Plan) -> int:
    return max(12, *(len(phase.name) for phase in plan.phases))


def _phase_lines(plan: Plan) -> list[str]:
    """The table of phases, a line each; of a long run of phases with one signature the first two and the last."""
    if not plan.phases:
        return []
    width = _name_width(plan)
    lines = [f"{'phase':<{width}} {'steps':>7} {'tokens':>8} {'FLOPs':>8} {'live':>8}  path and rules"]
    for _, group in itertools.groupby(range(len(plan.phases)), key=lambda index: plan.signatures[index]):
        run = list(group)
        shown = run if len(run) <= LONGEST_RUN_SHOWN else [*run[:2], run[-1]]
        for index in shown:
            if index == run[-1] and len(shown) < len(run):
                lines.append(f"{'...':<{width}} {len(run) - len(shown)} more phases like these")
            lines.append(_phase_line(plan, index))
    return [*lines, ""]


def _phase_line(plan: Plan, index: int) -> str:
    phase, flops = plan.phases[index], plan.step_flops[index]
    live, _ = phase_parameters(plan.config, phase, plan.signatures[index][0])
    return (
        f"{phase.name:<{_name_width(plan)}} {phase.steps:>7} {readable_count(phase.steps * plan.tokens_per_step):>8} "
        f"{readable_count(phase.steps * flops):>8} {readable_count(live):>8}  {paths_text(phase)}"
    )


def _memory_lines(plan: Plan, needs: Needs | None, target: Target) -> list[str]:
    """Device memory of the phase that needs most, by what fills it and moment by moment, then host and disk."""
    host, disk = host_bytes(plan), disk_bytes(plan)
    lines = [
        f"host     about {readable_bytes(sum(host.values()))}: {_parts(host)}",
        f"disk     {readable_bytes(sum(disk.values()))} besides the corpus: {_parts(disk)}",
    ]
    if needs is None:
        return lines
    fills = _parts(dataclasses.asdict(needs.device))
    if plan.rows is None and any(phase.cached for phase in plan.phases):
        fills += "; and the cache, known when the corpus is prepared or data.max_rows is set"
    each = f"each of {plan.config.mesh.n_devices} " if plan.config.mesh.n_devices > 1 else ""
    moments = device_moments(plan, needs.phase, target)
    return [
        f"device   {each}about {readable_bytes(needs.device.total)} in {plan.phases[needs.phase].name}: {fills}",
        f"         {', '.join(f'{name} {readable_bytes(need.total)}' for name, need in moments.items())}",
        *lines,
    ]


def _parts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {readable_bytes(count)}" for name, count in counts.items() if count)


def _cache_lines(plan: Plan) -> list[str]:
    """What the cache holds, where, and what it costs to fill it again."""
    config, layout = plan.config, plan.layout
    if layout is None or not plan.cache_bytes:
        return []
    last, refill = [phase for phase in plan.phases if phase.cached][-1], _refill(plan)
    per_window = layout.chunks_per_window * variants(config.objective)
    lines = [
        f"cache    {readable_bytes(plan.cache_bytes)} in {config.precision.cache}, tier {config.cache.tier}, "
        f"{per_window} chunk(s) of {readable_bytes(plan.cache_bytes / per_window)}; filling it anew in {last.name} "
        f"takes {readable_count(refill)} FLOPs ({100 * refill / plan.flops:.1f}% of the run)"
    ]
    if layout.n_windows > 1:
        times = [refills(config, plan.phases, index, layout) for index in range(len(plan.phases))]
        lines.append(
            f"windows  {layout.n_windows} of {layout.rows_per_window} rows, {layout.window_visits} passes each; "
            f"{sum(times)} refills in all"
        )
    return lines


def _refill(plan: Plan) -> float:
    """FLOPs of filling the cache anew in the last phase that has one."""
    assert plan.layout is not None
    config = plan.config
    last = [phase for phase in plan.phases if phase.cached][-1]
    blocks = sum(stack_sizes(config)[stack] for stack in last.main.trunk)
    tokens = plan.layout.rows_per_window * variants(config.objective) * config.data.seq_len
    return blocks * tokens * budget.block_forward_flops(config.model, config.data.seq_len)


def _time_lines(plan: Plan, machine: Machine) -> list[str]:
    """How long the run takes at the speed that is expected of the machine."""
    if machine.flops is None:
        return ["time     unknown: set logging.peak_flops, FLOP/s of one device, or name a card (--card)"]
    speed = machine.flops * plan.config.mesh.n_devices
    rates = [plan.tokens_per_step * speed / flops for flops in plan.step_flops]
    span = " to ".join(dict.fromkeys(readable_count(rate) for rate in (min(rates), max(rates)))) if rates else "no"
    lines = [
        f"time     {readable_time(plan.flops / speed)} at {machine.speed}: {span} tokens/s in a phase; compilation, "
        "evaluations and snapshots come besides"
    ]
    if plan.cache_bytes:
        config = plan.config
        touch = f" (the first use of pinned memory {readable_time(plan.cache_bytes / FIRST_TOUCH)} more)"
        touch = touch if config.cache.tier == "host" else ""
        again = "nothing" if config.cache.tier == "disk" else f"up to {readable_time(_refill(plan) / speed)}"
        lines.append(
            f"         of it {readable_time(sum(plan.pass_flops) / speed)} filling and advancing the cache{touch}; "
            f"on continuing, running the frozen stacks forward again takes {again}"
        )
    return lines


def _verdict_lines(plan: Plan, needs: Needs, machine: Machine) -> list[str]:
    """Fits or not, and what would make it fit."""
    short = shortages(needs, machine)
    lines = [f"verdict  {'does not fit' if short else 'fits'} on {machine.name}: {_rooms(needs, machine)}"]
    if machine.device is None:
        lines[0] += "; it has no memory of its own, name a card with --card or --device_gib"
    if not short:
        return lines
    for found in settings_that_fit(plan, needs, machine):
        needs = found.needs
        lines.append(f"         with {found.setting}: {_rooms(needs, machine)}")
    short = shortages(needs, machine)
    lines.append(
        f"         {'that fits' if not short else 'no setting that was tried makes it fit: ' + ', '.join(short)}"
    )
    return lines


def _rooms(needs: Needs, machine: Machine) -> str:
    rooms = {"device": machine.device, "host": machine.host, "disk": machine.disk}
    texts = []
    for place, room in rooms.items():
        of = "" if room is None else f" of {readable_bytes(room)}"
        texts.append(f"{place} {readable_bytes(needs.total(place))}{of}")
    return ", ".join(texts)


def paths_text(phase: Phase) -> str:
    """What a phase trains on what, each branch with its share, and with its task where there are several."""
    texts = []
    for branch in phase.branches:
        share = f"{100 * branch.share:.0f}% " if len(phase.branches) > 1 else ""
        task = f"{branch.task.objective} ({branch.task.attention}): "
        texts.append(share + (task if len({own.task for own in phase.branches}) > 1 else "") + _branch_text(branch))
    made = f"; {len(phase.grows)} new by {phase.operator}" if phase.grows else ""
    return "; ".join(texts) + made


def _branch_text(branch: Branch) -> str:
    roles = [f"embedding {branch.embedding}"]
    if branch.trunk:
        roles.append(f"trunk {_span(branch.trunk)} frozen ({'cached' if branch.cached else 'recomputed'})")
    elif branch.cached:
        roles.append("its output cached")
    if live := branch.live_stacks:
        roles.append(f"stack{'s' if len(live) > 1 else ''} {_span(live)} live")
    if adapted := branch.adapter_stacks:
        roles.append(f"adapters of {_span(adapted)}")
    if tail := branch.tail:
        roles.append(f"tail {_span(tail)} frozen")
    roles.append(f"head {branch.head}")
    if branch.band is not None:
        low, high = branch.band
        roles.append(f"masked {high:g}" if low == high else f"masked {low:g} to {high:g}")
    if branch.opened is not None:
        roles.append(f"causal but for the first {100 * branch.opened:.0f}%" if branch.opened else "causal")
    if branch.path and branch.execution == "chained":
        roles.append("chained")
    return ", ".join(roles)


def _span(stacks: Sequence[int]) -> str:
    """3,4,5 -> 3-5; what does not follow on is listed: 0,3-5."""
    runs: list[list[int]] = []
    for stack in stacks:
        if runs and stack == runs[-1][-1] + 1:
            runs[-1].append(stack)
        else:
            runs.append([stack])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
