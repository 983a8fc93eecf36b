"""A curriculum is a list of phases. Every training mode is built here and in `train/growing.py`, and nowhere else."""

import dataclasses
import itertools
from collections.abc import Sequence

from stackwise_jax.checks.text import budget_steps
from stackwise_jax.errors import UserError
from stackwise_jax.objectives.bands import bands_of
from stackwise_jax.objectives.objective import Task, tasks
from stackwise_jax.schema import RunConfig
from stackwise_jax.train import growing
from stackwise_jax.train.phases import Branch, Name, Path, Phase, Role, stack_sizes, uncachable

# Above this many stacks in the body of a path one compiled step is no longer worth its compile time.
FUSED_STACKS = 16
LIVE, FROZEN, ADAPTER = Role.LIVE, Role.FROZEN, Role.ADAPTER


def make_curriculum(config: RunConfig) -> tuple[Phase, ...]:
    """Builds the phases of a run; none where trained stacks are only assembled.

    Raises:
      UserError: the config asks for a cache that no path of the curriculum allows.
    """
    training = config.training
    if training.mode == "fusion":
        phases = []
    elif training.mode == "end_to_end":
        phases = _end_to_end(config)
    elif training.progressive.direction == "independent":
        phases = _independent(config)
    elif training.mode == "progressive" and training.progressive.trunk_strategy == "full":
        phases = _all_live(config)
    else:
        phases = _growing(config)
    if training.fusion.budget:
        phases += _fusion(config)
    wanted = training.progressive.cache_activations
    if wanted and not any(phase.cached for phase in phases):
        _refuse_cache(config, phases)
    return _with_boundaries(phases)


def is_depth(config: RunConfig) -> bool:
    """Bands of noise belong to depth."""
    return config.objective.time in ("depth", "depth_input")


def band_stacks(config: RunConfig) -> tuple[tuple[int, ...], ...]:
    """The stacks of each band of noise, leftmost first: contiguous, as equal in number as can be."""
    n_stacks = len(stack_sizes(config))
    n_bands = config.objective.n_bands or min(n_stacks, 4)
    ends = [round(band * n_stacks / n_bands) for band in range(n_bands + 1)]
    return tuple(tuple(range(*pair)) for pair in itertools.pairwise(ends))


def band_edges(config: RunConfig) -> tuple[tuple[float, float], ...]:
    """(low, high) masked fraction of each band, in the order of `band_stacks`."""
    return bands_of(config.objective, len(band_stacks(config)))


def _refuse_cache(config: RunConfig, phases: Sequence[Phase]) -> None:
    """UserError that says why nothing can be cached."""
    found = ((f"phase {phase.name}", reason) for phase in reversed(phases) if (reason := uncachable(phase.main)))
    what, reason = next(found, ("a rack that is only assembled", "nothing is trained"))
    remedy = "set it to False or None"
    if phases and (shared := unshared(config)) is not None:
        what, reason = f"phase {phases[-1].name}", shared
    else:
        remedy += ", or let a rack grow left to right over a frozen trunk"
    raise UserError(f"training.progressive.cache_activations=True, but {what} cannot be cached: {reason}; {remedy}")


def unshared(config: RunConfig) -> str | None:
    """Says why, whatever the path, one cache cannot serve all updates of a phase; None when it can."""
    progressive, objective = config.training.progressive, config.objective
    if len(_tasks(config)) > 1:
        return "its objectives corrupt rows in different ways"
    if objective.name == "block_diffusion":
        return "block diffusion reads every row twice, masked anew at every visit"
    if progressive.direction == "independent":
        return "its bands take turns, each from tokens masked at rates of its own"
    if objective.rate_draw == "stratified":
        return "with objective.rate_draw='stratified' a row's mask depends on the batch that it comes in"
    if progressive.anchor_every is not None and progressive.rebuild_every is None:
        return "anchors change its trunk; declare training.progressive.rebuild_every"
    if progressive.cache_activations is False:
        return "training.progressive.cache_activations=False"
    return None


