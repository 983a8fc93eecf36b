"""What a run needs of device, host and disk, and which settings would make it fit."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.memory import budget
from stackwise_jax.memory.tiers import TIERS
from stackwise_jax.models import weights
from stackwise_jax.objectives.objective import Task
from stackwise_jax.ops.target import Target
from stackwise_jax.train.machine import Machine
from stackwise_jax.train.phases import Role
from stackwise_jax.train.plan import Plan, make_plan, phase_device_bytes, phase_state_bytes, rack_bytes, shelf_bytes

PROGRAM_BYTES = 3 * 2**30  # of host memory that Python, JAX and CUDA take; assumed


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that a run takes, by what takes them.

    Attributes:
      device: of each device, in the phase that needs most.
      phase: number of that phase.
      host, disk: by name.
    """

    device: budget.DeviceBytes
    phase: int
    host: Mapping[str, int]
    disk: Mapping[str, int]

    def total(self, place: str) -> int:
        """Of "device", "host" or "disk"."""
        return self.device.total if place == "device" else sum(getattr(self, place).values())


def needs_of(plan: Plan, target: Target, phase: int | None = None) -> Needs:
    """What a run needs; `phase` is the one that needs most of the device, where that is known.

    The tier "auto" counts as the device.
    """
    numbers = heaviest_phases(plan) if phase is None else [phase]
    device = {number: phase_device_bytes(plan, number, target) for number in numbers}
    most = max(device, key=lambda number: (device[number].total, number))
    return Needs(device[most], most, host_bytes(plan), disk_bytes(plan))


def heaviest_phases(plan: Plan) -> list[int]:
    """The phases that none of the others outweighs in every respect: one of them needs most of the device."""
    loads = [_load(plan, number) for number in range(len(plan.phases))]

    def outweighs(other: int, number: int) -> bool:
        (tasks, own), (more_tasks, more) = loads[number], loads[other]
        is_below = tasks <= more_tasks and all(one <= two for one, two in zip(own, more, strict=True))
        return is_below and (loads[number] != loads[other] or other > number)

    numbers = range(len(loads))
    return [number for number in numbers if not any(outweighs(other, number) for other in numbers)]


def _load(plan: Plan, number: int) -> tuple[frozenset[Task], tuple[int, ...]]:
    """What the device memory of a phase grows with."""
    phase, signatures = plan.phases[number], plan.signatures[number]
    blocks = {role: max(sum(size for size, own in sig.body if own is role) for sig in signatures) for role in Role}
    bodies = sum(len(branch.body) - len(branch.live_stacks) for branch in phase.branches)
    trunks = sum(len(branch.trunk) for branch in phase.branches if not branch.cached)
    names = phase.live_names
    counts = (phase_state_bytes(plan, number), *blocks.values(), bodies, trunks, len(phase.branches))
    flags = ("embedding" in names, "head" in names, phase.cached, any(branch.trunk for branch in phase.branches))
    return frozenset(branch.task for branch in phase.branches), (*counts, *map(int, flags))


def bytes_besides_cache(plan: Plan) -> int:
    """Device memory that a run needs, wherever its cache may lie, on the device at hand."""
    return max(phase_device_bytes(plan, number).besides_cache for number in heaviest_phases(plan))


def host_bytes(plan: Plan) -> dict[str, int]:
    """Host memory by what takes it; that of the program is assumed."""
    config, state = plan.config, _largest_state(plan)
    rack, rest = rack_bytes(config), _rest_bytes(plan)
    held = min(rack - rest, int(config.checkpoint.host_gib * 2**30))
    return {
        "frozen parts": held + rest,
        "laid aside": shelf_bytes(plan),
        "snapshot being written": 2 * state,  # a copy, and what is read back to compare
        "cache": plan.cache_bytes if config.cache.tier == "host" else 0,
        "program": PROGRAM_BYTES,
    }


def disk_bytes(plan: Plan) -> dict[str, int]:
    """Disk by what takes it, without the corpus; one snapshot more than are kept lies there while it is written."""
    config = plan.config
    taps = [phase for phase in plan.phases if phase.newest is not None and phase.main.head is Role.LIVE]
    return {
        "rack": rack_bytes(config),
        "heads at depths": len(taps) * 4 * weights.count(weights.head_table(config.model, tied=False)),
        "laid aside": shelf_bytes(plan),
        f"{config.checkpoint.keep + 1} snapshots": (config.checkpoint.keep + 1) * _largest_state(plan),
        "cache": plan.cache_bytes if config.cache.tier == "disk" else 0,
    }


