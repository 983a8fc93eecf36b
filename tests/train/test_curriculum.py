"""Curricula: the phases of each mode, every parameter under exactly one rule, signatures, and what cannot be cached."""

import dataclasses
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.memory import budget
from stackwise_jax.models.rack import count_parameters
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.curriculum import FUSED_STACKS, make_curriculum
from stackwise_jax.train.describe import describe
from stackwise_jax.train.phases import Phase, Role, signature, stack_sizes, uncachable
from stackwise_jax.train.plan import device_moments, make_plan, phase_device_bytes, phase_parameters

LIVE, FROZEN = Role.LIVE, Role.FROZEN


def config_of(
    n_stacks: int = 4, blocks: int = 1, *, tied: bool = False, progressive: Any = None, **training: Any
) -> Any:
    model = {"ties_embedding": tied, "architecture": {"n_stacks": n_stacks, "blocks_per_stack": blocks}}
    progressive = {"progressive": progressive} if progressive else {}
    return resolve({"model": model, "training": {**training, **progressive}})


def signatures(config: RunConfig) -> list[Any]:
    phases = make_curriculum(config)
    return [signature(phase, phase.main, phases, config) for phase in phases]


@pytest.mark.parametrize(
    ("training", "sizes"),
    [
        ({"mode": "layerwise"}, (1,) * 6),
        ({"mode": "blockwise", "block_group": 3}, (3, 3)),
        ({"mode": "stackwise"}, (2, 2, 2)),
        ({"mode": "end_to_end"}, (2, 2, 2)),
    ],
    ids=lambda value: str(value.get("mode")) if isinstance(value, dict) else "",
)
def test_modes_group_the_same_blocks(training: dict[str, Any], sizes: tuple[int, ...]):
    assert stack_sizes(config_of(3, 2, **training)) == sizes


def test_layerwise_settles_the_embedding_then_appends_a_stack_a_phase():
    phases = make_curriculum(config_of(3, mode="layerwise", embedding_budget="7 steps", phase_budget="5 steps"))
    assert [phase.name for phase in phases] == ["embedding", "stack_0000", "stack_0001", "stack_0002"]
    assert [phase.steps for phase in phases] == [7, 5, 5, 5]
    assert [phase.main.path for phase in phases] == [
        (),
        ((0, LIVE),),
        ((0, FROZEN), (1, LIVE)),
        ((0, FROZEN), (1, FROZEN), (2, LIVE)),
    ]
    assert [phase.main.trunk for phase in phases] == [(), (), (0,), (0, 1)]
    assert [phase.live_stacks for phase in phases] == [(), (0,), (1,), (2,)]
    assert [phase.main.embedding for phase in phases] == [LIVE, FROZEN, FROZEN, FROZEN]
    assert [phase.settles for phase in phases] == [("embedding",), (0,), (1,), ("head", 2)]
    assert [phase.cached for phase in phases] == [False, True, True, True]
    assert [phase.main.reads_activations for phase in phases] == [False, True, True, True]


def test_with_first_stack_there_is_no_phase_0():
    phases = make_curriculum(config_of(2, mode="layerwise", embedding_phase="with_first_stack", head="frozen"))
    assert [phase.name for phase in phases] == ["stack_0000", "stack_0001"]
    assert [phase.main.embedding for phase in phases] == [LIVE, FROZEN]
    assert [phase.main.head for phase in phases] == [LIVE, FROZEN]
    assert [phase.settles for phase in phases] == [("embedding", "head", 0), (1,)]
    assert [phase.cached for phase in phases] == [False, True]


def test_end_to_end_is_one_phase_of_everything():
    (phase,) = make_curriculum(config_of(3, 2, mode="end_to_end"))
    assert phase.main.path == ((0, LIVE), (1, LIVE), (2, LIVE))
    assert (phase.main.embedding, phase.main.head, phase.cached) == (LIVE, LIVE, False)
    assert phase.settles == ("embedding", "head", 0, 1, 2)


def test_a_frozen_head_settles_with_the_embedding():
    phases = make_curriculum(config_of(2, mode="layerwise", head="frozen"))
    assert [phase.main.head for phase in phases] == [LIVE, FROZEN, FROZEN]
    assert phases[0].settles == ("embedding", "head")


def test_copy_unties_when_the_embedding_freezes():
    config = config_of(2, tied=True, mode="layerwise", head="copy")
    assert [phase.unties_head for phase in make_curriculum(config)] == [True, False, False]
    assert [s.head_has_table for s in signatures(config)] == [False, True, True]
    assert [s.head_has_table for s in signatures(config_of(2, tied=True, mode="layerwise"))] == [False] * 3
    assert [s.head_has_table for s in signatures(config_of(2, mode="layerwise"))] == [True] * 3


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    mode = draw(st.sampled_from(["layerwise", "blockwise", "stackwise", "end_to_end"]))
    n_stacks, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    group, tied = draw(st.integers(1, 3)), draw(st.booleans())
    head = draw(st.sampled_from(["live", "frozen", "copy"]))
    assume(mode != "blockwise" or n_stacks * blocks % group == 0)
    assume(head != "copy" or (tied and mode != "end_to_end"))
    return config_of(
        n_stacks,
        blocks,
        tied=tied,
        progressive={"cache_activations": draw(st.sampled_from([None, False]))},
        mode=mode,
        block_group=group,
        embedding_phase=draw(st.sampled_from(["alone", "with_first_stack"])),
        head=head,
        execution=draw(st.sampled_from(["auto", "fused", "chained"])),
    )


