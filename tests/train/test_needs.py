"""What a run needs of a machine, and what is said of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.memory import budget
from stackwise_jax.ops.target import HOPPER
from stackwise_jax.train.describe import describe
from stackwise_jax.train.machine import CARDS, Machine, machine
from stackwise_jax.train.metrics import PEAK_FLOPS
from stackwise_jax.train.needs import REMEDIES, heaviest_phases, needs_of, settings_that_fit, shortages, with_tier
from stackwise_jax.train.plan import Plan, make_plan, phase_device_bytes, phase_state_bytes, rack_bytes

GIB = 2**30
ROOMY = Machine("a card", 64 * GIB, 64 * GIB, 64 * GIB, 1e14, "as said", HOPPER)


SMALLER = {"architecture": {"n_stacks": 3}}


def plan_of(rows: int = 4096, **sections: Any) -> Plan:
    base = {
        "model": {"vocab_size": 4096, "d_model": 512, "n_heads": 8, "d_ff": 2048, "architecture": {"n_stacks": 4}},
        "data": {"seq_len": 512, "isolate_documents": False},
        "training": {"mode": "layerwise", "batch_size": 32},
        "precision": {"compute": "bf16", "cache": "bf16"},
    }
    return make_plan(
        resolve({name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}}), rows
    )


def test_the_host_and_the_disk_hold_what_is_written() -> None:
    plan = plan_of(cache={"tier": "host"}, checkpoint={"keep": 2})
    state = max(phase_state_bytes(plan, index) for index in range(len(plan.phases)))
    needs = needs_of(plan, HOPPER)
    assert needs.host["cache"] == plan.cache_bytes
    assert needs.disk["cache"] == 0
    assert needs.disk["3 snapshots"] == 3 * state
    assert needs.disk["rack"] == rack_bytes(plan.config)
    assert needs.host["snapshot being written"] == 2 * state
    on_disk = needs_of(plan_of(cache={"tier": "disk"}), HOPPER)
    assert (on_disk.host["cache"], on_disk.disk["cache"]) == (0, plan.cache_bytes)


def test_frozen_stacks_beyond_what_the_host_keeps_lie_on_the_disk_alone() -> None:
    few = needs_of(plan_of(checkpoint={"host_gib": 0.01}), HOPPER)
    all_of_them = needs_of(plan_of(), HOPPER)
    assert few.host["frozen parts"] < all_of_them.host["frozen parts"]
    assert few.disk == all_of_them.disk


@pytest.mark.parametrize(
    "training",
    [
        {"mode": "progressive", "progressive": {"trunk_strategy": "full"}},
        {"mode": "layerwise", "progressive": {"direction": "right_to_left"}},
    ],
)
def test_the_phase_that_needs_most_is_among_the_heaviest(training: dict[str, Any]) -> None:
    plan = plan_of(training={"batch_size": 32, **training}, model=SMALLER)
    heaviest = heaviest_phases(plan)
    totals = [phase_device_bytes(plan, index, HOPPER).total for index in range(len(plan.phases))]
    assert max(totals) == max(totals[index] for index in heaviest)
    assert len(heaviest) < len(totals)


def test_a_machine_that_is_too_small_is_said_so_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(cache={"tier": "device"})
    needs = needs_of(plan, HOPPER)
    assert shortages(needs, ROOMY) == []
    small = dataclasses.replace(ROOMY, device=int(0.4 * needs.device.total))
    assert shortages(needs, small) == ["device"]
    tried = list(settings_that_fit(plan, needs, small))
    sizes = [needs.device.total, *(found.needs.device.total for found in tried)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)  # what does not help is not kept
    assert tried[0].setting == "cache.tier=host"  # it changes no number, so it goes first
    assert shortages(tried[-1].needs, small) == []
    text = describe(plan, small)
    assert "verdict  does not fit on a card: device " in text
    assert f"with {tried[-1].setting}: " in text
    assert "that fits" in text
    hopeless = dataclasses.replace(ROOMY, device=1)
    monkeypatch.setitem(REMEDIES, "device", ({"cache.tier": "host"},))
    assert "no setting that was tried makes it fit: device" in describe(plan, hopeless)
    assert "verdict  fits on a card" in describe(plan, ROOMY)


def test_a_host_or_a_disk_that_is_too_small_has_remedies_of_its_own() -> None:
    plan = plan_of(rows=2**17, cache={"tier": "host"})
    needs = needs_of(plan, HOPPER)
    small = dataclasses.replace(ROOMY, host=needs.total("host") - plan.cache_bytes // 3)
    assert [found.setting for found in settings_that_fit(plan, needs, small)][-1] == "precision.cache=fp8"
    plan = plan_of(cache={"tier": "host"})
    needs = needs_of(plan, HOPPER)
    smaller = dataclasses.replace(ROOMY, disk=needs.total("disk") - 1)
    assert [found.setting for found in settings_that_fit(plan, needs, smaller)] == ["checkpoint.keep=1"]


def test_a_cache_of_any_tier_goes_where_there_is_room() -> None:
    plan = plan_of()
    assert with_tier(plan, ROOMY).config.cache.tier == "device"
    besides = needs_of(plan, HOPPER).device.besides_cache
    narrow = dataclasses.replace(ROOMY, device=besides + plan.cache_bytes // 2)
    assert with_tier(plan, narrow).config.cache.tier == "host"
    poor = dataclasses.replace(narrow, host=needs_of(plan, HOPPER).total("host") + plan.cache_bytes // 2)
    assert with_tier(plan, poor).config.cache.tier == "disk"
    assert with_tier(plan_of(cache={"tier": "disk"}), ROOMY).config.cache.tier == "disk"


def test_time_follows_the_speed_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    found = machine(tmp_path / "no" / "run", card="H200", host_gib=1.0, share=0.25)
    assert (found.device, found.host, found.flops) == (int(0.5 * 141e9), GIB, 0.25 * PEAK_FLOPS["H200"])
    assert found.target == CARDS["H200"][1]
    assert found.disk is not None
    own = machine(tmp_path, device_gib=10.0, peak=1e12)
    assert (own.device, own.flops, own.target) == (5 * GIB, 0.5e12, HOPPER)
    assert "assumed" in own.speed
    with pytest.raises(UserError, match=r'--card=H20 must be one of: .*Did you mean "H200"'):
        machine(tmp_path, card="H20")
    assert set(CARDS) <= set(PEAK_FLOPS)


def test_what_nobody_knows_is_not_made_up(tmp_path: Path) -> None:
    """A CPU has no memory of its own, and no listed speed."""
    text = describe(plan_of(), machine(tmp_path))
    assert "time     unknown" in text
    assert "name a card with --card" in text
    assert "device   about" in text
    assert "device   about" not in describe(plan_of())  # the device at hand, which is a CPU


def test_a_phase_that_trains_most_has_the_largest_snapshot() -> None:
    plan = plan_of()
    block = budget.block_parameters(plan.config.model)
    assert phase_state_bytes(plan, 1) == 12 * (block + 4096 * 512 + 512)  # the head stays live
