"""What training changes and what it has settled, part by part, and how fresh parts are drawn.

Parts are "embedding", "head" and "stacks" (the live stacks in path order). Between phases only what stays live is in
the state; a phase adds its stacks when it begins and they leave for the frozen rack when it ends.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.memory.fingerprint import named_leaves
from stackwise_jax.memory.placement import make_placement
from stackwise_jax.memory.precision import as_master, to_storage
from stackwise_jax.models.rack import init_embedding, init_head, init_rack_stack
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.curriculum import Phase, Role, Signature, stack_sizes
from stackwise_jax.train.optimizer import init_part, make_transforms
from stackwise_jax.train.scaling import init_scaling
from stackwise_jax.types import Key, Params


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


@dataclasses.dataclass
class Frozen:
    """The settled parts of the rack, as stored, on the host, and the digest of each.

    Digests are by name: "embedding", "head", or a stack's number.
    """

    embedding: Params | None = None
    stacks: dict[int, Params] = dataclasses.field(default_factory=dict)
    head: Params | None = None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def keep(self, kind: str, name: str, tree: Params, digest: str) -> None:
        """Takes a part in, on the host, with its `tree_digest`; `kind` is "embedding", "stacks" or "head"."""
        self.digests[name] = digest
        if kind == "stacks":
            self.stacks[int(name)] = tree
        else:
            setattr(self, kind, tree)


def fresh_lasting_parts(config: RunConfig, key: Key, phase: Phase, signature: Signature) -> TrainState:
    """Draws what outlasts a phase, embedding and head, with fresh optimiser state, and the first loss scale."""
    return make_placement(config.mesh).build(lambda: _draw_lasting_parts(config, key, phase, signature))


def _draw_lasting_parts(config: RunConfig, key: Key, phase: Phase, signature: Signature) -> TrainState:
    model = config.model
    params: Params = {}
    if phase.embedding is Role.LIVE:
        params["embedding"] = jax.jit(init_embedding, static_argnums=1)(key, model)
    if phase.head is Role.LIVE:
        own_table = dataclasses.replace(model, ties_embedding=not signature.head_has_table)
        params["head"] = jax.jit(init_head, static_argnums=1)(key, own_table)
    return dataclasses.replace(_with_optimizer(config, phase, params), scaling=init_scaling(config))


def fresh_stacks(config: RunConfig, key: Key, phase: Phase) -> TrainState:
    """Draws the live stacks of a phase, with fresh optimiser state; empty for a phase without."""
    if not phase.live_stacks:
        return TrainState({}, {})
    return make_placement(config.mesh).build(lambda: _draw_stacks(config, key, phase))


def _draw_stacks(config: RunConfig, key: Key, phase: Phase) -> TrainState:
    sizes = stack_sizes(config)
    draw = jax.jit(init_rack_stack, static_argnums=(1, 3))
    stacks = [draw(key, config.model, sum(sizes[:i]), sizes[i]) for i in phase.live_stacks]
    stacks = [as_master(stack, config.precision.weights) for stack in stacks]
    return _with_optimizer(config, phase, {"stacks": stacks})


def join_states(first: TrainState, second: TrainState) -> TrainState:
    """The parts of both."""
    params, optimizer = {**first.params, **second.params}, {**first.optimizer, **second.optimizer}
    return TrainState(params, optimizer, {**first.scaling, **second.scaling})


def snapshot_shape(config: RunConfig, key: Key, phase: Phase, signature: Signature, *, inside: bool) -> TrainState:
    """Shapes and dtypes of a snapshot taken inside a phase, or at its beginning (without its stacks)."""

    def draw() -> TrainState:
        lasting = _draw_lasting_parts(config, key, phase, signature)
        has_stacks = inside and phase.live_stacks
        return join_states(lasting, _draw_stacks(config, key, phase)) if has_stacks else lasting

    return jax.eval_shape(draw)


def part_shape(config: RunConfig, key: Key, kind: str, name: str) -> Any:
    """Shapes and dtypes of a frozen part as stored; a frozen or tapped head has been untied where it ever is."""
    model = config.model
    if kind == "stacks":
        size = stack_sizes(config)[int(name)]
        return jax.eval_shape(lambda: to_storage(init_rack_stack(key, model, 0, size), config.precision.trunk))
    if kind == "embedding":
        return jax.eval_shape(lambda: init_embedding(key, model))
    own_table = dataclasses.replace(model, ties_embedding=model.ties_embedding and config.training.head != "copy")
    return jax.eval_shape(lambda: init_head(key, own_table))


def untie_head(config: RunConfig, state: TrainState) -> TrainState:
    """Gives the head its own copy of the tied table; its norm keeps its moments, the table starts with none."""
    return make_placement(config.mesh).build(lambda old: _untie_head(config, old), state)


def _untie_head(config: RunConfig, state: TrainState) -> TrainState:
    head = {**state.params["head"], "table": jnp.copy(state.params["embedding"]["tokens"])}
    transforms = make_transforms(config, scales_head=True)
    moments = _carry_over(state.optimizer["head"], init_part(transforms, "head", head))
    return TrainState({**state.params, "head": head}, {**state.optimizer, "head": moments}, state.scaling)


def _with_optimizer(config: RunConfig, phase: Phase, params: Params) -> TrainState:
    transforms = make_transforms(config, scales_head=phase.embedding is Role.FROZEN)
    return TrainState(params, {name: init_part(transforms, name, part) for name, part in params.items()})


def _carry_over(old: Any, new: Any) -> Any:
    """Takes every array of `new` from the array of the same name in `old`, where there is one."""
    known = named_leaves(old)
    names = list(named_leaves(new))
    leaves = [known.get(name, leaf) for name, leaf in zip(names, jax.tree.leaves(new), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(new), leaves)
