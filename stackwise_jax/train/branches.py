"""A branch of a phase under way: its compiled step and evaluation, on its part of the run's state."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from stackwise_jax.objectives.objective import Task
from stackwise_jax.train.chain_programs import ChainPrograms
from stackwise_jax.train.chained import make_chained_evaluation, make_chained_step
from stackwise_jax.train.phases import Branch, Name, Phase, Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.state import Frozen, TrainState, joined, part_names, split
from stackwise_jax.train.step import make_evaluation, make_train_step
from stackwise_jax.train.trunk import TrunkInputs, timing_of
from stackwise_jax.types import Batch, Params


@dataclasses.dataclass(eq=False)
class OnDevice:
    """A settled part on the devices, for as long as somebody holds this."""

    tree: Params


class Compiled:
    """The compiled functions of a run, made when they are first needed and kept by signature, and what they share."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.step = functools.cache(self._make_step)
        self.evaluation = functools.cache(self._make_evaluation)
        self._chain = functools.cache(lambda: ChainPrograms(program))
        self._on_device: weakref.WeakValueDictionary[tuple[str, str], OnDevice] = weakref.WeakValueDictionary()

    def _make_step(self, signature: Signature) -> Any:
        if signature.execution == "chained":
            return make_chained_step(self._chain(), signature)
        return make_train_step(self.program, signature)

    def _make_evaluation(self, signature: Signature) -> Any:
        if signature.execution == "chained":
            return make_chained_evaluation(self._chain(), signature)
        return make_evaluation(self.program, signature)

    def settled(self, name: Name, frozen: Frozen) -> OnDevice:
        """A frozen part on the devices, once however many branches run through it."""
        key = (str(name), frozen.digests[str(name)])
        if (found := self._on_device.get(key)) is None:
            found = self._on_device[key] = OnDevice(self.program.placement.to_weights(frozen.part(name)))
        return found


class BranchRun:
    """One branch, ready to run.

    Attributes:
      rate_names: parts by whose learning-rate factors the updates go, in the order of `optimizer.update_parts`.
    """

    def __init__(
        self,
        compiled: Compiled,
        inputs: TrunkInputs,
        frozen: Frozen,
        phase: Phase,
        branch: Branch,
        signature: Signature,
    ) -> None:
        self.branch, self.rate_names = branch, update_order(branch)
        self._compiled, self._inputs = compiled, inputs
        self._phase, self._signature = phase, signature
        self._names, self._all_names = part_names(branch), part_names(phase)
        not_live = {stack for stack, role in branch.body if role is not Role.LIVE}
        lent = not_live & set(phase.live_stacks)
        own = {"head"} if branch.head is Role.FROZEN else set[Name]()
        own |= {"embedding"} if branch.embedding is Role.FROZEN and self._reads_embedding else set[Name]()
        self._held = {name: compiled.settled(name, frozen) for name in sorted((not_live - lent) | own, key=str)}
        self._timing = compiled.program.placement.to_weights(timing_of(frozen.embedding or {}))
        self._settled = None if lent else self._settled_parts(None)  # what another branch trains changes every step

    @property
    def _reads_embedding(self) -> bool:
        """Something after the trunk reads the embedding, were it frozen."""
        consistency = self._compiled.program.config.objective.consistency
        return not self._signature.head_has_table or consistency > 0.0

    def update(
        self, state: TrainState, batch: Batch, activations: Array | None, scalars: tuple[Any, ...]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update of what the branch trains; `scalars` are the last two arguments of a step."""
        step, settled = self._compiled.step(self._signature), self._settled or self._settled_parts(state)
        if self._names == self._all_names:
            return step(state, settled, batch, activations, *scalars)
        parts = split(state, self._all_names)
        own, metrics = step(joined(parts, self._names, state.scaling), settled, batch, activations, *scalars)
        parts |= split(own, self._names)
        return joined(parts, self._all_names, own.scaling), metrics

    def held_out(self, state: TrainState, poll: Callable[[], None]) -> tuple[float, float]:
        """(summed loss in nats, what it is divided by) of the held-out rows; `poll` is called between batches."""
        evaluate, settled = self._compiled.evaluation(self._signature), self._settled or self._settled_parts(state)
        params = joined(split(state, self._all_names), self._names, {}).params
        sums = []
        for batch, activations in self._inputs.held_out_batches(self.branch):
            poll()
            sums.append(evaluate(params, settled, batch, activations))
        total, weight = (float(sum(column)) for column in zip(*sums, strict=True))
        return total, weight

    def _settled_parts(self, state: TrainState | None) -> Params:
        """What the step runs through: only what it needs, so that equal signatures see equal trees."""
        held, branch = self._held, self.branch
        live = {} if state is None else dict(zip(self._phase.live_stacks, state.params["stacks"], strict=True))
        parts: Params = {
            "frozen_stacks": [
                live[stack] if stack in live else held[stack].tree
                for stack, role in branch.body
                if role is not Role.LIVE
            ]
        }
        if branch.head is Role.FROZEN:
            parts["head"] = held["head"].tree
        if branch.embedding is Role.FROZEN:
            embedding = held["embedding"].tree if self._reads_embedding else self._timing
            parts |= {"embedding": embedding} if embedding else {}
        return parts


def update_order(branch: Branch) -> tuple[Name, ...]:
    """The parts that a branch trains in the order of `optimizer.update_parts`; an adapter goes by its stack."""
    lasting = tuple(name for name in branch.live_names if not isinstance(name, int))
    return (*branch.adapter_stacks, *sorted(lasting), *branch.live_stacks)


def held_out_figures(
    branches: Sequence[Branch], sums: Sequence[tuple[float, float]], bytes_of: Callable[[Task], int]
) -> dict[str, float]:
    """What is told of held-out rows: the loss, of a causal task also in bits per byte; several branches each besides.

    The loss of several bands is the sum over them, each times its width, which makes it the bound; fixed levels and
    tasks are averaged, by their shares.
    """
    losses = [total / max(weight, 1.0) for total, weight in sums]
    if len(branches) == 1:
        result = {"loss": losses[0]}
        if branches[0].task.objective == "clm":
            result["bits_per_byte"] = sums[0][0] / np.log(2).item() / max(bytes_of(branches[0].task), 1)
        return result
    widths = [0.0 if branch.band is None else branch.band[1] - branch.band[0] for branch in branches]
    shares = [branch.share for branch in branches]
    factors = widths if all(widths) else [share / sum(shares) for share in shares]
    names = [
        branch.task.objective if branch.band is None else f"band_{number}" for number, branch in enumerate(branches)
    ]
    total = sum(factor * loss for factor, loss in zip(factors, losses, strict=True))
    return {"loss": total, **dict(zip(names, losses, strict=True))}
