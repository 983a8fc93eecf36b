"""What training changes and what it has settled, part by part, and where the parts of a phase come from.

In a `TrainState` parts are "embedding", "head", "stacks" (the live stacks in path order) and "adapters". Between phases
only what stays live is in it; a phase adds the rest when it begins: from the shelf, from a frozen copy, made from a
stack that is there, or drawn.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.checks.training import adapter_ranks
from stackwise_jax.memory.budget import tree_bytes
from stackwise_jax.memory.fingerprint import named_leaves
from stackwise_jax.memory.placement import make_placement
from stackwise_jax.memory.precision import as_master, from_storage, to_storage
from stackwise_jax.models.adapters import attach, init_adapter
from stackwise_jax.models.growth import grow, grow_moments
from stackwise_jax.models.rack import init_embedding, init_head, init_rack_stack
from stackwise_jax.models.stack import placed
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.optimizer import init_part, make_transforms
from stackwise_jax.train.optimizer_state import in_stream
from stackwise_jax.train.phases import Branch, Name, Phase, stack_sizes
from stackwise_jax.types import Key, Params

# Stream of the run's key that adapters are drawn from (see train/step.py and train/optimizer.py for others).
ADAPTER_STREAM = 17


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Exactly what a train step takes and returns, donated.

    Attributes:
      params: master weights of the live parts, float32 but for matrices of stacks where `precision.weights` says so.
      optimizer: optimiser state with the same parts.
      scaling: of the loss, where something is computed in fp16 (`train/scaling.py`); else empty.
    """

    params: Params
    optimizer: Params
    scaling: Params = dataclasses.field(default_factory=dict)


Parts = dict[Name, tuple[Any, Any]]
"""(weights, optimiser state) of live parts by name; an adapter's name is that of `adapter_name`."""


def adapter_name(stack: int) -> str:
    """The name of the adapter of a stack among parts."""
    return f"adapter_{stack:04d}"


def part_names(owner: Phase | Branch) -> tuple[Name, ...]:
    """What a phase, or one of its branches, trains: names in the order of a `TrainState`."""
    return (*owner.live_names, *map(adapter_name, owner.adapter_stacks))


def split(state: TrainState, names: Iterable[Name]) -> Parts:
    """The parts of a state that holds those of `names`."""
    left = {
        kind: iter(zip(state.params[kind], state.optimizer[kind], strict=True)) for kind in _LISTS & set(state.params)
    }
    return {
        name: next(left[kind]) if (kind := _kind(name)) in _LISTS else (state.params[kind], state.optimizer[kind])
        for name in names
    }


def joined(parts: Parts, names: Iterable[Name], scaling: Params) -> TrainState:
    """The state that holds the parts of `names`."""
    params: Params = {}
    optimizer: Params = {}
    for name in names:
        weights, moments = parts[name]
        if (kind := _kind(name)) in _LISTS:
            params.setdefault(kind, []).append(weights)
            optimizer.setdefault(kind, []).append(moments)
        else:
            params[kind], optimizer[kind] = weights, moments
    return TrainState(params, optimizer, scaling)


_LISTS = {"stacks", "adapters"}


def _kind(name: Name) -> str:
    """Where in a state a part lies."""
    if isinstance(name, int):
        return "stacks"
    return "adapters" if name.startswith("adapter_") else name


class HeldStacks(MutableMapping[int, Params]):
    """Frozen stacks by number, in host memory as far as that is wanted; the others are read when they are asked for.

    A rack of 80 large stacks does not fit into the memory of the host whose card trains it, and a cached phase needs
    the newest alone.
    """

    def __init__(self) -> None:
        self._trees: dict[int, Params | None] = {}  # None: on the disk only
        self._read: dict[int, Callable[[], Params]] = {}

    def hold(self, number: int, tree: Params, read: Callable[[], Params] | None) -> None:
        """Takes a stack in; `read` reads it from the disk again, once it is there."""
        self._trees[number] = tree
        self._read.pop(number, None)
        if read is not None:
            self._read[number] = read

    def release(self, held_bytes: int | float, *, unwritten: Collection[int] = ()) -> None:
        """Lets the lowest numbers go until those that stay take at most `held_bytes`.

        Args:
          unwritten: stacks that cannot be read from the disk yet, which stay.
        """
        sizes = {number: tree_bytes(tree) for number, tree in self._trees.items() if tree is not None}
        left = sum(sizes.values())
        for number in sorted(set(sizes) & set(self._read) - set(unwritten)):
            if left <= held_bytes:
                return
            self._trees[number] = None
            left -= sizes[number]

    def __getitem__(self, number: int) -> Params:
        tree = self._trees[number]
        return self._read[number]() if tree is None else tree

    def __setitem__(self, number: int, tree: Params) -> None:
        self.hold(number, tree, None)

    def __delitem__(self, number: int) -> None:
        del self._trees[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._trees)

    def __len__(self) -> int:
        return len(self._trees)


