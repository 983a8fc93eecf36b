"""The step: from a batch to an update of the live part, compiled once per phase signature.

Pure functions of arrays; the loop owns every side effect. `frozen` holds what the live part runs through and never
changes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stackwise_jax.data.tokenizer import Tokenizer
from stackwise_jax.memory.placement import Placement, make_placement
from stackwise_jax.memory.precision import DTYPES
from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import apply_embedding, apply_head_norm, output_table, row_context
from stackwise_jax.models.stack import apply_stack
from stackwise_jax.objectives.objective import Corrupt, make_corrupt
from stackwise_jax.ops.loss import cross_entropy
from stackwise_jax.schema import RunConfig
from stackwise_jax.train import optimizer
from stackwise_jax.train.curriculum import Role, Signature
from stackwise_jax.train.scaling import keep_where, loss_scale, next_scaling, scaling_metrics
from stackwise_jax.train.state import TrainState
from stackwise_jax.types import AnyArray, Batch, Example, Key, Params, Vocabulary

# Streams of the run's key that steps draw from (models/rack.py uses 0 to 2).
MASK_STREAM, DROPOUT_STREAM = 3, 4

StepFunction = Callable[..., tuple[TrainState, dict[str, Array]]]
"""(state, frozen, batch, activations | None, fraction, step) -> (state, metrics)."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static that compiled functions close over; one per run.

    Attributes:
      config: the resolved run.
      corrupt: the objective.
    """

    config: RunConfig
    corrupt: Corrupt

    @property
    def placement(self) -> Placement:
        """The run's devices."""
        return make_placement(self.config.mesh)

    @property
    def key(self) -> Key:
        return jax.random.key(self.config.seed)

    @property
    def mask_key(self) -> Key:
        return jax.random.fold_in(self.key, MASK_STREAM)

    def dropout_key(self, step: Int[AnyArray, ""]) -> Key | None:
        if self.config.model.dropout == 0.0:
            return None
        return jax.random.fold_in(jax.random.fold_in(self.key, DROPOUT_STREAM), step)

    @property
    def dtype(self) -> Any:
        """Arithmetic of the embedding, the trunk and the head."""
        return DTYPES[self.config.precision.compute]

    def context(self, rows: Batch | Example) -> Context:
        """What attention needs of rows; segments only where documents are kept apart."""
        segments = rows.segments if self.config.data.isolate_documents else None
        return row_context(self.config.model, segments, rows.positions)

    @property
    def live_dtype(self) -> Any:
        """Arithmetic of live stacks; with fp8 matmuls, of everything between these."""
        precision = self.config.training.progressive.new_stack_precision
        return self.dtype if precision in (None, "fp8") else DTYPES[precision]

    def apply_embedding(
        self, params: Params, inputs: Int[Array, "B T"], positions: Int[Array, "B T"], key: Key | None
    ) -> Float[Array, "B T D"]:
        """Runs the embedding; with a key also its dropout."""
        params = self.placement.as_whole(params)
        x = apply_embedding(params, inputs, positions, self.config.model, dtype=self.dtype, key=key)
        return self.placement.as_rows(x)

    def apply_live_stack(
        self, params: Params, x: Float[Array, "B T D"], context: Context, key: Key | None
    ) -> Float[Array, "B T D"]:
        """Runs a stack that is trained: in its own arithmetic, laid out and kept as the config says."""
        training = self.config.training
        x = apply_stack(
            params,
            x,
            context,
            self.config.model,
            dtype=self.live_dtype,
            in_fp8=training.progressive.new_stack_precision == "fp8",
            remat=training.remat,
            unroll=training.unroll_blocks,
            key=key,
            around=self.placement.around_block(self.live_dtype),
        )
        return self.placement.as_rows(x)

    def apply_frozen_stack(
        self, params: Params, x: Float[Array, "B T D"], context: Context, *, remat: str = "none"
    ) -> Float[Array, "B T D"]:
        """Runs a stack that is settled, without dropout; `remat` where gradient passes through."""
        around = self.placement.around_block(self.dtype)
        x = apply_stack(params, x, context, self.config.model, dtype=self.dtype, remat=remat, around=around)
        return self.placement.as_rows(x)


def make_program(config: RunConfig, tokenizer: Tokenizer, *, n_rows: int) -> Program:
    """The program of a run on a corpus of `n_rows` training rows."""
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.mask_id, tuple(tokenizer.special_ids))
    return Program(config, make_corrupt(config.objective, vocabulary, n_rows=n_rows))


def run_path(
    program: Program,
    signature: Signature,
    parts: Params,
    example: Example,
    activations: Float[Array, "B T D"] | None,
    key: Key | None,
) -> Float[Array, "B T E"]:
    """Runs the body of a path, from tokens or from the trunk's output, up to the output table."""
    model = program.config.model
    context = program.context(example)
    keys = [None] * (len(signature.body) + 1) if key is None else list(jax.random.split(key, len(signature.body) + 1))
    if activations is None:
        x = program.apply_embedding(parts["embedding"], example.inputs, example.positions, keys[0])
    else:
        x = activations
    live, frozen = iter(parts["stacks"]), iter(parts["frozen_stacks"])
    for (_, role), stack_key in zip(signature.body, keys[1:], strict=True):
        if role is Role.LIVE:
            x = program.apply_live_stack(next(live), x, context, stack_key)
        else:
            # Without remat the backward pass would keep every matrix of a quantised tail decoded.
            x = program.apply_frozen_stack(next(frozen), x, context, remat=program.config.training.remat)
    return apply_head_norm(parts["head"], x.astype(program.dtype), model)


