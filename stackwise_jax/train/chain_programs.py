"""The compiled programs that the chained execution is a chain of: one of each kind for each distinct stack shape.

A run has one set of them, whatever its signatures: a tail that grows by a stack, or another phase of the same shapes,
compiles nothing anew. None of them waits for the device, so the host is always ahead of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import apply_head_norm, output_table
from stackwise_jax.train import optimizer
from stackwise_jax.train.phases import Role
from stackwise_jax.train.program import Program
from stackwise_jax.train.scaling import keep_where
from stackwise_jax.train.step import consistency, head_loss, judge
from stackwise_jax.types import AnyArray, Example, Key, Params


class ChainPrograms:
    """Programs that are compiled when they first meet a shape.

    Attributes:
      prepare: (task, batch) -> example.
      embed: (embedding, example, key) -> activations; `pull_embedding` takes their gradient besides.
      forward: (role, live, settled, activations, context, key) -> as `Program.apply_stack`.
      penalty: (activations, embedding, example, scale) -> gradient of `consistency` for the activations.
      head: (live, settled, activations, example, time, offset, scale) -> (loss, (gradients, that of the activations)).
      loss: (parts, activations, example, time) -> loss without z-loss, of an evaluation.
      widen: a tree in float32; add: of two trees, the first of which is used up; square: sum of squares of a tree.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.model = program, program.config.model
        make = functools.partial(optimizer.make_transforms, program.config)
        self._transforms = {scales_head: make(scales_head=scales_head) for scales_head in (False, True)}
        self.prepare = jax.jit(program.corrupt, static_argnums=0)
        self.embed = jax.jit(self._apply_embedding)
        self.pull_embedding = jax.jit(self._pull_embedding)
        self.forward = jax.jit(program.apply_stack, static_argnums=0)
        self._pull = jax.jit(self._pull_stack, static_argnums=0)
        self._pull_in_place = jax.jit(self._pull_stack, static_argnums=0, donate_argnums=6)
        self.penalty = jax.jit(jax.grad(self._apply_penalty))
        self.head = jax.jit(self._pull_head)
        self.loss = jax.jit(self._apply_head)
        self.widen = jax.jit(optimizer.widened)
        self.add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)
        self.square = jax.jit(lambda tree: optax.tree.norm(optimizer.widened(tree), squared=True))
        self.judge = jax.jit(self._judge)
        self.update = jax.jit(self._update, static_argnums=(0, 1), donate_argnums=(2, 3))

    def pull(
        self,
        role: Role,
        live: Params,
        settled: Params,
        x: Float[Array, "B T D"],
        context: Context,
        key: Key | None,
        gradient: Float[Array, "B T D"],
        asked: tuple[Float[Array, ""], Float[Array, ""] | None],
    ) -> tuple[Params, Float[Array, "B T D"]]:
        """Takes a gradient back through a stack, whose inside is computed anew.

        Args:
          x: what went into the stack.
          gradient: of what came out of it; its memory becomes that of the result where the dtypes are the same.
          asked: the batch's weight, and the scale of the loss: what a router's penalty counts.

        Returns:
          Gradients of what is trained of the stack (of nothing: nothing), and of `x`.
        """
        pull = self._pull_in_place if gradient.dtype == x.dtype else self._pull
        return pull(role, live, settled, x, context, key, gradient, asked)

    def _apply_embedding(self, params: Params, example: Example, key: Key | None) -> Float[Array, "B T D"]:
        return self.program.apply_embedding(params, example.inputs, example.positions, key)

    def _pull_embedding(
        self, params: Params, example: Example, key: Key | None, gradient: Float[Array, "B T D"]
    ) -> Params:
        grads = jax.vjp(lambda p: self._apply_embedding(p, example, key), params)[1](gradient)[0]
        return self.program.placement.as_weights(grads)

    def _apply_penalty(
        self, x: Float[Array, "B T D"], embedding: Params, example: Example, scale: Float[Array, ""] | None
    ) -> Float[Array, ""]:
        penalty = consistency(self.program, embedding, x, example)
        return penalty if scale is None else penalty * scale

    def _pull_stack(
        self,
        role: Role,
        live: Params,
        settled: Params,
        x: Float[Array, "B T D"],
        context: Context,
        key: Key | None,
        gradient: Float[Array, "B T D"],
        asked: tuple[Float[Array, ""], Float[Array, ""] | None],
    ) -> tuple[Params, Float[Array, "B T D"]]:
        place, apply = self.program.placement, self.program.apply_stack
        (_, penalty), pull = jax.vjp(lambda p, h: apply(role, p, settled, h, context, key), live, x)
        weight, scale = asked
        of_penalty = None if penalty is None else weight if scale is None else weight * scale
        grads, pulled = pull((gradient, of_penalty))
        return place.as_weights(grads), place.as_rows(pulled)

    def _pull_head(
        self,
        live: Params,
        settled: Params,
        x: Float[Array, "B T D"],
        example: Example,
        time: Float[Array, "B C"] | None,
        offset: Array | None,
        scale: Float[Array, ""] | None,
    ) -> tuple[Float[Array, ""], tuple[Params, Float[Array, "B T D"]]]:
        place, z_loss = self.program.placement, self.model.stability.z_loss

        def loss(live: Params, x: Array) -> tuple[Array, Array]:
            """(the loss that is differentiated, the loss)."""
            found = self._apply_head({**settled, **live}, x, example, time, offset, z_loss)
            return found if scale is None else found * scale, found

        (_, found), (grads, pulled) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(live, x)
        return found, (place.as_weights(grads), place.as_rows(pulled))

    def _apply_head(
        self,
        parts: Params,
        x: Float[Array, "B T D"],
        example: Example,
        time: Float[Array, "B C"] | None,
        offset: Array | None = None,
        z_loss: float = 0.0,
    ) -> Float[Array, ""]:
        hidden = apply_head_norm(parts["head"], x.astype(self.program.dtype), self.model, time)
        table = output_table(parts["head"], parts.get("embedding", {}))
        return head_loss(self.program, hidden, table, example, offset, z_loss)

    def _judge(
        self,
        squares: list[Float[Array, ""]],
        total: Float[Array, ""],
        weight: Float[Array, ""],
        scaling: Params,
        fractions: Float[AnyArray, "P"],
    ) -> tuple[Float[Array, ""], Bool[Array, ""] | None, list[Array], Params, dict[str, Array]]:
        """As `train.step.judge`, whose factor and answers are followed by the fractions of the learning rate, apart.

        Args:
          squares: sums of squares of the gradients of each part.
          fractions: of the learning rate, of each part.
        """
        norm = jnp.sqrt(sum(squares))
        factor, is_finite, scaling, metrics = judge(self.program, norm, total, weight, scaling)
        apart = [fractions[index] for index in range(len(squares))]
        return factor, is_finite, apart, scaling, metrics

    def _update(
        self,
        kind: str,
        scales_head: bool,
        params: Params,
        state: Any,
        grads: Params,
        factor: Float[Array, ""],
        fraction: Float[AnyArray, ""],
        is_finite: Bool[Array, ""] | None,
    ) -> tuple[Params, Any]:
        """(weights, optimiser state) of one part after its update; what they were is used up.

        Args:
          kind: of the part, one of `optimizer.Transforms`.
          scales_head: as in `optimizer.make_transforms`.
          factor: what the gradients are multiplied by; the others as `judge` returns them.
        """
        transform = self._transforms[scales_head][kind]
        updated = optimizer.update_part(transform, optimizer.scaled(grads, factor), state, params, fraction)
        if is_finite is not None:
            updated = keep_where(is_finite, updated, (params, state))
        return self.program.placement.as_weights(updated)