@dataclasses.dataclass
class Frozen:
    """The settled parts of the rack, as stored, on the host, and the digest of each.

    Digests are by name: "embedding", "head", or a stack's number.

    Attributes:
      stacks: by number; some may lie on the disk only.
      adapters: of stacks, beside them.
      shelves: by name, (weights, moments) of parts that a later phase trains on, as {"params", "optimizer"}.
    """

    embedding: Params | None = None
    stacks: HeldStacks = dataclasses.field(default_factory=HeldStacks)
    head: Params | None = None
    adapters: dict[int, Params] = dataclasses.field(default_factory=dict)
    shelves: dict[str, Params] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def keep(self, kind: str, name: str, tree: Params, digest: str, read: Callable[[], Params] | None = None) -> None:
        """Takes a part in, on the host, with its `tree_digest`; `kind` is an attribute of this class.

        Args:
          read: of a stack, reads it from the disk again, once it is there.
        """
        if kind == "shelves":
            self.shelves[name] = tree
            return
        if kind == "adapters":
            self.adapters[int(name)] = tree
            return
        self.digests[name] = digest
        if kind == "stacks":
            self.stacks.hold(int(name), tree, read)
        else:
            setattr(self, kind, tree)

    def part(self, name: Name) -> Params | None:
        """The frozen copy of a part; None: there is none."""
        return self.stacks.get(name) if isinstance(name, int) else getattr(self, name)

    def rack(self, alpha: float) -> Params:
        """The rack of all that is settled, adapters attached."""
        stacks = [
            attach(tree, self.adapters[stack], alpha) if stack in self.adapters else tree
            for stack, tree in sorted(self.stacks.items())
        ]
        return {"embedding": self.embedding, "stacks": stacks, "head": self.head}


class PartSource:
    """Makes live parts of a run: fresh ones, and those of a phase that begins."""

    def __init__(self, config: RunConfig, key: Key) -> None:
        self.config, self.key = config, key
        self._place = make_placement(config.mesh)
        self._transforms = make_transforms(config, scales_head=False)  # its rates are no matter of the state

    def begin(self, phase: Phase, carried: Parts, frozen: Frozen, *, head_has_table: bool) -> Parts:
        """What a phase trains, from what the one before left live and what is settled; empties shelves it uses."""
        parts: Parts = {}
        made_from, progressive = dict(phase.grows), self.config.training.progressive
        for name in part_names(phase):
            if name in carried:
                parts[name] = carried[name]
            elif str(name) in frozen.shelves:
                shelf = self._place.to_weights(frozen.shelves.pop(str(name)))
                parts[name] = (shelf["params"], shelf["optimizer"])
            elif name in made_from:
                parts[name] = self._grown(carried[made_from[name]], phase.operator, name)
            elif _kind(name) != "adapters" and (settled := frozen.part(name)) is not None:
                parts[name] = self._thawed(settled, name)
            else:
                silent = isinstance(name, int) and bool(frozen.stacks) and progressive.new_stack == "silent"
                parts[name] = self._place.build(lambda own=name, s=silent: self.fresh(own, head_has_table, silent=s))
        return parts

    def fresh(self, name: Name, head_has_table: bool, *, silent: bool = False) -> tuple[Any, Any]:
        """A part as it is drawn from the run's key, with fresh optimiser state; a `silent` stack adds nothing yet."""
        params = self._drawn(name, head_has_table)
        return self._with_moments(name, grow(params, "zero_output", self.config.model) if silent else params)

    def _drawn(self, name: Name, head_has_table: bool) -> Params:
        config, model, sizes = self.config, self.config.model, stack_sizes(self.config)
        if isinstance(name, int):
            draw = jax.jit(init_rack_stack, static_argnums=(1, 3))
            return as_master(draw(self.key, model, sum(sizes[:name]), sizes[name]), config.precision.weights)
        if name == "embedding":
            return jax.jit(init_embedding, static_argnums=1)(self.key, model)
        if name == "head":
            own_table = dataclasses.replace(model, ties_embedding=not head_has_table)
            return jax.jit(init_head, static_argnums=1)(self.key, own_table)
        stack, adapters = int(name.removeprefix("adapter_")), config.training.adapters
        rank = adapter_ranks(adapters, len(sizes))[stack]
        key = jax.random.fold_in(self.key, ADAPTER_STREAM)
        return init_adapter(key, model, sum(sizes[:stack]), sizes[stack], rank=rank, targets=adapters.targets)

    def _thawed(self, settled: Params, name: Name) -> tuple[Any, Any]:
        """A settled part that is trained again and whose own weights were not laid aside."""

        def thaw(tree: Params) -> tuple[Any, Any]:
            params = from_storage(tree, jnp.float32)
            params = as_master(params, self.config.precision.weights) if isinstance(name, int) else params
            return self._with_moments(name, params)

        return self._place.build(thaw, settled)

    def _grown(self, source: tuple[Any, Any], operator: str, name: int) -> tuple[Any, Any]:
        """A new stack made from one that is live, with moments made from its moments."""
        model = self.config.model

        def make(params: Params, moments: Any) -> tuple[Any, Any]:
            stack = placed(grow(params, operator, model), model, sum(stack_sizes(self.config)[:name]))
            return stack, in_stream(grow_moments(moments, operator), name)

        return self._place.build(make, *source)

    def _with_moments(self, name: Name, params: Params) -> tuple[Params, Any]:
        kind = _kind(name)
        moments = init_part(self._transforms, kind, params)
        index = name if isinstance(name, int) else 0
        return params, in_stream(moments, index) if kind in _LISTS else moments

    def snapshot_shape(
        self, phases: tuple[Phase, ...], index: int, *, inside: bool, head_has_table: bool, scaling: Params
    ) -> TrainState:
        """Shapes and dtypes of a snapshot taken inside a phase, or at its beginning: then of what it was left."""
        names = part_names(phases[index]) if inside else carried_names(phases, index)

        def draw() -> TrainState:
            return joined({name: self.fresh(name, head_has_table) for name in names}, names, scaling)

        return jax.eval_shape(draw)


