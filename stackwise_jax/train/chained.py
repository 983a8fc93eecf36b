"""The chained execution of a path: a Python-driven chain of per-stack programs instead of one compiled step.

Forward stack by stack keeping the boundary activations, head and loss, then backward stack by stack, each recomputing
its own inside; then one update per part. Compiled once per distinct stack shape whatever the depth. Its gradients
equal the fused step's (a law of the tests); it takes and returns the same things.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from stackwise_jax.train.chain_programs import ChainPrograms
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.scaling import loss_scale
from stackwise_jax.train.state import TrainState
from stackwise_jax.train.step import StepFunction, body_parts, join_parts
from stackwise_jax.types import AnyArray, Batch, Key, Params


class ChainedGradients:
    """Callable as what `make_gradients` returns, driven from Python."""

    def __init__(self, programs: ChainPrograms, signature: Signature) -> None:
        self.programs, self.signature = programs, signature

    def __call__(
        self,
        live: Params,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        key: Key | None,
        offset: Array | None = None,
        scale: Array | None = None,
    ) -> tuple[Params, Array, Array]:
        program, programs = self.programs.program, self.programs
        pieces, place = program.config.training.accumulation_steps, program.placement
        total: Any = None
        for index in range(pieces):
            batch_piece, activation_piece = jax.tree.map(
                lambda leaf, i=index: leaf[i * (leaf.shape[0] // pieces) : (i + 1) * (leaf.shape[0] // pieces)],
                (batch, activations),
            )
            if pieces > 1:
                batch_piece, activation_piece = place.to_rows((batch_piece, activation_piece))
            own_key = key if key is None or pieces == 1 else jax.random.fold_in(key, index)
            piece = self._one_piece(live, frozen, batch_piece, activation_piece, own_key, offset, scale)
            if pieces > 1:
                piece = programs.widen(piece)  # sums over pieces are float32, whatever the weights are
            total = piece if total is None else programs.add(total, piece)
        return total

    def _one_piece(
        self,
        live: Params,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        key: Key | None,
        offset: Array | None,
        scale: Array | None,
    ) -> tuple[Params, Array, Array]:
        programs, signature = self.programs, self.signature
        roles = [role for _, role in signature.body]
        parts = join_parts(live, frozen)
        example = programs.prepare(signature.task, batch)
        context = programs.program.context(signature.task, example, parts.get("embedding", {}))
        keys = [None] * (len(roles) + 1) if key is None else list(jax.random.split(key, len(roles) + 1))
        stacks = list(zip(roles, body_parts(signature, parts), keys[1:], strict=True))

        x = programs.embed(parts["embedding"], example, keys[0]) if activations is None else activations
        boundaries = [x]
        for role, own, stack_key in stacks:
            boundaries.append(programs.forward(role, *own, boundaries[-1], context, stack_key)[0])

        near_head = {name: live[name] for name in ("embedding", "head") if name in live}
        settled = {name: frozen[name] for name in ("embedding", "head") if name in frozen}
        loss, (grads, pulled) = programs.head(
            near_head, settled, boundaries.pop(), example, context.time, offset, scale
        )
        own_grads: dict[Role, list[Params]] = {Role.LIVE: [], Role.ADAPTER: [], Role.FROZEN: []}
        penalised = example.revealed is not None
        asked = (example.weight, scale)
        for role, own, stack_key in reversed(stacks):
            x = boundaries.pop()  # and what the last turn held of them is free
            if role is Role.LIVE and penalised:
                penalised = False
                out, _ = programs.forward(role, *own, x, context, stack_key)
                pulled = programs.add(pulled, programs.penalty(out, parts["embedding"], example, scale))
            stack_grads, pulled = programs.pull(role, *own, x, context, stack_key, pulled, asked)
            own_grads[role].insert(0, stack_grads)
        grads |= {"stacks": own_grads[Role.LIVE], "adapters": own_grads[Role.ADAPTER]}
        if "embedding" in live:
            through = programs.pull_embedding(live["embedding"], example, keys[0], pulled)
            grads["embedding"] = programs.add(grads["embedding"], through)
        return {name: grads[name] for name in live}, loss, example.weight


def make_chained_step(programs: ChainPrograms, signature: Signature) -> StepFunction:
    """Builds the chained step of a signature; same arguments and results as `make_train_step`."""
    gradients, program = ChainedGradients(programs, signature), programs.program

    def train_step(
        state: TrainState,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        fractions: Float[AnyArray, "P"],
        step: Int[AnyArray, ""],
    ) -> tuple[TrainState, dict[str, Array]]:
        draws = (program.dropout_key(step), program.loss_offset(step), loss_scale(state.scaling))
        grads, total, weight = gradients(state.params, frozen, batch, activations, *draws)
        parts = [(name, *part) for name in sorted(grads) for part in _parts(name, state.params, state.optimizer, grads)]
        squares = [programs.square(own_grads) for *_, own_grads in parts]
        factor, is_finite, apart, scaling, metrics = programs.judge(squares, total, weight, state.scaling, fractions)
        params: Params = {name: [] for name in state.params}
        states: Params = {name: [] for name in state.params}
        for (name, *part), fraction in zip(parts, apart, strict=True):
            scales_head = name == "head" and signature.embedding is Role.FROZEN
            updated = programs.update(name, scales_head, *part, factor, fraction, is_finite)
            params[name].append(updated[0])
            states[name].append(updated[1])
        for name, part in state.params.items():
            if not isinstance(part, list):
                (params[name],), (states[name],) = params[name], states[name]
        return TrainState(params, states, scaling), metrics

    return train_step


def _parts(name: str, *trees: Params) -> list[tuple[Any, ...]]:
    """Of a kind of part what each tree has of each, in the order of `optimizer.update_parts`."""
    own = [tree[name] for tree in trees]
    return list(zip(*own, strict=True)) if isinstance(own[0], list) else [tuple(own)]


def make_chained_evaluation(programs: ChainPrograms, signature: Signature) -> Callable[..., tuple[Array, Array]]:
    """Builds the chained evaluation of a signature; same arguments and results as `make_evaluation`."""

    def evaluate(live: Params, frozen: Params, batch: Batch, activations: Array | None) -> tuple[Array, Array]:
        parts = join_parts(live, frozen)
        example = programs.prepare(signature.task, batch)
        context = programs.program.context(signature.task, example, parts.get("embedding", {}))
        x = programs.embed(parts["embedding"], example, None) if activations is None else activations
        for (_, role), own in zip(signature.body, body_parts(signature, parts), strict=True):
            x, _ = programs.forward(role, *own, x, context, None)
        near_head = {name: parts[name] for name in ("embedding", "head") if name in parts}
        return programs.loss(near_head, x, example, context.time), example.weight

    return evaluate
