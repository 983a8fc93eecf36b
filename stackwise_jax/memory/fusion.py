"""Which values of a program a GPU stores, and the kernels that make them: XLA's fusion, as far as memory shows it.

What XLA does not store is what it computes inside the kernel that reads it. The rules are those that matter for
training steps:

- a matmul or another kernel of a library reads whole arrays; a sum that a matmul's result is added to is written over;
- an elementwise value that several kernels read one after another is stored where computing it again takes longer than
  what storing and reading it would take more of the memory's time;
- kernels of one shape that read the same array are one;
- of equal constants that loops and scatters begin from, one kernel makes all, where the first is needed;
- results of a program lie in the arguments that were donated for them.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from stackwise_jax.memory.steps import BARRIER, FUSIBLE, IN_PLACE, LOOP, OPAQUE, Step, Value

_WIDEST_FUSION = 96  # operands and results of one
_CONVERSION = "convert_element_type"
_MORE_THAN_COPYING = 10.0  # FLOPs a number
MATMUL_WORKSPACE = 32 * 2**20  # of cuBLAS


@dataclasses.dataclass(eq=False)
class Kernel:
    """What runs at once.

    Attributes:
      reads: stored values, by id.
      writes: what it stores in space of its own.
      makes: everything stored that it makes.
      over: it may write over an operand that nothing reads afterwards.
      workspace: bytes that it needs besides.
    """

    name: str
    reads: dict[int, Value]
    writes: list[Value]
    makes: list[Value]
    over: bool = False
    workspace: int = 0


class Fused:
    """A program of kernels.

    Attributes:
      kernels: in the order of the program.
    """

    def __init__(
        self,
        steps: list[Step],
        results: list[Value],
        donated: list[Value],
        flops_per_byte: float,
        workspace: int = MATMUL_WORKSPACE,
    ) -> None:
        """Decides what is stored.

        Args:
          donated: results that lie in arguments.
          flops_per_byte: of the device: FLOPs that it computes while its memory moves a byte.
          workspace: bytes that a matmul needs besides.
        """
        self._flops_per_byte, self._workspace = flops_per_byte, workspace
        self._results, self._donated = {id(value) for value in results}, {id(value) for value in donated}
        self._steps = _needed(steps, results)
        self._number = {id(step): number for number, step in enumerate(self._steps)}
        self._readers: dict[int, list[Step]] = defaultdict(list)
        for step in self._steps:
            for value in step.reads:
                self._readers[id(value)].append(step)
        self._sums = self._matmul_sums()
        self._fills = self._equal_fills()
        self._whole = {id(value) for step in self._steps for value in step.writes if self._is_whole(step, value)}
        self._stored = set(self._whole)
        self._made_of: dict[int, dict[int, Value]] = {}
        self._steps_of: dict[int, set[int]] = {}
        for _ in range(2):  # what is stored decides what others are made of, and that what else is stored
            self._find_sources()
            self._store_shared()
        self._find_sources()
        self.kernels = self._grouped()

    def labels(self, value: Value) -> frozenset[str]:
        """The labels of the arguments that a value is made of by fusions alone; none where a matmul or so made it."""
        if value.step is None:
            return frozenset({value.label or ""})
        if value.step.kind not in FUSIBLE or id(value.step) in self._sums:
            return frozenset()
        return frozenset().union(*(self.labels(source) for source in self._reads(value.step).values()))

    # What is stored.

    def _matmul_sums(self) -> set[int]:
        """Additions to a matmul's result that nothing else reads: the matmul does them, over the other operand."""
        found = set[int]()
        for step in self._steps:
            if step.name in ("add", "add_any") and len(step.reads) == 2:
                own_bytes = {step.writes[0].bytes, *(value.bytes for value in step.reads)}
                if len(own_bytes) == 1 and any(self._is_summed(value) for value in step.reads):
                    found.add(id(step))
        return found

    def _is_summed(self, value: Value) -> bool:
        return value.step is not None and value.step.name == "dot_general" and len(self._readers[id(value)]) == 1

    def _equal_fills(self) -> set[int]:
        """Constants that are written over, where others are equal to them."""
        alike: dict[tuple[Any, ...], set[int]] = defaultdict(set)
        for step in self._steps:
            begun = step.reads[:1] if step.kind == IN_PLACE else step.reads if step.kind == LOOP and step.writes else []
            for value in begun:
                if value.step is not None and value.step.kind in FUSIBLE and not value.step.reads:
                    alike[value.shape, value.bytes].add(id(value))
        return _union(equal for equal in alike.values() if len(equal) > 1)

    def _is_whole(self, step: Step, value: Value) -> bool:
        """It must be stored."""
        readers = self._readers[id(value)]
        if id(value) in self._results or id(step) in self._sums or id(value) in self._fills:
            return True
        if self._is_summed(value) and id(readers[0]) in self._sums:  # of two that are added one is done over the other
            return next(own for own in readers[0].reads if self._is_summed(own)) is not value
        is_read_whole = any(own.kind in (OPAQUE, BARRIER) or id(own) in self._sums for own in readers)
        return step.kind not in FUSIBLE or (is_read_whole and bool(step.reads))

    def _store_shared(self) -> None:
        """Stores elementwise values that several kernels read and that are dear, or smaller than their operands."""
        kernels_of = dict[int, set[int]]()
        for step in reversed(self._steps):
            for value in step.writes:
                kernels = set[int]()
                for reader in self._readers[id(value)]:
                    is_inside = reader.kind in FUSIBLE and not any(id(own) in self._stored for own in reader.writes)
                    kernels |= _union(kernels_of[id(own)] for own in reader.writes) if is_inside else {self._at(reader)}
                kernels_of[id(value)] = kernels
                if step.kind not in FUSIBLE or id(value) in self._whole:
                    continue
                is_stored = len(kernels) > 1 and self._is_dear(value, len(kernels))
                if is_stored and not self._is_widened_again(step, value) and not self._are_one(kernels):
                    self._stored.add(id(value))
                else:
                    self._stored.discard(id(value))

    def _is_dear(self, value: Value, kernels: int) -> bool:
        """Computing a value in each of its kernels takes longer than storing it once and reading it there."""
        operands = sum(source.bytes for source in self._made_of[id(value)].values())
        saved = (1 + kernels) * value.bytes - (kernels - 1) * operands  # bytes, if it is not stored
        numbers = math.prod(value.shape)
        return (kernels - 1) * self._cost(value) * numbers > saved * self._flops_per_byte

    def _cost(self, value: Value) -> float:
        """FLOPs a number of computing a value from what is stored."""
        return sum(self._steps[number].cost for number in self._steps_of[id(value)])

    def _is_widened_again(self, step: Step, value: Value) -> bool:
        """Something computed, in fewer bits, which all that read it widen: the compiler leaves out both conversions."""
        if any(own.name != _CONVERSION for own in (step, *self._readers[id(value)])):
            return False
        if self._cost(value) > _MORE_THAN_COPYING:
            return True
        wide = [own.step for own in self._made_of[id(value)].values() if own.bytes == 2 * value.bytes]
        return any(step is not None and (step.name == "dot_general" or id(step) in self._sums) for step in wide)

    def _at(self, step: Step) -> int:
        return self._number[id(step)]

    def _are_one(self, kernels: set[int]) -> bool:
        """None of the kernels needs another's result, so that they may run as one."""
        first, *others = sorted(kernels)
        reached, left = set[int](), [first]
        while left:
            for value in self._steps[left.pop()].writes:
                for number in map(self._at, self._readers[id(value)]):
                    if number in kernels:
                        return False
                    if number < others[-1] and number not in reached:
                        reached.add(number)
                        left.append(number)
        return len(others) == 1 or self._are_one(set(others))

    # Kernels.

    def _find_sources(self) -> None:
        """The stored values that every other value is made of, and the steps that this takes."""
        self._made_of, self._steps_of = {}, {}
        for step in self._steps:
            self._made_of |= dict.fromkeys(map(id, step.writes), self._reads(step))
            inside = (id(own) for own in step.reads if own.step is not None and id(own) not in self._stored)
            taken = _union(self._steps_of.get(name, set()) for name in inside) | {self._at(step)}
            self._steps_of |= dict.fromkeys(map(id, step.writes), taken)

    def _reads(self, step: Step) -> dict[int, Value]:
        """The stored values that a step reads, itself or by what is computed inside it."""
        joined: dict[int, Value] = {}
        for value in step.reads:
            is_there = value.step is None or id(value) in self._stored
            joined |= {id(value): value} if is_there else self._made_of.get(id(value), {})
        return joined

    def _has_place(self, value: Value) -> bool:
        """It is written straight to where it goes: into a donated argument, or into what a loop carries or collects."""
        step, readers = value.step, self._readers[id(value)]
        if step is None or step.kind not in (*FUSIBLE, IN_PLACE):
            return False
        if id(value) in self._donated:
            return not any(reader.kind == OPAQUE for reader in readers)
        if id(step) in self._sums and not any(own.step and own.step.kind == LOOP for own in step.reads):
            return False
        return bool(readers) and all(reader.kind == LOOP and not reader.writes for reader in readers)

    def _grouped(self) -> list[Kernel]:
        groups = _Groups()
        for step in self._steps:
            makes = [value for value in step.writes if id(value) in self._stored]
            if step.kind in FUSIBLE and not makes:
                continue
            is_sum = id(step) in self._sums
            own = Kernel(
                step.name,
                reads=self._reads(step),
                writes=[value for value in makes if value.bytes and not self._has_place(value)],
                makes=makes,
                over=is_sum or step.kind in (IN_PLACE, LOOP),
                workspace=self._workspace if is_sum or step.name == "dot_general" else step.workspace,
            )
            if step.kind in FUSIBLE and not own.writes and all(id(value) in self._donated for value in makes):
                groups.add_update(own)
            elif step.kind in FUSIBLE and len(own.writes) == 1:
                groups.add_fusion(own)
            else:
                groups.add(own, is_barrier=step.kind == BARRIER)
        return [kernel for kernel in groups.kernels if kernel is not None]