def carried_names(phases: tuple[Phase, ...], index: int) -> tuple[Name, ...]:
    """What phase `index` trains on from the phase before it, in the order of a `TrainState`."""
    before = set(part_names(phases[index - 1])) if index else set()
    return tuple(name for name in part_names(phases[index]) if name in before)


def part_shape(config: RunConfig, key: Key, kind: str, name: str) -> Any:
    """Shapes and dtypes of a frozen part as stored; a frozen or tapped head has been untied where it ever is."""
    model = config.model
    has_table = not model.ties_embedding or config.training.head == "copy"
    if kind == "stacks":
        size = stack_sizes(config)[int(name)]
        return jax.eval_shape(lambda: to_storage(init_rack_stack(key, model, 0, size), config.precision.trunk))
    if kind == "embedding":
        return jax.eval_shape(lambda: init_embedding(key, model))
    source = PartSource(config, key)
    if kind == "head":
        return jax.eval_shape(lambda: source.fresh("head", has_table)[0])
    if kind == "adapters":
        return jax.eval_shape(lambda: source.fresh(adapter_name(int(name)), has_table)[0])
    part = int(name) if name.isdigit() else name

    def shelf() -> Params:
        params, moments = source.fresh(part, has_table)
        return {"params": params, "optimizer": moments}

    return jax.eval_shape(shelf)


def untie_head(config: RunConfig, parts: Parts) -> Parts:
    """Gives the head its own copy of the tied table; its norm keeps its moments, the table starts with none."""
    return {**parts, "head": make_placement(config.mesh).build(lambda old: _untie_head(config, old), parts)}


def _untie_head(config: RunConfig, parts: Parts) -> tuple[Params, Any]:
    old, moments = parts["head"]
    head = {**old, "table": jnp.copy(parts["embedding"][0]["tokens"])}
    transforms = make_transforms(config, scales_head=True)
    return head, _carry_over(moments, init_part(transforms, "head", head))


def _carry_over(old: Any, new: Any) -> Any:
    """Takes every array of `new` from the array of the same name in `old`, where there is one."""
    known = named_leaves(old)
    names = list(named_leaves(new))
    leaves = [known.get(name, leaf) for name, leaf in zip(names, jax.tree.leaves(new), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(new), leaves)
