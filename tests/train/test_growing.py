"""Racks that grow while all their stacks are live: nested, out of what is there, under one budget and one schedule."""

import itertools
from typing import Any

import pytest
from curricula import config_of
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.errors import UserError
from stackwise_jax.train import growing
from stackwise_jax.train.curriculum import make_curriculum


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.sampled_from(["", "late", "doubling", "list"]), st.data())
def test_growth_stages_are_nested_and_cover_the_rack(n_stacks: int, sizes: str, data: st.DataObject):
    rising = sorted(data.draw(st.sets(st.integers(1, n_stacks), max_size=4)) | {n_stacks})
    operator = data.draw(st.sampled_from(["random", "copy", "interleave", "zero_output"]))
    prepends = operator == "random" and data.draw(st.booleans())
    config = config_of(
        {
            "training.mode": "progressive",
            "training.progressive.trunk_strategy": "full",
            "training.growth.operator": operator,
            "training.growth.sizes": ",".join(map(str, rising)) if sizes == "list" else sizes,
            "training.progressive.direction": "right_to_left" if prepends else "left_to_right",
        },
        n_stacks,
    )
    stages = growing.stages(config, n_stacks)
    assert stages[-1].stacks == tuple(range(n_stacks))
    assert stages[0].grows == ()
    if sizes == "list":
        assert [len(stage.stacks) for stage in stages] == rising
    for before, after in itertools.pairwise(stages):
        assert set(before.stacks) < set(after.stacks)
        assert list(after.stacks) == sorted(after.stacks)
        new = set(after.stacks) - set(before.stacks)
        made = dict(after.grows)
        assert set(made) == (set() if operator == "random" else new)
        assert set(made.values()) <= set(before.stacks)
        if prepends:
            assert max(new) < min(before.stacks)


def test_growing_racks_by_hand():
    full = {"training.mode": "progressive", "training.progressive.trunk_strategy": "full"}

    def racks(**growth: Any) -> list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
        fields = {f"training.growth.{name}": value for name, value in growth.items()}
        return [(s.stacks, s.grows) for s in growing.stages(config_of({**full, **fields}), 4)]

    assert racks(sizes="doubling", operator="copy") == [
        ((0,), ()),
        ((0, 1), ((1, 0),)),
        ((0, 1, 2, 3), ((2, 0), (3, 1))),
    ]
    assert racks(sizes="doubling", operator="interleave") == [
        ((0,), ()),
        ((0, 2), ((2, 0),)),
        ((0, 1, 2, 3), ((1, 0), (3, 2))),
    ]
    assert racks(sizes="late") == [((0,), ()), ((0, 1, 2, 3), ())]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(5, 200), st.data())
def test_all_live_racks_share_one_budget_and_one_schedule(n_stacks: int, total: int, data: st.DataObject):
    shares = [data.draw(st.integers(1, 9)) for _ in range(n_stacks)]
    fields = {"training.growth.shares": ",".join(map(str, shares)), "training.phase_budget": f"{total} steps"}
    fields |= {"training.mode": "progressive", "training.progressive.trunk_strategy": "full"}
    phases = make_curriculum(config_of(fields, n_stacks))
    assert {phase.schedule and phase.schedule[1] for phase in phases} == {total}
    assert phases[0].schedule == (0, total)
    for number, phase in enumerate(phases):
        assert phase.schedule is not None
        wanted = total * sum(shares[:number]) / sum(shares)
        assert phase.schedule[0] == sum(earlier.steps for earlier in phases[:number])
        if min(shares) * total / sum(shares) >= 1.0:  # else a stage is given an update that its share does not come to
            assert abs(phase.schedule[0] - wanted) <= 1.0
    assert min(phase.steps for phase in phases) >= 1
    assert sum(phase.steps for phase in phases) == total


def test_a_rack_on_the_way_without_an_update_is_refused():
    fields = {"training.mode": "progressive", "training.progressive.trunk_strategy": "full"}
    with pytest.raises(UserError, match=r"training.phase_budget='3 steps' is 3 update\(s\) for 4 racks"):
        make_curriculum(config_of({**fields, "training.phase_budget": "3 steps"}, 4))