def parts_of(config: RunConfig) -> list[Any]:
    return ["embedding", "head", *range(len(stack_sizes(config)))]


def live_parts(phase: Phase) -> set[Any]:
    return set(phase.live_names)


def claimed_once(phases: tuple[Phase, ...], parts: list[Any]) -> bool:
    """Every part is settled exactly once, by a phase that trains it, and trained by none after."""
    if Counter(part for phase in phases for part in phase.settles) != Counter(parts):
        return False
    settled: set[Any] = set()
    for phase in phases:
        if not set(phase.settles) <= live_parts(phase) or live_parts(phase) & settled:
            return False
        settled |= set(phase.settles)
    return True


@settings(max_examples=100, deadline=None)
@given(configs())
def test_every_part_is_claimed_by_exactly_one_rule(config: RunConfig):
    phases = make_curriculum(config)
    assert claimed_once(phases, parts_of(config))
    assert sum(stack_sizes(config)) == config.model.n_blocks
    assert len({phase.name for phase in phases}) == len(phases)
    for phase in phases:
        branch = phase.main
        assert [stack for stack, _ in branch.path] == list(range(len(branch.path)))  # left to right, none skipped
        assert branch.trunk + tuple(stack for stack, _ in branch.body) == tuple(stack for stack, _ in branch.path)
        assert not phase.cached or uncachable(branch) is None


@pytest.mark.parametrize(
    "change",
    [
        {"settles": ()},
        {"settles": (2, "head", 1)},
        {"settles": (2, "head", 3)},
        {"settles": (2, "head", "head")},
        {"embedding": LIVE},
        {"head": FROZEN},
    ],
    ids=str,
)
def test_every_part_is_claimed_by_exactly_one_rule_detects(change: dict[str, Any]):
    config = config_of(3, mode="layerwise")
    phases = make_curriculum(config)
    assert not claimed_once((*phases[:-1], changed(phases[-1], **change)), parts_of(config))


def changed(phase: Phase, **change: Any) -> Phase:
    """The phase with other fields, of itself or of its one branch."""
    own = {name: value for name, value in change.items() if name == "settles"}
    branch = dataclasses.replace(phase.main, **{name: value for name, value in change.items() if name not in own})
    return dataclasses.replace(phase, branches=(branch,), **own)


@settings(max_examples=40, deadline=None)
@given(configs())
def test_plans_render_and_count_every_parameter(config: RunConfig):
    plan = make_plan(config, 64)
    text = describe(plan)
    assert all(phase.name in text for phase in plan.phases)
    assert f"{plan.compilations} distinct train" in text
    assert plan.flops > 0
    pairs = list(zip(plan.phases, (own[0] for own in plan.signatures), strict=True))
    in_stacks = sum(phase_parameters(config, *pair)[1] for pair in pairs)
    assert in_stacks == config.model.n_blocks * budget.block_parameters(config.model)
    everything_live, _ = phase_parameters(config, *pairs[0])
    if config.training.mode == "end_to_end":
        assert everything_live == count_parameters(config.model)


def test_device_bytes_of_a_phase():
    config = config_of(3, mode="layerwise", head="frozen")
    plan = make_plan(config, 64)
    block, sizes = budget.block_parameters(config.model), config.model.vocab_size * config.model.d_model
    moments, cache = device_moments(plan, 3), budget.cache_bytes(config, 64, 1) + budget.cache_bytes(config, 64, 1)
    count = 4  # bytes of the count of updates
    for need in moments.values():
        assert (need.weights, need.optimizer, need.cache) == (4 * block, 8 * block + count, cache)
    assert moments["caching"].frozen == 4 * block  # the stack that the rows pass through
    assert moments["training"].head >= 4 * (sizes + config.model.d_model)
    assert moments["training"].frozen == moments["settling"].gradients == 0
    assert phase_device_bytes(plan, 3) == moments["training"]  # which needs most


def test_device_bytes_do_not_grow_with_depth_but_for_a_recomputed_trunk():
    def frozen_bytes(**training: Any) -> list[int]:
        plan = make_plan(config_of(6, mode="layerwise", **training), 64)
        return [device_moments(plan, index)["training"].frozen for index in range(2, len(plan.phases))]

    assert len(set(frozen_bytes())) == 1
    assert len(set(frozen_bytes(progressive={"cache_activations": False}))) == 5