def _with_boundaries(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Says of every phase what freezes when it ends: what the next one does not train, or reads frozen from a cache."""
    live = [phase.live_names for phase in phases]
    result = []
    for index, phase in enumerate(phases):
        following = live[index + 1] if index + 1 < len(phases) else ()
        read = {s for b in phases[index + 1].branches if b.cached for s in b.trunk} if following else set()
        settles = tuple(name for name in live[index] if name not in following or name in read)
        later = {name for names in live[index + 2 :] for name in names}
        later -= {s for phase in phases[index + 1 :] for s in phase.adapter_stacks}  # what is laid aside would lack it
        shelves = tuple(name for name in settles if name not in following and name in later)
        result.append(dataclasses.replace(phase, settles=settles, shelves=shelves))
    return tuple(result)


def _steps(config: RunConfig, budget: str, field: str) -> int:
    return budget_steps(budget, config.training.batch_size * config.data.seq_len, field=f"training.{field}")


def _execution(config: RunConfig, n_stacks: int) -> str:
    """How a body of that many stacks, live ones and those that gradient passes through, is run."""
    if config.training.execution != "auto":
        return config.training.execution
    return "fused" if n_stacks <= FUSED_STACKS else "chained"


def _branch(
    config: RunConfig, path: Path, task: Task, share: float, *, embedding: Role, head: Role, caches: bool = False
) -> Branch:
    """One branch, with the execution that fits its body, cached where it may be."""
    branch = Branch(path, embedding, head, task, share=share)
    allowed = caches and uncachable(branch) is None
    tells_time = config.model.time_input and embedding is LIVE  # whose gradient comes from every block
    execution = "fused" if tells_time else _execution(config, len(branch.body))
    return dataclasses.replace(branch, cached=allowed, execution=execution)


def _tasks(config: RunConfig) -> tuple[tuple[Task, float], ...]:
    return tasks(config.objective, config.model.attention)


def _branches(config: RunConfig, path: Path, **roles: Role) -> tuple[Branch, ...]:
    """The same path under every task, uncached."""
    return tuple(
        _branch(config, path, task, share, embedding=roles["embedding"], head=roles["head"])
        for task, share in _tasks(config)
    )


def _early(config: RunConfig) -> Role:
    """The role of an embedding that no phase has settled yet."""
    return FROZEN if config.training.embedding_phase == "given" else LIVE


def _end_to_end(config: RunConfig) -> list[Phase]:
    path = tuple((stack, LIVE) for stack in range(len(stack_sizes(config))))
    steps = _steps(config, config.training.phase_budget, "phase_budget")
    return [Phase("end_to_end", _branches(config, path, embedding=_early(config), head=LIVE), steps)]


def _embedding_phase(config: RunConfig) -> list[Phase]:
    """Phase 0: embedding and head alone, over all rates; none where they are trained with the first stack."""
    training = config.training
    if training.embedding_phase != "alone":
        return []
    steps = _steps(config, training.embedding_budget, "embedding_budget")
    branches = _branches(config, (), embedding=LIVE, head=LIVE)
    scale = training.embedding_learning_rate_scale
    rates: tuple[tuple[Name, float], ...] = () if scale == 1.0 else (("embedding", scale),)
    return [Phase("embedding", branches, steps, unties_head=training.head == "copy", rates=rates)]


def _independent(config: RunConfig) -> list[Phase]:
    """Every band of noise trains its own stacks, from tokens, in turn; embedding and head are shared."""
    phases = _embedding_phase(config)
    embedding = FROZEN if phases else _early(config)
    head = FROZEN if phases and config.training.head == "frozen" else LIVE
    bands = list(zip(band_stacks(config), band_edges(config), strict=True))
    (task, _), *_ = _tasks(config)
    branches = []
    for stacks, band in bands:
        path = tuple((stack, LIVE) for stack in stacks)
        branch = _branch(config, path, task, 1.0 / len(bands), embedding=embedding, head=head)
        branches.append(dataclasses.replace(branch, band=band))
    steps = _steps(config, config.training.phase_budget, "phase_budget") * len(bands)
    return [*phases, Phase("bands", tuple(branches), steps)]


def _growing(config: RunConfig) -> list[Phase]:
    """Settles the embedding, then appends a stack (or a band) a phase to a trunk, or prepends it to a tail."""
    training, progressive = config.training, config.training.progressive
    n_stacks = len(stack_sizes(config))
    units = band_stacks(config) if is_depth(config) else tuple((stack,) for stack in range(n_stacks))
    edges = band_edges(config) if is_depth(config) else (None,) * len(units)
    last = tuple(range(n_stacks - progressive.last_stacks, n_stacks))
    numbers = [number for number, unit in enumerate(units) if not set(unit) & set(last)]
    order = numbers if progressive.direction == "left_to_right" else numbers[::-1]
    steps = _steps(config, training.phase_budget, "phase_budget") * len(order)
    shares = growing.phase_shares(progressive.shares, len(order), "training.progressive.shares")
    phases = _embedding_phase(config)
    for grown, (number, share) in enumerate(zip(order, shares, strict=True)):
        unit, settling = units[number], not phases
        head = FROZEN if training.head == "frozen" and not settling else LIVE
        branches = _unit_branches(config, unit, last, embedding=_early(config) if settling else FROZEN, head=head)
        branches = tuple(dataclasses.replace(branch, band=edges[number]) for branch in branches)
        phase = Phase(
            name=f"band_{number:04d}" if is_depth(config) else f"stack_{unit[0]:04d}",
            branches=branches,
            steps=max(1, round(steps * share)),
            unties_head=settling and training.head == "copy",
            rates=_growing_rates(config, branches, unit, grown),
        )
        phases += _in_stretches(phase, progressive.rebuild_every)
    return phases


def _growing_rates(
    config: RunConfig, branches: tuple[Branch, ...], unit: tuple[int, ...], grown: int
) -> tuple[tuple[Name, float], ...]:
    """Of the new stacks, by their depth; of stacks that anchors alone move, by how seldom these come.

    At the full rate they would move as far in one update as the rest does in all those between two anchors, under it.
    """
    progressive = config.training.progressive
    rates: dict[Name, float] = dict.fromkeys(unit, progressive.learning_rate_decay**grown)
    every = progressive.anchor_every
    if every is not None:
        by_anchors = {stack for branch in branches[1:] for stack in branch.live_stacks} - set(branches[0].live_stacks)
        rates |= dict.fromkeys(by_anchors, 1.0 / every)
    return tuple((name, rate) for name, rate in sorted(rates.items(), key=str) if rate != 1.0)


def _unit_branches(
    config: RunConfig, unit: tuple[int, ...], last: tuple[int, ...], *, embedding: Role, head: Role
) -> tuple[Branch, ...]:
    """Stacks trained over what is there already, a trunk before them or a tail after, and anchors if asked for."""
    progressive, n_stacks = config.training.progressive, len(stack_sizes(config))
    appends = progressive.direction == "left_to_right"
    settled = ADAPTER if config.training.mode == "progressive" and progressive.trunk_strategy == "qlora" else FROZEN
    before = tuple((stack, settled) for stack in range(unit[0])) if appends else ()
    own = tuple((stack, LIVE) for stack in unit)
    after = () if appends else tuple((stack, settled) for stack in range(unit[-1] + 1, n_stacks))
    after += tuple((stack, LIVE) for stack in last)
    # A tail or adapters void every cache, so a rack that grows such keeps none, not even for its first phase.
    caches = unshared(config) is None and ((appends and settled is FROZEN) or len(unit) == n_stacks)
    every = progressive.anchor_every if len(before) else None
    branches = []
    for task, share in _tasks(config):
        local = share if every is None else share * (1.0 - 1.0 / every)
        path = (*before, *own, *after)
        branches.append(_branch(config, path, task, local, embedding=embedding, head=head, caches=caches))
        if every is not None:
            whole = tuple((stack, LIVE) for stack, _ in path)
            branches.append(_branch(config, whole, task, share / every, embedding=embedding, head=head))
    return tuple(branches)


def _in_stretches(phase: Phase, every: int | None) -> list[Phase]:
    """The phase in stretches of so many steps, after each of which the cache is computed anew; one schedule for all."""
    if every is None or len(phase.branches) == 1 or every >= phase.steps:
        return [phase]
    starts = range(0, phase.steps, every)
    return [
        dataclasses.replace(
            phase,
            name=f"{phase.name}_{number:02d}",
            steps=min(every, phase.steps - start),
            schedule=(start, phase.steps),
            unties_head=phase.unties_head and number == len(starts) - 1,
        )
        for number, start in enumerate(starts)
    ]


def _all_live(config: RunConfig) -> list[Phase]:
    """A rack that grows while all its stacks are trained, under one schedule."""
    training = config.training
    total = _steps(config, training.phase_budget, "phase_budget")
    stages = growing.stages(config, len(stack_sizes(config)))
    ends = growing.stage_ends(config, len(stages), total)
    phases = []
    for number, stage in enumerate(stages):
        start = ends[number - 1] if number else 0
        path = tuple((stack, LIVE) for stack in stage.stacks)
        phase = Phase(
            name=f"grown_to_{len(stage.stacks):04d}",
            branches=_branches(config, path, embedding=_early(config), head=LIVE),
            steps=ends[number] - start,
            grows=stage.grows,
            operator=training.growth.operator,
            schedule=(start, total),
        )
        phases.append(phase)
    return phases


def _fusion(config: RunConfig) -> list[Phase]:
    """Trained stacks together: all, the last ones or adapters, joining from the head down in so many phases."""
    training, fusion, n_stacks = config.training, config.training.fusion, len(stack_sizes(config))
    steps, n_phases = _steps(config, fusion.budget, "fusion.budget"), fusion.unfreeze_phases
    adapts = fusion.live == "adapters"
    n_live = n_stacks if adapts or fusion.live == "all" else int(fusion.live.removeprefix("last:"))
    head = FROZEN if training.head == "frozen" else LIVE
    phases = []
    for number in range(n_phases):
        own = -(-n_live * (number + 1) // n_phases)
        roles = [FROZEN] * (n_stacks - own) + [ADAPTER if adapts else LIVE] * own
        path = tuple(enumerate(roles))
        embedding = LIVE if fusion.embedding == "live" and own == n_stacks else FROZEN
        caches = unshared(config) is None and own < n_stacks  # the embedding alone is computed as fast as it is read
        branches = tuple(
            _branch(config, path, task, share, embedding=embedding, head=head, caches=caches)
            for task, share in _tasks(config)
        )
        start, end = (round(steps * part / n_phases) for part in (number, number + 1))
        phases.append(Phase(f"fusion_{number:04d}", branches, max(1, end - start), rates=_fusion_rates(config, path)))
    return _opened(config, phases[0]) if fusion.opening else phases


def _opened(config: RunConfig, phase: Phase) -> list[Phase]:
    """The phase, before it so many stages of it in which more and more of a row is seen from everywhere.

    A causal rack becomes one that reads both ways while its weights move (Gong et al., 2024, who open pairs of places
    at random). The first stage is causal. All are one program: how far a row is open is data.
    """
    fusion, (branch,) = config.training.fusion, phase.branches
    n_stages, opening = fusion.opening_stages, round(phase.steps * fusion.opening)
    starts = [round(opening * stage / n_stages) for stage in range(n_stages + 1)]
    task = dataclasses.replace(branch.task, attention="prefix")
    stages = [
        dataclasses.replace(
            phase,
            name=f"{phase.name}_{stage:02d}",
            branches=(dataclasses.replace(branch, task=task, opened=stage / n_stages, cached=False),),
            steps=end - start,
            schedule=(start, phase.steps),
        )
        for stage, (start, end) in enumerate(itertools.pairwise(starts))
    ]
    whole = dataclasses.replace(
        phase, name=f"{phase.name}_{n_stages:02d}", steps=phase.steps - opening, schedule=(opening, phase.steps)
    )
    return [*stages, whole]


def _fusion_rates(config: RunConfig, path: Path) -> tuple[tuple[Name, float], ...]:
    fusion = config.training.fusion
    trained = [stack for stack, role in path if role is not FROZEN]
    rates: dict[Name, float] = dict.fromkeys(("embedding", "head", *trained), fusion.learning_rate_scale)
    for stack in trained[:-1]:
        rates[stack] *= fusion.trunk_learning_rate_scale
    return tuple(rates.items()) if set(rates.values()) != {1.0} else ()
