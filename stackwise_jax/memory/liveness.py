"""How much memory a program takes on a GPU: its values, fused, ordered and packed as XLA does it.

`memory/fusion.py` says what is stored. Kernels run in the order of the program, or in one of two that free memory
earlier, whichever takes least; temporary values share one buffer, largest first, each at the tightest gap that is free
while it lives. What XLA's compiler says of the same programs is within a few percent (docs/memory.md).
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from stackwise_jax.memory.fusion import MATMUL_WORKSPACE, Fused, Kernel
from stackwise_jax.memory.steps import Value, program_steps

_ALIGNMENT = 256
# What the temporary memory of a program is counted above the model, which has been up to six percent below XLA's count.
_MARGIN = 1.03


@dataclasses.dataclass(frozen=True)
class Stored:
    """A value at the peak.

    Attributes:
      bytes, shape: of the value.
      is_argument: of the program.
      labels: of an argument its own, else those of the arguments that it is made of by fusions alone; empty where a
        matmul, a reduction or a loop made it.
    """

    bytes: int
    shape: tuple[int, ...]
    is_argument: bool
    labels: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Peak:
    """The memory of a program.

    Attributes:
      arguments: bytes of its arguments, all through.
      temporary: bytes that it needs besides, its results among them unless they lie in arguments.
      stored: what is alive when most is, arguments among it; its bytes may add up to less than both, since a buffer has
        gaps and kernels have workspaces.
    """

    arguments: int
    temporary: int
    stored: tuple[Stored, ...]

    @property
    def total(self) -> int:
        return self.arguments + self.temporary


def peak_memory(
    closed: Any,
    labels: Sequence[str],
    *,
    flops_per_byte: float,
    donated: int = 0,
    is_chain: bool = False,
    workspace: int = MATMUL_WORKSPACE,
) -> Peak:
    """Counts the memory of a traced program.

    Args:
      closed: a jaxpr, of `jax.make_jaxpr` or `jitted.trace(...).jaxpr`.
      labels: of its arguments, one each.
      flops_per_byte: of the device, as in `Fused`.
      donated: so many first results lie in arguments that were given up for them.
      is_chain: Python drives it, and every jitted call in it is a program.
      workspace: bytes that a matmul needs besides.
    """
    steps, arguments, results = program_steps(
        closed, labels, _measured(flops_per_byte, workspace) if is_chain else None
    )
    fused = Fused(steps, results, results[:donated], flops_per_byte, workspace)
    fixed, lasting = {id(value) for value in arguments}, set(map(id, results))
    orders = [fused.kernels] if is_chain else [fused.kernels, _greedy(fused.kernels), _lazy(fused.kernels)]
    lives = min((_Lives(order, fixed, lasting) for order in orders), key=lambda own: own.most)
    stored = [Stored(value.bytes, value.shape, True, fused.labels(value)) for value in arguments if value.bytes]
    stored += [Stored(value.bytes, value.shape, False, fused.labels(value)) for value in lives.at_peak]
    temporary = lives.most if is_chain else int(_MARGIN * packed_bytes(lives.intervals))
    return Peak(sum(value.bytes for value in arguments), temporary, tuple(stored))


def _measured(flops_per_byte: float, workspace: int) -> Callable[[Any], int]:
    """Says what a program of a chain needs besides operands and results; equal programs are counted once."""
    known: dict[int, int] = {}

    def measure(program: Any) -> int:
        if id(program) not in known:
            labels = [""] * len(program.jaxpr.invars)
            peak = peak_memory(program, labels, flops_per_byte=flops_per_byte, workspace=workspace)
            results = sum(value.bytes for value in program_steps(program, labels)[2])
            known[id(program)] = max(0, peak.temporary - results)
        return known[id(program)]

    return measure


def _units(kernels: list[Kernel]) -> list[list[Kernel]]:
    """Single kernels, and loops with all that is in them."""
    units: list[list[Kernel]] = []
    depth = 0
    for kernel in kernels:
        if depth == 0:
            units.append([])
        units[-1].append(kernel)
        depth += {"loop": 1, "loop_end": -1}.get(kernel.name, 0)
    return units


class _Graph:
    """Units, and what flows between them."""

    def __init__(self, kernels: list[Kernel]) -> None:
        self.units = _units(kernels)
        self.sizes = {id(value): value.bytes for kernel in kernels for value in kernel.writes}
        self.makes = [{id(value) for kernel in unit for value in kernel.makes} for unit in self.units]
        inside = zip(self.units, self.makes, strict=True)
        self.reads = [{name for kernel in unit for name in kernel.reads} - own for unit, own in inside]
        self.taken = [sum(self.sizes.get(name, 0) for name in own) for own in self.makes]

    def ordered(self, numbers: Sequence[int], inside: Callable[[list[Kernel]], list[Kernel]]) -> list[Kernel]:
        """The kernels of units in a new order, loops' own put in order by `inside`."""
        order: list[Kernel] = []
        for unit in (self.units[number] for number in numbers):
            order += unit if len(unit) == 1 else [unit[0], *inside(unit[1:-1]), unit[-1]]
        return order


