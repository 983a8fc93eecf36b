"""The chained execution of a path: a Python-driven chain of per-stack programs instead of one compiled step.

Forward stack by stack keeping the boundary activations, head and loss, then backward stack by stack, each recomputing
its own inside; then one update per part. Compiled once per distinct stack shape whatever the depth. Its gradients
equal the fused step's (a law of the tests); it takes and returns the same things.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import apply_head_norm, output_table
from stackwise_jax.train import optimizer
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.scaling import keep_where, loss_scale, next_scaling, scaling_metrics
from stackwise_jax.train.state import TrainState
from stackwise_jax.train.step import StepFunction, body_parts, consistency, head_loss, join_parts
from stackwise_jax.types import AnyArray, Batch, Example, Key, Params


class ChainedGradients:
    """Callable as what `make_gradients` returns, driven from Python; holds the per-stack programs."""

    def __init__(self, program: Program, signature: Signature) -> None:
        self.program, self.signature = program, signature
        self.model = program.config.model
        self._prepare = jax.jit(functools.partial(program.corrupt, signature.task))
        self._penalty = jax.jit(jax.value_and_grad(self._apply_penalty))
        self._embed = jax.jit(self._apply_embedding)
        self._embed_vjp = jax.jit(self._pull_embedding)
        self._forward = jax.jit(self._apply_stack, static_argnums=0)
        self._vjp = jax.jit(self._pull_stack, static_argnums=0)
        self._head = jax.jit(self._pull_head)
        self._widen = jax.jit(optimizer.widened)  # sums over pieces are float32, whatever the weights are
        self._add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)

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
        pieces, place = self.program.config.training.accumulation_steps, self.program.placement
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
                piece = self._widen(piece)
            total = piece if total is None else self._add(total, piece)
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
        roles = [role for _, role in self.signature.body]
        parts = join_parts(live, frozen)
        example = self._prepare(batch)
        context = self.program.context(self.signature.task, example, parts.get("embedding", {}))
        keys = [None] * (len(roles) + 1) if key is None else list(jax.random.split(key, len(roles) + 1))
        stacks = list(zip(roles, body_parts(self.signature, parts), keys[1:], strict=True))

        x = self._embed(parts["embedding"], example, keys[0]) if activations is None else activations
        boundaries = [x]
        for role, own, stack_key in stacks:
            boundaries.append(self._forward(role, *own, boundaries[-1], context, stack_key))

        near_head = {name: live[name] for name in ("embedding", "head") if name in live}
        settled = {name: frozen[name] for name in ("embedding", "head") if name in frozen}
        loss, (grads, pull) = self._head(near_head, settled, boundaries.pop(), example, offset, scale)
        own_grads: dict[Role, list[Params]] = {Role.LIVE: [], Role.ADAPTER: [], Role.FROZEN: []}
        penalised = example.revealed is not None
        for role, own, stack_key in reversed(stacks):
            x = boundaries.pop()
            if role is Role.LIVE and penalised:
                penalised = False
                out = self._forward(role, *own, x, context, stack_key)
                pull = self._add(pull, self._penalty(out, parts["embedding"], example, scale)[1])
            stack_grads, pull = self._vjp(role, *own, x, context, stack_key, pull)
            own_grads[role].insert(0, stack_grads)
        grads |= {"stacks": own_grads[Role.LIVE], "adapters": own_grads[Role.ADAPTER]}
        if "embedding" in live:
            pulled = self._embed_vjp(live["embedding"], example, keys[0], pull)
            grads["embedding"] = self._add(grads["embedding"], pulled)
        grads = {name: grads[name] for name in live}
        return grads, loss, example.weight

    def _apply_embedding(self, params: Params, example: Example, key: Key | None) -> Array:
        return self.program.apply_embedding(params, example.inputs, example.positions, key)

    def _pull_embedding(self, params: Params, example: Example, key: Key | None, pull: Array) -> Params:
        grads = jax.vjp(lambda p: self._apply_embedding(p, example, key), params)[1](pull)[0]
        return self.program.placement.as_weights(grads)

    def _apply_penalty(self, x: Array, embedding: Params, example: Example, scale: Array | None) -> Array:
        penalty = consistency(self.program, embedding, x, example)
        return penalty if scale is None else penalty * scale

    def _apply_stack(
        self, role: Role, live: Params, settled: Params, x: Array, context: Context, key: Key | None
    ) -> Array:
        return self.program.apply_stack(role, live, settled, x, context, key)

    def _pull_stack(
        self, role: Role, live: Params, settled: Params, x: Array, context: Context, key: Key | None, pull: Array
    ) -> tuple[Params, Array]:
        """Gradients of what is trained of a stack (of nothing: nothing), and of its input."""
        place = self.program.placement
        grads, pull = jax.vjp(lambda p, h: self._apply_stack(role, p, settled, h, context, key), live, x)[1](pull)
        return place.as_weights(grads), place.as_rows(pull)

    def _pull_head(
        self, live: Params, frozen: Params, x: Array, example: Example, offset: Array | None, scale: Array | None
    ) -> tuple[Float[Array, ""], tuple[Params, Array]]:
        place = self.program.placement
        grad = jax.value_and_grad(self._apply_head, argnums=(0, 2), has_aux=True)
        (_, loss), (grads, pull) = grad(live, frozen, x, example, offset, scale)
        return loss, (place.as_weights(grads), place.as_rows(pull))

    def _apply_head(
        self, live: Params, frozen: Params, x: Array, example: Example, offset: Array | None, scale: Array | None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(the loss that is differentiated, the loss)."""
        parts = {**frozen, **live}
        time = self.program.context(self.signature.task, example, parts.get("embedding", {})).time
        hidden = apply_head_norm(parts["head"], x.astype(self.program.dtype), self.model, time)
        table = output_table(parts["head"], parts.get("embedding", {}))
        loss = head_loss(self.program, hidden, table, example, offset, self.model.stability.z_loss)
        return loss if scale is None else loss * scale, loss