@pytest.mark.parametrize("head", ["live", "frozen"])
def test_layerwise_with_the_embedding_alone_has_two_signatures_whatever_the_depth(head: str):
    for n_stacks in (1, 3, 20):
        assert len(set(signatures(config_of(n_stacks, mode="layerwise", head=head)))) == 2
        assert make_plan(config_of(n_stacks, mode="layerwise", head=head), 64).compilations == 2


def test_two_signatures_detects_a_trunk_that_runs_inside_the_step():
    config = config_of(3, mode="layerwise")
    phases = make_curriculum(config)
    inside = {tuple((1, role) for _, role in phase.main.path) for phase in phases}
    assert len(inside) == 4


def test_many_live_stacks_are_chained():
    (phase,) = make_curriculum(config_of(FUSED_STACKS + 1, mode="end_to_end"))
    assert phase.main.execution == "chained"
    assert make_curriculum(config_of(FUSED_STACKS, mode="end_to_end"))[0].main.execution == "fused"
    assert make_curriculum(config_of(2, mode="layerwise", execution="chained"))[1].main.execution == "chained"


def test_reasons_against_a_cache():
    embedding, first = (phase.main for phase in make_curriculum(config_of(2, mode="layerwise"))[:2])
    assert "embedding is live" in str(uncachable(embedding))
    assert "no stack" in str(uncachable(dataclasses.replace(embedding, embedding=FROZEN)))
    assert uncachable(first) is None
    assert "embedding is live" in str(uncachable(dataclasses.replace(first, embedding=LIVE)))


@pytest.mark.parametrize(
    "training", [{"mode": "end_to_end"}, {"n_stacks": 1, "mode": "layerwise", "embedding_phase": "with_first_stack"}]
)
def test_asking_for_a_cache_that_no_path_allows_is_refused(training: dict[str, Any]):
    with pytest.raises(UserError, match=r"cache_activations=True, but phase .* cannot be cached: .*embedding is live"):
        make_curriculum(config_of(progressive={"cache_activations": True}, **training))


def test_a_cache_can_be_switched_off():
    phases = make_curriculum(config_of(3, mode="layerwise", progressive={"cache_activations": False}))
    assert not any(phase.cached for phase in phases)


def test_a_cache_makes_every_depth_cost_what_the_first_costs():
    cached = make_plan(config_of(4, mode="layerwise"), 64)
    assert len(set(cached.step_flops[1:])) == 1
    recomputed = make_plan(config_of(4, mode="layerwise", progressive={"cache_activations": False}), 64)
    config = cached.config
    block = budget.block_forward_flops(config.model, config.data.seq_len) * cached.tokens_per_step
    for depth in range(4):
        assert recomputed.step_flops[1 + depth] - cached.step_flops[1 + depth] == pytest.approx(depth * block)
    assert sum(recomputed.pass_flops) == 0


@pytest.mark.parametrize("embedding_phase", ["alone", "with_first_stack"])
def test_plans_count_every_pass_that_advances_the_cache(embedding_phase: str):
    """Each stack but the last is passed once by every row, also the one that was trained with the embedding."""
    plan = make_plan(config_of(4, mode="layerwise", embedding_phase=embedding_phase), 64)
    config = plan.config
    one_pass = 64 * config.data.seq_len * budget.block_forward_flops(config.model, config.data.seq_len)
    assert sum(plan.pass_flops) == pytest.approx(3 * one_pass)


def test_windows_cost_refills_through_the_trunk() -> None:
    """What windows cost: for each that a phase enters after its first, a run through that phase's trunk."""
    whole = make_plan(config_of(4, mode="layerwise"), 64)
    config, row_bytes = whole.config, budget.cache_bytes(whole.config, 1, 1)
    cache = {"chunk_bytes": row_bytes * config.training.batch_size, "window_gib": 16 * row_bytes / 2**30}
    windows = make_plan(resolve(dataclasses.asdict(config) | {"cache": cache | {"window_visits": 1}}), 64)
    assert windows.layout is not None
    assert (windows.layout.n_windows, windows.layout.rows_per_window) == (4, 16)
    assert windows.cache_bytes * 4 == whole.cache_bytes
    first, refills = 0, []
    for phase in windows.phases:
        entered = [windows.order.window(index) for index in range(first, first + phase.steps)]
        refills.append(sum(one != other for one, other in pairwise(entered)) if phase.cached else 0)
        first += phase.steps
    assert sum(refills) > 0
    per_block = 16 * config.data.seq_len * budget.block_forward_flops(config.model, config.data.seq_len)
    extra = sum(n * len(phase.main.trunk) * per_block for n, phase in zip(refills, windows.phases, strict=True))
    assert sum(windows.pass_flops) == pytest.approx(sum(whole.pass_flops) / 4 + extra)
    assert f"windows  4 of 16 rows, 1 passes each; {sum(refills)} refills" in describe(windows)
    assert "windows" not in describe(whole)