def _greedy(kernels: list[Kernel]) -> list[Kernel]:
    """What frees most memory, or takes least, goes first."""
    graph = _Graph(kernels)
    maker = {name: number for number, own in enumerate(graph.makes) for name in own}
    needs = [{maker[name] for name in own if name in maker} for own in graph.reads]
    users: dict[int, set[int]] = defaultdict(set)
    feeds: dict[int, set[int]] = defaultdict(set)
    for number, own in enumerate(graph.reads):
        for name in own:
            users[name].add(number)
        for other in needs[number]:
            feeds[other].add(number)
    ready, order = {number for number, own in enumerate(needs) if not own}, list[int]()

    def gain(number: int) -> tuple[int, int]:
        freed = sum(graph.sizes.get(name, 0) for name in graph.reads[number] if users[name] == {number})
        return freed - graph.taken[number], -number

    while ready:
        number = max(ready, key=gain)
        ready.remove(number)
        order.append(number)
        for name in graph.reads[number]:
            users[name].discard(number)
        for other in feeds[number]:
            needs[other].discard(number)
            if not needs[other]:
                ready.add(other)
    return graph.ordered(order, _greedy)


def _lazy(kernels: list[Kernel]) -> list[Kernel]:
    """The order of the program, but what takes more than it frees waits until it is needed."""
    graph = _Graph(kernels)
    last = {name: number for number, own in enumerate(graph.reads) for name in own}
    moment, first_use = list(range(len(graph.units))), dict[int, int]()
    for number in reversed(moment.copy()):
        freed = sum(graph.sizes.get(name, 0) for name in graph.reads[number] if last[name] == number)
        uses = [first_use[name] for name in graph.makes[number] if name in first_use]
        if uses and len(graph.units[number]) == 1 and freed < graph.taken[number]:
            moment[number] = min(uses)
        for name in graph.reads[number]:
            first_use[name] = min(first_use.get(name, moment[number]), moment[number])
    return graph.ordered(sorted(range(len(moment)), key=lambda own: (moment[own], own)), _lazy)


class _Lives:
    """From when to when each stored value lives.

    Attributes:
      intervals: (bytes, first kernel, last kernel) of every piece of memory.
      most: bytes that are alive at once.
      at_peak: the values that are alive then.
    """

    def __init__(self, kernels: list[Kernel], fixed: set[int], lasting: set[int]) -> None:
        last = {name: number for number, kernel in enumerate(kernels) for name in kernel.reads}
        last |= dict.fromkeys(lasting, len(kernels))
        alive: dict[int, Value] = {}
        begun: dict[int, int] = {}
        self.intervals: list[tuple[int, int, int]] = []
        self.most, self.at_peak = 0, list[Value]()
        total = 0
        for number, kernel in enumerate(kernels):
            dying = {n: v for n, v in kernel.reads.items() if last[n] == number and n in alive and n not in fixed}
            for value in kernel.writes:
                old = next((n for n, own in dying.items() if own.bytes == value.bytes), None) if kernel.over else None
                begun[id(value)] = number if old is None else begun[old]
                if old is not None:  # it takes the place, and with it the past, of an operand that ends here
                    total -= dying.pop(old).bytes
                    del alive[old]
                alive[id(value)] = value
                total += value.bytes
            if total + kernel.workspace > self.most:
                self.most, self.at_peak = total + kernel.workspace, list(alive.values())
            if kernel.workspace:
                self.intervals.append((kernel.workspace, number, number))
            for name in [*dying, *(id(value) for value in kernel.writes if id(value) not in last)]:
                value = alive.pop(name)
                total -= value.bytes
                self.intervals.append((value.bytes, begun[name], number))
        self.intervals += [(value.bytes, begun[name], len(kernels)) for name, value in alive.items()]


def packed_bytes(intervals: Sequence[tuple[int, int, int]]) -> int:
    """The size of one buffer for pieces of (bytes, first, last) moments: XLA's best fit, largest first."""
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
    for count, first, last in sorted(intervals, key=lambda own: (-own[0], own[1] - own[2])):
        aligned = -(-count // _ALIGNMENT) * _ALIGNMENT
        beside = sorted(own[:2] for own in placed if own[2] <= last and first <= own[3])
        offset = _tightest_gap(beside, aligned)
        placed.append((offset, offset + aligned, first, last))
    return max((end for _, end, _, _ in placed), default=0)


def _tightest_gap(taken: list[tuple[int, int]], wanted: int) -> int:
    """Where `wanted` bytes go between pieces at (offset, end): the smallest gap with room, or behind them all."""

    def after(end: int, piece: tuple[int, int]) -> int:
        gaps.append((piece[0] - end, end))
        return max(end, piece[1])

    gaps: list[tuple[int, int]] = []
    last = functools.reduce(after, taken, 0)
    return min(((gap, end) for gap, end in gaps if gap >= wanted), default=(0, last))[1]
