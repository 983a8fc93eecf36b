"""The step: from a batch to an update of the live part, compiled once per phase signature.

Pure functions of arrays; the loop owns every side effect. `frozen` holds what the live part runs through and never
changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from stackwise_jax.models.rack import apply_head_norm, output_table
from stackwise_jax.ops.loss import cross_entropy
from stackwise_jax.train import optimizer
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.scaling import keep_where, loss_scale, next_scaling, scaling_metrics
from stackwise_jax.train.state import TrainState
from stackwise_jax.types import AnyArray, Batch, Example, Key, Params

StepFunction = Callable[..., tuple[TrainState, dict[str, Array]]]
"""(state, frozen, batch, activations | None, fractions, step) -> (state, metrics)."""


def body_parts(signature: Signature, parts: Params) -> list[tuple[Params, Params]]:
    """(what is trained, what is settled) of each stack of a path's body; nothing is an empty tree."""
    live, adapters, settled = (iter(parts[name]) for name in ("stacks", "adapters", "frozen_stacks"))
    take = {
        Role.LIVE: lambda: (next(live), {}),
        Role.FROZEN: lambda: ({}, next(settled)),
        Role.ADAPTER: lambda: (next(adapters), next(settled)),
    }
    return [take[role]() for _, role in signature.body]


def run_path(
    program: Program,
    signature: Signature,
    parts: Params,
    example: Example,
    activations: Float[Array, "B T D"] | None,
    key: Key | None,
) -> tuple[Float[Array, "B T E"], Float[Array, ""]]:
    """Runs the body of a path, from tokens or from the trunk's output, up to the output table.

    Returns:
      What meets the output table, and the summed penalties of `consistency` and of the routers of live stacks (0
      where there are none).
    """
    model, embedding = program.config.model, parts.get("embedding", {})
    context = program.context(signature.task, example, embedding)
    keys = [None] * (len(signature.body) + 1) if key is None else list(jax.random.split(key, len(signature.body) + 1))
    if activations is None:
        x = program.apply_embedding(embedding, example.inputs, example.positions, keys[0])
    else:
        x = activations
    roles = [role for _, role in signature.body]
    last_live = max((number for number, role in enumerate(roles) if role is Role.LIVE), default=None)
    penalty = jnp.zeros(())
    for number, (role, own, stack_key) in enumerate(zip(roles, body_parts(signature, parts), keys[1:], strict=True)):
        x, of_routers = program.apply_stack(role, *own, x, context, stack_key)
        if of_routers is not None:  # a mean, beside a sum that is divided by the weight later
            penalty = penalty + example.weight * of_routers
        if number == last_live and example.revealed is not None:
            penalty = consistency(program, embedding, x, example)
    return apply_head_norm(parts["head"], x.astype(program.dtype), model, context.time), penalty


def consistency(program: Program, embedding: Params, x: Float[Array, "B T D"], example: Example) -> Float[Array, ""]:
    """How far what a band puts out is from E(token) where the next band sees the token.

    The sum over revealed places of mean((x / rms(x) - e / rms(e))**2), e the token's embedding, which takes no
    gradient; times `objective.consistency`.
    """
    clean = program.apply_embedding(embedding, example.targets, example.positions, None)
    wide = [a.astype(jnp.float32) for a in (x, jax.lax.stop_gradient(clean))]
    unit, target = (a * jax.lax.rsqrt(jnp.mean(a * a, axis=-1, keepdims=True) + 1e-12) for a in wide)
    distance = jnp.mean(jnp.square(unit - target), axis=-1)
    assert example.revealed is not None
    return program.config.objective.consistency * jnp.sum(jnp.where(example.revealed, distance, 0.0))


def join_parts(live: Params, frozen: Params) -> Params:
    """Live and frozen parts as one tree for `run_path`."""
    return {"stacks": [], "adapters": [], "frozen_stacks": [], **frozen, **live}


def path_loss(
    program: Program,
    signature: Signature,
    live: Params,
    frozen: Params,
    batch: Batch,
    activations: Float[Array, "B T D"] | None,
    key: Key | None,
    offset: Int[Array, ""] | None = None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Returns (summed loss in nats, what it is divided by, penalty to be added in training) of a batch, in float32.

    `offset` and `z_loss` as in `head_loss`.
    """
    parts = join_parts(live, frozen)
    example = program.corrupt(signature.task, batch)
    hidden, penalty = run_path(program, signature, parts, example, activations, key)
    table = output_table(parts["head"], parts.get("embedding", {}))
    return head_loss(program, hidden, table, example, offset, z_loss), example.weight, penalty


def head_loss(
    program: Program,
    hidden: Float[Array, "B T E"],
    table: Float[Array, "V E"],
    example: Example,
    offset: Int[Array, ""] | None = None,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Summed cross-entropy, in chunks of tokens; on several devices each computes that of its own rows.

    Args:
      offset: only the places offset, offset + n, offset + 2 n .. are scored, n being `Program.loss_stride`, and the
        sum is multiplied by n: over offsets drawn uniformly its mean is the whole. None: every place.
      z_loss: as in `cross_entropy`.
    """
    stride = 1 if offset is None else program.loss_stride

    def scored(places: Array) -> Array:
        if offset is None:
            return places
        apart = places.reshape(places.shape[0], -1, stride, *places.shape[2:])
        return jax.lax.dynamic_index_in_dim(apart, offset, axis=2, keepdims=False)

    def summed(table: Array, hidden: Array, targets: Array, weights: Array) -> Float[Array, ""]:
        return cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            targets.reshape(-1),
            weights.reshape(-1),
            chunk_tokens=program.config.training.loss_chunk_tokens,
            z_loss=z_loss,
            asks_everywhere=example.asks_everywhere,
        )

    rows = [scored(places) for places in (hidden, example.targets, example.weights)]
    return stride * program.placement.sum_over_rows(summed, table.astype(program.dtype), *rows)