def join_parts(live: Params, frozen: Params) -> Params:
    """Live and frozen parts as one tree for `run_path`."""
    return {"stacks": [], "frozen_stacks": [], **frozen, **live}


def path_loss(
    program: Program,
    signature: Signature,
    live: Params,
    frozen: Params,
    batch: Batch,
    activations: Float[Array, "B T D"] | None,
    key: Key | None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (summed loss in nats, summed weight) of a batch, in float32; `z_loss` as in `cross_entropy`."""
    parts = join_parts(live, frozen)
    example = program.corrupt(program.mask_key, batch)
    hidden = run_path(program, signature, parts, example, activations, key)
    table = output_table(parts["head"], parts.get("embedding", {}))
    return (
        head_loss(program, hidden, table, example, z_loss),
        jnp.sum(example.weights),
    )


def head_loss(
    program: Program, hidden: Float[Array, "B T D"], table: Float[Array, "V D"], example: Example, z_loss: float = 0.0
) -> Float[Array, ""]:
    """Summed cross-entropy, in chunks of tokens; on several devices each computes that of its own rows."""

    def summed(table: Array, hidden: Array, targets: Array, weights: Array) -> Float[Array, ""]:
        return cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            targets.reshape(-1),
            weights.reshape(-1),
            chunk_tokens=program.config.training.loss_chunk_tokens,
            z_loss=z_loss,
        )

    rows = (hidden, example.targets, example.weights)
    return program.placement.sum_over_rows(summed, table.astype(program.dtype), *rows)


def make_gradients(program: Program, signature: Signature) -> Callable[..., tuple[Params, Array, Array]]:
    """Returns (live, frozen, batch, activations, key[, scale]) -> (summed gradients, summed loss, summed weight).

    With a scale the gradients are those of the loss times it; the loss is not. `model.stability.z_loss` counts in both.
    """
    z_loss = program.config.model.stability.z_loss

    def loss(
        live: Params, frozen: Params, batch: Batch, activations: Array | None, key: Key | None, scale: Array | None
    ) -> tuple[Array, tuple[Array, Array]]:
        total, weight = path_loss(program, signature, live, frozen, batch, activations, key, z_loss)
        return total if scale is None else total * scale, (total, weight)

    grad = jax.value_and_grad(loss, has_aux=True)
    pieces, place = program.config.training.accumulation_steps, program.placement

    def gradients(
        live: Params,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        key: Key | None,
        scale: Array | None = None,
    ) -> tuple[Params, Array, Array]:
        if pieces == 1:
            (_, (total, weight)), grads = grad(live, frozen, batch, activations, key, scale)
            return place.as_weights(grads), total, weight

        def body(carry: Any, piece: Any) -> tuple[Any, None]:
            index, own_batch, own_activations = piece
            own_key = None if key is None else jax.random.fold_in(key, index)
            (_, (total, weight)), grads = grad(live, frozen, own_batch, own_activations, own_key, scale)
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

    The returned function takes (state, frozen, batch, activations, fraction, step): `activations` are the trunk's
    output or None where the path starts from tokens, `fraction` the schedule's, `step` the run's update count for
    dropout. Its metrics are scalars on the device: loss (nats per weighted token), gradient_norm, weight; with a scaled
    loss also those of `scaling_metrics`.
    """
    gradients = make_gradients(program, signature)
    config = program.config.optimizer
    transforms = optimizer.make_transforms(program.config, scales_head=signature.embedding is Role.FROZEN)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState,
        frozen: Params,
        batch: Batch,
        activations: Array | None,
        fraction: Float[AnyArray, ""],
        step: Int[AnyArray, ""],
    ) -> tuple[TrainState, dict[str, Array]]:
        scale = loss_scale(state.scaling)
        grads, total, weight = gradients(state.params, frozen, batch, activations, program.dropout_key(step), scale)
        weight = jnp.maximum(weight, 1.0)  # a batch that asks nothing has no gradient, not an undefined one
        divisor = weight if scale is None else weight * scale
        norm = optimizer.gradient_norm(grads) / divisor
        factor = optimizer.clip_scale(norm, config.clip_norm) / divisor
        grads = optimizer.scaled(grads, factor)
        params, states = optimizer.update_parts(transforms, grads, state.optimizer, state.params, fraction)
        metrics = {"loss": total / weight, "gradient_norm": norm, "weight": weight}
        if scale is not None:
            is_finite = jnp.isfinite(norm)
            params, states = keep_where(is_finite, (params, states), (state.params, state.optimizer))
            metrics |= scaling_metrics(scale, is_finite)
        state = TrainState(params, states, next_scaling(state.scaling, norm))
        return program.placement.as_weights(state), metrics

    return train_step


def make_evaluation(program: Program, signature: Signature) -> Callable[..., tuple[Array, Array]]:
    """Compiles (live, frozen, batch, activations) -> (summed loss, summed weight), without dropout."""

    @jax.jit
    def evaluate(live: Params, frozen: Params, batch: Batch, activations: Array | None) -> tuple[Array, Array]:
        return path_loss(program, signature, live, frozen, batch, activations, None)

    return evaluate
