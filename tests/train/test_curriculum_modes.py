"""Curricula of every mode: what is trained, frozen, laid aside and read when, against a model of it in plain sets."""

import dataclasses
import itertools
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curricula import ASSEMBLED, DIFFUSION, FULL, JOINT, QLORA, RIGHT_TO_LEFT, config_of
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.config import resolve
from stackwise_jax.objectives.objective import Task
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.curriculum import band_edges, band_stacks, make_curriculum
from stackwise_jax.train.describe import describe
from stackwise_jax.train.phases import Branch, Phase, Role, stack_sizes, uncachable
from stackwise_jax.train.plan import make_plan

LIVE, FROZEN, ADAPTER = Role.LIVE, Role.FROZEN, Role.ADAPTER
SMALL = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "small.py"))

# --- the books: what is live, frozen and on the shelf at each boundary ---


def complaints(config: RunConfig, phases: tuple[Phase, ...]) -> list[str]:
    """What a curriculum gets wrong, by a model of the loop in sets: parts, and the phase that last moved each."""
    parts = {"embedding", "head", *range(len(stack_sizes(config)))}
    begins_frozen, merges = config.training.mode == "fusion", config.training.adapters.merge
    moved: dict[Any, int] = dict.fromkeys(parts, -1) if begins_frozen else {}  # the phase that last trained a part
    frozen = dict(moved)  # and the phase whose numbers its frozen copy holds
    shelf: set[Any] = set()
    carried: set[Any] = set()
    adapted: set[Any] = set()  # stacks whose adapter has been trained since they were
    wrong = []
    for number, phase in enumerate(phases):
        trained = set(phase.live_names)
        fresh = trained - set(moved)
        thawed = {name for name in trained if moved.get(name) == -1} | (adapted if merges else set())
        lost = trained - carried - shelf - fresh - thawed
        wrong += [f"{phase.name} trains {name} anew" for name in lost]
        wrong += [f"{phase.name} trains {name} without its adapter" for name in trained & adapted & shelf]
        made = {new for new, source in phase.grows if source in carried}
        wrong += [f"{phase.name} grows {new} out of nothing" for new, _ in phase.grows if new not in made & fresh]
        shelf -= trained
        for branch in phase.branches:
            read = [stack for stack, role in branch.path if role is not LIVE]
            read += [name for name in ("embedding", "head") if getattr(branch, name) is not LIVE]
            for name in read:
                is_current = name in frozen and frozen[name] == moved[name]
                if not is_current and (name not in trained or branch.cached):
                    wrong.append(f"{phase.name} reads {name}, which is not settled")
        following = set(phases[number + 1].live_names) if number + 1 < len(phases) else set()
        moved |= dict.fromkeys(trained, number)
        adapted = (adapted - trained) | set(phase.adapter_stacks)
        wrong += [f"{phase.name} settles {name} untrained" for name in set(phase.settles) - trained]
        wrong += [f"{phase.name} drops {name}" for name in trained - following - set(phase.settles)]
        wrong += [f"{phase.name} shelves {name}" for name in set(phase.shelves) - (set(phase.settles) - following)]
        frozen |= dict.fromkeys(phase.settles, number)
        shelf |= set(phase.shelves)
        carried = trained & following
    wrong += [f"{name} stays on the shelf" for name in shelf]
    late = [name for name in parts if name not in frozen or frozen[name] != moved[name]]
    return wrong + [f"{name} is not settled at the end" for name in late]


PATTERNS = st.sampled_from(["", "linear", "cosine", "exponential", "geometric"])


def listed_shares(draw: st.DrawFn, n: int) -> str:
    return ",".join(str(draw(st.integers(1, 9))) for _ in range(n)) if draw(st.booleans()) else ""


