"""What a phase takes of each device at each of its moments: while it begins, caches, trains, evaluates and settles.

The programs' own needs are counted in `train/footprint.py`; this adds what lies beside them: parts of other branches,
optimiser state, a recomputed trunk, the cache or its chunks on their way.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable

from stackwise_jax.checks.training import adapter_ranks
from stackwise_jax.memory import budget
from stackwise_jax.memory.budget import DeviceBytes
from stackwise_jax.memory.tiers import CHUNKS_IN_FLIGHT, CHUNKS_READ
from stackwise_jax.models import weights
from stackwise_jax.ops.target import Target
from stackwise_jax.schema import RunConfig
from stackwise_jax.train import footprint
from stackwise_jax.train.phases import Branch, Name, Phase, Role, Signature, stack_sizes
from stackwise_jax.train.state import part_names


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """The activation cache as a device sees it.

    Attributes:
      held: bytes of training rows that lie on the device for good.
      chunk, n_chunks: bytes of one that comes and goes instead, and how many there are; 0 where none does.
      held_out: bytes of the held-out rows, which are one chunk.
    """

    held: int = 0
    chunk: int = 0
    n_chunks: int = 0
    held_out: int = 0

    def beside(self, chunks: int) -> DeviceBytes:
        """With up to so many chunks on the device."""
        return DeviceBytes(cache=self.held + self.chunk * min(chunks, self.n_chunks) + self.held_out)


def phase_moments(
    config: RunConfig,
    phase: Phase,
    signatures: tuple[Signature, ...],
    carried: Iterable[Name],
    cache: CacheBytes,
    target: Target,
) -> dict[str, DeviceBytes]:
    """The memory of a phase on each device, moment by moment.

    Args:
      signatures: of its branches.
      carried: names of the parts that the phase before leaves live.
      target: the kind of device that it is planned for.
    """
    own = _Phase(config, phase, signatures)
    moments = {"beginning": own.beginning(set(carried))}
    if phase.cached:
        moments["caching"] = own.caching(target) + cache.beside(CHUNKS_IN_FLIGHT)
    moments |= {"training": own.training(target), "evaluating": own.evaluating(target)}
    moments["settling"] = own.settling()
    reading = cache.beside(CHUNKS_READ) if phase.cached else DeviceBytes()
    return {
        name: _on_each_device(config, need if name == "caching" else need + reading) for name, need in moments.items()
    }


@dataclasses.dataclass(frozen=True)
class _Phase:
    config: RunConfig
    phase: Phase
    signatures: tuple[Signature, ...]

    @functools.cached_property
    def _own(self) -> RunConfig:
        return footprint.comparable(self.config)

    def beginning(self, carried: set[Name]) -> DeviceBytes:
        """While new parts are drawn, in float32, beside those that are there already."""
        there = _sum(self._part(name) for name in part_names(self.phase) if name in carried)
        most = there
        for name in part_names(self.phase):
            if name in carried:
                continue
            done = self._part(name)
            drawn = DeviceBytes(weights=4 * self._count(name))
            drawing = drawn if drawn.weights == done.weights else drawn + DeviceBytes(gathered=done.weights)
            there, most = there + done, max(most, there + drawing, there + done, key=_total)
        return most

    def caching(self, target: Target) -> DeviceBytes:
        """While rows pass through the embedding or a frozen stack, beside a live part that waits."""
        branch = next(branch for branch in self.phase.branches if branch.cached)
        needs = [DeviceBytes(head=self._embedding_bytes(), activations=budget.hidden_bytes(self.config))]
        if branch.trunk:
            blocks = stack_sizes(self.config)[branch.trunk[-1]]
            needs.append(footprint.passing_bytes(self._own, branch.task, blocks, target))
        return max(needs, key=_total) + self._state(self.phase)

    def training(self, target: Target) -> DeviceBytes:
        """During an update of the branch that needs most."""
        needs = []
        for branch, sig in self._branches():
            resting = self._state(self.phase, besides=branch) + self._settled(branch)
            needs.append(footprint.training_bytes(self._own, sig, target) + resting)
        return max(needs, key=_total)

    def evaluating(self, target: Target) -> DeviceBytes:
        """During a held-out batch, which is no micro-batch."""
        needs = []
        for branch, sig in self._branches():
            resting = self._state(self.phase, besides=branch) + self._settled(branch)
            optimizer = DeviceBytes(optimizer=self._state(branch).optimizer)
            needs.append(footprint.evaluation_bytes(self._own, sig, target) + resting + optimizer)
        return max(needs, key=_total)

    def settling(self) -> DeviceBytes:
        """While a frozen copy of a stack is made."""
        stored = [self._stored(name) for name in self.phase.settles if isinstance(name, int)]
        merged = 0
        if self.config.training.adapters.merge and self.phase.adapter_stacks:
            merged = max(8 * self._count(stack) for stack in self.phase.adapter_stacks)  # in float32, before and after
        return self._state(self.phase) + DeviceBytes(frozen=max(stored, default=0), gathered=merged)

    def _branches(self) -> Iterable[tuple[Branch, Signature]]:
        return zip(self.phase.branches, self.signatures, strict=True)

    def _state(self, owner: Phase | Branch, besides: Branch | None = None) -> DeviceBytes:
        """Live parts with their optimiser state, but for those that a branch trains."""
        left_out = set() if besides is None else set(part_names(besides))
        return _sum(self._part(name) for name in part_names(owner) if name not in left_out)

    def _settled(self, branch: Branch) -> DeviceBytes:
        """What other branches run through, and a trunk that is recomputed, with the embedding before it."""
        uncached = [own for own in self.phase.branches if own.reads_activations and not own.cached]
        stacks = {stack for own in uncached for stack in own.trunk}
        stacks |= {stack for own in self.phase.branches for stack, role in own.body if role is not Role.LIVE}
        stacks -= {stack for stack, _ in branch.body} | set(self.phase.live_stacks)
        table = self._embedding_bytes() if uncached else 0
        return DeviceBytes(frozen=sum(self._stored(stack) for stack in stacks), head=table)

    def _stored(self, stack: int) -> int:
        return stack_sizes(self.config)[stack] * budget.stored_block_bytes(self.config)

    def _embedding_bytes(self) -> int:
        return 4 * weights.count(weights.embedding_table(self.config.model))

    def _count(self, name: Name) -> int:
        """Parameters of a part."""
        return footprint.part_size(self._own, *self._kind(name))

    def _part(self, name: Name) -> DeviceBytes:
        own, moments = footprint.part_bytes(self._own, *self._kind(name))
        return DeviceBytes(weights=own, optimizer=moments)

    def _kind(self, name: Name) -> tuple[str, int, bool, int]:
        """As `footprint.part_bytes` takes it."""
        has_table, sizes = self.signatures[0].head_has_table, stack_sizes(self.config)
        if isinstance(name, int):
            return "stack", sizes[name], has_table, 0
        if name in ("embedding", "head"):
            return name, 0, has_table, 0
        stack = int(name.removeprefix("adapter_"))
        return "adapter", sizes[stack], has_table, adapter_ranks(self.config.training.adapters, len(sizes))[stack]


def _total(need: DeviceBytes) -> int:
    return need.total


def _sum(needs: Iterable[DeviceBytes]) -> DeviceBytes:
    return functools.reduce(operator.add, needs, DeviceBytes())


def _on_each_device(config: RunConfig, need: DeviceBytes) -> DeviceBytes:
    """A device's share where a mesh divides matrices and the cache; what is whole while it is used comes besides."""
    mesh = config.mesh
    if mesh.n_devices == 1:
        return need
    table = weights.block_table(config.model)
    share = budget.parameters_per_device(table, mesh.fsdp) / weights.count(table)
    parts = {name: round(share * getattr(need, name)) for name in ("weights", "optimizer", "gradients", "frozen")}
    gathered = need.gathered if mesh.fsdp == 1 else max(need.gathered, budget.gathered_bytes(config))
    return dataclasses.replace(need, **parts, gathered=gathered, cache=need.cache // mesh.n_devices)