class _Groups:
    """Kernels in order, those that run as one put together.

    Attributes:
      kernels: None where one has gone into a later one.
    """

    def __init__(self) -> None:
        self.kernels: list[Kernel | None] = []
        self._updates: dict[tuple[int, ...], int] = {}  # the last kernel that changes donated arrays of a shape
        self._made_at: dict[int, int] = {}
        self._fills: dict[tuple[tuple[int, ...], int], int] = {}  # the first constant of a shape and size
        self._read_at: dict[tuple[int, int], int] = {}  # the last fusion of a size that reads an array
        self._barred: dict[int, int] = {}  # the last barrier in front of an array

    def add(self, own: Kernel, *, is_barrier: bool = False) -> None:
        if is_barrier:
            self._barred |= dict.fromkeys(own.reads, len(self.kernels))
        self._made_at |= dict.fromkeys(map(id, own.makes), len(self.kernels))
        self.kernels.append(own)

    def add_update(self, own: Kernel) -> None:
        """One kernel changes equal arrays together, and so as late as the last of them can be."""
        shape = own.makes[0].shape
        place = self._updates.get(shape)
        before = None if place is None else self.kernels[place]
        if before is not None and len(before.reads) + len(before.makes) + len(own.makes) < _WIDEST_FUSION:
            assert place is not None
            own.reads, own.makes, self.kernels[place] = before.reads | own.reads, before.makes + own.makes, None
        self._updates[shape] = len(self.kernels)
        self.add(own)

    def add_fusion(self, own: Kernel) -> None:
        """A kernel of one result joins an earlier one of its size that reads an array too, if all is there by then."""
        size = own.writes[0].bytes
        if not own.reads:
            place = self._fills.setdefault((own.writes[0].shape, size), len(self.kernels))
            if place < len(self.kernels):
                self._join(place, own)
                return
        shared = [name for name, value in own.reads.items() if 2 * value.bytes >= size and name in self._made_at]
        latest = max((self._made_at.get(name, -1) for name in own.reads), default=-1)
        for name in shared:
            place = self._read_at.get((name, size), -1)
            before = self.kernels[place] if place > max(latest, self._barred.get(name, -1)) else None
            if before is not None:
                self._join(place, own)
                return
        self._read_at |= {(name, size): len(self.kernels) for name in shared}
        self.add(own)

    def _join(self, place: int, own: Kernel) -> None:
        before = self.kernels[place]
        assert before is not None
        before.reads |= own.reads
        before.writes += own.writes
        before.makes += own.makes
        self._made_at |= dict.fromkeys(map(id, own.makes), place)


def _needed(steps: list[Step], results: list[Value]) -> list[Step]:
    """The steps without those whose results nobody reads."""
    wanted, kept = {id(value) for value in results}, list[Step]()
    for step in reversed(steps):
        if not step.writes or any(id(value) in wanted for value in step.writes):
            kept.append(step)
            wanted |= {id(value) for value in step.reads}
    return kept[::-1]


def _union(sets: Iterable[set[int]]) -> set[int]:
    return set[int]().union(*sets)