@st.composite
def curricula(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Fields of any curriculum, and the number of stacks."""
    kind = draw(st.sampled_from(["appends", "prepends", "adapts", "all_live", "depth", "independent", "whole"]))
    n_stacks = draw(st.integers(2, 6))
    fields: dict[str, Any] = {
        "training.phase_budget": f"{draw(st.integers(8, 30))} steps",
        "training.embedding_phase": draw(st.sampled_from(["alone", "with_first_stack"])),
        "training.head": draw(st.sampled_from(["live", "frozen"])),
        "training.progressive.cache_activations": draw(st.sampled_from([None, False])),
    }
    if kind == "whole":
        fields |= {"training.mode": "end_to_end"}
    elif draw(st.booleans()):
        fields |= {"training.head": "copy", "model.ties_embedding": True}
    if kind == "appends":
        last = draw(st.integers(0, n_stacks - 1))
        every = draw(st.sampled_from([None, 2, 3, 5]))
        fields |= {
            "training.mode": draw(st.sampled_from(["stackwise", "progressive"])),
            "training.progressive.last_stacks": last,
            "training.progressive.anchor_every": every,
            "training.progressive.rebuild_every": every and draw(st.sampled_from([None, 1, 4, 7])),
            "training.progressive.shares": listed_shares(draw, n_stacks - last),
        }
    if kind in ("prepends", "adapts"):
        directions = ["right_to_left"] if kind == "prepends" else ["left_to_right", "right_to_left"]
        fields |= {"training.progressive.direction": draw(st.sampled_from(directions))}
    if kind == "adapts":
        fields |= {"training.mode": "progressive", "training.progressive.trunk_strategy": "qlora"}
        merges = draw(st.booleans())
        fields |= {"training.adapters.merge": merges}
    if kind == "all_live":
        rising = [*sorted(draw(st.sets(st.integers(1, n_stacks - 1), max_size=3))), n_stacks]
        fields |= {"training.mode": "progressive", "training.progressive.trunk_strategy": "full"}
        fields |= {
            "training.growth.sizes": draw(st.sampled_from(["", "late", "doubling", ",".join(map(str, rising))])),
            "training.growth.operator": draw(st.sampled_from(["random", "copy", "interleave", "zero_output"])),
        }
    if kind in ("depth", "independent"):
        n_bands = draw(st.integers(2, n_stacks))
        directions = ["independent"] if kind == "independent" else ["left_to_right", "right_to_left"]
        fields |= {
            **DIFFUSION,
            "training.mode": "stackwise",
            "training.progressive.direction": draw(st.sampled_from(directions)),
            "objective.time": draw(st.sampled_from(["depth", "depth_input"])),
            "objective.n_bands": n_bands,
            "objective.levels": draw(PATTERNS),
            "objective.noise_order": draw(st.sampled_from(["high_to_low", "low_to_high"])),
        }
    elif kind == "adapts" and not merges:
        fields |= {**JOINT, "training.fusion.live": "adapters"}
    elif kind != "whole" and draw(st.booleans()):
        n_live = draw(st.integers(1, n_stacks))
        fields |= {
            **JOINT,
            "training.fusion.live": draw(st.sampled_from(["all", "adapters", f"last:{n_live}"])),
            "training.fusion.unfreeze_phases": draw(st.integers(1, n_live)),
            "training.fusion.embedding": draw(st.sampled_from(["live", "frozen"])),
        }
    return fields, n_stacks


@pytest.mark.parametrize("mode", SMALL["MODES"])
def test_the_books_of_every_small_config_balance(mode: str):
    config = resolve(SMALL["get_config"](mode))
    assert complaints(config, make_curriculum(config)) == []
    text = describe(make_plan(config, 64))
    assert all(phase.name in text for phase in make_curriculum(config))


@settings(max_examples=100, deadline=None)
@given(curricula())
def test_the_books_of_any_curriculum_balance(fields: tuple[dict[str, Any], int]):
    config = config_of(*fields)
    phases = make_curriculum(config)
    assert complaints(config, phases) == []
    everything = {stack for phase in phases for stack in phase.live_stacks}
    assert everything == set(range(len(stack_sizes(config))))  # each stack is live somewhere
    assert len({phase.name for phase in phases}) == len(phases)
    for phase in phases:
        assert phase.steps >= 1
        assert sum(branch.share for branch in phase.branches) == pytest.approx(1.0)
        for branch in phase.branches:
            assert not branch.cached or uncachable(branch) is None
            assert branch.trunk + tuple(stack for stack, _ in branch.body) == tuple(s for s, _ in branch.path)


@settings(max_examples=25, deadline=None)
@given(curricula())
def test_any_plan_renders(fields: tuple[dict[str, Any], int]):
    plan = make_plan(config_of(*fields), 64)
    text = describe(plan)
    shown = [phase for phase in plan.phases if phase.name in text]
    assert len(shown) == len(plan.phases) or "more phases like these" in text
    assert plan.flops > 0


BROKEN = {
    "a stack that is let go": ({}, -2, "settles", lambda names: names[:-1], "drops 2"),
    "a stack that is settled early": ({}, 1, "settles", lambda names: (*names, 3), "settles 3 untrained"),
    "a shelf that is forgotten": (JOINT, 2, "shelves", lambda names: (), "trains 1 anew"),
    "a shelf that nobody empties": (JOINT, -1, "shelves", lambda names: (3,), "3 stays on the shelf"),
    "a trunk that was trained since": (
        {"training.progressive.anchor_every": 3, "training.progressive.rebuild_every": 3},
        -2,
        "settles",
        lambda names: names[-1:],
        "reads 0, which is not settled",
    ),
    "a stack laid aside without its adapter": (
        {**JOINT, **QLORA, "training.adapters.merge": True},
        1,
        "shelves",
        lambda names: (0,),
        "trains 0 without its adapter",
    ),
    "a stack grown from one that is not there": (
        {"training.mode": "progressive", "training.progressive.trunk_strategy": "full"},
        1,
        "grows",
        lambda pairs: ((1, 3),),
        "grows 1 out of nothing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_books_detect(case: str):
    fields, index, field, change, expected = BROKEN[case]
    config = config_of(fields)
    phases = list(make_curriculum(config))
    assert complaints(config, tuple(phases)) == []
    phases[index] = dataclasses.replace(phases[index], **{field: change(getattr(phases[index], field))})
    assert any(expected in wrong for wrong in complaints(config, tuple(phases)))


# --- paths ---


def stacks_of(phases: tuple[Phase, ...]) -> list[tuple[int, ...]]:
    return [tuple(stack for stack, _ in phase.main.path) for phase in phases if phase.main.path]


@pytest.mark.parametrize("strategy", ["frozen", "qlora"])
def test_right_to_left_prepends_to_a_tail(strategy: str):
    fields = {"training.progressive.direction": "right_to_left", "training.progressive.trunk_strategy": strategy}
    phases = make_curriculum(config_of({**fields, "training.mode": "progressive"}, 3))
    role = FROZEN if strategy == "frozen" else ADAPTER
    assert [phase.name for phase in phases] == ["embedding", "stack_0002", "stack_0001", "stack_0000"]
    assert [phase.main.path for phase in phases[1:]] == [
        ((2, LIVE),),
        ((1, LIVE), (2, role)),
        ((0, LIVE), (1, role), (2, role)),
    ]
    assert [phase.main.trunk for phase in phases] == [()] * 4
    assert [phase.main.tail for phase in phases[1:]] == ([(), (2,), (1, 2)] if role is FROZEN else [()] * 3)
    assert not any(phase.cached for phase in phases)


@given(st.integers(2, 6), st.data())
@settings(max_examples=30, deadline=None)
def test_last_stacks_are_live_in_every_phase_and_end_its_path(n_stacks: int, data: st.DataObject):
    last = data.draw(st.integers(1, n_stacks - 1))
    phases = make_curriculum(config_of({"training.progressive.last_stacks": last}, n_stacks))[1:]
    ends = tuple(range(n_stacks - last, n_stacks))
    assert len(phases) == n_stacks - last
    for number, phase in enumerate(phases):
        assert phase.main.path == (
            *((stack, FROZEN) for stack in range(number)),
            *((stack, LIVE) for stack in (number, *ends)),
        )
        assert phase.cached
    assert set(phases[-1].settles) == {"head", phases[-1].live_stacks[0], *ends}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 50), st.data())
def test_shares_divide_the_updates_of_all_stacks(n_stacks: int, steps: int, data: st.DataObject):
    shares = [data.draw(st.integers(1, 9)) for _ in range(n_stacks)]
    fields = {"training.progressive.shares": ",".join(map(str, shares)), "training.phase_budget": f"{steps} steps"}
    phases = make_curriculum(config_of(fields, n_stacks))[1:]
    for phase, share in zip(phases, shares, strict=True):
        wanted = steps * n_stacks * share / sum(shares)
        assert abs(phase.steps - max(1.0, wanted)) <= 0.5


BANDS = {**DIFFUSION, "objective.time": "depth", "objective.n_bands": 2}


@pytest.mark.parametrize(
    ("fields", "newest"),
    [
        ({}, [None, 0, 1, 2, 3]),
        (RIGHT_TO_LEFT, [None, 3, 2, 1, 0]),
        (BANDS, [None, 1, 3]),
        ({**BANDS, **RIGHT_TO_LEFT}, [None, 2, 0]),
        ({"training.progressive.last_stacks": 1}, [None, None, None, 3]),
        (FULL, [None, None, None, 3]),
        (JOINT, [None, 0, 1, 2, None, 3]),
    ],
    ids=str,
)
def test_depths_at_which_a_rack_can_be_read(fields: dict[str, Any], newest: list[int | None]):
    assert [phase.newest for phase in make_curriculum(config_of(fields))] == newest


def test_plans_count_a_cache_that_is_computed_anew_for_a_shorter_trunk():
    """Growth passes one stack a phase; the fusion phase behind it has two of them for a trunk, from tokens on."""
    plan = make_plan(config_of({**JOINT, "training.fusion.live": "last:2"}), 64)
    one_pass = plan.pass_flops[1]
    assert [flops / one_pass for flops in plan.pass_flops] == [0, 1, 1, 1, 2, 0]
    begun = make_plan(config_of({**JOINT, **ASSEMBLED, "training.fusion.live": "last:1"}), 64)
    assert begun.pass_flops == (3 * one_pass,)


# --- branches ---


def branch(share: float) -> Branch:
    return Branch(((0, LIVE),), LIVE, LIVE, Task("clm", "causal"), share=share)


def whole(phase: Phase) -> np.ndarray:
    """Which updates of a phase train the whole path."""
    return np.array([{role for _, role in own.path} == {LIVE} for own in phase.branches])[phase.branch_order()]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 200))
def test_anchors_take_exactly_every_nth_update(every: int, steps: int):
    fields = {"training.progressive.anchor_every": every, "training.phase_budget": f"{steps} steps"}
    for phase in make_curriculum(config_of(fields, 2))[2:]:
        anchors = np.flatnonzero(whole(phase))
        assert len(anchors) in (steps // every, -(-steps // every))
        assert set(np.diff(anchors)) <= {every}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(1, 12), st.integers(6, 60))
def test_anchors_keep_their_distance_over_stretches(every: int, rebuild: int, steps: int):
    fields = {"training.progressive.anchor_every": every, "training.progressive.rebuild_every": rebuild}
    phases = make_curriculum(config_of({**fields, "training.phase_budget": f"{steps} steps"}, 2))[2:]
    assert sum(phase.steps for phase in phases) == steps
    assert all(phase.steps <= rebuild for phase in phases) or len(phases) == 1
    start = 0
    for phase in phases:
        assert phase.schedule == (start, steps) or len(phases) == 1
        start += phase.steps
    anchors = np.flatnonzero(np.concatenate([whole(phase) for phase in phases]))
    assert len(anchors) in (steps // every, -(-steps // every))
    assert set(np.diff(anchors)) <= {every}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 300))
def test_branches_never_fall_an_update_behind_their_share(weights: list[int], steps: int):
    shares = np.array(weights) / sum(weights)
    order = Phase("p", tuple(map(branch, shares)), steps).branch_order()
    done = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    behind = np.abs(done - shares * np.arange(1, steps + 1)[:, None])
    assert behind.max() < max(1.0, len(weights) / 2)
    assert Counter(order.tolist()).total() == steps


def test_what_is_measured_of_a_phase():
    """One branch of each task and band, and none that reads a trunk as it was before the anchors moved it."""
    anchored = {"training.progressive.anchor_every": 3, "training.progressive.rebuild_every": 4}
    for fields, expected in (({}, (0,)), (anchored, (1,)), ({"training.progressive.anchor_every": 3}, (0,))):
        assert make_curriculum(config_of(fields))[-1].measured == expected
    mixed = {"objective.name": "mixed", "objective.mixture": "clm@0.5; mlm@0.5", "objective.shift": True}
    assert make_curriculum(config_of(mixed))[-1].measured == (0, 1)


# --- bands ---


@settings(max_examples=60, deadline=None)
@given(curricula().filter(lambda fields: "objective.n_bands" in fields[0]))
def test_bands_cover_the_rack_and_the_range(fields: tuple[dict[str, Any], int]):
    config = config_of(*fields)
    units, edges = band_stacks(config), band_edges(config)
    assert list(itertools.chain(*units)) == list(range(len(stack_sizes(config))))
    assert max(map(len, units)) - min(map(len, units)) <= 1
    falling = edges if config.objective.noise_order == "high_to_low" else edges[::-1]
    if config.objective.levels:
        assert (falling[0], falling[-1]) == ((0.9, 0.9), (0.15, 0.15))
        assert all(low == high for low, high in edges)
    else:
        assert (falling[0][1], falling[-1][0]) == (config.objective.rate_max, config.objective.rate_min)
        assert all(heavy[0] == light[1] for heavy, light in itertools.pairwise(falling))
    phases = make_curriculum(config)
    trained = [(own.live_stacks, own.band) for phase in phases for own in phase.branches if own.path]
    assert sorted(trained) == sorted(zip(units, edges, strict=True))


def test_stacks_that_anchors_alone_move_go_by_a_share_of_the_rate(tiny: Any) -> None:
    anchored = {"training__progressive__anchor_every": 4, "training__progressive__cache_activations": False}
    phases = make_curriculum(tiny(training__mode="layerwise", model__architecture__n_stacks=3, **anchored))
    *_, last = phases
    assert [last.rate(stack) for stack in range(3)] == [0.25, 0.25, 1.0]
    assert all(phase.rate(name) == 1.0 for phase in phases[:2] for name in phase.live_names)


def test_rates_fall_with_depth(tiny: Any) -> None:
    decay = {"training__progressive__learning_rate_decay": 0.5, "training__embedding_learning_rate_scale": 3.0}
    phases = make_curriculum(tiny(training__mode="layerwise", model__architecture__n_stacks=3, **decay))
    assert [phase.rate(stack) for stack, phase in enumerate(phases[1:])] == [1.0, 0.5, 0.25]
    assert (phases[0].rate("embedding"), phases[0].rate("head"), phases[1].rate("embedding")) == (3.0, 1.0, 1.0)
