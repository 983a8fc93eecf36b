"""What a plan says of phases with branches, of parts that are laid aside, and of caches that cannot last."""

import dataclasses
from typing import Any

import pytest

from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.memory import budget
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.describe import describe
from stackwise_jax.train.plan import Plan, make_plan, shelf_bytes

ROWS = 64


def config_of(progressive: Any = None, fusion: Any = None, objective: Any = None, **training: Any) -> RunConfig:
    training = {"mode": "layerwise", **training}
    training |= {"progressive": progressive} if progressive else {}
    training |= {"fusion": fusion} if fusion else {}
    return resolve({"training": training, "objective": objective or {}})


def part_bytes(parameters: int) -> int:
    """A float32 weight and the two moments of AdamW."""
    return 12 * parameters


def test_what_is_laid_aside_is_every_part_that_rests_before_it_is_trained_again() -> None:
    joint = make_plan(config_of(fusion={"budget": "5 steps"}), ROWS)
    model = joint.config.model
    resting = 3 * budget.block_parameters(model) + model.vocab_size * model.d_model  # the last stack is carried on
    assert shelf_bytes(joint) == part_bytes(resting)
    assert "laid aside" in describe(joint)
    frozen = make_plan(config_of(fusion={"budget": "5 steps", "embedding": "frozen"}), ROWS)
    assert shelf_bytes(frozen) == part_bytes(3 * budget.block_parameters(model))


def test_nothing_is_laid_aside_where_nothing_is_trained_again() -> None:
    plan = make_plan(config_of(), ROWS)
    assert shelf_bytes(plan) == 0
    assert "laid aside" not in describe(plan)


def one_pass(plan: Plan) -> float:
    """FLOPs of running every row through a stack of one block."""
    config = plan.config
    return ROWS * config.data.seq_len * budget.block_forward_flops(config.model, config.data.seq_len)


def test_a_trunk_that_becomes_shorter_is_filled_anew() -> None:
    plan = make_plan(config_of(fusion={"budget": "5 steps", "live": "last:2"}), ROWS)
    assert plan.phases[-1].main.trunk == (0, 1)
    assert sum(plan.pass_flops) == pytest.approx((3 + 2) * one_pass(plan))  # three advances, then two stacks once more
    longer = make_plan(config_of(fusion={"budget": "5 steps", "live": "last:1"}), ROWS)
    assert sum(longer.pass_flops) == pytest.approx(3 * one_pass(longer))  # the trunk of the last stack serves on


def test_a_rack_of_finished_runs_fills_its_cache_first() -> None:
    plan = make_plan(config_of(mode="fusion", fusion={"sources": "a", "budget": "5 steps", "live": "last:2"}), ROWS)
    assert sum(plan.pass_flops) == pytest.approx(2 * one_pass(plan))
    assembled = make_plan(config_of(mode="fusion", fusion={"sources": "a"}), ROWS)
    assert "path and rules" not in describe(assembled)


@pytest.mark.parametrize("direction", ["left_to_right", "right_to_left"])
def test_adapters_are_cached_in_no_phase_and_the_reason_is_of_the_phase_that_is_named(direction: str) -> None:
    progressive = {"trunk_strategy": "qlora", "direction": direction}
    phases = make_curriculum(config_of(progressive, mode="progressive"))
    assert not any(phase.cached for phase in phases)
    reason = "trained through adapters" if direction == "left_to_right" else "are a tail"
    with pytest.raises(UserError, match=rf"phase {phases[-1].name} cannot be cached: .*{reason}"):
        make_curriculum(config_of({**progressive, "cache_activations": True}, mode="progressive"))


MIXED = {"name": "mixed", "mixture": "clm@0.5; diffusion@0.5", "shift": True}


def test_branches_are_told_apart() -> None:
    mixed = make_plan(config_of({"anchor_every": 2}, objective=MIXED), ROWS)
    assert mixed.phases[-1].branch_names == ("clm", "clm_anchor", "diffusion", "diffusion_anchor")
    text = describe(mixed)
    assert "clm (causal): " in text
    assert "diffusion (bidirectional): " in text
    plain = make_plan(config_of({"anchor_every": 2}), ROWS)
    assert plain.phases[-1].branch_names == ("clm", "clm_anchor")
    assert "(causal)" not in describe(plain)


def test_columns_stand_under_their_names() -> None:
    config = config_of({"anchor_every": 2, "rebuild_every": 7}, phase_budget="20 steps")
    plan = make_plan(config, ROWS)
    lines = describe(plan).splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("phase "))
    table = lines[head : head + 1 + len(plan.phases)]
    ends = {line.split()[0]: line.index(line.split()[1]) + len(line.split()[1]) for line in table}
    assert len(set(ends.values())) == 1
    assert max(map(len, ends)) > 12
    longer = dataclasses.replace(plan.phases[-1], name="a_name_that_is_longer_than_all_others")
    assert longer.name in describe(dataclasses.replace(plan, phases=(*plan.phases[:-1], longer)))
