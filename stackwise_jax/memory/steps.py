"""A traced program as a list of steps that read and write values: what `memory/liveness.py` counts.

Calls are inlined, and so are loops: once where they stay loops, in whole where they are unrolled. Nothing is computed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core

# Operations whose result is their operand. A transposition is one because matmuls read either layout.
_SAME = {"reshape", "squeeze", "expand_dims", "transpose", "stop_gradient", "copy", "copy_p", "name"}
_SAME |= {"sharding_constraint", "bitcast_convert_type"}
# Kernels of libraries, and what else reads and writes whole arrays: nothing is computed inside them on the way.
_OPAQUE = {"dot_general", "ragged_dot_general", "conv_general_dilated", "sort", "top_k", "ffi_call", "pallas_call"}
_OPAQUE |= {"fft", "custom_call", "dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "reduce"}
_REDUCTIONS |= {"argmax", "argmin", "cumsum", "cummax", "cumprod", "cumlogsumexp"}
_IN_PLACE = {"scatter", "scatter-add", "scatter_add", "dynamic_update_slice"}
# Elementwise operations that cost as much as many others.
_EXPENSIVE = {"exp", "exp2", "log", "log1p", "expm1", "pow", "tanh", "logistic", "erf", "erf_inv", "sin", "cos"}
_RANDOM = {"random_bits", "threefry2x32"}
# Jitted functions with such names stand for one kernel, into which nobody looks (`ops/attention.py`).
KERNEL_PREFIX = "kernel_"
# FLOPs a number that elementwise operations cost: such that values are stored where XLA stores them on H100 and H200.
_COSTS = {"cheap": 0.5, "expensive": 105.0, "random": 300.0}

CHEAP, EXPENSIVE, RANDOM = "cheap", "expensive", "random"
OPAQUE, REDUCTION, IN_PLACE = "opaque", "reduction", "in_place"
BARRIER, LOOP = "barrier", "loop"
FUSIBLE = (CHEAP, EXPENSIVE, RANDOM)


@dataclasses.dataclass(eq=False)
class Value:
    """An array of a program.

    Attributes:
      bytes: as stored; 0 for what takes no space (constants).
      shape: of the array.
      step: that makes it; None for an argument.
      label: of an argument, whatever the caller calls it.
    """

    bytes: int
    shape: tuple[int, ...]
    step: "Step | None" = None
    label: str | None = None


Bundle = Value | list[Any] | None
"""What a variable stands for: an array, the slices of one that an unrolled loop made, or a literal (None)."""


@dataclasses.dataclass(eq=False)
class Step:
    """One operation.

    Attributes:
      kind: cheap, expensive or random (an elementwise one and its like, or a draw: it may be computed inside what
        reads it), opaque (a library's kernel), reduction, in_place (it overwrites its first operand), barrier (nothing:
        its operands must be stored, and are its results), loop (the borders of one).
      reads, writes: its operands and results.
      workspace: bytes that it needs besides.
    """

    name: str
    kind: str
    reads: list[Value]
    writes: list[Value]
    workspace: int = 0

    @property
    def cost(self) -> float:
        """FLOPs a number of its result; 0 of what is no elementwise operation."""
        return _COSTS.get(self.kind, 0.0)


def program_steps(
    closed: Any, labels: Sequence[str], measure: Callable[[Any], int] | None = None
) -> tuple[list[Step], list[Value], list[Value]]:
    """Returns (steps in the order of the program, arguments, results) of a closed jaxpr.

    Args:
      labels: of the arguments, one each.
      measure: where Python drives a chain of programs, each jitted call is one: says what it needs besides its
        operands and results. None: everything is one program.
    """
    flat = _Flattened(measure)
    invars = closed.jaxpr.invars
    arguments = [_value(variable.aval, label=label) for variable, label in zip(invars, labels, strict=True)]
    results = flat.inline(closed, list(arguments))
    return flat.steps, arguments, flattened(results)


def flattened(values: Iterable[Bundle]) -> list[Value]:
    """The arrays of several variables."""
    lists = ([value] if isinstance(value, Value) else flattened(value or []) for value in values)
    return list(itertools.chain.from_iterable(lists))


def _value(aval: Any, **fields: Any) -> Value:
    shape = tuple(getattr(aval, "shape", ()))
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 8)  # a random key's dtype has none
    return Value(math.prod(shape) * itemsize, shape, **fields)


class _Flattened:
    """Collects steps while a jaxpr is walked through."""

    def __init__(self, measure: Callable[[Any], int] | None) -> None:
        self.steps: list[Step] = []
        self._measure = measure
        self._slices: dict[tuple[int, int], Value] = {}  # of unrolled loops; the compiler takes each once

    def inline(self, closed: Any, arguments: list[Bundle]) -> list[Bundle]:
        """Adds the steps of a jaxpr, closed or not; returns its results."""
        jaxpr = getattr(closed, "jaxpr", closed)
        known: dict[Any, Bundle] = {variable: Value(0, ()) for variable in jaxpr.constvars}
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Bundle:
            return None if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            known |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[Bundle]) -> Sequence[Bundle]:
        name = eqn.primitive.name
        inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        if self._measure is not None:
            return self._called(eqn, inner, operands)
        if name == "scan":
            return self._scan(eqn, operands)
        if name == "while":
            return self._while(eqn, operands)
        if name == "cond":  # one branch runs; listed one after another they add nothing to what is alive at once
            return [self.inline(branch, operands[1:]) for branch in eqn.params["branches"]][-1]
        if name in _SAME and isinstance(operands[0], Value):
            return operands
        if name == "optimization_barrier":
            self._step(name, BARRIER, operands, [])
            return operands
        if inner is not None and not str(eqn.params.get("name", "")).startswith(KERNEL_PREFIX):
            if eqn.params.get("prevent_cse") and eqn.params.get("differentiated"):  # a second computation begins here
                self._step("optimization_barrier", BARRIER, operands, [])
            return self.inline(inner, operands)
        if name == "split" and set(eqn.params["sizes"]) == {1} and eqn.params["axis"] == 0:  # as in an unrolled loop
            whole = operands[0]
            slices = (self._slice(whole, variable.aval, turn) for turn, variable in enumerate(eqn.outvars))
            return whole if isinstance(whole, list) else list(slices)
        if name == "concatenate" and eqn.params["dimension"] == 0 and all(own.aval.shape[0] == 1 for own in eqn.invars):
            return [operands]  # the other way
        if name == "dot_general":
            operands = self._as_multiplied(eqn, operands)
        return self._add(eqn, OPAQUE if inner is not None else _kind(name), operands)

    def _as_multiplied(self, eqn: Any, operands: list[Bundle]) -> list[Bundle]:
        """Matrix units read 8-bit operands along the contracted axis, so that those that lie otherwise are copied."""
        contracted = eqn.params["dimension_numbers"][0]
        read: list[Bundle] = []
        for own, atom, axes in zip(operands, eqn.invars, contracted, strict=True):
            lies_well = atom.aval.ndim - 1 in axes or not str(atom.aval.dtype).startswith("float8")
            read.append(own if lies_well else self._step("transpose", CHEAP, [own], [_value(atom.aval)])[0])
        return read

    def _called(self, eqn: Any, program: Any, operands: list[Bundle]) -> list[Value]:
        """An operation that Python starts: a program of its own, whose results may lie in what was given up for it."""
        assert self._measure is not None
        results = [_value(variable.aval) for variable in eqn.outvars]
        given = zip(operands, eqn.params.get("donated_invars", ()), strict=False)
        room = [own.bytes for own, is_given in given if is_given and isinstance(own, Value)]
        for value in results:
            if value.bytes in room:
                room.remove(value.bytes)
                value.bytes = 0
        workspace = 0 if program is None else self._measure(program)
        return self._step(eqn.primitive.name, OPAQUE, operands, results, workspace)

    def _add(self, eqn: Any, kind: str, operands: Iterable[Bundle]) -> list[Value]:
        return self._step(eqn.primitive.name, kind, operands, [_value(variable.aval) for variable in eqn.outvars])

    def _step(
        self, name: str, kind: str, operands: Iterable[Bundle], results: list[Value], workspace: int = 0
    ) -> list[Value]:
        step = Step(name, kind, flattened(operands), results, workspace)
        for value in results:
            value.step = step
        self.steps.append(step)
        return results

    def _scan(self, eqn: Any, operands: list[Bundle]) -> Sequence[Bundle]:
        """A loop. Its operands are constants, what it carries, and what it takes slices of, in this order."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        inside = body.jaxpr
        carried = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, inside.outvars, strict=True))
        sliced = sum(o.aval.ndim != i.aval.ndim for o, i in zip(eqn.invars, inside.invars, strict=True))
        first = len(eqn.invars) - carried - sliced
        constants, carry, stacked = operands[:first], operands[first : first + carried], operands[first + carried :]
        slice_avals = [variable.aval for variable in inside.invars[first + carried :]]
        if eqn.params["unroll"] >= length:
            return self._unrolled(eqn, constants, carry, stacked, slice_avals)
        results = [_value(variable.aval) for variable in eqn.outvars]
        self._step("loop", LOOP, carry, results)
        slices = [self._slice(own, aval) for own, aval in zip(stacked, slice_avals, strict=True)]
        inner = self.inline(body, [*constants, *results[:carried], *slices])
        # The end reads all that must last as long as the loop.
        self._step("loop_end", LOOP, [*constants, *results, *stacked, *inner], [])
        return results

    def _unrolled(
        self, eqn: Any, constants: list[Bundle], carry: list[Bundle], stacked: list[Bundle], slice_avals: list[Any]
    ) -> list[Bundle]:
        length, carried = eqn.params["length"], len(carry)
        made: dict[int, list[Bundle]] = {}
        for turn in range(length)[::-1] if eqn.params["reverse"] else range(length):
            slices = [
                own[turn] if isinstance(own, list) else own if length == 1 else self._slice(own, aval, turn)
                for own, aval in zip(stacked, slice_avals, strict=True)
            ]
            results = self.inline(eqn.params["jaxpr"], [*constants, *carry, *slices])
            carry, made[turn] = results[:carried], results[carried:]
        columns = zip(*(made[turn] for turn in range(length)), strict=True)
        return [*carry, *([own or Value(0, ()) for own in column] if length > 1 else column[0] for column in columns)]

    def _while(self, eqn: Any, operands: list[Bundle]) -> list[Value]:
        """A loop whose operands are constants of its condition and of its body, and what it carries."""
        skipped, constants = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        of_body, carry = operands[skipped : skipped + constants], operands[skipped + constants :]
        results = self._step("loop", LOOP, carry, [_value(variable.aval) for variable in eqn.outvars])
        inner = self.inline(eqn.params["body_jaxpr"], [*of_body, *results])
        self._step("loop_end", LOOP, [*operands, *results, *inner], [])
        return results

    def _slice(self, own: Bundle, aval: Any, turn: int | None = None) -> Bundle:
        if own is None:
            return None
        if turn is None:
            return self._step("slice", CHEAP, [own], [_value(aval)])[0]
        if (id(own), turn) not in self._slices:
            self._slices[id(own), turn] = self._step("slice", CHEAP, [own], [_value(aval)])[0]
        return self._slices[id(own), turn]


def _kind(name: str) -> str:
    kinds = {OPAQUE: _OPAQUE, REDUCTION: _REDUCTIONS, IN_PLACE: _IN_PLACE, EXPENSIVE: _EXPENSIVE, RANDOM: _RANDOM}
    return next((kind for kind, names in kinds.items() if name in names), CHEAP)