def make_gradients(program: Program, signature: Signature) -> Callable[..., tuple[Params, Array, Array]]:
    """Returns (live, frozen, batch, activations, key[, offset, scale]) -> (summed gradients, loss and weight).

    With a scale the gradients are those of the loss times it; the loss is not. `model.stability.z_loss` counts in both.
    """
    z_loss = program.config.model.stability.z_loss

    def loss(
        live: Params,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        key: Key | None,
        offset: Array | None,
        scale: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        total, weight, penalty = path_loss(program, signature, live, frozen, batch, activations, key, offset, z_loss)
        asked = total + penalty
        return asked if scale is None else asked * scale, (total, weight)

    grad = jax.value_and_grad(loss, has_aux=True)
    pieces, place = program.config.training.accumulation_steps, program.placement

    def gradients(
        live: Params,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        key: Key | None,
        offset: Array | None = None,
        scale: Array | None = None,
    ) -> tuple[Params, Array, Array]:
        if pieces == 1:
            (_, (total, weight)), grads = grad(live, frozen, batch, activations, key, offset, scale)
            return place.as_weights(grads), total, weight

        def body(carry: Any, piece: Any) -> tuple[Any, None]:
            index, own_batch, own_activations = piece
            own_key = None if key is None else jax.random.fold_in(key, index)
            (_, (total, weight)), grads = grad(live, frozen, own_batch, own_activations, own_key, offset, scale)
            return jax.tree.map(jnp.add, carry, (place.as_weights(grads), total, weight)), None

        split = jax.tree.map(
            lambda leaf: leaf.reshape(pieces, leaf.shape[0] // pieces, *leaf.shape[1:]), (batch, activations)
        )
        split = place.as_rows(split, axis=1)
        zero = (place.as_weights(optimizer.widened(jax.tree.map(jnp.zeros_like, live))), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(body, zero, (jnp.arange(pieces), *split))[0]

    return gradients


def make_train_step(program: Program, signature: Signature) -> StepFunction:
    """Compiles the fused step of a signature: one executable from batch to update, state donated.

    The returned function takes (state, frozen, batch, activations, fractions, step): `activations` are the trunk's
    output or None where the path starts from tokens, `fractions` what the learning rate of each part is multiplied by
    (one a part, in the order of `optimizer.update_parts`), `step` the run's update count for dropout. Its metrics are
    scalars on the device: loss (nats per token that is asked for), gradient_norm, weight; with a scaled loss also those
    of `scaling_metrics`.
    """
    return make_update(program, signature, make_gradients(program, signature))


def make_update(program: Program, signature: Signature, gradients: Callable[..., Any]) -> StepFunction:
    """As `make_train_step`, of gradients from elsewhere that are called as those of `make_gradients` are."""
    transforms = optimizer.make_transforms(program.config, scales_head=signature.embedding is Role.FROZEN)

    @functools.partial(jax.jit, donate_argnums=0)
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
        norm = optimizer.gradient_norm(grads)
        factor, is_finite, scaling, metrics = judge(program, norm, total, weight, state.scaling)
        grads = optimizer.scaled(grads, factor)
        params, states = optimizer.update_parts(transforms, grads, state.optimizer, state.params, fractions)
        if is_finite is not None:
            params, states = keep_where(is_finite, (params, states), (state.params, state.optimizer))
        return program.placement.as_weights(TrainState(params, states, scaling)), metrics

    return train_step


def judge(
    program: Program, norm: Float[Array, ""], total: Float[Array, ""], weight: Float[Array, ""], scaling: Params
) -> tuple[Float[Array, ""], Bool[Array, ""] | None, Params, dict[str, Array]]:
    """What the updates of all parts have in common, in either execution.

    Args:
      norm: global, of the summed gradients.
      total, weight: summed loss, and what it is divided by.

    Returns:
      What gradients are multiplied by, whether they are numbers (None: the loss is not scaled), the loss scaling after
      the step, and the metrics.
    """
    scale = loss_scale(scaling)
    weight = jnp.maximum(weight, 1.0)  # a batch that asks nothing has no gradient, not an undefined one
    divisor = weight if scale is None else weight * scale
    norm = norm / divisor
    factor = optimizer.clip_scale(norm, program.config.optimizer.clip_norm) / divisor
    metrics = {"loss": total / weight, "gradient_norm": norm, "weight": weight}
    if scale is None:
        return factor, None, next_scaling(scaling, norm), metrics
    is_finite = jnp.isfinite(norm)
    return factor, is_finite, next_scaling(scaling, norm), metrics | scaling_metrics(scale, is_finite)


def make_evaluation(program: Program, signature: Signature) -> Callable[..., tuple[Array, Array]]:
    """Compiles (live, frozen, batch, activations) -> (summed loss, summed weight), without dropout."""

    @jax.jit
    def evaluate(live: Params, frozen: Params, batch: Batch, activations: Array | None) -> tuple[Array, Array]:
        return path_loss(program, signature, live, frozen, batch, activations, None)[:2]

    return evaluate