def make_chained_step(program: Program, signature: Signature) -> StepFunction:
    """Builds the chained step of a signature; same arguments and results as `make_train_step`."""
    gradients = ChainedGradients(program, signature)
    config = program.config.optimizer
    transforms = optimizer.make_transforms(program.config, scales_head=signature.embedding is Role.FROZEN)
    square = jax.jit(lambda tree: optax.tree.norm(optimizer.widened(tree), squared=True))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def update(
        kind: str,
        params: Params,
        state: Any,
        grads: Params,
        factor: Float[Array, ""],
        fraction: Float[AnyArray, ""],
        is_finite: Bool[Array, ""] | None,
    ) -> tuple[Params, Any]:
        grads = optimizer.scaled(grads, factor)
        updated = optimizer.update_part(transforms[kind], grads, state, params, fraction)
        if is_finite is not None:
            updated = keep_where(is_finite, updated, (params, state))
        return program.placement.as_weights(updated)

    def train_step(
        state: TrainState,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        fractions: Float[AnyArray, "P"],
        step: Int[AnyArray, ""],
    ) -> tuple[TrainState, dict[str, Array]]:
        scale = loss_scale(state.scaling)
        draws = (program.dropout_key(step), program.loss_offset(step))
        grads, total, weight = gradients(state.params, frozen, batch, activations, *draws, scale)
        weight = jnp.maximum(weight, 1.0)
        divisor = weight if scale is None else weight * scale
        norm = jnp.sqrt(sum(square(part) for part in _parts(grads))) / divisor
        factor = optimizer.clip_scale(norm, config.clip_norm) / divisor
        is_finite = None if scale is None else jnp.isfinite(norm)
        params: Params = {}
        states: Params = {}
        number = itertools.count()  # of the part, in the order of `optimizer.update_parts`
        for name, part in sorted(state.params.items()):
            if isinstance(part, list):
                triples = zip(part, state.optimizer[name], grads[name], strict=True)
                pairs = [update(name, *triple, factor, fractions[next(number)], is_finite) for triple in triples]
                params[name], states[name] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            else:
                triple = (part, state.optimizer[name], grads[name])
                params[name], states[name] = update(name, *triple, factor, fractions[next(number)], is_finite)
        metrics = {"loss": total / weight, "gradient_norm": norm, "weight": weight}
        if scale is not None:
            metrics |= scaling_metrics(scale, jnp.isfinite(norm))
        return TrainState(params, states, next_scaling(state.scaling, norm)), metrics

    return train_step


def _parts(grads: Params) -> list[Params]:
    """Each part on its own, so that equal stacks share one program."""
    return [part for value in grads.values() for part in (value if isinstance(value, list) else [value])]
