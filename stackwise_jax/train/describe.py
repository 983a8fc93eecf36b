"""A plan as text: the model, every phase with its paths and rules, tokens, FLOPs, memory per tier."""

import dataclasses
import itertools
from collections.abc import Sequence

from stackwise_jax import __version__
from stackwise_jax.memory import budget
from stackwise_jax.memory.budget import readable_bytes, readable_count
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.objectives.objective import variants
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.phases import Branch, Phase, stack_sizes
from stackwise_jax.train.plan import Plan, phase_device_bytes, phase_parameters, rack_bytes, refills, shelf_bytes

LONGEST_RUN_SHOWN = 16


def describe(plan: Plan) -> str:
    """The whole text."""
    config, model = plan.config, plan.config.model
    sizes = stack_sizes(config)
    lines = [
        f"stackwise_jax {__version__}   run {config.name}   seed {config.seed}",
        f"model    {readable_count(count_parameters(model))} parameters: {len(sizes)} stacks of {sizes[0]} block(s), "
        f"width {model.d_model}, {model.n_heads}/{model.n_kv_heads} heads{_attention_kind(config)}, {_ffn(model)}, "
        f"vocabulary {model.vocab_size}, {model.attention}, {config.objective.name}",
        f"rows     {plan.rows if plan.rows is not None else 'known when the corpus is prepared'} "
        f"of {config.data.seq_len} tokens; {plan.tokens_per_step} tokens a step",
        "",
        *_phase_lines(plan),
        *_memory_lines(plan),
        *_cache_lines(plan),
        "",
        f"total    {sum(p.steps for p in plan.phases)} steps, {readable_count(plan.flops)} FLOPs "
        f"({readable_count(sum(plan.pass_flops))} of them advancing the cache), {plan.compilations} distinct train "
        "step(s) to compile",
    ]
    return "\n".join(lines)


def _attention_kind(config: RunConfig) -> str:
    """Of the line about the model; nothing for plain attention."""
    model, kernel = config.model, config.model.kernel
    words = "" if model.attention_kind == "mha" else f" of {model.attention_kind}"
    words += f" ({kernel.family} kernel, {kernel.form})" if model.has_kernel else ""
    return words


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


def _memory_lines(plan: Plan) -> list[str]:
    """Device memory of the phase that needs most, by what fills it, then host and disk."""
    if not plan.phases:
        return [f"host     {readable_bytes(rack_bytes(plan.config))} of settled parts; nothing is trained"]
    largest = max(range(len(plan.phases)), key=lambda index: phase_device_bytes(plan, index).total)
    device = phase_device_bytes(plan, largest)
    counts = dataclasses.asdict(device)
    if plan.config.mesh.fsdp == 1:
        counts["decoded"] = counts.pop("gathered")
    parts = ", ".join(f"{name} {readable_bytes(count)}" for name, count in counts.items() if count)
    if plan.rows is None and any(phase.cached for phase in plan.phases):
        parts += "; and the cache, known when the corpus is prepared or data.max_rows is set"
    rack = readable_bytes(rack_bytes(plan.config))
    shelves = shelf_bytes(plan)
    aside = f", and up to {readable_bytes(shelves)} laid aside for phases that train it again" if shelves else ""
    each = f"each of {plan.config.mesh.n_devices} " if plan.config.mesh.n_devices > 1 else ""
    return [
        f"device   {each}about {readable_bytes(device.total)} in {plan.phases[largest].name}: {parts}",
        f"host     {rack} of frozen parts at the end{aside}, besides the program",
        f"disk     {rack} of frozen parts at the end, and {plan.config.checkpoint.keep} snapshot(s) of the live state",
    ]


def _cache_lines(plan: Plan) -> list[str]:
    """What the cache holds, where, and what it costs to fill it again."""
    config, layout = plan.config, plan.layout
    if layout is None or not plan.cache_bytes:
        return []
    last = [phase for phase in plan.phases if phase.cached][-1]
    blocks = sum(stack_sizes(config)[stack] for stack in last.main.trunk)
    tokens = layout.rows_per_window * variants(config.objective) * config.data.seq_len
    refill = blocks * tokens * budget.block_forward_flops(config.model, config.data.seq_len)
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
