"""What compiled functions close over: the run, its vocabulary, and how parts of the model are applied under it."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Float32, Int

from stackwise_jax.data.tokenizer import Tokenizer
from stackwise_jax.memory.placement import Placement, make_placement
from stackwise_jax.memory.precision import DTYPES
from stackwise_jax.models import weights
from stackwise_jax.models.adapters import attach
from stackwise_jax.models.block import Context
from stackwise_jax.models.rack import apply_embedding, row_context, time_vector
from stackwise_jax.models.stack import apply_penalised_stack, apply_stack, stack_size
from stackwise_jax.objectives.objective import Task, make_corrupt, tasks
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.phases import Role, stack_sizes
from stackwise_jax.types import AnyArray, Batch, Example, Key, Params, Vocabulary

# Streams of the run's key that steps draw from (models/rack.py uses 0 to 2).
MASK_STREAM, DROPOUT_STREAM, PLACE_STREAM = 3, 4, 5


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static that compiled functions close over; one per run.

    Attributes:
      config: the resolved run.
      vocabulary: the ids that objectives must know.
      n_rows: training rows.
    """

    config: RunConfig
    vocabulary: Vocabulary
    n_rows: int

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
    def loss_stride(self) -> int:
        """In training the loss is computed at one place in so many."""
        return round(1.0 / self.config.training.loss_fraction)

    def loss_offset(self, step: Int[AnyArray, ""]) -> Int[Array, ""] | None:
        """Which of `loss_stride` neighbouring places an update scores; None: all of them."""
        if self.loss_stride == 1:
            return None
        key = jax.random.fold_in(jax.random.fold_in(self.key, PLACE_STREAM), step)
        return jax.random.randint(key, (), 0, self.loss_stride)

    @property
    def task(self) -> Task:
        """What the run is asked; of several tasks the first."""
        return tasks(self.config.objective, self.config.model.attention)[0][0]

    @property
    def dtype(self) -> Any:
        """Arithmetic of the embedding, the trunk and the head."""
        return DTYPES[self.config.precision.compute]

    def corrupt(self, task: Task, batch: Batch) -> Example:
        """What a task asks of a batch."""
        return make_corrupt(self.config.objective, task, self.vocabulary, n_rows=self.n_rows)(self.mask_key, batch)

    def context(self, task: Task, example: Example, embedding: Params) -> Context:
        """What blocks need of rows; segments only where documents are kept apart.

        Args:
          embedding: with what turns masked fractions into a vector, where the model takes time as input.
        """
        model = self.config.model
        context = row_context(
            model,
            example.segments if self.config.data.isolate_documents else None,
            example.positions,
            kind=task.attention,
            prefix_lengths=example.prefix_lengths,
            block_length=self.config.objective.block_length if task.attention == "block_diffusion" else None,
            time=self._time(example, embedding),
        )
        return dataclasses.replace(context, cuts_rows=self.placement.mesh is None)

    def _time(self, example: Example, embedding: Params) -> Float[Array, "B C"] | None:
        if not self.config.model.time_input or example.rates is None:
            return None
        return time_vector(self.placement.as_whole(embedding), example.rates)

    @property
    def trunk_in_fp8(self) -> bool:
        """Matmuls of frozen stacks go on to fp8."""
        return self.config.precision.trunk_compute == "fp8"

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

    def apply_stack(
        self, role: Role, live: Params, settled: Params, x: Float[Array, "B T D"], context: Context, key: Key | None
    ) -> tuple[Float[Array, "B T D"], Float32[Array, ""] | None]:
        """Runs a stack of a path's body; returns activations, and what routers add to the loss a token.

        Routers that are settled ask nothing of what is before them: only live stacks add anything.

        Args:
          live: what of it is trained: the stack, its adapter, or nothing.
          settled: what is not: nothing, or the stack.
        """
        training = self.config.training
        if role is Role.LIVE:
            in_fp8 = training.progressive.new_stack_precision == "fp8"
            return self._run(live, x, context, self.live_dtype, key, in_fp8=in_fp8)
        if role is Role.ADAPTER:
            settled = attach(settled, live, training.adapters.alpha)
        # Without remat the backward pass would keep every matrix of a quantised tail decoded.
        return self._run(settled, x, context, self.dtype, None, in_fp8=self.trunk_in_fp8)[0], None

    def _run(
        self, params: Params, x: Array, context: Context, dtype: Any, key: Key | None, *, in_fp8: bool = False
    ) -> tuple[Float[Array, "B T D"], Float32[Array, ""] | None]:
        """Runs a stack that gradient passes through, laid out and kept as the config says."""
        training = self.config.training
        x, penalty = apply_penalised_stack(
            params,
            x,
            context,
            self.config.model,
            dtype=dtype,
            in_fp8=in_fp8,
            remat=training.remat,
            unroll=training.unroll_blocks,
            key=key,
            around=self.placement.around_block(dtype),
            known=weights.known_facts(self.config.model, self._first_blocks, stack_size(params)),
        )
        return self.placement.as_rows(x), penalty

    @property
    def _first_blocks(self) -> list[int]:
        """Numbers of the blocks that stacks of the rack begin with. One program serves all stacks of a shape."""
        sizes = stack_sizes(self.config)
        return [sum(sizes[:number]) for number in range(len(sizes))]

    def apply_trunk_stack(self, params: Params, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Runs a stack of the trunk, which no gradient reaches."""
        around = self.placement.around_block(self.dtype)
        in_fp8, model = self.trunk_in_fp8, self.config.model
        x = apply_stack(params, x, context, model, dtype=self.dtype, in_fp8=in_fp8, around=around)
        return self.placement.as_rows(x)


def make_program(config: RunConfig, tokenizer: Tokenizer, *, n_rows: int) -> Program:
    """The program of a run on a corpus of `n_rows` training rows."""
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.mask_id, tuple(tokenizer.special_ids))
    return Program(config, vocabulary, n_rows)