def _largest_state(plan: Plan) -> int:
    return max((phase_state_bytes(plan, index) for index in range(len(plan.phases))), default=0)


def _rest_bytes(plan: Plan) -> int:
    """Of the rack, what is no stack."""
    return rack_bytes(plan.config) - plan.config.model.n_blocks * budget.stored_block_bytes(plan.config)


# Settings that may make a run fit, in the order in which they are tried: those that change no number first.
REMEDIES: dict[str, tuple[dict[str, Any], ...]] = {
    "device": (
        {"cache.tier": "host"},
        {"training.loss_chunk_tokens": 1024},
        {"training.accumulation_steps": 2},
        {"training.accumulation_steps": 4},
        {"training.remat": "dots"},
        {"training.remat": "full"},
        {"precision.optimizer": "int8"},
        {"precision.weights": "bf16"},
        {"precision.trunk": "nvfp4"},
    ),
    "host": (
        {"checkpoint.host_gib": 1.0},
        {"precision.cache": "fp8"},
        {"precision.optimizer": "int8"},
        {"cache.window_gib": None},
        {"cache.tier": "disk"},
    ),
    "disk": (
        {"checkpoint.keep": 1},
        {"precision.trunk": "nvfp4"},
        {"precision.optimizer": "int8"},
        {"cache.tier": "host"},
    ),
}


def shortages(needs: Needs, machine: Machine) -> list[str]:
    """The places that a run does not fit in."""
    rooms = {"device": machine.device, "host": machine.host, "disk": machine.disk}
    return [place for place, room in rooms.items() if room is not None and needs.total(place) > room]


@dataclasses.dataclass(frozen=True)
class Try:
    """A setting that was tried on top of those before it, with what the run needs then."""

    setting: str
    needs: Needs


def settings_that_fit(plan: Plan, needs: Needs, machine: Machine) -> Iterator[Try]:
    """Tries settings in turn and keeps those that help, until the run fits or none is left."""
    for place in ("device", "host", "disk"):
        for change in REMEDIES[place]:
            if place not in shortages(needs, machine):
                break
            name, value = next(iter(change.items()))
            value = _window(plan, needs, machine) if value is None else value
            changed = _changed(plan, name, value)
            if changed is None:
                continue
            found = needs_of(changed, machine.target, needs.phase)
            worse = set(shortages(found, machine)) - set(shortages(needs, machine))
            if found.total(place) < needs.total(place) and not worse:
                plan, needs = changed, found
                yield Try(f"{name}={value}", found)


def with_tier(plan: Plan, machine: Machine) -> Plan:
    """The plan with the first tier that has room for its cache, where it may choose; else as it is."""
    if plan.config.cache.tier != "auto" or not plan.cache_bytes:
        return plan
    for tier in TIERS:
        changed = _changed(plan, "cache.tier", tier)
        if changed is not None and tier not in shortages(needs_of(changed, machine.target), machine):
            return changed
    return plan


def _window(plan: Plan, needs: Needs, machine: Machine) -> float:
    """GiB of the cache that the host has room for."""
    assert machine.host is not None
    left = machine.host - (needs.total("host") - needs.host["cache"])
    return max(0.1, math.floor(10 * 0.9 * left / 2**30) / 10)


def _changed(plan: Plan, name: str, value: Any) -> Plan | None:
    """The plan with another value of a field; None where it is that already, or is refused."""
    entries = dataclasses.asdict(plan.config)
    section: Any = entries
    *sections, field = name.split(".")
    for part in sections:
        section = section[part]
    if section[field] == value or (name == "training.accumulation_steps" and section[field] > value):
        return None
    if name == "training.loss_chunk_tokens" and section[field] < value:
        return None
    if name == "training.remat" and section[field] == "full":
        return None
    section[field] = value
    try:
        return make_plan(resolve(entries), plan.rows)
    except UserError:
        return None
